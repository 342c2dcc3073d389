use std::path::Path;

use super::*;
use crate::backend::host::Buffer;
use crate::backend::{Hidden, Precision, reference::Reference};
use crate::model::load;
use crate::ops;
use crate::weights::{Checkpoint, Source};

fn tiny() -> Model<Reference> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tiny");
    let checkpoint = Checkpoint::open(Source::folder(folder)).unwrap();
    let config = ModelConfig::from_json(&checkpoint.file("config.json").unwrap().unwrap()).unwrap();
    let fields = load::load(&config, &checkpoint, &|_| {}).unwrap().fields;
    let limits =
        Limits { step_tokens: 16, logit_rows: 1, slots: 1, blocks: 8, block_len: 4, ..Limits::default() };
    Model::new(Reference::new(Precision::F32), config, fields, limits).unwrap()
}

fn rms(x: &[f32], weight: &[f32], eps: f32) -> Vec<f32> {
    let mut out = vec![0.0; x.len()];
    ops::rms_norm::reference(x, weight, eps, &mut out);
    out
}

/// The drafter over all entries from position 1 on at once, from their hidden vectors and in blocks of its own: the
/// last entry's output and logits. Spec nemotron-h §3.1.
fn compose(model: &mut Model<Reference>, tokens: &[u32], hidden: &[Vec<f32>]) -> (Vec<f32>, Vec<f32>) {
    let Model { backend, config, body, mtp, work, state, .. } = model;
    let (mtp, eps, h) = (mtp.as_ref().unwrap(), config.norm_eps, config.hidden_size);
    let mut x = Buffer::new(tokens.len(), h);
    let mut row = vec![0.0; 2 * h];
    for (i, (token, hidden)) in tokens.iter().zip(hidden).enumerate() {
        let mut embedding = vec![0.0; h];
        ops::embed::reference(&body.embeddings, &[*token], &mut embedding);
        let joined = [rms(&embedding, &mtp.enorm, eps), rms(hidden, &mtp.hnorm, eps)].concat();
        ops::linear::reference(&mtp.eh_proj, &joined, x.row_mut(i), Epilogue::Store, &mut row);
    }
    let mut inputs = StepInputs::single(tokens, 1, 4);
    inputs.sequences[0].visible_from = 1;
    inputs.blocks.iter_mut().for_each(|block| *block += 4);
    for (i, block) in mtp.layers.iter().enumerate() {
        layer(backend, block, body.layers.len() + i, eps, &mut x, work, state, &inputs);
    }
    let output = rms(x.row(tokens.len() - 1), &mtp.final_norm, eps);
    let mut logits = vec![0.0; config.vocab_size];
    ops::linear::reference(&body.lm_head, &output, &mut logits, Epilogue::Store, &mut row[..h]);
    (output, logits)
}

#[test]
fn a_draft_of_a_draft_joins_the_output_it_came_from() {
    let mut model = tiny();
    let mut tokens = vec![700, 31, 5, 900, 44, 12, 650, 3, 77];
    model.forward(&StepInputs::single(&tokens[..8], 0, 4));
    let (eps, norm_f) = (model.config.norm_eps, model.body.norm_f.clone());
    let mut hidden: Vec<_> = (0..8).map(|i| rms(model.x.row(i), &norm_f, eps)).collect();
    let mut pass = DraftInputs::single(&tokens[1..], 1, 4);
    for depth in 0..4 {
        let got = model.forward_draft(&pass).to_vec();
        let (output, expected) = compose(&mut model, &tokens[1..], &hidden);
        assert_eq!(got, expected, "draft {depth}");
        let mut draft = Vec::new();
        Buffer { width: got.len(), data: got.into() }.largest(1, &mut draft);
        pass = DraftInputs::single(&draft, tokens.len(), 4);
        pass.hidden[0] = Hidden::Draft(0);
        tokens.extend(draft);
        hidden.push(output);
    }
}
