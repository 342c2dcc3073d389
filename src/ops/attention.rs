//! Grouped-query attention over paged K/V, causal, with no position encoding of any kind.

use super::{Cost, cells::Cells};
use crate::backend::StepInputs;
use crate::model::config::Attention;

/// The cache of one attention layer: blocks of `[kv_heads, block_len, head_dim]`, keys and values apart,
/// so that one head's keys of a block are contiguous.
#[derive(Debug, Clone, Copy)]
pub struct Pages {
    pub block_len: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
}

impl Pages {
    pub fn new(shape: &Attention, block_len: usize) -> Self {
        Pages { block_len, kv_heads: shape.kv_heads, head_dim: shape.head_dim }
    }

    /// Elements of one block of keys (or of values).
    pub fn block_size(&self) -> usize {
        self.block_len * self.kv_heads * self.head_dim
    }

    /// Where the vector of `position` of a sequence with block table `blocks` starts.
    #[inline]
    pub fn offset(&self, blocks: &[u32], position: usize, kv_head: usize) -> usize {
        let block = blocks[position / self.block_len] as usize;
        let row = kv_head * self.block_len + position % self.block_len;
        block * self.block_size() + row * self.head_dim
    }
}

/// `q` [T, heads * D] · `k`, `v` [T, kv * D] are first written to `keys`, `values` (pages) · `out` [T, heads * D].
pub fn reference(
    shape: &Attention,
    inputs: &StepInputs,
    pages: Pages,
    q: &[f32],
    k: &[f32],
    v: &[f32],
    keys: &mut Cells,
    values: &mut Cells,
    out: &mut [f32],
) {
    let &Attention { heads, kv_heads, head_dim: dim } = shape;
    let scale = 1.0 / (dim as f64).sqrt();
    for sequence in &inputs.sequences {
        let blocks = inputs.blocks_of(sequence);
        for i in 0..sequence.count as usize {
            let token = sequence.first as usize + i;
            for head in 0..kv_heads {
                let to = pages.offset(blocks, sequence.past as usize + i, head);
                let from = (token * kv_heads + head) * dim;
                keys.write(to, &k[from..][..dim]);
                values.write(to, &v[from..][..dim]);
            }
        }
        for i in 0..sequence.count as usize {
            let token = sequence.first as usize + i;
            let visible = sequence.visible_from as usize..sequence.past as usize + i + 1;
            for head in 0..heads {
                let kv_head = head / (heads / kv_heads);
                let query = &q[(token * heads + head) * dim..][..dim];
                let mut scores: Vec<f64> = visible
                    .clone()
                    .map(|position| {
                        let key = pages.offset(blocks, position, kv_head);
                        let product = |j| f64::from(query[j]) * f64::from(keys.get(key + j));
                        (0..dim).map(product).sum::<f64>() * scale
                    })
                    .collect();
                let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                scores.iter_mut().for_each(|s| *s = (*s - max).exp());
                let total = scores.iter().sum::<f64>();
                for j in 0..dim {
                    let sum = visible
                        .clone()
                        .zip(&scores)
                        .map(|(p, score)| score * f64::from(values.get(pages.offset(blocks, p, kv_head) + j)))
                        .sum::<f64>();
                    out[(token * heads + head) * dim + j] = (sum / total) as f32;
                }
            }
        }
    }
}

/// `element` is the bytes of one cached number.
pub fn cost(shape: &Attention, inputs: &StepInputs, element: usize) -> Cost {
    let width = shape.kv_heads * shape.head_dim;
    let mut cost = Cost::default();
    for s in &inputs.sequences {
        let (past, count) = ((s.past - s.visible_from) as usize, s.count as usize);
        cost.state += (2 * width * (past + 2 * count) * element) as u64;
        cost.activations += (count * (2 * shape.heads * shape.head_dim + 2 * width) * 4) as u64;
        let pairs = count * past + count * (count + 1) / 2;
        cost.flops += (4 * pairs * shape.heads * shape.head_dim) as u64;
    }
    cost
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::SequenceInputs;
    use crate::ops::lines::Lines;

    #[test]
    fn equal_keys_average_the_values_seen_so_far() {
        let shape = Attention { heads: 2, kv_heads: 1, head_dim: 1 };
        let pages = Pages::new(&shape, 2);
        let inputs = StepInputs {
            tokens: vec![0; 3],
            sequences: vec![SequenceInputs {
                slot: 0,
                first: 0,
                count: 3,
                past: 0,
                first_block: 0,
                block_count: 2,
                ..SequenceInputs::default()
            }],
            blocks: vec![1, 0],
            ..StepInputs::default()
        };
        let pool = || Cells::F32(Lines::from(&[9.0; 4][..]));
        let (mut keys, mut values, mut out) = (pool(), pool(), vec![0.0; 6]);
        let q = [1.0; 6];
        reference(&shape, &inputs, pages, &q, &[0.0; 3], &[3.0, 5.0, 10.0], &mut keys, &mut values, &mut out);
        assert_eq!(out, [3.0, 3.0, 4.0, 4.0, 6.0, 6.0]);
        assert_eq!(
            values,
            Cells::F32(Lines::from(&[10.0, 9.0, 3.0, 5.0][..])),
            "pages follow the block table"
        );
    }
}
