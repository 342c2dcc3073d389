//! What could be reused at best: the longest head of a prompt that was sent or generated before.

/// All that was read and written, each prompt with its answer.
#[derive(Debug, Default)]
pub struct Known {
    /// Sorted, so that the sequence with the longest common head stands beside a prompt's own place.
    sequences: Vec<Vec<u32>>,
}

impl Known {
    pub fn add(&mut self, sequence: Vec<u32>) {
        let place = self.sequences.partition_point(|known| *known < sequence);
        self.sequences.insert(place, sequence);
    }

    /// Tokens that `prompt` begins with and that are known.
    pub fn shared(&self, prompt: &[u32]) -> usize {
        let place = self.sequences.partition_point(|known| known.as_slice() < prompt);
        let beside = self.sequences[place.saturating_sub(1)..].iter().take(2);
        beside.map(|known| common(known, prompt)).max().unwrap_or(0)
    }
}

fn common(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::bench::chance::Chance;

    #[test]
    fn the_longest_common_head_is_found_among_all() {
        let mut chance = Chance::new(5);
        let mut draw = || (0..1 + chance.below(8)).map(|_| chance.below(3) as u32).collect::<Vec<_>>();
        let (mut known, mut all) = (Known::default(), Vec::new());
        for _ in 0..300 {
            let prompt = draw();
            let expected = all.iter().map(|sequence: &Vec<u32>| common(sequence, &prompt)).max().unwrap_or(0);
            assert_eq!(known.shared(&prompt), expected, "{prompt:?} in {all:?}");
            known.add(prompt.clone());
            all.push(prompt);
        }
    }
}
