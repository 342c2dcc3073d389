//! A seeded world on a null backend: arrivals, cancels, ends and failed steps. After each step slots and blocks
//! add up, and everyone who was not cancelled is served.

mod null;

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use ferrotron::backend::StepInputs;
use ferrotron::model::{Limits, Network};
use ferrotron::schedule::{Cancelled, Outcome, Scheduler};
use null::{Chance, Null};

const VOCAB: usize = 4;

/// What the world knows of a sequence.
struct Life {
    arrived: u64,
    left: usize,
    /// All its tokens, to be compared with what the scheduler feeds.
    tokens: Vec<u32>,
}

struct World {
    chance: Chance,
    scheduler: Scheduler,
    network: Null,
    alive: BTreeMap<u64, Life>,
    next_id: u64,
    served: usize,
    /// No sequence may live longer than this many steps.
    age_max: u64,
}

impl World {
    fn new(seed: u64) -> Self {
        let mut chance = Chance(seed);
        let limits = Limits {
            step_tokens: 1 + chance.below(24),
            logit_rows: 1 + chance.below(12),
            slots: 1 + chance.below(8),
            blocks: 4 + chance.below(40),
            block_len: 1 + chance.below(6),
            ..Limits::default()
        };
        Self {
            scheduler: Scheduler::new(limits, 1 + chance.below(8)).unwrap(),
            network: Null::new(limits, VOCAB),
            chance,
            alive: BTreeMap::new(),
            next_id: 0,
            served: 0,
            age_max: 4000,
        }
    }

    fn arrive(&mut self, now: u64) {
        let limit = self.scheduler.len_limit();
        let len = 2 + self.chance.below((limit - 1).min(60));
        let prompt_len = 1 + self.chance.below(len - 1);
        let prompt: Vec<u32> = (0..prompt_len).map(|_| self.chance.below(VOCAB) as u32).collect();
        let left = len - prompt_len;
        let every_row = self.chance.below(8) == 0;
        self.scheduler.add(self.next_id, prompt.clone(), left, every_row).unwrap();
        self.alive.insert(self.next_id, Life { arrived: now, left, tokens: prompt });
        self.next_id += 1;
    }

    fn cancel_one(&mut self) {
        let index = self.chance.below(self.alive.len());
        let id = *self.alive.keys().nth(index).unwrap();
        self.alive.remove(&id);
        assert_ne!(self.scheduler.cancel(id), Cancelled::Unknown);
        assert_eq!(self.scheduler.cancel(id), Cancelled::Unknown);
    }

    fn outcome(&mut self, id: u64, samples: bool, now: u64) -> Outcome {
        let Some(life) = self.alive.get_mut(&id) else { return Outcome::Advance }; // cancelled in mid-step
        assert!(now - life.arrived <= self.age_max, "sequence {id} starves");
        if self.chance.below(200) == 0 {
            return Outcome::Rewind;
        }
        if self.chance.below(200) == 0 {
            self.alive.remove(&id);
            return Outcome::End;
        }
        if !samples {
            return Outcome::Advance;
        }
        life.left -= 1;
        if life.left == 0 || self.chance.below(40) == 0 {
            self.alive.remove(&id);
            self.served += 1;
            return Outcome::End;
        }
        let token = self.chance.below(VOCAB) as u32;
        life.tokens.push(token);
        Outcome::Token(token)
    }

    /// One step; false if there was nothing to run.
    fn step(&mut self, inputs: &mut StepInputs, now: u64) -> bool {
        if !self.scheduler.plan(inputs) {
            assert!(self.alive.is_empty(), "{} sequences and no plan", self.alive.len());
            return false;
        }
        self.scheduler.check();
        self.network.step(inputs).unwrap();
        let shares = self.scheduler.shares().to_vec();
        for (share, sequence) in shares.iter().zip(&inputs.sequences) {
            let fed = &inputs.tokens[sequence.first as usize..][..sequence.count as usize];
            let life = &self.alive[&share.id];
            assert_eq!(fed, &life.tokens[share.past..share.past + share.count], "sequence {}", share.id);
            assert_eq!(share.samples, share.past + share.count == life.tokens.len());
            assert!(!share.samples || share.rows > 0, "sequence {} draws without logits", share.id);
        }
        if self.chance.below(20) == 0 && !self.alive.is_empty() {
            self.cancel_one();
        }
        let outcomes: Vec<_> =
            shares.iter().map(|share| self.outcome(share.id, share.samples, now)).collect();
        self.scheduler.commit(&outcomes);
        self.scheduler.check();
        true
    }

    fn live(&mut self, steps: u64) {
        let mut inputs = StepInputs::default();
        for now in 0..steps {
            if self.alive.len() < 12 && self.chance.below(3) == 0 {
                self.arrive(now);
            }
            if self.chance.below(30) == 0 && !self.alive.is_empty() {
                self.cancel_one();
                self.scheduler.check();
            }
            self.step(&mut inputs, now);
        }
        // No one else arrives: everyone left must come to an end.
        let mut now = steps;
        while self.step(&mut inputs, now) {
            now += 1;
        }
        assert!(self.scheduler.is_idle());
        assert_eq!((self.scheduler.slots().taken_count(), self.scheduler.blocks().taken_count()), (0, 0));
    }
}

#[test]
fn slots_and_blocks_add_up_and_everyone_is_served() {
    let mut served = 0;
    for seed in 0..60 {
        let mut world = World::new(seed);
        match catch_unwind(AssertUnwindSafe(|| world.live(500))) {
            Ok(()) => served += world.served,
            Err(panic) => {
                eprintln!("the world of seed {seed} broke");
                resume_unwind(panic);
            }
        }
    }
    assert!(served > 500, "only {served} sequences were served: the world is too quiet to prove anything");
}
