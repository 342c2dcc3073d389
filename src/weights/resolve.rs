//! Names to weights: what is stored under a name decides how it is read; a recipe only cross-checks.

use bytes::Bytes;
use safetensors::Dtype;

use super::linear::NVFP4_BLOCK;
use super::{Blocks, Checkpoint, Error, Format, Linear, RowOrder, Stored, codec};

impl Checkpoint {
    /// The linear weight `name` (without `.weight`), `[rows, cols]`, in whatever format it is stored.
    ///
    /// BF16, F16, F32: `name.weight`. FP8: `.weight` F8_E4M3 and `.weight_scale`. NVFP4: `.weight` U8,
    /// `.weight_scale` and `.weight_scale_2` (ModelOpt), or `.weight_packed`, `.weight_scale` and the reciprocal
    /// `.weight_global_scale` (compressed-tensors). Blocks: `name.weight` and perhaps `.scale`. Scalars may have rank 0 or
    /// shape `[1]`. Rows that are stored in another order are copied into theirs.
    pub fn linear(&self, name: &str, rows: usize, cols: usize) -> Result<Linear, Error> {
        let linear = self.linear_as_stored(name, rows, cols)?;
        match self.row_order(&format!("{name}.weight")) {
            RowOrder::AsIs => Ok(linear),
            order => Ok(linear.reordered(|row| order.stored_at(row))),
        }
    }

    /// As [`Checkpoint::linear`] with rows in the order they are stored in, so that no data is touched.
    pub fn linear_as_stored(&self, name: &str, rows: usize, cols: usize) -> Result<Linear, Error> {
        let packed = format!("{name}.weight_packed");
        if self.contains(&packed) {
            let reciprocal = self.scale(&format!("{name}.weight_global_scale"))?;
            return self.nvfp4(name, &packed, rows, cols, 1.0 / reciprocal);
        }
        let weight = format!("{name}.weight");
        match self.stored(&weight) {
            Stored::Tensor(Dtype::U8, _) => {
                let global_scale = self.scale(&format!("{name}.weight_scale_2"))?;
                self.nvfp4(name, &weight, rows, cols, global_scale)
            }
            Stored::Tensor(Dtype::F8_E4M3, _) => {
                let data = self.exact(&weight, Dtype::F8_E4M3, &[rows, cols])?;
                let scale = self.scale(&format!("{name}.weight_scale"))?;
                Ok(Linear { rows, cols, format: Format::Fp8 { scale }, data })
            }
            Stored::Blocks(..) => {
                let (blocks, data) = self.blocks(&weight, &[rows, cols])?;
                let scale = self.block_scales(&format!("{name}.scale"), 1)?[0];
                Ok(Linear { rows, cols, format: Format::Blocks { blocks, scale }, data })
            }
            _ => {
                let (dtype, data) = self.float(&weight, &[&[rows, cols]])?;
                Ok(Linear { rows, cols, format: format_of(dtype), data })
            }
        }
    }

    /// `count` weights stored as one tensor `name` `[count, rows, cols]` of BF16, F16, F32 or blocks, which `name.scale`
    /// may have a factor for: one, or one for each weight.
    pub fn stacked(&self, name: &str, count: usize, rows: usize, cols: usize) -> Result<Vec<Linear>, Error> {
        let shape = [count, rows, cols];
        let (data, formats) = match self.stored(name) {
            Stored::Blocks(..) => {
                let (blocks, data) = self.blocks(name, &shape)?;
                let scales = self.block_scales(&format!("{name}.scale"), count)?;
                (data, scales.into_iter().map(|scale| Format::Blocks { blocks, scale }).collect())
            }
            _ => {
                let (dtype, data) = self.float(name, &[&shape])?;
                (data, vec![format_of(dtype); count])
            }
        };
        let each = data.len() / count.max(1);
        let one = |(i, format)| Linear { rows, cols, format, data: data.slice(i * each..(i + 1) * each) };
        Ok(formats.into_iter().enumerate().map(one).collect())
    }

    fn blocks(&self, name: &str, shape: &[usize]) -> Result<(Blocks, Bytes), Error> {
        self.in_blocks(name, shape).ok_or_else(|| self.unexpected(name, format!("blocks {shape:?}")))
    }

    /// Factors of `count` weights in blocks: 1 where the file has none.
    fn block_scales(&self, name: &str, count: usize) -> Result<Vec<f32>, Error> {
        if !self.contains(name) {
            return Ok(vec![1.0; count]);
        }
        let mut scales = self.values(name, &[&[], &[1], &[count]])?;
        if let Some(&got) = scales.iter().find(|s| !s.is_finite()) {
            return Err(Error::Value { tensor: name.into(), expected: "a finite scale", got });
        }
        scales.resize(count, scales[0]);
        Ok(scales)
    }

    /// A small tensor as `f32`, from BF16, F16 or F32; its shape must be one of `shapes`.
    pub fn values(&self, name: &str, shapes: &[&[usize]]) -> Result<Vec<f32>, Error> {
        let (dtype, data) = self.float(name, shapes)?;
        Ok(match dtype {
            Dtype::F32 => words(&data, f32::from_le_bytes),
            Dtype::F16 => words(&data, |b| codec::f16_to_f32(u16::from_le_bytes(b))),
            _ => words(&data, |b| codec::bf16_to_f32(u16::from_le_bytes(b))),
        })
    }

    /// The vector `name` [len] as `f32`.
    pub fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>, Error> {
        self.values(name, &[&[len]])
    }

    /// A positive finite scalar of F32 (or BF16, F16), rank 0 or `[1]`.
    pub fn scale(&self, name: &str) -> Result<f32, Error> {
        let value = self.values(name, &[&[], &[1]])?[0];
        if value.is_finite() && value > 0.0 {
            Ok(value)
        } else {
            Err(Error::Value { tensor: name.into(), expected: "a finite scale above 0", got: value })
        }
    }

    fn nvfp4(
        &self,
        name: &str,
        codes: &str,
        rows: usize,
        cols: usize,
        global_scale: f32,
    ) -> Result<Linear, Error> {
        if !cols.is_multiple_of(NVFP4_BLOCK) {
            let expected = format!("a width that is a multiple of {NVFP4_BLOCK} for NVFP4, not {cols}");
            return Err(Error::Tensor { tensor: codes.into(), expected, got: self.stored(codes) });
        }
        let data = self.exact(codes, Dtype::U8, &[rows, cols / 2])?;
        let scales =
            self.exact(&format!("{name}.weight_scale"), Dtype::F8_E4M3, &[rows, cols / NVFP4_BLOCK])?;
        Ok(Linear { rows, cols, format: Format::Nvfp4 { scales, global_scale }, data })
    }

    /// The bytes of a tensor of exactly this dtype and shape.
    fn exact(&self, name: &str, dtype: Dtype, shape: &[usize]) -> Result<Bytes, Error> {
        match self.tensor(name) {
            Some(t) if t.dtype == dtype && t.shape == shape => Ok(t.bytes),
            _ => Err(self.unexpected(name, format!("{dtype:?} {shape:?}"))),
        }
    }

    /// The bytes of a BF16, F16 or F32 tensor of one of these shapes.
    fn float(&self, name: &str, shapes: &[&[usize]]) -> Result<(Dtype, Bytes), Error> {
        match self.tensor(name) {
            Some(t)
                if matches!(t.dtype, Dtype::BF16 | Dtype::F16 | Dtype::F32)
                    && shapes.iter().any(|s| *s == t.shape) =>
            {
                Ok((t.dtype, t.bytes))
            }
            _ => {
                let shapes: Vec<_> = shapes.iter().map(|s| format!("{s:?}")).collect();
                Err(self.unexpected(name, format!("BF16, F16 or F32 {}", shapes.join(" or "))))
            }
        }
    }

    fn unexpected(&self, name: &str, expected: String) -> Error {
        Error::Tensor { tensor: name.into(), expected, got: self.stored(name) }
    }
}

/// The format of an unquantised dtype that `float` let through.
fn format_of(dtype: Dtype) -> Format {
    match dtype {
        Dtype::F32 => Format::F32,
        Dtype::F16 => Format::F16,
        _ => Format::BF16,
    }
}

fn words<const N: usize>(data: &[u8], decode: impl Fn([u8; N]) -> f32) -> Vec<f32> {
    let (words, _) = data.as_chunks::<N>();
    words.iter().map(|&w| decode(w)).collect()
}
