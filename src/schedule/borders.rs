//! Where to checkpoint a prompt: few places, but those where another prompt will part from it.

/// A prompt about to be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Prompt<'a> {
    /// Tokens that the cache already has the state of; a checkpoint stands there, unless it is 0.
    pub cached_len: u32,
    pub len: u32,
    /// Lengths at which a turn ends, ascending.
    pub borders: &'a [u32],
    /// No stretch without a checkpoint is longer, but for a rest below `gap_min`; 0: as long as it likes.
    pub stride: u32,
    /// A checkpoint that saves fewer tokens over the one before is not worth its bytes, unless a rule below says so.
    pub gap_min: u32,
    /// Others with the same prompt wait until it is read.
    pub group: bool,
}

/// Replaces what is in `positions` by the lengths to checkpoint at, ascending, in `cached_len + 1 ..= len - 1`:
///
/// - the last border (after the last user turn, where the next request of the conversation parts from this one) and
///   the first (after the system turn, which other conversations share);
/// - other borders at least `gap_min` behind the position before;
/// - multiples of `stride` between those, where they are further apart than that;
/// - `len - 1`, all that a copy of the prompt can use, if a group waits for it or the last position is further than
///   `gap_min` from the end.
pub fn checkpoint_positions(prompt: &Prompt<'_>, positions: &mut Vec<u32>) {
    positions.clear();
    let Prompt { cached_len, len, borders, gap_min, group, .. } = *prompt;
    let Some(end) = len.checked_sub(1).filter(|end| *end > cached_len) else { return };
    let inside = |border: u32| border > cached_len && border <= end;
    let first = borders.first().copied();
    let last = borders.iter().copied().rfind(|&border| border <= end);
    let mut before = cached_len;
    for &border in borders {
        let always = Some(border) == first || Some(border) == last;
        if inside(border) && border > before && (always || border - before >= gap_min) {
            prompt.put_strides(before, border, positions);
            positions.push(border);
            before = border;
        }
    }
    if group || len - before > gap_min {
        prompt.put_strides(before, end, positions);
        if positions.last() != Some(&end) {
            positions.push(end);
        }
    }
}

impl Prompt<'_> {
    /// Multiples of the stride between two positions, at least `gap_min` from both. Multiples, and not distances, so
    /// that another prompt with the same head puts them at the same place.
    fn put_strides(&self, before: u32, after: u32, positions: &mut Vec<u32>) {
        if self.stride == 0 || after - before <= self.stride {
            return;
        }
        let multiples = (before / self.stride + 1..=after / self.stride).map(|count| count * self.stride);
        let gap_min = self.gap_min.max(1);
        positions.extend(multiples.filter(|&at| at - before >= gap_min && after - at >= gap_min));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PROMPT: Prompt<'static> =
        Prompt { cached_len: 0, len: 1000, borders: &[], stride: 0, gap_min: 64, group: false };

    fn check(prompt: Prompt<'_>, expected: &[u32]) {
        let mut positions = vec![7];
        checkpoint_positions(&prompt, &mut positions);
        assert_eq!(positions, expected, "{prompt:?}");
    }

    #[test]
    fn a_prompt_without_borders_is_kept_up_to_its_last_token() {
        check(PROMPT, &[999]);
        check(Prompt { len: 65, ..PROMPT }, &[64]);
    }

    #[test]
    fn a_short_prompt_is_not_worth_a_checkpoint_unless_others_wait_for_it() {
        check(Prompt { len: 64, ..PROMPT }, &[]);
        check(Prompt { len: 64, group: true, ..PROMPT }, &[63]);
        check(Prompt { len: 1, group: true, ..PROMPT }, &[]);
        check(Prompt { len: 0, group: true, ..PROMPT }, &[]);
    }

    #[test]
    fn the_first_and_the_last_border_are_always_kept() {
        check(Prompt { borders: &[10, 40, 995], ..PROMPT }, &[10, 995]);
        check(Prompt { borders: &[10, 12], len: 20, ..PROMPT }, &[10, 12]);
        check(Prompt { borders: &[10], len: 20, ..PROMPT }, &[10]);
    }

    #[test]
    fn borders_between_are_kept_where_they_save_enough() {
        check(Prompt { borders: &[10, 73, 74, 137, 138, 990], ..PROMPT }, &[10, 74, 138, 990]);
    }

    #[test]
    fn what_is_cached_is_not_kept_again() {
        check(Prompt { cached_len: 500, borders: &[10, 500, 530, 980], ..PROMPT }, &[980]);
        check(Prompt { cached_len: 980, borders: &[10, 980], ..PROMPT }, &[]);
        check(Prompt { cached_len: 999, borders: &[10, 980], group: true, ..PROMPT }, &[]);
        check(Prompt { cached_len: 980, borders: &[10, 980], group: true, ..PROMPT }, &[999]);
    }

    #[test]
    fn a_long_rest_behind_the_last_border_is_kept() {
        check(Prompt { borders: &[10, 900], ..PROMPT }, &[10, 900, 999]);
        check(Prompt { borders: &[10, 936], ..PROMPT }, &[10, 936]);
        check(Prompt { borders: &[10, 935], ..PROMPT }, &[10, 935, 999]);
    }

    #[test]
    fn borders_at_the_end_and_behind_it_are_none() {
        check(Prompt { borders: &[10, 999], ..PROMPT }, &[10, 999]);
        check(Prompt { borders: &[10, 950, 1000], ..PROMPT }, &[10, 950]);
        check(Prompt { borders: &[1000, 2000], ..PROMPT }, &[999]);
    }

    #[test]
    fn long_stretches_are_kept_at_multiples_of_the_stride() {
        let strided = Prompt { stride: 300, ..PROMPT };
        check(strided, &[300, 600, 900, 999]);
        check(Prompt { borders: &[350, 650, 990], ..strided }, &[350, 650, 900, 990]);
        check(Prompt { borders: &[400, 650, 950], ..strided }, &[300, 400, 650, 950]);
        check(Prompt { cached_len: 250, ..strided }, &[600, 900, 999]);
        check(Prompt { borders: &[100, 990], ..strided }, &[100, 300, 600, 900, 990]);
        check(Prompt { borders: &[200, 500], len: 510, ..strided }, &[200, 500]);
    }
}
