//! Random conversation trees on the tiny model: they branch, are edited, lose their thoughts, carry salts, come many at a
//! time, with drafts and without, through a prefix cache that is too small. Each answer must be, id for id, that of
//! an engine without cache and drafts that is asked one thing at a time.
//!
//! `FERROTRON_TREES=10000 cargo test --release --test conversations` runs more; `FERROTRON_TREES_SEED=7` repeats one world.

#[path = "support/models.rs"]
mod models;
mod null;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use ferrotron::backend::Precision;
use ferrotron::backend::cpu::Cpu;
use ferrotron::engine::{self, EngineConfig, Event, Handle, Request, RequestStream, Runner, Speculation};
use ferrotron::model::Limits;
use ferrotron::sample::SamplingParams;
use models::Random as Chance;
use null::sampling;

/// Trees that share an engine, so that they disturb each other.
const TREES_PER_WORLD: usize = 25;
/// Ids of text, beyond the control tokens.
const TEXT: std::ops::Range<usize> = 32..1280;

async fn start(limits: Limits, config: EngineConfig) -> (Handle, Runner) {
    let (handle, runner) = engine::start(config, move |_| {
        let cpu = Cpu::new(Precision::F32, 1).expect("threads start");
        Ok(Box::new(models::model(cpu, &models::tiny(), limits)))
    });
    handle.loaded().await;
    (handle, runner)
}

/// What is asked, apart from how it is scheduled.
#[derive(Clone, PartialEq, Eq, Hash)]
struct Question {
    prompt: Vec<u32>,
    max_tokens: usize,
    /// 0 is greedy.
    seed: u64,
}

impl Question {
    fn request(&self) -> Request {
        let sampling = match self.seed {
            0 => sampling(0.0, 0),
            seed => SamplingParams { top_p: 0.9, ..sampling(1.0, seed) },
        };
        Request::new(self.prompt.clone(), sampling, self.max_tokens)
    }
}

/// The engine that does nothing but what it is asked, and what it has answered.
struct Oracle {
    engine: Handle,
    known: HashMap<Question, Vec<u32>>,
}

impl Oracle {
    async fn new() -> Self {
        let limits = Limits {
            step_tokens: 512,
            logit_rows: 1,
            slots: 1,
            blocks: 64,
            block_len: 16,
            ..Limits::default()
        };
        let config = EngineConfig { checkpoints_max: 0, ..EngineConfig::default() };
        Self { engine: start(limits, config).await.0, known: HashMap::new() }
    }

    async fn answer(&mut self, question: &Question) -> Vec<u32> {
        if let Some(known) = self.known.get(question) {
            return known.clone();
        }
        let stream = self.engine.submit(question.request()).expect("it fits");
        let (ids, cached) = collect(stream).await;
        assert_eq!(cached, 0, "the oracle remembers");
        self.known.insert(question.clone(), ids.clone());
        ids
    }
}

async fn collect(mut stream: RequestStream) -> (Vec<u32>, usize) {
    let (mut ids, mut cached) = (Vec::new(), 0);
    while let Some(event) = stream.next().await {
        match event {
            Event::Token { id, .. } => ids.push(id),
            Event::Started { cached_tokens, .. } => cached = cached_tokens,
            Event::Finished { .. } => {}
            Event::Failed(failure) => panic!("{failure}"),
        }
    }
    (ids, cached)
}

/// A conversation so far.
#[derive(Clone)]
struct Branch {
    tokens: Vec<u32>,
    /// Where its turns end.
    borders: Vec<u32>,
    salt: Option<Arc<str>>,
    /// Where the last answer stands, to be thinned out.
    answer: std::ops::Range<usize>,
}

struct World {
    chance: Chance,
    branches: Vec<Branch>,
    systems: Vec<Vec<u32>>,
}

/// A question on its way, and whose next turn its answer is.
struct Asked {
    question: Question,
    stream: RequestStream,
    branch: Branch,
}

impl World {
    fn text(&mut self, count: usize) -> Vec<u32> {
        // From few words, so that n-grams repeat.
        (0..count).map(|_| (TEXT.start + self.chance.below(40) * 31) as u32).collect()
    }

    /// The root of a tree: one of few system turns.
    fn plant(&mut self) -> Branch {
        let tokens = self.systems[self.chance.below(self.systems.len())].clone();
        let salt = [None, None, Some("a".into()), Some("b".into())][self.chance.below(4)].clone();
        let borders = vec![tokens.len() as u32];
        Branch { answer: tokens.len()..tokens.len(), tokens, borders, salt }
    }

    /// What is asked next: somewhere a tree grows, and perhaps not from its end.
    fn grow(&mut self) -> (Branch, Question) {
        let mut branch = match self.branches.len() {
            0 => self.plant(),
            count => self.branches[self.chance.below(count)].clone(),
        };
        match self.chance.below(6) {
            // Thoughts are dropped: a head of the last answer goes.
            0 => {
                let cut = branch.answer.start..branch.answer.end - branch.answer.len() / 3;
                branch.tokens.drain(cut);
            }
            // A user edits what was said, and all behind it is another conversation.
            1 => {
                let keep = 1 + self.chance.below(branch.tokens.len());
                branch.tokens.truncate(keep);
                branch.tokens[keep - 1] = self.text(1)[0];
            }
            _ => {}
        }
        if branch.tokens.len() > 120 {
            branch = self.plant();
        }
        let count = 1 + self.chance.below(6);
        let turn = self.text(count);
        branch.tokens.extend(turn);
        branch.borders.retain(|&border| (border as usize) < branch.tokens.len());
        branch.borders.push(branch.tokens.len() as u32);
        // What opens the answer.
        let opener = TEXT.start as u32 + 5;
        branch.tokens.extend([opener, opener + 1]);
        let question = Question {
            prompt: branch.tokens.clone(),
            max_tokens: 1 + self.chance.below(9),
            seed: if self.chance.below(3) == 0 { 1 + self.chance.below(3) as u64 } else { 0 },
        };
        (branch, question)
    }

    fn request(&mut self, question: &Question, branch: &Branch, group: Option<u64>) -> Request {
        let speculation = match self.chance.below(5) {
            0 => Speculation::OFF,
            1 => Speculation { mtp: false, ..Speculation::default() },
            // Whether they pay or not, so that most are refused.
            2 => Speculation {
                depth_max: 1 + self.chance.below(4) as u32,
                ngram: false,
                adaptive: false,
                ..Speculation::default()
            },
            3 => Speculation { adaptive: false, ..Speculation::default() },
            _ => Speculation::default(),
        };
        Request {
            borders: branch.borders.clone(),
            cache_salt: branch.salt.clone(),
            priority: [0, 0, 0, 1, -1][self.chance.below(5)],
            group,
            speculation,
            ..question.request()
        }
    }
}

/// One engine, many trees. Returns how many tokens came from the cache, and how many drafts were accepted.
async fn live(seed: u64, trees: usize, oracle: &mut Oracle) -> (u64, u64) {
    let mut chance = Chance(seed);
    let places = 1 + chance.below(6);
    let checkpoints_max = 1 + chance.below(10);
    let drafts = chance.below(5);
    let block_len = [4, 8, 16][chance.below(3)];
    let limits = Limits {
        step_tokens: 8 + places + chance.below(60),
        logit_rows: places * (1 + drafts),
        slots: places + checkpoints_max,
        blocks: 200usize.div_ceil(block_len) + chance.below(60),
        block_len,
        lanes: if drafts == 0 { 0 } else { places },
        drafts,
        ..Limits::default()
    };
    let config = EngineConfig { max_sequences: places, checkpoints_max, ..EngineConfig::default() };
    let (engine, _runner) = start(limits, config).await;
    let mut world = World { chance, branches: Vec::new(), systems: Vec::new() };
    for _ in 0..3 {
        let count = 8 + world.chance.below(24);
        let system = world.text(count);
        world.systems.push(system);
    }
    for tree in 0..trees {
        world.branches.clear();
        // Its turns, some of them asked at once.
        for round in 0..2 {
            let mut asked = Vec::new();
            for number in 0..1 + world.chance.below(2) {
                let (branch, question) = world.grow();
                // Answers of one prompt that differ by their seeds, or do not.
                let copies = if world.chance.below(8) == 0 { 3 } else { 1 };
                for copy in 0..copies {
                    let mut question = question.clone();
                    question.seed += if question.seed > 0 { copy } else { 0 };
                    let group = (copies > 1).then_some((tree * 100 + round * 10 + number) as u64);
                    let request = world.request(&question, &branch, group);
                    let stream = engine.submit(request).expect("it fits");
                    asked.push(Asked { question, stream, branch: branch.clone() });
                }
            }
            for Asked { question, stream, mut branch } in asked {
                let (ids, cached) = collect(stream).await;
                let expected = oracle.answer(&question).await;
                assert_eq!(
                    ids,
                    expected,
                    "tree {tree}, {} prompt ids, {cached} cached",
                    question.prompt.len()
                );
                assert!(cached < question.prompt.len());
                branch.answer = branch.tokens.len()..branch.tokens.len() + ids.len();
                branch.tokens.extend(ids);
                world.branches.push(branch);
            }
        }
    }
    let stats = engine.stats();
    (stats.prefix_hits.load(Relaxed), stats.accepted_tokens.load(Relaxed))
}

fn setting(name: &str) -> Option<u64> {
    std::env::var(name)
        .ok()
        .map(|text| text.parse().unwrap_or_else(|_| panic!("{name}: not a number: {text}")))
}

#[tokio::test]
async fn cached_and_drafted_answers_are_those_of_a_patient_engine() {
    let trees = setting("FERROTRON_TREES").unwrap_or(150);
    let seeds = match setting("FERROTRON_TREES_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..trees.div_ceil(TREES_PER_WORLD as u64),
    };
    let mut oracle = Oracle::new().await;
    let (mut hits, mut accepted) = (0, 0);
    for seed in seeds {
        println!("world {seed}: FERROTRON_TREES_SEED={seed} repeats it");
        let (more_hits, more_accepted) = live(seed, TREES_PER_WORLD, &mut oracle).await;
        hits += more_hits;
        accepted += more_accepted;
    }
    println!("{hits} tokens came from the cache, {accepted} drafts were accepted");
    assert!(hits > 500 && accepted > 100, "too quiet to prove anything: {hits} hits, {accepted} drafts");
}
