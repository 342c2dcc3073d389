//! What a step costs: its time as a function of the tokens in it, learnt from the steps that ran.

use std::ops::RangeInclusive;

/// Sizes at which the time is known; between them it is interpolated. 1, 2, 3, 4, 6, 8, 12, 16 …: powers of two and
/// their halves in between, as kernels change their tiles there.
const SIZES: [u32; 26] = [
    1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096,
    6144, 8192,
];

/// The weight of one observation once there are many: they are forgotten after some twenty.
const RATE: f64 = 0.05;

/// The weight of one observation for the sizes it says nothing about by itself: contexts grow and clocks change
/// for all of them, and a size that nobody runs would keep its old time for ever.
const DRIFT: f64 = 0.025;

/// What a size's observations keep with every step, whatever its size: those that were not seen for a while learn
/// fast when they are. One always stays, or the size would be forgotten.
const KEPT: f64 = 0.99;

/// One observation counts as no more than so many times what was expected, and no less than its inverse: a page
/// fault or a busy neighbour says nothing about the next step.
const OUTLIER: f64 = 2.0;

/// Microseconds of a step, or of a pass of the drafter, by its tokens. Never falls as the tokens grow.
#[derive(Debug, Clone, Default)]
pub struct StepCosts {
    means: [f64; SIZES.len()],
    /// Observations of each size, up to where they are forgotten.
    counts: [f64; SIZES.len()],
}

/// A straight piece of the curve: it passes through the point `from` (tokens, microseconds).
struct Line {
    from: (f64, f64),
    slope: f64,
    /// The most tokens it holds for.
    end: usize,
}

impl Line {
    fn us(&self, tokens: usize) -> f64 {
        self.from.1 + self.slope * (tokens as f64 - self.from.0)
    }
}

impl StepCosts {
    /// Takes in a measured step. Steps of one kind only: a chunk of a prompt costs something else.
    pub fn learn(&mut self, tokens: usize, us: f64) {
        if tokens == 0 || us.is_nan() || us <= 0.0 {
            return;
        }
        let above = SIZES.partition_point(|&size| (size as usize) < tokens).min(SIZES.len() - 1);
        let below = if SIZES[above] as usize <= tokens { above } else { above - 1 };
        let (low, high) = (f64::from(SIZES[below]), f64::from(SIZES[above]));
        let share = if above == below { 1.0 } else { (tokens as f64 - low) / (high - low) };
        let nearest = if share >= 0.5 { above } else { below };
        let size = SIZES[nearest] as usize;
        let Some((expected, at_size)) = self.predict(tokens).zip(self.predict(size)) else {
            // The first of all: time is taken to grow with the tokens.
            return self.begin(nearest, us * size as f64 / tokens as f64);
        };
        if self.counts[nearest] == 0.0 {
            return self.begin(nearest, at_size * us / expected);
        }
        let change = (us / expected).clamp(1.0 / OUTLIER, OUTLIER) - 1.0;
        for size in 0..SIZES.len() {
            let near = match size {
                size if size == above => share,
                size if size == below => 1.0 - share,
                _ => 0.0,
            };
            let rate = (near * RATE.max(1.0 / (self.counts[size] + 1.0))).max(DRIFT);
            self.means[size] *= 1.0 + rate * change;
            if self.counts[size] > 0.0 {
                self.counts[size] = (self.counts[size] * KEPT + near).clamp(1.0, 1.0 / RATE);
            }
        }
        self.settle(nearest);
    }

    /// Microseconds of a step of so many tokens; `None` before anything was learnt.
    ///
    /// Below the smallest size that is known it is as slow as that one; above the largest it goes on with the last
    /// slope. If only one is known, time is taken to grow with the tokens: so nothing looks cheap before it was tried.
    pub fn predict(&self, tokens: usize) -> Option<f64> {
        self.line(tokens).map(|line| line.us(tokens))
    }

    /// Appends the times of steps of each of so many tokens; nothing before anything was learnt.
    pub fn predict_each(&self, tokens: RangeInclusive<usize>, us: &mut Vec<f64>) {
        let (mut next, last) = tokens.into_inner();
        while next <= last {
            let Some(line) = self.line(next) else { return };
            let end = line.end.min(last);
            us.extend((next..=end).map(|tokens| line.us(tokens)));
            next = end + 1;
        }
    }

    /// The piece that so many tokens lie on.
    fn line(&self, tokens: usize) -> Option<Line> {
        let mut known = (0..SIZES.len()).filter(|&size| self.counts[size] > 0.0);
        let point = |size: usize| (f64::from(SIZES[size]), self.means[size]);
        let mut before = (0.0, 0.0);
        let mut after = point(known.next()?);
        if tokens as f64 <= after.0 {
            return Some(Line { from: after, slope: 0.0, end: after.0 as usize });
        }
        let mut end = usize::MAX;
        for size in known {
            (before, after) = (after, point(size));
            if tokens as f64 <= after.0 {
                end = SIZES[size] as usize;
                break;
            }
        }
        Some(Line { from: after, slope: (after.1 - before.1) / (after.0 - before.0), end })
    }

    /// A size that was not seen before.
    fn begin(&mut self, size: usize, us: f64) {
        self.means[size] = us;
        self.counts[size] = 1.0;
        self.settle(size);
    }

    /// The size seen last is right; the others give way until times ascend again.
    fn settle(&mut self, size: usize) {
        let mean = self.means[size];
        self.means[..size].iter_mut().for_each(|smaller| *smaller = smaller.min(mean));
        self.means[size..].iter_mut().for_each(|larger| *larger = larger.max(mean));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn costs(seen: &[(usize, f64)]) -> StepCosts {
        let mut costs = StepCosts::default();
        seen.iter().for_each(|&(tokens, us)| costs.learn(tokens, us));
        costs
    }

    fn check(costs: &StepCosts, tokens: usize, us: f64) {
        let predicted = costs.predict(tokens).unwrap();
        assert!((predicted / us - 1.0).abs() < 0.01, "{tokens} tokens: expected {us} us, got {predicted}");
    }

    #[test]
    fn nothing_is_known_before_a_step_ran() {
        assert_eq!(StepCosts::default().predict(1), None);
        assert_eq!(costs(&[(0, 5.0), (3, 0.0), (3, f64::NAN)]).predict(1), None);
    }

    #[test]
    fn one_size_alone_looks_proportional() {
        let costs = costs(&[(2, 100.0)]);
        check(&costs, 1, 100.0);
        check(&costs, 2, 100.0);
        check(&costs, 6, 300.0);
    }

    #[test]
    fn between_known_sizes_time_is_interpolated_and_beyond_them_it_goes_on() {
        let costs = costs(&[(1, 100.0), (4, 130.0), (8, 210.0)]);
        check(&costs, 2, 110.0);
        check(&costs, 6, 170.0);
        check(&costs, 10, 250.0);
        check(&costs, 100_000, 210.0 + 20.0 * 99_992.0);
    }

    #[test]
    fn a_range_is_predicted_as_each_of_it() {
        let costs = costs(&[(2, 100.0), (4, 130.0), (12, 210.0), (16, 400.0)]);
        let mut us = vec![1.0];
        costs.predict_each(1..=40, &mut us);
        let each = (1..=40).map(|tokens| costs.predict(tokens).unwrap());
        assert_eq!(us[1..], each.collect::<Vec<_>>());
        us.clear();
        StepCosts::default().predict_each(1..=40, &mut us);
        assert!(us.is_empty());
    }

    #[test]
    fn time_never_falls_with_more_tokens() {
        let costs = costs(&[(1, 100.0), (2, 90.0), (8, 80.0), (4, 120.0)]);
        for tokens in 1..100 {
            assert!(costs.predict(tokens) <= costs.predict(tokens + 1), "{tokens} tokens");
        }
    }

    #[test]
    fn a_change_is_learnt_and_a_stall_is_not() {
        let mut costs = costs(&[(1, 100.0), (2, 110.0), (4, 130.0)]);
        (0..50).for_each(|_| costs.learn(1, 100.0));
        costs.learn(1, 50_000.0);
        assert!(costs.predict(1).unwrap() < 106.0);
        (0..100).for_each(|_| costs.learn(1, 200.0));
        check(&costs, 1, 200.0);
    }

    #[test]
    fn sizes_that_nobody_runs_drift_along() {
        let mut costs = costs(&[(1, 100.0), (2, 150.0)]);
        (0..50).for_each(|_| [(1, 100.0), (2, 150.0)].iter().for_each(|&(n, us)| costs.learn(n, us)));
        (0..300).for_each(|_| costs.learn(2, 300.0));
        let (one, two) = (costs.predict(1).unwrap(), costs.predict(2).unwrap());
        check(&costs, 2, 300.0);
        assert!(one > 130.0 && one < two, "{one} and {two} us");
    }

    #[test]
    fn sizes_between_teach_both_neighbours() {
        let mut costs = costs(&[(4, 100.0), (6, 120.0)]);
        (0..200).for_each(|_| costs.learn(5, 165.0));
        check(&costs, 5, 165.0);
        assert!(costs.predict(4).unwrap() > 130.0 && costs.predict(6).unwrap() > 150.0);
    }
}
