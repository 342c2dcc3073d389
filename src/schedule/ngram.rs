//! The n-gram drafter of one sequence: what followed the last time the same few tokens stood there, follows again.
//!
//! ```text
//! let mut ngram = Ngram::new(len_max);
//! ngram.extend(&tokens);                                  // after each chunk and each step; tokens only ever grow
//! let matched = ngram.propose(&tokens, depth, &mut drafts);
//! ```

/// Tokens that must agree before anything is proposed. Two agree by chance too often, four miss short calls.
pub const GRAM_LEN: usize = 3;

/// How far back a match is measured; longer ones are all as good.
pub const MATCH_MAX: usize = 32;

/// An index over the tokens of one sequence: where each run of [`GRAM_LEN`] tokens ended last.
/// Allocates nothing after [`Ngram::new`].
#[derive(Debug, Clone)]
pub struct Ngram {
    /// Open addressing: the position behind a gram, 0 if empty. At most half full. Which gram it is, the tokens say.
    table: Vec<u32>,
    /// Grams that end here or before are in the table.
    end: usize,
    len_max: usize,
}

impl Ngram {
    /// For a sequence of at most `len_max` tokens: 8 to 16 bytes each. Tokens beyond are proposed for, but not found.
    pub fn new(len_max: usize) -> Self {
        let len_max = len_max.min(u32::MAX as usize);
        Self { table: vec![0; (2 * len_max).next_power_of_two()], end: GRAM_LEN - 1, len_max }
    }

    /// Takes in the tokens behind those of the last call; `tokens` are all of them. The last gram stays out until
    /// something follows it: it would be found as its own latest occurrence.
    pub fn extend(&mut self, tokens: &[u32]) {
        let last = tokens.len().saturating_sub(1).min(self.len_max);
        for end in self.end + 1..=last {
            let place = self.place(tokens, gram(tokens, end));
            self.table[place] = end as u32;
        }
        self.end = self.end.max(last);
    }

    /// Replaces what is in `drafts` by the `depth` tokens that followed the latest earlier occurrence of the last
    /// [`GRAM_LEN`] tokens; where they run into the end, they go on with themselves, as a loop would. Returns how
    /// many tokens before the end agree, at most [`MATCH_MAX`]; 0, and no drafts, if the gram is new.
    pub fn propose(&self, tokens: &[u32], depth: usize, drafts: &mut Vec<u32>) -> usize {
        drafts.clear();
        let len = tokens.len();
        if len <= GRAM_LEN {
            return 0;
        }
        let end = self.table[self.place(tokens, gram(tokens, len))] as usize;
        if end == 0 {
            return 0;
        }
        for at in end..end + depth {
            let token = if at < len { tokens[at] } else { drafts[at - len] };
            drafts.push(token);
        }
        let further = tokens[..end - GRAM_LEN].iter().rev().zip(tokens[..len - GRAM_LEN].iter().rev());
        let agree = further.take(MATCH_MAX - GRAM_LEN).take_while(|(before, now)| before == now);
        GRAM_LEN + agree.count()
    }

    /// Where a gram stands in the table, or the empty place where it would.
    fn place(&self, tokens: &[u32], sought: &[u32]) -> usize {
        let mask = self.table.len() - 1;
        let mut place = hash(sought) & mask;
        loop {
            let end = self.table[place] as usize;
            if end == 0 || gram(tokens, end) == sought {
                return place;
            }
            place = (place + 1) & mask;
        }
    }
}

/// The gram before position `end`.
fn gram(tokens: &[u32], end: usize) -> &[u32] {
    &tokens[end - GRAM_LEN..end]
}

fn hash(gram: &[u32]) -> usize {
    let mixed = gram.iter().fold(0u64, |hash, &token| {
        (hash.rotate_left(21) ^ u64::from(token)).wrapping_mul(0xD6E8_FEB8_6659_FD93)
    });
    (mixed >> 24) as usize
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Proposes after the whole of `tokens` was read at once.
    fn check(tokens: &[u32], depth: usize, matched: usize, expected: &[u32]) {
        let mut ngram = Ngram::new(tokens.len());
        ngram.extend(tokens);
        let mut drafts = vec![7; 3];
        assert_eq!((ngram.propose(tokens, depth, &mut drafts), &drafts[..]), (matched, expected));
    }

    #[test]
    fn what_followed_follows_again() {
        check(&[1, 2, 3, 4, 5, 6, 1, 2, 3], 3, 3, &[4, 5, 6]);
        check(&[8, 9, 1, 2, 3, 4, 5, 6, 7, 9, 1, 2, 3], 2, 4, &[4, 5]);
    }

    #[test]
    fn the_latest_occurrence_counts() {
        check(&[1, 2, 3, 4, 1, 2, 3, 5, 1, 2, 3], 1, 3, &[5]);
    }

    #[test]
    fn a_new_gram_proposes_nothing() {
        check(&[1, 2, 3, 4, 5, 2, 3], 4, 0, &[]);
        check(&[1, 2, 3], 4, 0, &[]);
        check(&[], 4, 0, &[]);
    }

    #[test]
    fn a_loop_goes_on() {
        check(&[9, 1, 2, 3, 1, 2, 3], 8, 3, &[1, 2, 3, 1, 2, 3, 1, 2]);
        check(&[5, 5, 5, 5], 3, 3, &[5, 5, 5]);
    }

    #[test]
    fn a_match_is_measured_up_to_a_bound() {
        let once: Vec<u32> = (0..40).collect();
        check(&[once.clone(), once].concat(), 2, MATCH_MAX, &[0, 1]);
    }

    #[test]
    fn tokens_beyond_the_length_are_proposed_for_and_not_found() {
        let tokens = [1, 2, 3, 4, 7, 8, 9, 6, 1, 2, 3];
        let mut ngram = Ngram::new(4);
        ngram.extend(&tokens);
        let mut drafts = Vec::new();
        assert_eq!(ngram.propose(&tokens, 1, &mut drafts), 3);
        assert_eq!(drafts, [4]);
        assert_eq!(ngram.propose(&[&tokens[..], &[7, 8, 9]].concat(), 1, &mut drafts), 0);
    }

    /// By looking at every earlier end.
    fn naive(tokens: &[u32], depth: usize) -> (usize, Vec<u32>) {
        let len = tokens.len();
        let matched =
            |end: usize| (0..end).take_while(|&i| tokens[end - 1 - i] == tokens[len - 1 - i]).count();
        let Some(end) = (1..len).rev().find(|&end| matched(end) >= GRAM_LEN) else { return (0, Vec::new()) };
        let mut all = tokens.to_vec();
        for at in end..end + depth {
            all.push(all[at]);
        }
        (matched(end).min(MATCH_MAX), all[len..].to_vec())
    }

    proptest! {
        #[test]
        fn as_found_by_looking_at_every_place(
            tokens in prop::collection::vec(0u32..4, 0..120),
            chunks in prop::collection::vec(1usize..9, 120),
            depth in 0usize..9,
        ) {
            let mut ngram = Ngram::new(tokens.len());
            let mut drafts = Vec::new();
            let mut end = 0;
            for chunk in chunks {
                end = (end + chunk).min(tokens.len());
                ngram.extend(&tokens[..end]);
                let matched = ngram.propose(&tokens[..end], depth, &mut drafts);
                prop_assert_eq!((matched, drafts.clone()), naive(&tokens[..end], depth));
            }
        }
    }
}
