use super::*;
use crate::schedule::{Acceptance, Drafter, Verdict};

const DEPTH: usize = 4;

/// Times as a straight line: so much for any step, so much per token.
fn costs(fixed_us: f64, token_us: f64) -> StepCosts {
    let mut costs = StepCosts::default();
    for tokens in [1, 2, 4, 8, 16, 32, 64, 128] {
        costs.learn(tokens, fixed_us + token_us * tokens as f64);
    }
    costs
}

fn speed(fixed_us: f64, token_us: f64, pass_us: f64) -> Speed {
    Speed { steps: costs(fixed_us, token_us), passes: costs(pass_us, 0.001) }
}

/// Sequences with the same chances.
fn candidates(count: usize, entries: usize) -> Vec<Candidate> {
    vec![Candidate { first: 0, count: DEPTH, entries, probe: false }; count]
}

fn chances(chance: f64) -> Vec<f64> {
    (1..=DEPTH as i32).map(|depth| chance.powi(depth)).collect()
}

fn chooser() -> Chooser {
    Chooser::new(64, DEPTH, 64 * (DEPTH + 1))
}

/// Drafts by candidate, in a first step.
fn chosen(candidates: &[Candidate], chances: &[f64], room: usize, speed: &Speed) -> Vec<usize> {
    let mut choices = Vec::new();
    chooser().choose(candidates, chances, room, speed, &mut choices);
    choices.iter().map(|choice| choice.drafts).collect()
}

#[test]
fn cheap_steps_and_good_drafts_go_deep() {
    assert_eq!(chosen(&candidates(1, 1), &chances(0.95), 99, &speed(1000.0, 1.0, 20.0)), [4]);
    assert_eq!(chosen(&candidates(3, 1), &chances(0.95), 99, &speed(1000.0, 1.0, 20.0)), [4; 3]);
}

#[test]
fn where_each_token_costs_as_much_nothing_is_drafted() {
    assert_eq!(chosen(&candidates(1, 1), &chances(0.95), 99, &speed(0.0, 100.0, 5.0)), [0]);
    assert_eq!(chosen(&candidates(8, 0), &chances(1.0), 99, &speed(0.0, 100.0, 5.0)), [0; 8]);
}

#[test]
fn passes_bound_the_depth_of_the_one_who_needs_them_only() {
    let speed = speed(1000.0, 10.0, 600.0);
    let (mtp, ngram) = (candidates(1, 1)[0], candidates(1, 0)[0]);
    assert_eq!(chosen(&[mtp], &chances(0.9), 99, &speed), [2]);
    assert_eq!(chosen(&[ngram], &chances(0.9), 99, &speed), [4]);
    assert_eq!(chosen(&[mtp, ngram], &chances(0.9), 99, &speed), [0, 4]);
}

#[test]
fn likelier_drafts_come_first() {
    let chances = [0.9, 0.8, 0.7, 0.6, 0.3, 0.2, 0.1, 0.0];
    let mut two = candidates(2, 0);
    two[0].first = 4;
    assert_eq!(chosen(&two, &chances, 3, &speed(1000.0, 1.0, 0.0)), [0, 3]);
    assert_eq!(chosen(&two, &chances, 5, &speed(1000.0, 1.0, 0.0)), [1, 4]);
}

#[test]
fn no_more_than_there_is_room_for() {
    for room in 0..9 {
        let drafts = chosen(&candidates(2, 1), &chances(0.99), room, &speed(1000.0, 1.0, 1.0));
        assert_eq!(drafts.iter().sum::<usize>(), room.min(8));
    }
}

#[test]
fn without_measured_steps_or_passes_nothing_is_drafted() {
    let known = costs(1000.0, 1.0);
    let unknown = StepCosts::default();
    let speed = Speed { steps: unknown.clone(), passes: known.clone() };
    assert_eq!(chosen(&candidates(1, 1), &chances(0.9), 9, &speed), [0]);
    let speed = Speed { steps: known, passes: unknown };
    assert_eq!(chosen(&candidates(2, 1), &chances(0.9), 9, &speed), [0, 0]);
    let mut both = candidates(2, 1);
    both[1].entries = 0;
    assert_eq!(chosen(&both, &chances(0.9), 9, &speed), [0, 4]);
}

#[test]
fn drafting_begins_later_than_it_ends() {
    // One draft of chance p at 10 % of a step: the gain is (1 + p) / 1.1.
    let speed = speed(900.0, 100.0, 0.001);
    let one = [Candidate { first: 0, count: 1, entries: 0, probe: false }];
    let mut chooser = chooser();
    let mut choices = Vec::new();
    let mut drafts = |chance: f64| {
        chooser.choose(&one, &[chance], 9, &speed, &mut choices);
        choices[0].drafts
    };
    let gain = |gain: f64| gain * 1.1 - 1.0;
    assert_eq!([1.06, 1.09, 1.06, 1.03, 1.06].map(gain).map(&mut drafts), [0, 1, 1, 0, 0]);
}

#[test]
fn while_drafts_pay_a_step_now_and_then_has_none() {
    let (speed, candidates, chances) = (speed(1000.0, 1.0, 20.0), candidates(3, 1), chances(0.95));
    let (mut chooser, mut choices, mut plain) = (chooser(), Vec::new(), Vec::new());
    for step in 0..200 {
        chooser.choose(&candidates, &chances, 99, &speed, &mut choices);
        assert_eq!(chooser.is_plain(), choices.iter().all(|choice| choice.drafts == 0));
        if chooser.is_plain() {
            plain.push(step);
        }
    }
    assert_eq!(plain, [96, 193]);
}

#[test]
fn where_deeper_is_hardly_better_it_is_not_chosen() {
    // 1.9 tokens after one pass and 2.4 after two: the second gains 5 %, then less than 2.
    let pays = |pass_us| chosen(&candidates(1, 1), &[0.9, 0.5, 0.0, 0.0], 99, &speed(100.0, 0.001, pass_us));
    assert_eq!(pays(25.0), [2]);
    assert_eq!(pays(32.0), [1]);
}

#[test]
fn what_is_chosen_is_never_predicted_to_be_slower_than_nothing() {
    let mut chance = Chance(1);
    for _ in 0..2000 {
        let speed = speed(chance.unit() * 1000.0, chance.unit() * 100.0, chance.unit() * 300.0 + 0.1);
        let count = 1 + chance.below(12);
        let mut chances = Vec::new();
        let candidates: Vec<Candidate> = (0..count)
            .map(|_| {
                let (first, depth) = (chances.len(), chance.below(DEPTH + 1));
                let unit = chance.unit();
                chances.extend((1..=depth as i32).map(|depth| unit.powi(depth)));
                Candidate { first, count: depth, entries: chance.below(4), probe: false }
            })
            .collect();
        let drafts = chosen(&candidates, &chances, chance.below(30), &speed);
        let none = count as f64 / speed.steps.predict(count).unwrap();
        let taken: usize = drafts.iter().sum();
        let rate = rate(&candidates, &chances, &drafts, &speed);
        assert!(taken == 0 || rate > none * 1.079, "{rate} against {none}: {drafts:?}");
    }
}

/// Tokens per microsecond, computed from the choice alone.
fn rate(candidates: &[Candidate], chances: &[f64], drafts: &[usize], speed: &Speed) -> f64 {
    let pairs = || candidates.iter().zip(drafts);
    let tokens: f64 =
        pairs().map(|(c, &drafts)| 1.0 + chances[c.first..c.first + drafts].iter().sum::<f64>()).sum();
    let mut us = speed.steps.predict(candidates.len() + drafts.iter().sum::<usize>()).unwrap();
    for depth in 1..=DEPTH {
        let deep = pairs().filter(|(c, drafts)| c.entries > 0 && **drafts >= depth);
        let entries: usize = deep.map(|(c, _)| if depth == 1 { c.entries } else { 1 }).sum();
        us += if entries > 0 { speed.passes.predict(entries).unwrap() } else { 0.0 };
    }
    tokens / us
}

/// A small generator of its own: a seed names a world.
struct Chance(u64);

impl Chance {
    fn below(&mut self, end: usize) -> usize {
        (self.unit() * end as f64) as usize
    }

    fn unit(&mut self) -> f64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 40) as f64 / (1u64 << 24) as f64
    }
}

/// Sequences that decode with MTP drafts under given true times and true chances.
struct World {
    chance: Chance,
    chooser: Chooser,
    /// What is believed, and what is true.
    speed: Speed,
    truth: Speed,
    house: Acceptance,
    sequences: Vec<Acceptance>,
    choices: Vec<Choice>,
}

impl World {
    fn new(count: usize, truth: Speed) -> Self {
        Self {
            chance: Chance(7),
            chooser: chooser(),
            speed: truth.clone(),
            truth,
            house: Acceptance::house(),
            sequences: vec![Acceptance::house().fresh(); count],
            choices: Vec::new(),
        }
    }

    /// One step in which each draft is accepted with chance `true_chance`: tokens, and microseconds.
    fn step(&mut self, true_chance: f64) -> (usize, f64) {
        let mut chances = Vec::new();
        let mut candidates = Vec::new();
        for sequence in &self.sequences {
            let probe = sequence.probe_is_due(Drafter::Mtp { intact: true });
            candidates.push(Candidate { first: chances.len(), count: DEPTH, entries: 1, probe });
            sequence.survival(Drafter::Mtp { intact: true }, DEPTH, &mut chances);
        }
        self.chooser.choose(&candidates, &chances, 1000, &self.speed, &mut self.choices);
        let (mut tokens, mut us) = (0, 0.0);
        for (sequence, choice) in self.sequences.iter_mut().zip(&self.choices) {
            let accepted = (0..choice.drafts).take_while(|_| self.chance.unit() < true_chance).count();
            let Choice { drafts: proposed, probe } = *choice;
            let verdict = Some(Verdict { drafter: Drafter::Mtp { intact: true }, proposed, accepted, probe });
            sequence.observe(1 + accepted, verdict);
            self.house.observe(1 + accepted, verdict);
            tokens += 1 + accepted;
        }
        let fed = self.sequences.len() + self.drafts();
        let step_us = self.truth.steps.predict(fed).unwrap() * (0.97 + 0.06 * self.chance.unit());
        self.speed.steps.learn(fed, step_us);
        us += step_us;
        for depth in 1..=DEPTH {
            let entries = self.choices.iter().filter(|choice| choice.drafts >= depth).count();
            if entries > 0 {
                let pass_us = self.truth.passes.predict(entries).unwrap();
                self.speed.passes.learn(entries, pass_us);
                us += pass_us;
            }
        }
        (tokens, us)
    }

    fn drafts(&self) -> usize {
        self.choices.iter().map(|choice| choice.drafts).sum()
    }

    /// Tokens per microsecond over many steps, relative to none drafted.
    fn gain(&mut self, steps: usize, true_chance: f64) -> f64 {
        let count = self.sequences.len();
        let (mut tokens, mut us) = (0, 0.0);
        for _ in 0..steps {
            let step = self.step(true_chance);
            tokens += step.0;
            us += step.1;
        }
        tokens as f64 / us / (count as f64 / self.truth.steps.predict(count).unwrap())
    }
}

#[test]
fn when_drafts_fail_they_end_within_30_steps() {
    for count in [1, 4, 16] {
        let mut world = World::new(count, speed(1000.0, 50.0, 100.0));
        world.gain(200, 0.9);
        assert!(world.drafts() > count, "{count}: {} drafts", world.drafts());
        world.gain(30, 0.0);
        assert_eq!(world.drafts(), 0, "{count} sequences");
    }
}

#[test]
fn when_drafts_are_good_again_a_probe_finds_out() {
    let mut world = World::new(1, speed(1000.0, 50.0, 100.0));
    world.gain(300, 0.0);
    let found = (0..600).position(|_| {
        world.step(1.0);
        world.drafts() > 1
    });
    assert!(found.is_some_and(|steps| steps < 520), "{found:?}");
}

#[test]
fn useless_drafts_cost_less_than_one_in_a_hundred() {
    for count in [1, 4, 16, 64] {
        let mut world = World::new(count, speed(1000.0, 50.0, 100.0));
        world.gain(50, 0.0);
        let gain = world.gain(2000, 0.0);
        assert!(gain > 0.99, "{count} sequences: {gain}");
    }
}

#[test]
fn drafts_that_almost_pay_do_no_harm() {
    for count in [1, 2, 16] {
        for true_chance in [0.0, 0.05, 0.2, 0.3, 0.5, 0.7] {
            for (token_us, pass_us) in [(5.0, 0.1), (20.0, 0.1), (50.0, 100.0), (200.0, 10.0), (500.0, 300.0)]
            {
                let mut world = World::new(count, speed(1000.0, token_us, pass_us));
                let gain = world.gain(600, true_chance);
                assert!(
                    gain > 0.985,
                    "{count} sequences, {true_chance}, {token_us} and {pass_us} us: {gain}"
                );
            }
        }
    }
}

#[test]
fn short_sequences_do_not_pay_for_what_the_house_knows() {
    for count in [1, 4, 16] {
        let mut world = World::new(count, speed(1000.0, 50.0, 100.0));
        world.gain(100, 0.05);
        let mut gains = 0.0;
        for _ in 0..50 {
            world.sequences = vec![world.house.fresh(); count];
            gains += world.gain(60, 0.05);
        }
        assert!(gains / 50.0 > 0.985, "{count} sequences: {}", gains / 50.0);
    }
}

#[test]
fn costs_that_have_fallen_are_found_by_probing() {
    let mut world = World::new(4, speed(10.0, 500.0, 100.0));
    assert!(world.gain(100, 0.9) > 0.99);
    world.truth = speed(2000.0, 3.0, 10.0);
    world.gain(4000, 0.9);
    assert!(world.drafts() >= 4, "{} drafts", world.drafts());
}
