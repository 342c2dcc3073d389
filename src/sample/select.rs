//! The best of many, without sorting all of them.

use std::cmp::Ordering;

/// An id and what speaks for it: a weight or a logit.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Candidate {
    pub value: f32,
    pub id: u32,
}

/// Better first: the greater value; of equals, the lower id.
pub fn better(a: &Candidate, b: &Candidate) -> Ordering {
    b.value.total_cmp(&a.value).then(a.id.cmp(&b.id))
}

/// Leaves the best `count` of `values` in `out`, in no particular order; −∞ and 0 weights of `skip` are left out.
///
/// One pass with a floor that rises: nearly all values are looked at once and never stored. `out` grows to
/// `values.len()` at most.
pub fn top(values: &[f32], count: usize, skip: f32, out: &mut Vec<Candidate>) {
    /// Below this, shrinking more often would cost more than it saves.
    const BUFFER_MIN: usize = 128;
    out.clear();
    if count == 0 {
        return;
    }
    let full = count.saturating_mul(2).max(BUFFER_MIN);
    let mut floor = skip;
    for (id, &value) in values.iter().enumerate() {
        // An equal to the floor comes later and has a higher id than all that set the floor, so it loses.
        if value > floor {
            out.push(Candidate { value, id: id as u32 });
            if out.len() == full {
                out.select_nth_unstable_by(count - 1, better);
                out.truncate(count);
                floor = out[count - 1].value;
            }
        }
    }
    if out.len() > count {
        out.select_nth_unstable_by(count - 1, better);
        out.truncate(count);
    }
}

/// Keeps the fewest best candidates that together weigh at least `mass`; always at least one.
///
/// A binary search for the border that partitions as it goes: twice `candidates.len()` in all, not n log n.
pub fn nucleus(candidates: &mut Vec<Candidate>, mass: f64) {
    // The first `low` are kept and weigh `kept`, less than `mass`; those from `high` on are dropped.
    let (mut low, mut high) = (0, candidates.len());
    let mut kept = 0.0;
    while high - low > 1 {
        let half = (high - low) / 2;
        candidates[low..high].select_nth_unstable_by(half, better);
        let weight: f64 = candidates[low..low + half].iter().map(|c| f64::from(c.value)).sum();
        if kept + weight >= mass {
            high = low + half;
        } else {
            kept += weight;
            low += half;
        }
    }
    candidates.truncate(high);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sorted(mut candidates: Vec<Candidate>) -> Vec<Candidate> {
        candidates.sort_by(better);
        candidates
    }

    /// Few distinct values, so that ties are common.
    fn values() -> impl Strategy<Value = Vec<f32>> {
        proptest::collection::vec((0u8..40).prop_map(|v| f32::from(v) / 8.0), 1..600)
    }

    proptest! {
        #[test]
        fn top_is_the_head_of_the_sorted_list(values in values(), count in 0usize..700) {
            let all = values.iter().enumerate().map(|(id, &value)| Candidate { value, id: id as u32 });
            let mut expected = sorted(all.filter(|c| c.value > 0.0).collect());
            expected.truncate(count);
            let mut out = Vec::new();
            top(&values, count, 0.0, &mut out);
            prop_assert_eq!(sorted(out), expected);
        }

        #[test]
        fn nucleus_is_the_shortest_heavy_head(values in values(), share in 0.0f64..1.0) {
            let all = values.iter().enumerate().map(|(id, &value)| Candidate { value, id: id as u32 });
            let mut candidates: Vec<_> = all.collect();
            // Multiples of 1/8 add up exactly, in any order.
            let mass = share * candidates.iter().map(|c| f64::from(c.value)).sum::<f64>();
            let mut expected = sorted(candidates.clone());
            let mut weight = 0.0;
            let head = expected.iter().position(|c| { weight += f64::from(c.value); weight >= mass });
            expected.truncate(head.map_or(expected.len(), |head| head + 1));
            nucleus(&mut candidates, mass);
            prop_assert_eq!(sorted(candidates), expected);
        }
    }
}
