//! A seeded world on a null backend: arrivals in classes, conversations that go on and branch, salts, cancels, ends, failed
//! steps, drafts that are right or wrong, and pools too small for all of it. After each step slots, blocks and lanes add up,
//! the network finds every state and block to hold what it must, and everyone who was not cancelled is served with
//! the ids that the network's definition alone gives.
//!
//! `FERROTRON_SIM_STEPS=100000000 cargo test --release --test schedule` runs longer; `FERROTRON_SIM_SEED=7` repeats one world.

mod null;

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use ferrotron::model::{Limits, Network};
use ferrotron::schedule::{
    Arrival, Cancelled, Config, DraftInputs, Outcome, Scheduler, Share, StepInputs, Wanted,
};
use null::{Chance, Null};

const VOCAB: usize = 5;

/// What the world knows of a sequence.
struct Life {
    arrived: u64,
    priority: i32,
    len_max: usize,
    prompt_len: usize,
    salt: Option<std::sync::Arc<str>>,
    /// All its tokens, to be compared with what the scheduler feeds.
    tokens: Vec<u32>,
    /// When it will end of itself.
    end: usize,
}

struct World {
    chance: Chance,
    limits: Limits,
    scheduler: Scheduler,
    network: Null,
    alive: BTreeMap<u64, Life>,
    /// What ended: conversations to go on with.
    histories: Vec<(Option<std::sync::Arc<str>>, Vec<u32>)>,
    next_id: u64,
    served: usize,
    drafts: bool,
    /// No sequence of the highest class may live longer than this many steps.
    age_max: u64,
    steps: u64,
}

impl World {
    fn new(seed: u64) -> Self {
        let mut chance = Chance(seed);
        let places = 1 + chance.below(8);
        let checkpoints_max = if chance.below(4) == 0 { 0 } else { 1 + chance.below(12) };
        let drafts = if chance.below(3) == 0 { 0 } else { 1 + chance.below(4) };
        let limits = Limits {
            step_tokens: places + chance.below(24),
            logit_rows: places + chance.below(12),
            slots: places + checkpoints_max,
            blocks: 6 + chance.below(40),
            block_len: 1 + chance.below(6),
            lanes: if drafts == 0 { 0 } else { 1 + chance.below(places) },
            drafts,
            ..Limits::default()
        };
        let config = Config {
            checkpoints_max,
            state_bytes: 1 + chance.below(1000),
            block_bytes: 1 + chance.below(100),
            checkpoint_gap: chance.below(20) as u32,
            checkpoint_stride: chance.below(40) as u32,
            ..Config::new(limits, places)
        };
        let network = Null::new(limits, VOCAB);
        let network = match chance.below(3) {
            0 => network,
            _ => network.with_drafter(seed, chance.below(101)),
        };
        Self {
            limits,
            scheduler: Scheduler::new(config).unwrap(),
            network,
            chance,
            alive: BTreeMap::new(),
            histories: Vec::new(),
            next_id: 0,
            served: 0,
            drafts: drafts > 0,
            age_max: 4000,
            steps: 0,
        }
    }

    /// A new conversation, one that goes on, or one that goes on differently from somewhere in the middle.
    fn prompt(&mut self, len_max: usize) -> (Option<std::sync::Arc<str>>, Vec<u32>) {
        let (mut salt, mut prompt) = (None, Vec::new());
        if !self.histories.is_empty() && self.chance.below(4) > 0 {
            let index = self.chance.below(self.histories.len());
            (salt, prompt) = self.histories[index].clone();
            if self.chance.below(3) == 0 {
                prompt.truncate(self.chance.below(prompt.len() + 1));
            }
            if self.chance.below(10) == 0 {
                salt = [None, Some("a".into()), Some("b".into())][self.chance.below(3)].clone();
            }
        }
        for _ in 0..1 + self.chance.below(12) {
            prompt.push(self.chance.below(VOCAB) as u32);
        }
        prompt.truncate(len_max - 1);
        (salt, prompt)
    }

    fn arrive(&mut self) {
        let limit = self.scheduler.len_limit().min(80);
        let (salt, prompt) = self.prompt(limit);
        let max_tokens = 1 + self.chance.below(limit - prompt.len());
        let mut borders: Vec<u32> = (0..self.chance.below(4)).map(|_| self.chance.below(80) as u32).collect();
        borders.retain(|&border| border > 0 && (border as usize) < prompt.len());
        borders.sort_unstable();
        borders.dedup();
        let priority = [0, 0, 1, -3][self.chance.below(4)];
        let copies = if self.chance.below(12) == 0 { 3 } else { 1 };
        for _ in 0..copies {
            let arrival = Arrival {
                id: self.next_id,
                prompt: prompt.clone(),
                max_tokens,
                every_row: self.chance.below(16) == 0,
                priority,
                salt: salt.clone(),
                borders: borders.clone(),
                siblings: copies > 1,
            };
            self.scheduler.add(arrival).unwrap();
            let life = Life {
                arrived: self.steps,
                priority,
                len_max: prompt.len() + max_tokens,
                prompt_len: prompt.len(),
                salt: salt.clone(),
                end: prompt.len() + 1 + self.chance.below(max_tokens),
                tokens: prompt.clone(),
            };
            self.alive.insert(self.next_id, life);
            self.next_id += 1;
        }
    }

    fn cancel_one(&mut self) {
        let index = self.chance.below(self.alive.len());
        let id = *self.alive.keys().nth(index).unwrap();
        self.alive.remove(&id);
        assert_ne!(self.scheduler.cancel(id), Cancelled::Unknown);
        assert_eq!(self.scheduler.cancel(id), Cancelled::Unknown);
    }

    /// Draws greedily from the logits of a share, as far as its drafts are right.
    fn outcome(&mut self, share: &Share, drafts: &[u32], logits: &[f32], sampled: &mut Vec<u32>) -> Outcome {
        let Some(life) = self.alive.get_mut(&share.id) else { return Outcome::Advance }; // cancelled in mid-step
        let waited = self.steps - life.arrived;
        assert!(life.priority > -3 || waited <= self.age_max, "sequence {} starves", share.id);
        match self.chance.below(400) {
            0 => return Outcome::Rewind,
            1 => {
                self.alive.remove(&share.id);
                return Outcome::Fail;
            }
            _ => {}
        }
        if !share.samples {
            return Outcome::Advance;
        }
        let first = sampled.len();
        let rows = &logits[share.first_row * VOCAB..][..share.rows * VOCAB];
        for (row, draft) in rows.chunks(VOCAB).skip(share.rows - 1 - drafts.len()).zip(0..) {
            let id = null::argmax(row);
            sampled.push(id);
            life.tokens.push(id);
            if life.tokens.len() == life.end || drafts.get(draft) != Some(&id) {
                break;
            }
        }
        let count = sampled.len() - first;
        if life.tokens.len() < life.end {
            return Outcome::Tokens { first, count };
        }
        let life = self.alive.remove(&share.id).unwrap();
        self.check_served(life);
        Outcome::End { first, count }
    }

    /// The ids are those of a network that is asked about this sequence alone.
    fn check_served(&mut self, life: Life) {
        for len in life.prompt_len..life.tokens.len() {
            let expected = null::argmax(&null::logits(&life.tokens[..len], VOCAB));
            assert_eq!(life.tokens[len], expected, "the id at {len}");
        }
        self.served += 1;
        if self.histories.len() == 12 {
            self.histories.swap_remove(self.chance.below(12));
        }
        self.histories.push((life.salt, life.tokens));
    }

    fn check_share(&self, share: &Share, inputs: &StepInputs) {
        let fed = &inputs.tokens[share.first..][..share.count - share.drafts];
        let life = &self.alive[&share.id];
        assert_eq!(fed, &life.tokens[share.past..share.past + fed.len()], "sequence {}", share.id);
        assert_eq!(share.samples, share.past + fed.len() == life.tokens.len());
        assert!(!share.samples || share.rows > share.drafts, "sequence {} draws without logits", share.id);
        assert!(life.tokens.len() + share.drafts < life.len_max, "sequence {} drafts too far", share.id);
    }

    /// One step; false if there was nothing to run.
    fn step(&mut self, inputs: &mut StepInputs, draft_inputs: &mut DraftInputs) -> bool {
        let tokens = if self.chance.below(8) == 0 { 1 + self.chance.below(8) } else { usize::MAX };
        if !self.scheduler.plan_within(inputs, tokens) {
            assert!(self.alive.is_empty(), "{} sequences and no plan", self.alive.len());
            return false;
        }
        self.steps += 1;
        self.scheduler.check();
        if self.chance.below(300) == 0 {
            return true; // Planned and forgotten.
        }
        let logits = self.network.step(inputs).unwrap().to_vec();
        let shares = self.scheduler.shares().to_vec();
        for share in &shares {
            self.check_share(share, inputs);
        }
        let drafts: Vec<_> = shares.iter().map(|share| self.scheduler.drafts(share).to_vec()).collect();
        if self.chance.below(20) == 0 && !self.alive.is_empty() {
            self.cancel_one();
        }
        let mut sampled = Vec::new();
        let outcomes: Vec<_> = shares
            .iter()
            .zip(&drafts)
            .map(|(share, drafts)| self.outcome(share, drafts, &logits, &mut sampled))
            .collect();
        self.scheduler.commit(&outcomes, &sampled);
        self.scheduler.check();
        if self.drafts {
            self.draft(draft_inputs);
        }
        true
    }

    fn draft(&mut self, inputs: &mut DraftInputs) {
        // Drafts from elsewhere, some of them right.
        let ids: Vec<u64> = self.scheduler.stepped().map(|stepped| stepped.id).collect();
        for &id in &ids {
            if self.chance.below(3) == 0 {
                let mut tokens = self.alive[&id].tokens.clone();
                let known = tokens.len();
                for _ in 0..self.chance.below(6) {
                    let right = null::argmax(&null::logits(&tokens, VOCAB));
                    tokens.push((right + u32::from(self.chance.below(4) == 0)) % VOCAB as u32);
                }
                self.scheduler.set_drafts(id, &tokens[known..]);
            }
        }
        if !self.network.can_draft() {
            return;
        }
        let (chance, deepest) = (&mut self.chance, self.limits.drafts + 1);
        let wanted = |_| match chance.below(6) {
            0 => Wanted::Nothing,
            _ => Wanted::Drafts(chance.below(deepest)),
        };
        let mut proposals = Vec::new();
        let mut more = self.scheduler.plan_drafts(inputs, wanted);
        while more {
            self.network.draft(inputs, &mut proposals).unwrap();
            more = self.scheduler.take_drafts(&proposals, inputs);
        }
        self.scheduler.check();
    }

    fn live(&mut self, steps: u64) {
        let (mut inputs, mut draft_inputs) = (self.scheduler.inputs(), self.scheduler.draft_inputs());
        for _ in 0..steps {
            if self.alive.len() < 12 && self.chance.below(3) == 0 {
                self.arrive();
            }
            if self.chance.below(30) == 0 && !self.alive.is_empty() {
                self.cancel_one();
                self.scheduler.check();
            }
            if self.chance.below(1000) == 0 {
                self.scheduler.clear_cache();
            }
            self.step(&mut inputs, &mut draft_inputs);
        }
        // No one else arrives: everyone left must come to an end.
        while self.step(&mut inputs, &mut draft_inputs) {
            assert!(self.steps < 2 * steps + 20_000, "the world does not come to an end");
        }
        assert!(self.scheduler.is_idle());
        assert_eq!(self.scheduler.blocks_used(), 0);
        self.scheduler.clear_cache();
        self.scheduler.check();
        let taken = (self.scheduler.slots().taken_count(), self.scheduler.blocks().taken_count());
        assert_eq!(taken, (0, 0), "slots and blocks of an empty world");
        assert_eq!(self.scheduler.lanes().taken_count(), 0, "lanes of an empty world");
    }
}

fn setting(name: &str) -> Option<u64> {
    std::env::var(name)
        .ok()
        .map(|text| text.parse().unwrap_or_else(|_| panic!("{name}: not a number: {text}")))
}

#[test]
fn everything_adds_up_and_everyone_is_served() {
    const STEPS: u64 = 500;
    let total = setting("FERROTRON_SIM_STEPS").unwrap_or(1_000_000);
    let seeds = match setting("FERROTRON_SIM_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..total.div_ceil(STEPS),
    };
    let (mut served, mut steps) = (0, 0);
    let mut counts = Vec::new();
    for seed in seeds {
        let mut world = World::new(seed);
        match catch_unwind(AssertUnwindSafe(|| world.live(STEPS))) {
            Ok(()) => {
                served += world.served;
                steps += world.steps;
                counts.push(world.scheduler.counts());
            }
            Err(panic) => {
                eprintln!("the world of seed {seed} broke: FERROTRON_SIM_SEED={seed} repeats it");
                resume_unwind(panic);
            }
        }
    }
    println!("{served} sequences served in {steps} steps");
    if counts.len() > 20 {
        let sum = |of: fn(&ferrotron::schedule::Counts) -> u64| counts.iter().map(of).sum::<u64>();
        let happened =
            [sum(|c| c.hit_tokens), sum(|c| c.paused), sum(|c| c.preempted), sum(|c| c.copied_blocks)];
        println!("hit tokens, pauses, preemptions, copied blocks: {happened:?}");
        assert!(served as u64 > steps / 100, "the world is too quiet to prove anything");
        assert!(happened.iter().all(|&count| count > 50), "some of it never happened: {happened:?}");
    }
}
