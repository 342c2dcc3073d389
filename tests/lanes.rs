//! Drafts, checkpoints and shared blocks leave no trace: whatever was drafted, rejected, saved, resumed or copied,
//! logits are bit for bit those of token after token.

#[path = "support/models.rs"]
mod models;

use std::path::{Path, PathBuf};

use ferrotron::backend::cpu::{Cpu, simd::Isa};
use ferrotron::backend::reference::Reference;
use ferrotron::backend::{BlockCopy, KvType, Precision, Save, SsmType, StepInputs};
use ferrotron::model::{Limits, Network};
use models::{Random, model, tiny};

const BLOCK_LEN: usize = 4;
/// Drafts in a step at most.
const DRAFTS: usize = 3;
/// Tokens of a walk.
const LENGTH: usize = 30;

fn folders() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut folders: Vec<_> = std::fs::read_dir(root.join("tests/goldens"))
        .expect("tests/goldens is part of the project")
        .map(|entry| entry.expect("a readable entry").path())
        .filter(|path| path.join("golden.json").exists())
        .collect();
    folders.push(tiny());
    folders
}

/// Room for 4 walks and 8 checkpoints.
fn limits(kv: KvType, ssm: SsmType) -> Limits {
    Limits {
        step_tokens: 64,
        logit_rows: 64,
        slots: 12,
        blocks: 4 * LENGTH.div_ceil(BLOCK_LEN),
        block_len: BLOCK_LEN,
        lanes: 4,
        drafts: DRAFTS,
        kv,
        ssm,
    }
}

/// Calls `check` with networks of every architecture on every backend, and with what they are called. Narrow caches and
/// states are the same code for every architecture, so one small one shows them.
fn on_every_network(check: impl Fn(&mut dyn Network, &mut Random, &str)) {
    for folder in folders() {
        let mut kinds = vec![(KvType::F32, SsmType::F32)];
        if folder.ends_with("odd") {
            kinds.extend([(KvType::Bf16, SsmType::F16), (KvType::Fp8, SsmType::F16)]);
        }
        for (kv, ssm) in kinds {
            let what =
                |name: &str, seed| format!("{} on {name}, {kv:?} {ssm:?}, seed {seed}", folder.display());
            let mut network = model(Reference::new(Precision::F32), &folder, limits(kv, ssm));
            check(&mut network, &mut Random(0), &what("reference", 0));
            for isa in Isa::available() {
                let cpu = Cpu::with_isa(Precision::F32, 2, isa).expect("threads start");
                let mut network = model(cpu, &folder, limits(kv, ssm));
                for seed in 0..if isa == Isa::detect() { 3 } else { 1 } {
                    check(&mut network, &mut Random(seed), &what(isa.name(), seed));
                }
            }
        }
    }
}

/// One sequence on its way along `ids`, which its drafts guess.
struct Walk {
    ids: Vec<u32>,
    /// [LENGTH, V] of the ids, token after token.
    expected: Vec<f32>,
    slot: u32,
    source: u32,
    past: usize,
    replay: usize,
    blocks: Vec<u32>,
}

/// What one walk does in a step.
struct Stride {
    certain: usize,
    drafts: Vec<u32>,
}

impl Walk {
    /// Walk `index` with its own slot, lane and blocks. `network` computes what is expected of it.
    fn new(network: &mut dyn Network, index: usize, random: &mut Random) -> Walk {
        let vocab = network.vocab_size();
        let ids: Vec<u32> = (0..LENGTH).map(|_| random.below(vocab) as u32).collect();
        let mut expected = Vec::new();
        for (past, id) in ids.iter().enumerate() {
            expected
                .extend_from_slice(network.step(&StepInputs::single(&[*id], past, BLOCK_LEN)).expect("runs"));
        }
        let count = LENGTH.div_ceil(BLOCK_LEN) as u32;
        let slot = index as u32;
        let blocks = (0..count).map(|b| b * 4 + slot).collect();
        Walk { ids, expected, slot, source: slot, past: 0, replay: 0, blocks }
    }

    fn left(&self) -> usize {
        LENGTH - self.past
    }

    /// Any number of certain tokens, and drafts of which each may be right.
    fn stride(&self, random: &mut Random, vocab: usize) -> Stride {
        let certain = if random.below(3) == 0 { 1 + random.below(self.left().min(9)) } else { 1 };
        let room = (self.left() - certain).min(DRAFTS);
        let next = self.past + certain;
        let drafts = (next..next + random.below(room + 1)).map(|i| match random.below(4) {
            0 => random.below(vocab) as u32,
            _ => self.ids[i],
        });
        Stride { certain, drafts: drafts.collect() }
    }

    fn put(&self, stride: &Stride, inputs: &mut StepInputs) {
        let certain = &self.ids[self.past..self.past + stride.certain];
        let tokens = certain.iter().chain(&stride.drafts).copied();
        let put = inputs.push(self.slot, self.past, tokens, self.blocks.iter().copied());
        put.source = self.source;
        // Not the slot's number, so that neither is taken for the other.
        put.lane = 3 - self.slot;
        put.replay = self.replay as u32;
        put.drafts = stride.drafts.len() as u32;
        inputs.logit_rows = (0..inputs.tokens.len() as u32).collect();
    }

    /// Compares the rows that are not of a wrong past, then accepts some of the right drafts.
    fn judge(&mut self, stride: &Stride, logits: &[f32], random: &mut Random, what: &str) {
        let right =
            stride.drafts.iter().zip(&self.ids[self.past + stride.certain..]).take_while(|(a, b)| a == b);
        let right = right.count();
        let vocab = self.expected.len() / LENGTH;
        for row in 0..stride.certain + right {
            let position = self.past + row;
            let expected = &self.expected[position * vocab..][..vocab];
            assert_eq!(&logits[row * vocab..][..vocab], expected, "{what}: position {position}");
        }
        self.replay = if random.below(4) == 0 { random.below(right + 1) } else { right };
        self.past += stride.certain + self.replay;
        self.source = self.slot;
    }
}

/// One step of those walks that are not at their end.
fn step(
    network: &mut dyn Network,
    walks: &mut [Walk],
    random: &mut Random,
    mut inputs: StepInputs,
    what: &str,
) -> bool {
    let vocab = network.vocab_size();
    let strides: Vec<_> = walks.iter().map(|w| (w.left() > 0).then(|| w.stride(random, vocab))).collect();
    for (walk, stride) in walks.iter().zip(&strides) {
        stride.iter().for_each(|stride| walk.put(stride, &mut inputs));
    }
    if inputs.sequences.is_empty() {
        return false;
    }
    let logits = network.step(&inputs).expect("the step runs").to_vec();
    let mut first = 0;
    for (walk, stride) in walks.iter_mut().zip(&strides) {
        let Some(stride) = stride else { continue };
        walk.judge(stride, &logits[first * vocab..], random, what);
        first += stride.certain + stride.drafts.len();
    }
    true
}

#[test]
fn any_history_of_drafts_leaves_the_logits_of_decode_bit_for_bit() {
    on_every_network(|network, random, what| {
        let mut walks: Vec<_> = (0..3).map(|i| Walk::new(network, i, random)).collect();
        while step(network, &mut walks, random, StepInputs::default(), what) {}
    });
}

/// Two walks; the first leaves checkpoints in the middle of its chunks, which later walks resume from, with blocks
/// that are shared as far as they are full.
#[test]
fn a_resumed_checkpoint_goes_on_bit_for_bit() {
    on_every_network(resume);
}

fn resume(network: &mut dyn Network, random: &mut Random, what: &str) {
    let vocab = network.vocab_size();
    let mut walks: Vec<_> = (0..2).map(|i| Walk::new(network, i, random)).collect();
    step(network, &mut walks, random, StepInputs::default(), what);

    // Twelve certain tokens after whatever was drafted, kept after 3, 7 and 12 of them.
    let start = walks[0].past;
    let stride = Stride { certain: 12, drafts: walks[0].ids[start + 12..][..2].to_vec() };
    let other = walks[1].stride(random, vocab);
    let mut inputs = StepInputs::default();
    walks[1].put(&other, &mut inputs);
    walks[0].put(&stride, &mut inputs);
    let kept = [(3, 8), (7, 4), (12, 11)];
    inputs.saves = kept.iter().map(|&(after, to)| Save { sequence: 1, after, to }).collect();
    let logits = network.step(&inputs).expect("the step runs").to_vec();
    walks[1].judge(&other, &logits, random, what);
    let own = &logits[(other.certain + other.drafts.len()) * vocab..];
    walks[0].judge(&stride, own, random, what);

    // Each is resumed twice: by walks that go on beside the first two, one of which the first is itself.
    for (after, place) in kept {
        for again in 0..2 {
            let position = start + after as usize;
            let shared = position / BLOCK_LEN;
            let slot = 2 + again;
            let mut blocks: Vec<u32> = (0..walks[0].blocks.len() as u32).map(|b| b * 4 + slot).collect();
            blocks[..shared].copy_from_slice(&walks[0].blocks[..shared]);
            let mut inputs = StepInputs::default();
            if !position.is_multiple_of(BLOCK_LEN) {
                inputs.block_copies.push(BlockCopy { from: walks[0].blocks[shared], to: blocks[shared] });
            }
            let walk = &walks[0];
            let (ids, expected) = (walk.ids.clone(), walk.expected.clone());
            walks.push(Walk { ids, expected, slot, source: place, past: position, replay: 0, blocks });
            assert!(step(network, &mut walks, random, inputs, what));
            if again == 0 {
                assert!(walks[2].source == walks[2].slot);
                continue;
            }
            while walks[2..].iter().any(|w| w.left() > 0) {
                step(network, &mut walks[2..], random, StepInputs::default(), what);
            }
            walks.truncate(2);
        }
    }
}
