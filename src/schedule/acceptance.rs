//! How far one sequence's drafts can be trusted, and when to try again after they could not.

/// Who proposes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Drafter {
    /// The model's own draft head; `intact` if it remembers the sequence from its beginning. Without it is another, and a
    /// worse one.
    Mtp { intact: bool },
    /// What stood in the sequence before; `matched` tokens agreed.
    Ngram { matched: usize },
}

/// Depths that are told apart; deeper drafts are taken to be like the last of them.
const DEPTHS: usize = 4;

/// What an observation keeps of its weight at the next one: some ten count for a sequence, which may turn from prose
/// to quotation in between; some hundred for the house.
const KEPT: f64 = 0.9;
const KEPT_BY_HOUSE: f64 = 0.99;

/// What they all keep when a probe contradicts them: they are old by then.
const KEPT_AT_PROBE: f64 = 0.25;

/// How many observations the prior weighs as, and how fast it becomes what is seen: where drafts are nearly free, a
/// prior that stays would keep useless ones alive.
const PRIOR_COUNT: f64 = 1.0;
const PRIOR_RATE: f64 = 0.02;

const PRIOR_MTP: f64 = 0.7;
const PRIOR_MTP_CUT: f64 = 0.4;

/// Matches of 3, 4 to 7, 8 to 15, and 16 tokens and more: the longer, the likelier it is a quotation.
const PRIORS_NGRAM: [f64; 4] = [0.3, 0.5, 0.7, 0.85];

/// Tokens without drafts before the first probe, and at most. Doubling between them, probes are at most five in the
/// first thousand tokens and one in a thousand later: below one in a hundred steps.
const PROBE_AFTER: u32 = 32;
const PROBE_AFTER_MAX: u32 = 1024;

/// What one sequence has seen of its drafters; or the *house*, which sees the verdicts of all sequences, so that a
/// short one need not find out by itself: `house.fresh()` is where it starts.
#[derive(Debug, Clone)]
pub struct Acceptance {
    mtp: Chain,
    /// Of a head that has forgotten the beginning.
    mtp_cut: Chain,
    /// By length of the match.
    ngram: [Chain; PRIORS_NGRAM.len()],
    probe_mtp: Probe,
    probe_ngram: Probe,
}

/// Chances by depth that a draft is accepted if all before it were.
#[derive(Debug, Clone, Copy)]
struct Chain {
    /// Of the first draft; a slow estimate below the fast one.
    prior: f64,
    /// The prior of each further draft is the estimate of the one before, times this.
    ratios: [f64; DEPTHS],
    kept: f64,
    rates: [Rate; DEPTHS],
}

/// Counts in which the past fades.
#[derive(Debug, Clone, Copy, Default)]
struct Rate {
    accepted: f64,
    tried: f64,
}

/// When to try a drafter again that did not pay.
#[derive(Debug, Clone, Copy)]
pub(super) struct Probe {
    wait: u32,
    left: u32,
}

/// What became of the drafts of one step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Verdict {
    pub drafter: Drafter,
    /// Drafts verified.
    pub proposed: usize,
    /// The first so many of them stay.
    pub accepted: usize,
    /// They were tried without hope of gain.
    pub probe: bool,
}

impl Acceptance {
    /// A house that has seen nothing yet.
    pub fn house() -> Self {
        let chain =
            |prior| Chain { prior, ratios: [1.0; DEPTHS], kept: KEPT_BY_HOUSE, rates: Default::default() };
        Self {
            mtp: chain(PRIOR_MTP),
            mtp_cut: chain(PRIOR_MTP_CUT),
            ngram: PRIORS_NGRAM.map(chain),
            probe_mtp: Probe::default(),
            probe_ngram: Probe::default(),
        }
    }

    /// A sequence that has seen nothing yet and expects what this house has seen.
    pub fn fresh(&self) -> Self {
        Self {
            mtp: self.mtp.fresh(),
            mtp_cut: self.mtp_cut.fresh(),
            ngram: self.ngram.each_ref().map(Chain::fresh),
            probe_mtp: Probe::default(),
            probe_ngram: Probe::default(),
        }
    }

    /// The chance that draft `depth` (0 is the first) is accepted if those before it are.
    pub fn chance(&self, drafter: Drafter, depth: usize) -> f64 {
        self.chain(drafter).chance(depth)
    }

    /// How many first drafts it has seen, the old ones faded.
    pub fn tried(&self, drafter: Drafter) -> f64 {
        self.chain(drafter).rates[0].tried
    }

    fn chain(&self, drafter: Drafter) -> &Chain {
        match drafter {
            Drafter::Mtp { intact: true } => &self.mtp,
            Drafter::Mtp { intact: false } => &self.mtp_cut,
            Drafter::Ngram { matched } => &self.ngram[bucket(matched)],
        }
    }

    /// Appends the chances that the first, the first two, … the first `depth` drafts are accepted: they descend.
    pub fn survival(&self, drafter: Drafter, depth: usize, chances: &mut Vec<f64>) {
        let mut all = 1.0;
        chances.extend((0..depth).map(|at| {
            all *= self.chance(drafter, at);
            all
        }));
    }

    /// Whether a drafter has not been tried for so long that it is worth a draft without hope.
    pub fn probe_is_due(&self, drafter: Drafter) -> bool {
        match drafter {
            Drafter::Mtp { .. } => self.probe_mtp.is_due(),
            Drafter::Ngram { .. } => self.probe_ngram.is_due(),
        }
    }

    /// Takes in one step: so many tokens more, and what became of its drafts if it had any.
    pub fn observe(&mut self, tokens: usize, verdict: Option<Verdict>) {
        self.probe_mtp.pass(tokens);
        self.probe_ngram.pass(tokens);
        let Some(verdict) = verdict.filter(|verdict| verdict.proposed > 0) else { return };
        let (chain, probe) = match verdict.drafter {
            Drafter::Mtp { intact: true } => (&mut self.mtp, &mut self.probe_mtp),
            Drafter::Mtp { intact: false } => (&mut self.mtp_cut, &mut self.probe_mtp),
            Drafter::Ngram { matched } => (&mut self.ngram[bucket(matched)], &mut self.probe_ngram),
        };
        if !verdict.probe {
            probe.relax();
        } else {
            probe.answer(verdict.accepted > 0);
            if verdict.accepted > 0 {
                chain.fade(KEPT_AT_PROBE);
            }
        }
        chain.observe(verdict.proposed, verdict.accepted);
    }
}

impl Chain {
    fn fresh(&self) -> Self {
        let ratios = std::array::from_fn(|depth| self.chance(depth) / self.chance(depth.saturating_sub(1)));
        Self { prior: self.chance(0), ratios, kept: KEPT, rates: Default::default() }
    }

    fn chance(&self, depth: usize) -> f64 {
        let seen = self.rates.iter().zip(self.ratios).take(depth + 1);
        seen.fold(self.prior, |before, (rate, ratio)| {
            let prior = (before * ratio).min(1.0);
            (rate.accepted + prior * PRIOR_COUNT) / (rate.tried + PRIOR_COUNT)
        })
    }

    /// Drafts behind the first one refused say nothing.
    fn observe(&mut self, proposed: usize, accepted: usize) {
        if proposed > 0 {
            self.prior += PRIOR_RATE * (f64::from(u8::from(accepted > 0)) - self.prior);
        }
        for depth in 0..proposed.min(accepted + 1) {
            let rate = &mut self.rates[depth.min(DEPTHS - 1)];
            rate.fade(self.kept);
            rate.tried += 1.0;
            rate.accepted += f64::from(u8::from(depth < accepted));
        }
    }

    fn fade(&mut self, kept: f64) {
        self.rates.iter_mut().for_each(|rate| rate.fade(kept));
    }
}

impl Rate {
    fn fade(&mut self, kept: f64) {
        self.accepted *= kept;
        self.tried *= kept;
    }
}

impl Default for Probe {
    fn default() -> Self {
        Self { wait: PROBE_AFTER, left: PROBE_AFTER }
    }
}

impl Probe {
    pub(super) fn is_due(&self) -> bool {
        self.left == 0
    }

    /// So many tokens went by.
    pub(super) fn pass(&mut self, tokens: usize) {
        self.left = self.left.saturating_sub(u32::try_from(tokens).unwrap_or(u32::MAX));
    }

    /// A probe that went well is followed by another at once, until drafts pay or one fails: so a drafter that has
    /// come back is found in one go, and one that has not costs little more than one draft.
    pub(super) fn answer(&mut self, well: bool) {
        if well {
            self.left = 0;
            return;
        }
        self.wait = (self.wait * 2).min(PROBE_AFTER_MAX);
        self.left = self.wait;
    }

    /// Drafts pay. Halved and not reset, so that a drafter on the edge is not probed as often as it falls.
    pub(super) fn relax(&mut self) {
        self.wait = (self.wait / 2).max(PROBE_AFTER);
        self.left = self.wait;
    }
}

fn bucket(matched: usize) -> usize {
    match matched {
        0..4 => 0,
        4..8 => 1,
        8..16 => 2,
        _ => 3,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MTP: Drafter = Drafter::Mtp { intact: true };
    const NGRAM: Drafter = Drafter::Ngram { matched: 5 };

    fn see(acceptance: &mut Acceptance, drafter: Drafter, proposed: usize, accepted: usize, steps: usize) {
        for _ in 0..steps {
            let verdict = Verdict { drafter, proposed, accepted, probe: false };
            acceptance.observe(accepted + 1, Some(verdict));
        }
    }

    #[test]
    fn chances_follow_what_was_accepted() {
        let mut acceptance = Acceptance::house().fresh();
        see(&mut acceptance, MTP, 2, 1, 50);
        assert!(acceptance.chance(MTP, 0) > 0.93);
        assert!(acceptance.chance(MTP, 1) < 0.17);
        see(&mut acceptance, MTP, 2, 0, 50);
        assert!(acceptance.chance(MTP, 0) < 0.13);
    }

    #[test]
    fn survival_is_the_chance_of_all_so_far() {
        let mut acceptance = Acceptance::house().fresh();
        see(&mut acceptance, NGRAM, 3, 2, 5);
        let mut chances = vec![9.0];
        acceptance.survival(NGRAM, 6, &mut chances);
        let expected = (0..6).scan(1.0, |all, depth| {
            *all *= acceptance.chance(NGRAM, depth);
            Some(*all)
        });
        assert_eq!(chances[1..], expected.collect::<Vec<_>>());
        assert!(chances[1..].is_sorted_by(|a, b| a >= b));
    }

    #[test]
    fn what_was_never_tried_is_as_good_as_the_draft_before() {
        let mut acceptance = Acceptance::house().fresh();
        see(&mut acceptance, MTP, 1, 0, 20);
        let chance = acceptance.chance(MTP, 0);
        assert_eq!(acceptance.chance(MTP, 1), chance);
        assert_eq!(acceptance.chance(MTP, 9), chance);
    }

    #[test]
    fn a_fresh_sequence_expects_what_the_house_has_seen() {
        let mut house = Acceptance::house();
        see(&mut house, MTP, 3, 1, 200);
        see(&mut house, NGRAM, 1, 0, 200);
        let fresh = house.fresh();
        for depth in 0..6 {
            let (here, there) = (fresh.chance(MTP, depth), house.chance(MTP, depth));
            assert!((here - there).abs() < 1e-9, "depth {depth}: {here} and {there}");
        }
        assert!(fresh.chance(NGRAM, 0) < 0.02);
    }

    #[test]
    fn a_sequence_that_is_better_than_the_house_is_found_by_one_probe() {
        let mut house = Acceptance::house();
        see(&mut house, MTP, 1, 0, 200);
        let mut fresh = house.fresh();
        let verdict = Verdict { drafter: MTP, proposed: 1, accepted: 1, probe: true };
        fresh.observe(2, Some(verdict));
        assert!(fresh.chance(MTP, 0) > 0.5);
    }

    #[test]
    fn matches_of_another_length_and_the_other_drafter_are_told_apart() {
        let mut acceptance = Acceptance::house().fresh();
        let fresh = Acceptance::house().fresh();
        see(&mut acceptance, NGRAM, 1, 0, 20);
        for drafter in [MTP, Drafter::Ngram { matched: 3 }, Drafter::Ngram { matched: 8 }] {
            assert_eq!(acceptance.chance(drafter, 0), fresh.chance(drafter, 0), "{drafter:?}");
        }
        assert!(acceptance.chance(Drafter::Ngram { matched: 4 }, 0) < 0.2);
    }

    /// Probes in so many tokens of a sequence that drafts only when a probe is due; every `n`th of them is accepted.
    fn probes(tokens: usize, n: usize) -> Vec<usize> {
        let mut acceptance = Acceptance::house().fresh();
        let mut at = Vec::new();
        for token in 0..tokens {
            let due = acceptance.probe_is_due(MTP);
            if due {
                at.push(token);
            }
            let accepted = usize::from(at.len().is_multiple_of(n));
            let verdict = Verdict { drafter: MTP, proposed: 1, accepted, probe: true };
            acceptance.observe(1, Some(verdict).filter(|_| due));
        }
        at
    }

    #[test]
    fn probes_are_ever_further_apart() {
        assert_eq!(probes(500, usize::MAX), [32, 97, 226, 483]);
        assert!(probes(100_000, usize::MAX).len() <= 102);
        assert!(probes(100_000, 3).len() <= 160);
    }

    #[test]
    fn a_probe_that_goes_well_is_followed_by_another_at_once() {
        assert_eq!(probes(36, 1), [32, 33, 34, 35]);
    }

    #[test]
    fn a_few_good_probes_in_a_row_restore_trust() {
        let mut acceptance = Acceptance::house().fresh();
        see(&mut acceptance, MTP, 1, 0, 100);
        for _ in 0..3 {
            let verdict = Verdict { drafter: MTP, proposed: 1, accepted: 1, probe: true };
            acceptance.observe(2, Some(verdict));
        }
        assert!(acceptance.chance(MTP, 0) > 0.5);
    }
}
