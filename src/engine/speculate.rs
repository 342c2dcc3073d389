//! How far ahead each sequence is drafted, and by whom: the engine's side of [`crate::schedule::Chooser`].
//!
//! After each step every sequence that lacks one token says what its drafters promise: the n-gram drafter has looked up
//! what followed the last time, the draft head has its record. The chooser weighs that against the measured time of
//! verifying and of the draft head's passes, and gives each as many drafts as make tokens come faster, which may be none.

use std::time::{Duration, Instant};

use super::Speculation;
use super::ids::ById;
use super::sequence::Sequence;
use crate::model::{Limits, Network, StepError};
use crate::schedule::{
    Acceptance, Candidate, Choice, Chooser, DraftInputs, Drafter, Ngram, Scheduler, Speed, StepInputs,
    Verdict, Wanted, trial_pass, trial_step,
};

/// Measuring what steps cost may delay the start so long.
const CALIBRATION_MAX: Duration = Duration::from_secs(2);
/// Each size is measured so often; the first run warms up and the fastest counts.
const CALIBRATION_RUNS: usize = 4;

/// Until the house has seen so many first drafts of a draft head with all its memory, it is tried wherever it could pay.
const EXPLORED: f64 = 16.0;

/// Drafts that an n-gram must promise beyond those of a draft head with all its memory: once left out, the head
/// forgets what came before.
const HEAD_START: f64 = 0.5;

/// The draft head reads a prompt along if one draft each would promise so much more than none.
const GAIN_TO_READ: f64 = 1.10;

/// What one sequence's drafts are made by, and how that went.
pub(super) struct SequenceDrafter {
    speculation: Speculation,
    acceptance: Option<Acceptance>,
    ngram: Option<Ngram>,
    /// Who made the drafts of the step that is under way, and whether only to learn.
    proposed: Option<(Drafter, bool)>,
    /// Drafts that the draft head is to make now.
    wanted: usize,
    /// The last step read a piece of its prompt, which the draft head should read as well.
    read_prompt: bool,
    /// The head would draft for it if this step were not to go without.
    spared: bool,
    /// Tokens drawn in the last step, and what became of its drafts.
    drawn: usize,
    verdict: Option<Verdict>,
}

impl SequenceDrafter {
    pub fn new(speculation: Speculation) -> Self {
        Self {
            speculation,
            acceptance: None,
            ngram: None,
            proposed: None,
            wanted: 0,
            read_prompt: false,
            spared: false,
            drawn: 0,
            verdict: None,
        }
    }

    /// What a step drew, and how many of its drafts were right.
    pub fn note(&mut self, drawn: usize, drafted: usize) {
        self.drawn = drawn;
        self.verdict = self.proposed.take().filter(|_| drafted > 0).map(|(drafter, probe)| Verdict {
            drafter,
            proposed: drafted,
            accepted: drawn - 1,
            probe,
        });
    }
}

/// What the engine's drafts are made by. Nothing is allocated from step to step.
pub(super) struct Speculator {
    ceiling: Speculation,
    depth_max: usize,
    /// Tokens and rows that a step has for drafts, and for those who are drafted for.
    room: usize,
    len_max: usize,
    mtp: bool,
    house: Acceptance,
    speed: Speed,
    /// What the passes of this turn took.
    in_passes: Duration,
    chooser: Chooser,
    inputs: DraftInputs,
    proposals: Vec<u32>,
    stepped: Vec<u64>,
    asked: Vec<Asked>,
    candidates: Vec<Candidate>,
    chances: Vec<f64>,
    choices: Vec<Choice>,
    /// N-gram drafts of all who were asked, one after the other.
    copied: Vec<u32>,
    copy: Vec<u32>,
}

/// A sequence that could be drafted for, and by whom.
#[derive(Debug, Clone, Copy)]
struct Asked {
    id: u64,
    drafter: Drafter,
    /// Where its n-gram drafts stand among the copied.
    first: usize,
}

impl Speculator {
    pub fn new(ceiling: Speculation, scheduler: &Scheduler, network: &mut dyn Network) -> Self {
        let limits = *network.limits();
        let places = scheduler.places();
        let room = limits.step_tokens.min(limits.logit_rows);
        let depth_max = match limits.lanes {
            0 => 0,
            _ => limits.drafts.min(ceiling.depth_max as usize),
        };
        let mtp = network.can_draft() && ceiling.mtp && depth_max > 0;
        let mut speculator = Self {
            ceiling,
            depth_max,
            room,
            len_max: scheduler.len_limit(),
            mtp,
            house: Acceptance::house(),
            speed: Speed::default(),
            in_passes: Duration::ZERO,
            chooser: Chooser::new(places, depth_max, limits.step_tokens),
            inputs: scheduler.draft_inputs(),
            proposals: Vec::with_capacity(limits.logit_rows),
            stepped: Vec::with_capacity(places),
            asked: Vec::with_capacity(places),
            candidates: Vec::with_capacity(places),
            chances: Vec::with_capacity(places * depth_max),
            choices: Vec::with_capacity(places),
            copied: Vec::with_capacity(places * depth_max),
            copy: Vec::with_capacity(depth_max),
        };
        if depth_max > 0 && (mtp || ceiling.ngram) {
            speculator.calibrate(network, &limits, places);
        }
        speculator
    }

    /// Measured times, for whoever wants to see them.
    pub fn speed(&self) -> &Speed {
        &self.speed
    }

    /// Takes in what a turn of the engine took from its plan to the drafts of the next, if it only decoded. The host's
    /// work counts, for more tokens are more of it; the passes of the drafter have their own account.
    pub fn learn(&mut self, inputs: &StepInputs, turn: Duration) {
        let decodes = inputs.sequences.iter().all(|sequence| sequence.count == sequence.drafts + 1);
        if self.depth_max > 0 && decodes {
            let us = turn.saturating_sub(self.in_passes).as_secs_f64() * 1e6;
            self.speed.steps.learn(inputs.tokens.len(), us);
        }
    }

    /// Drafts what the next step is to verify.
    pub fn draft(
        &mut self,
        scheduler: &mut Scheduler,
        network: &mut dyn Network,
        running: &mut ById<Sequence>,
    ) -> Result<(), StepError> {
        if self.depth_max > 0 {
            self.ask(scheduler, running);
            self.choose(scheduler, running);
            if self.mtp {
                self.run_head(scheduler, network, running)?;
            }
        }
        self.stepped.clear();
        self.stepped.extend(scheduler.stepped().map(|stepped| stepped.id));
        for id in &self.stepped {
            let Some(sequence) = running.get_mut(id).filter(|sequence| sequence.is_steered()) else {
                continue;
            };
            if let Some(drafts) = scheduler.drafts_mut(*id) {
                sequence.prepare(drafts);
            }
        }
        Ok(())
    }

    /// What the drafters of each sequence promise.
    fn ask(&mut self, scheduler: &Scheduler, running: &mut ById<Sequence>) {
        self.asked.clear();
        self.candidates.clear();
        self.chances.clear();
        self.copied.clear();
        for stepped in scheduler.stepped() {
            let Some(sequence) = running.get_mut(&stepped.id) else { continue };
            let own = &mut sequence.drafter;
            own.wanted = 0;
            own.spared = false;
            own.read_prompt = !stepped.decodes || stepped.entries > 1 + self.depth_max;
            if !stepped.decodes {
                continue;
            }
            if own.speculation.depth_max == 0 {
                // It counts among those who decode, and asks for nothing.
                self.candidates.push(Candidate::default());
                self.asked.push(Asked { id: stepped.id, drafter: Drafter::Ngram { matched: 0 }, first: 0 });
                continue;
            }
            let acceptance = own.acceptance.get_or_insert_with(|| self.house.fresh());
            let verdict = own.verdict.take();
            acceptance.observe(own.drawn, verdict);
            self.house.observe(own.drawn, verdict);
            let depth = self.depth_max.min(own.speculation.depth_max as usize).min(stepped.drafts_useful);
            let mut candidate = Candidate { first: self.chances.len(), ..Candidate::default() };
            let head_drafter = Drafter::Mtp { intact: stepped.remembered };
            let mut asked = Asked { id: stepped.id, drafter: head_drafter, first: self.copied.len() };
            if self.mtp && own.speculation.mtp {
                acceptance.survival(head_drafter, depth, &mut self.chances);
                // A prompt is read whether it is drafted for or not.
                candidate.entries = if own.read_prompt { 1 } else { stepped.entries };
                candidate.probe = stepped.remembered && self.house.tried(head_drafter) < EXPLORED;
            }
            if self.ceiling.ngram && own.speculation.ngram {
                let len_max = self.len_max.min(stepped.len_max);
                let ngram = own.ngram.get_or_insert_with(|| Ngram::new(len_max));
                ngram.extend(stepped.tokens);
                let matched = ngram.propose(stepped.tokens, depth, &mut self.copy);
                let drafter = Drafter::Ngram { matched };
                let mut head: f64 = self.chances[candidate.first..].iter().sum();
                if candidate.entries > 0 && stepped.remembered {
                    head += HEAD_START;
                }
                let begun = self.chances.len();
                if matched > 0 {
                    acceptance.survival(drafter, depth, &mut self.chances);
                }
                let copied: f64 = self.chances[begun..].iter().sum();
                // What costs no pass is taken when it is as good.
                if copied > 0.0 && copied >= head {
                    self.chances.drain(candidate.first..begun);
                    self.copied.extend_from_slice(&self.copy);
                    candidate.entries = 0;
                    asked.drafter = drafter;
                } else {
                    self.chances.truncate(begun);
                }
            }
            candidate.count = self.chances.len() - candidate.first;
            candidate.probe |= acceptance.probe_is_due(asked.drafter);
            self.candidates.push(candidate);
            self.asked.push(asked);
        }
    }

    /// Decides, and hands over the n-gram drafts.
    fn choose(&mut self, scheduler: &mut Scheduler, running: &mut ById<Sequence>) {
        let room = self.room.saturating_sub(scheduler.running_count());
        self.chooser.choose(&self.candidates, &self.chances, room, &self.speed, &mut self.choices);
        let mut left = room.saturating_sub(self.choices.iter().map(|choice| choice.drafts).sum());
        for ((asked, choice), candidate) in self.asked.iter().zip(&mut self.choices).zip(&self.candidates) {
            let Some(sequence) = running.get_mut(&asked.id) else { continue };
            if !(self.ceiling.adaptive && sequence.drafter.speculation.adaptive) {
                // As many as were asked for, whether they pay or not.
                let more = candidate.count.saturating_sub(choice.drafts).min(left);
                left -= more;
                *choice = Choice { drafts: choice.drafts + more, probe: false };
            }
            if choice.drafts == 0 {
                let head = matches!(asked.drafter, Drafter::Mtp { .. });
                sequence.drafter.spared = self.chooser.is_plain() && head;
                continue;
            }
            sequence.drafter.proposed = Some((asked.drafter, choice.probe));
            match asked.drafter {
                Drafter::Mtp { .. } => sequence.drafter.wanted = choice.drafts,
                Drafter::Ngram { .. } => {
                    scheduler.set_drafts(asked.id, &self.copied[asked.first..asked.first + choice.drafts]);
                }
            }
        }
    }

    /// Whether the draft head would pay if all who run had one draft of it: if not, prompts need not be read by it.
    fn head_pays(&self, sequences: usize) -> bool {
        let both = 2 * sequences.max(1);
        let (steps, passes) = (&self.speed.steps, &self.speed.passes);
        let times = steps.predict(sequences.max(1)).zip(steps.predict(both)).zip(passes.predict(both));
        let chance = self.house.chance(Drafter::Mtp { intact: true }, 0);
        // What was never measured may well pay.
        times.is_none_or(|((plain, verify), pass)| (1.0 + chance) * plain > (verify + pass) * GAIN_TO_READ)
    }

    /// The passes of the draft head: first over all that became certain, prompts too, then over its own drafts.
    fn run_head(
        &mut self,
        scheduler: &mut Scheduler,
        network: &mut dyn Network,
        running: &ById<Sequence>,
    ) -> Result<(), StepError> {
        let reads_prompts = !self.ceiling.adaptive || self.head_pays(scheduler.running_count());
        let wanted = |id| match running.get(&id).map(|sequence| &sequence.drafter) {
            Some(own) if !own.speculation.mtp || own.speculation.depth_max == 0 => Wanted::Nothing,
            Some(own) if own.wanted > 0 => Wanted::Drafts(own.wanted),
            Some(own) if own.read_prompt && reads_prompts || own.spared => Wanted::Drafts(0),
            _ => Wanted::Nothing,
        };
        let began = Instant::now();
        let mut start = began;
        let mut more = scheduler.plan_drafts(&mut self.inputs, wanted);
        while more {
            let (entries, rows) = (self.inputs.step.tokens.len(), self.inputs.step.logit_rows.len());
            network.draft(&self.inputs, &mut self.proposals)?;
            more = scheduler.take_drafts(&self.proposals, &mut self.inputs);
            let end = Instant::now();
            // A pass that only reads has no head to pay for.
            if rows > 0 {
                self.speed.passes.learn(entries, (end - start).as_secs_f64() * 1e6);
            }
            start = end;
        }
        self.in_passes = start - began;
        Ok(())
    }

    /// Measures steps and passes of a few sizes on places that nobody uses yet, so that the first requests are
    /// drafted for as well as the later ones.
    fn calibrate(&mut self, network: &mut dyn Network, limits: &Limits, places: usize) {
        let began = Instant::now();
        let most = self.room.min(places * (1 + self.depth_max));
        for tokens in [1, 2, 4, 8, 16, 32, 64].into_iter().filter(|&size| size <= most) {
            for run in 0..CALIBRATION_RUNS {
                let inputs = trial_step(tokens, self.depth_max, places, limits);
                let Some(inputs) = inputs else { break };
                let start = Instant::now();
                if network.step(&inputs).is_err() {
                    return;
                }
                let step = start.elapsed();
                let pass = self.mtp.then(|| self.time_pass(network, &inputs)).flatten();
                // The first run warms caches.
                if run > 0 {
                    self.speed.steps.learn(tokens, step.as_secs_f64() * 1e6);
                    if let Some((entries, time)) = pass {
                        self.speed.passes.learn(entries, time.as_secs_f64() * 1e6);
                    }
                }
            }
            if began.elapsed() > CALIBRATION_MAX {
                return;
            }
        }
    }

    /// A pass of one entry for each sequence of a trial step.
    fn time_pass(&mut self, network: &mut dyn Network, step: &StepInputs) -> Option<(usize, Duration)> {
        trial_pass(step, &mut self.inputs);
        let start = Instant::now();
        network.draft(&self.inputs, &mut self.proposals).ok()?;
        Some((self.inputs.step.tokens.len(), start.elapsed()))
    }
}
