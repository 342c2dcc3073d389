//! How many drafts each sequence gets in a step: as many as make tokens come faster, and none if none do.
//!
//! ```text
//! for each decoding sequence: acceptance.survival(drafter, depth_max, &mut chances); candidates.push(…);
//! chooser.choose(&candidates, &chances, room, &speed, &mut choices);   // before the passes of the drafter
//! …                                                                    // draft, step, verify
//! acceptance.observe(tokens, verdict);                                 // for each sequence, drafts or not
//! speed.steps.learn(step_tokens, us); speed.passes.learn(entries, us);
//! ```
//!
//! A step of `n` sequences yields `n` tokens and each draft with its chance. Drafts are taken likeliest first, and the
//! set is cut where tokens per microsecond are highest: likelier drafts never cost more tokens than unlikelier ones, so
//! only passes of the drafter need a choice of their own, and for them every depth is tried.

use super::acceptance::Probe;
use super::costs::StepCosts;

/// Drafts begin only if they promise so much more than none …
const GAIN_TO_BEGIN: f64 = 1.08;

/// … and go on while they promise so much more: estimates waver, and each change costs a graph and a pass.
const GAIN_TO_STAY: f64 = 1.04;

/// Each pass deeper must promise so much more, and each draft more of every sequence so much: what was learnt of deep
/// sets is old, and where the curve is flat fewer are as good.
const GAIN_BY_PASS: f64 = 1.02;
const GAIN_BY_DRAFT: f64 = 0.01;

/// While drafts go on, one step in so many has none, to learn what none cost: a machine that was slow when that was
/// last measured would keep useless drafts alive.
const PLAIN_EVERY: u32 = 96;

/// A pass whose time is not known is never worth it. Finite, for differences are taken of it.
const UNKNOWN_US: f64 = 1e18;

/// Of so many sequences at most one is probed in a step.
const SEQUENCES_PER_PROBE: usize = 16;

/// Measured times.
#[derive(Debug, Clone, Default)]
pub struct Speed {
    /// A decode step by its tokens.
    pub steps: StepCosts,
    /// A pass of the drafter by its entries.
    pub passes: StepCosts,
}

/// A decoding sequence, whether it can draft or not.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Candidate {
    /// Its chances stand at `chances[first .. first + count]`, by depth, descending; `count` is all that may be drafted.
    pub first: usize,
    pub count: usize,
    /// Entries of the drafter's first pass if it drafts: the tokens since its last one. 0 if drafts come without a pass.
    pub entries: usize,
    /// Its drafter is due for a probe.
    pub probe: bool,
}

/// What a candidate got.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Choice {
    pub drafts: usize,
    /// To learn, not to gain.
    pub probe: bool,
}

/// Chooses from step to step. Allocates nothing after [`Chooser::new`].
#[derive(Debug)]
pub struct Chooser {
    /// Drafts were chosen in the last step.
    drafting: bool,
    /// Steps with drafts since one without.
    since_plain: u32,
    /// Drafts pay, and this step has none to learn what that costs.
    plain: bool,
    /// When to try more drafts than the measured costs allow: costs can only be learnt by paying.
    probe: Probe,
    /// All drafts, likeliest first.
    drafts: Vec<Draft>,
    /// Microseconds of a step with so many drafts, 0 drafts first.
    step_us: Vec<f64>,
    /// Microseconds of a pass of so many entries, 0 entries first.
    pass_us: Vec<f64>,
    /// Sequences that go so deep, in the set being tried.
    deep: Vec<usize>,
}

#[derive(Debug, Clone, Copy)]
struct Draft {
    /// Ascends as the chance falls, then by depth and candidate: one number, for sorting is most of the work.
    order: u64,
    chance: f64,
    candidate: u32,
    /// 1 is the first.
    depth: u32,
    /// As the candidate's.
    entries: u32,
}

/// A set of drafts: of the likeliest `taken`, those that no pass deeper than `depth` is needed for.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Set {
    depth: u32,
    taken: usize,
    /// Tokens per microsecond.
    rate: f64,
}

impl Chooser {
    /// For steps of at most `candidates_max` sequences, `depth_max` drafts each, and `entries_max` entries of a pass.
    pub fn new(candidates_max: usize, depth_max: usize, entries_max: usize) -> Self {
        let drafts_max = candidates_max * depth_max;
        Self {
            drafting: false,
            since_plain: 0,
            plain: false,
            probe: Probe::default(),
            drafts: Vec::with_capacity(drafts_max),
            step_us: Vec::with_capacity(drafts_max + 1),
            pass_us: Vec::with_capacity(entries_max.max(candidates_max) + 1),
            deep: Vec::with_capacity(depth_max + 1),
        }
    }

    /// Replaces what is in `choices` by one per candidate, at most `room` drafts together.
    ///
    /// Either the drafts promise more than none, or there are none but a few probes: of drafters that are due and
    /// would pay if all they drafted were accepted, and now and then of one that would not, to learn what it costs.
    /// For the same reason there are, now and then, twice as many as seems best.
    pub fn choose(
        &mut self,
        candidates: &[Candidate],
        chances: &[f64],
        room: usize,
        speed: &Speed,
        choices: &mut Vec<Choice>,
    ) {
        choices.clear();
        choices.resize(candidates.len(), Choice::default());
        self.plain = false;
        if candidates.iter().all(|candidate| candidate.count == 0) || room == 0 {
            return;
        }
        let known = self.gather(candidates, chances, room, speed);
        let none = self.rate(candidates.len(), 0, 0.0, 0.0);
        let nothing = Set { depth: 0, taken: 0, rate: 0.0 };
        let mut best = if known { self.best_set(candidates.len(), room) } else { nothing };
        let gain = if self.drafting { GAIN_TO_STAY } else { GAIN_TO_BEGIN };
        let drafted = self.drafting;
        self.drafting = best.taken > 0 && best.rate > none * gain;
        if self.drafting {
            if !drafted {
                self.probe.relax();
                self.since_plain = 0;
            }
            self.since_plain += 1;
            if self.since_plain > PLAIN_EVERY {
                self.since_plain = 0;
                self.plain = true;
                return;
            }
            self.probe.pass(1);
            if self.probe.is_due() {
                best = Set { depth: best.depth + 1, taken: 2 * best.taken, ..best };
                self.probe.answer(false);
            }
            self.put_drafts(best, room, choices);
        }
        let taken: usize = choices.iter().map(|choice| choice.drafts).sum();
        self.put_probes(
            candidates,
            (room - taken).min(candidates.len().div_ceil(SEQUENCES_PER_PROBE)),
            known,
            choices,
        );
    }

    /// Whether the last choice was none although drafts pay: drafters should not forget meanwhile.
    pub fn is_plain(&self) -> bool {
        self.plain
    }

    /// Gives out the drafts of a set, at most `room`.
    fn put_drafts(&self, set: Set, room: usize, choices: &mut [Choice]) {
        let taken = self.drafts.iter().take(set.taken).filter(|draft| draft.needs_at_most(set.depth));
        for draft in taken.take(room) {
            choices[draft.candidate as usize].drafts = draft.depth as usize;
        }
    }

    /// Fills the lists for one choice; false if the time of a step is not known yet.
    fn gather(&mut self, candidates: &[Candidate], chances: &[f64], room: usize, speed: &Speed) -> bool {
        self.drafts.clear();
        self.step_us.clear();
        self.pass_us.clear();
        for (index, candidate) in candidates.iter().enumerate() {
            let own = &chances[candidate.first..candidate.first + candidate.count];
            debug_assert!(own.is_sorted_by(|a, b| a >= b), "chances that ascend: {own:?}");
            self.drafts.extend((1..).zip(own).map(|(depth, &chance)| Draft {
                order: order(chance, depth, index as u32),
                chance,
                candidate: index as u32,
                depth,
                entries: candidate.entries as u32,
            }));
        }
        self.drafts.sort_unstable_by_key(|draft| draft.order);
        let most = candidates.len() + self.drafts.len().min(room);
        speed.steps.predict_each(candidates.len()..=most, &mut self.step_us);
        // Entries of the first pass, or sequences in a later one.
        let entries: usize = candidates.iter().map(|candidate| candidate.entries).sum();
        let entries_max = entries.max(candidates.len());
        self.pass_us.push(0.0);
        speed.passes.predict_each(1..=entries_max, &mut self.pass_us);
        self.pass_us.resize(entries_max + 1, UNKNOWN_US);
        !self.step_us.is_empty()
    }

    /// Tokens per microsecond of `sequences` with so many drafts.
    fn rate(&self, sequences: usize, drafts: usize, gain: f64, pass_us: f64) -> f64 {
        let us = self.step_us.get(drafts).map_or(f64::INFINITY, |step_us| step_us + pass_us);
        (sequences as f64 + gain) / us
    }

    /// The best of all sets: every depth of passes with every cut of the list.
    fn best_set(&mut self, sequences: usize, room: usize) -> Set {
        let deepest = self.drafts.iter().filter(|draft| draft.entries > 0).map(|draft| draft.depth).max();
        let mut best = Set { depth: 0, taken: 0, rate: 0.0 };
        for depth in 0..=deepest.unwrap_or(0) {
            let set = self.best_cut(sequences, room, depth);
            if set.rate > best.rate * GAIN_BY_PASS.powi((depth - best.depth) as i32) {
                best = set;
            }
        }
        best
    }

    fn best_cut(&mut self, sequences: usize, room: usize, depth: u32) -> Set {
        self.deep.clear();
        self.deep.resize(depth as usize + 1, 0);
        let mut best = Set { depth, taken: 0, rate: self.rate(sequences, 0, 0.0, 0.0) };
        let (mut count, mut gain, mut pass_us, mut counted) = (0, 0.0, 0.0, 0);
        for (index, draft) in self.drafts.iter().enumerate() {
            if !draft.needs_at_most(depth) {
                continue;
            }
            if count == room {
                break;
            }
            count += 1;
            gain += draft.chance;
            if draft.entries > 0 {
                let in_pass = &mut self.deep[draft.depth as usize];
                let before = *in_pass;
                *in_pass += if draft.depth == 1 { draft.entries as usize } else { 1 };
                pass_us += self.pass_us[*in_pass] - self.pass_us[before];
            }
            let rate = self.rate(sequences, count, gain, pass_us);
            let more = (count - counted) as f64 / sequences as f64;
            if rate > best.rate * (1.0 + GAIN_BY_DRAFT * more) {
                best = Set { depth, taken: index + 1, rate };
                counted = count;
            }
        }
        best
    }

    /// Gives one draft each to candidates that are due and got none, while `count` lasts; where costs alone forbid
    /// drafts, to one of them now and then.
    fn put_probes(&mut self, candidates: &[Candidate], count: usize, known: bool, choices: &mut [Choice]) {
        let none = self.rate(candidates.len(), 0, 0.0, 0.0);
        let can_draft = |candidate: &&Candidate| candidate.count > 0;
        let least = candidates.iter().filter(can_draft).map(|candidate| candidate.entries).min();
        // Even a draft that is always accepted may cost more than it brings.
        let certain = self.rate(candidates.len(), 1, 1.0, self.pass_us[least.unwrap_or(0)]);
        let could_pay = known && certain > none * GAIN_TO_BEGIN;
        let forbidden = !self.drafting && !could_pay;
        if forbidden {
            self.probe.pass(1);
        }
        let for_cost = forbidden && self.probe.is_due() && count > 0;
        let left = if could_pay { count } else { usize::from(for_cost) };
        let idle = |(candidate, choice): &(&Candidate, &mut Choice)| {
            candidate.count > 0 && choice.drafts == 0 && (for_cost || candidate.probe)
        };
        for (_, choice) in candidates.iter().zip(choices).filter(idle).take(left) {
            *choice = Choice { drafts: 1, probe: true };
        }
        if for_cost {
            self.probe.answer(false);
        }
    }
}

/// Bits of numbers that are not negative ascend as they do. Of the depth 8 bits are left and of the candidate 24, far
/// more than a step has tokens for.
fn order(chance: f64, depth: u32, candidate: u32) -> u64 {
    let falling = !(chance.max(0.0) as f32).to_bits();
    u64::from(falling) << 32 | u64::from(depth.min(255)) << 24 | u64::from(candidate & 0xFF_FFFF)
}

impl Draft {
    /// Whether it can be had with passes of the drafter up to `depth`.
    fn needs_at_most(&self, depth: u32) -> bool {
        self.entries == 0 || self.depth <= depth
    }
}

#[cfg(test)]
mod tests;
