//! The drafter through steps and passes: how its entries are cut into passes changes no bit of its logits.

#[path = "support/models.rs"]
mod models;

use ferrotron::backend::cpu::{Cpu, simd::Isa};
use ferrotron::backend::reference::Reference;
use ferrotron::backend::{Backend, BlockCopy, DraftInputs, Hidden, Precision, Save, StepInputs};
use ferrotron::model::{Limits, Model, Network};
use models::{Random, model, tiny};

const BLOCK_LEN: usize = 4;
/// Positions of a sequence at most, and its blocks.
const LENGTH: usize = 32;
const BLOCKS: u32 = (LENGTH / BLOCK_LEN) as u32;

fn limits() -> Limits {
    Limits {
        step_tokens: 64,
        logit_rows: 64,
        slots: 4,
        blocks: 3 * BLOCKS as usize,
        block_len: BLOCK_LEN,
        lanes: 2,
        drafts: 3,
        ..Limits::default()
    }
}

/// A model whose drafts come with their logits.
trait Drafter: Network {
    fn logits(&mut self, inputs: &DraftInputs) -> Vec<f32>;
}

impl<B: Backend> Drafter for Model<B> {
    fn logits(&mut self, inputs: &DraftInputs) -> Vec<f32> {
        self.forward_draft(inputs).to_vec()
    }
}

fn reference() -> Model<Reference> {
    model(Reference::new(Precision::F32), &tiny(), limits())
}

fn cpu(isa: Isa) -> Model<Cpu> {
    model(Cpu::with_isa(Precision::F32, 2, isa).expect("threads start"), &tiny(), limits())
}

fn drafters() -> Vec<Box<dyn Drafter>> {
    let mut all: Vec<Box<dyn Drafter>> = vec![Box::new(reference())];
    all.extend(Isa::available().into_iter().map(|isa| Box::new(cpu(isa)) as Box<dyn Drafter>));
    all
}

fn ids(model: &dyn Drafter, seed: u64) -> Vec<u32> {
    let mut random = Random(seed);
    (0..LENGTH).map(|_| random.below(model.vocab_size()) as u32).collect()
}

/// Appends positions `from..to` of `ids` as sequence `slot`, whose blocks are its own. All rows are answered.
fn put(inputs: &mut StepInputs, ids: &[u32], (from, to): (usize, usize), slot: u32, visible_from: u32) {
    let blocks = slot * BLOCKS..(slot + 1) * BLOCKS;
    inputs.push(slot, from, ids[from..to].iter().copied(), blocks).visible_from = visible_from;
    inputs.logit_rows = (0..inputs.tokens.len() as u32).collect();
}

fn step(ids: &[u32], range: (usize, usize), slot: u32) -> StepInputs {
    let mut inputs = StepInputs::default();
    put(&mut inputs, ids, range, slot, 0);
    inputs
}

/// Entries of `range`, the first of which joins the vector `hidden(0)`, the second `hidden(1)` …
fn entries(ids: &[u32], range: (usize, usize), slot: u32, hidden: impl Fn(u32) -> Hidden) -> DraftInputs {
    let mut inputs = DraftInputs::default();
    put(&mut inputs.step, ids, range, slot, 1);
    inputs.hidden = (0..(range.1 - range.0) as u32).map(hidden).collect();
    inputs
}

/// Draft logits of every entry of `ids` from one step and one pass.
fn whole(model: &mut dyn Drafter, ids: &[u32], slot: u32) -> Vec<f32> {
    let end = ids.len();
    model.step(&step(ids, (0, end - 1), slot)).expect("the step runs");
    model.logits(&entries(ids, (1, end), slot, Hidden::Step))
}

fn argmax(row: &[f32]) -> u32 {
    (0..row.len()).fold(0, |best, i| if row[i] > row[best] { i } else { best }) as u32
}

/// Three passes after one whose last row's logits are `logits`, each entry the draft of the one before; the logits of
/// all, one after the other. `from` is the row of the last pass to go on from.
fn recurse(model: &mut dyn Drafter, mut logits: Vec<f32>, from: u32, position: usize, slot: u32) -> Vec<f32> {
    let vocab = model.vocab_size();
    let mut ids = vec![0; position];
    for i in 0..3 {
        ids.push(argmax(&logits[logits.len() - vocab..]));
        let row = if i == 0 { from } else { 0 };
        let range = (position + i, position + i + 1);
        let pass = entries(&ids, range, slot, |_| Hidden::Draft(row));
        logits.extend(model.logits(&pass));
    }
    logits.split_off(logits.len() - 3 * vocab)
}

#[test]
fn entries_of_a_chunked_prompt_are_those_of_the_whole() {
    for mut model in drafters() {
        let ids = &ids(&*model, 1)[..20];
        let (vocab, expected) = (model.vocab_size(), whole(&mut *model, ids, 0));
        for chunk in [1, 3, 7] {
            let mut got = Vec::new();
            for from in (0..19).step_by(chunk) {
                let to = (from + chunk).min(19);
                model.step(&step(ids, (from, to), 1)).expect("the step runs");
                got.extend(model.logits(&entries(ids, (from + 1, to + 1), 1, Hidden::Step)));
                // Drafts of drafts are cached where the next entries go, and leave nothing behind.
                recurse(&mut *model, got[got.len() - vocab..].to_vec(), (to - from) as u32 - 1, to + 1, 1);
            }
            assert_eq!(got, expected, "chunks of {chunk}");
        }
    }
}

#[test]
fn one_step_serves_several_passes() {
    for mut model in drafters() {
        let ids = &ids(&*model, 2)[..20];
        let expected = whole(&mut *model, ids, 0);
        let mut got = model.logits(&entries(ids, (1, 8), 1, Hidden::Step));
        let mut silent = entries(ids, (8, 11), 1, |i| Hidden::Step(7 + i));
        let vocab = model.vocab_size();
        silent.step.logit_rows.clear();
        assert!(model.logits(&silent).is_empty());
        got.extend_from_slice(&expected[7 * vocab..10 * vocab]);
        got.extend(model.logits(&entries(ids, (11, 20), 1, |i| Hidden::Step(10 + i))));
        assert_eq!(got, expected);
    }
}

#[test]
fn an_entry_of_a_batch_is_the_entry_alone() {
    for mut model in drafters() {
        let all = [&ids(&*model, 3)[..9], &ids(&*model, 4)[..14]];
        let vocab = model.vocab_size();
        let alone = [0, 1].map(|i| {
            let logits = whole(&mut *model, all[i], 0);
            let last = logits[logits.len() - vocab..].to_vec();
            let rows = (logits.len() / vocab) as u32;
            (logits, recurse(&mut *model, last, rows - 1, all[i].len(), 0))
        });
        let mut batch = StepInputs::default();
        let mut pass = DraftInputs::default();
        for (slot, ids) in all.iter().enumerate() {
            put(&mut batch, ids, (0, ids.len() - 1), slot as u32, 0);
            put(&mut pass.step, ids, (1, ids.len()), slot as u32, 1);
        }
        pass.hidden = (0..pass.step.tokens.len() as u32).map(Hidden::Step).collect();
        model.step(&batch).expect("the step runs");
        assert_eq!(model.logits(&pass), [&alone[0].0[..], &alone[1].0].concat());
        let mut rows = [7, 20];
        let mut drafts = [0, 1].map(|i| argmax(&alone[i].0[alone[i].0.len() - vocab..]));
        for depth in 0..3 {
            let mut pass = DraftInputs::default();
            for (slot, ids) in all.iter().enumerate() {
                let at = ids.len() + depth;
                let mut tokens = vec![0; at];
                tokens.push(drafts[slot]);
                put(&mut pass.step, &tokens, (at, at + 1), slot as u32, 1);
            }
            pass.hidden = rows.map(Hidden::Draft).to_vec();
            let logits = model.logits(&pass);
            for slot in 0..2 {
                let own = &logits[slot * vocab..][..vocab];
                assert_eq!(own, &alone[slot].1[depth * vocab..][..vocab], "draft {depth} of {slot}");
                drafts[slot] = argmax(own);
            }
            rows = [0, 1];
        }
    }
}

/// Positions 0 to 8 are shared, 9 on resumed: the entry at 9 joins what the checkpoint kept of position 8.
#[test]
fn a_resumed_checkpoint_drafts_as_if_it_had_never_stopped() {
    for mut model in drafters() {
        let ids = &ids(&*model, 5)[..20];
        let (vocab, expected) = (model.vocab_size(), whole(&mut *model, ids, 0));
        let mut first = step(ids, (0, 11), 1);
        first.saves.push(Save { sequence: 0, after: 9, to: 3 });
        model.step(&first).expect("the step runs");
        model.logits(&entries(ids, (1, 12), 1, Hidden::Step));

        let mut resumed = step(ids, (9, 19), 2);
        resumed.sequences[0].source = 3;
        resumed.blocks[..2].copy_from_slice(&[BLOCKS, BLOCKS + 1]);
        resumed.block_copies.push(BlockCopy { from: BLOCKS + 2, to: 2 * BLOCKS + 2 });
        model.step(&resumed).expect("the step runs");
        let hidden = |i| if i == 0 { Hidden::Saved(3) } else { Hidden::Step(i - 1) };
        let mut pass = entries(ids, (9, 20), 2, hidden);
        pass.step.blocks.copy_from_slice(&resumed.blocks);
        assert_eq!(model.logits(&pass), expected[8 * vocab..]);
    }
}

#[test]
fn drafts_of_drafts_are_those_of_the_reference() {
    let logits = |model: &mut dyn Drafter| {
        let ids = &ids(model, 6)[..12];
        let logits = whole(model, ids, 0);
        let last = logits[logits.len() - model.vocab_size()..].to_vec();
        recurse(model, last, 10, 12, 0)
    };
    let expected = logits(&mut reference());
    let scale = expected.iter().fold(0.0f32, |m, v| m.max(v.abs()));
    for isa in Isa::available() {
        for (got, expected) in logits(&mut cpu(isa)).iter().zip(&expected) {
            assert!((got - expected).abs() <= 1e-4 * scale, "{}: {got}, not {expected}", isa.name());
        }
    }
}

#[test]
fn a_draft_is_the_likeliest_id() {
    let mut model = cpu(Isa::detect());
    let ids = &ids(&model, 7)[..12];
    let expected: Vec<_> = whole(&mut model, ids, 0).chunks_exact(model.vocab_size()).map(argmax).collect();
    let mut drafts = vec![99];
    assert!(model.can_draft());
    model.draft(&entries(ids, (1, 12), 0, Hidden::Step), &mut drafts).expect("the pass runs");
    assert_eq!(drafts, expected);
}
