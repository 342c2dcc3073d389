//! Memory as a device would hand it out: aligned, poisoned, and with a zone on either side that must stay untouched.

use super::Error;

/// What `cudaMalloc` promises.
const LINE_BYTES: usize = 256;
const LINE: usize = LINE_BYTES / size_of::<u16>();

/// A NaN that no conversion of ours produces, so that neither reading nor missing it goes unnoticed.
const POISON: u16 = 0x7fa5;

#[repr(C, align(256))]
#[derive(Clone, Copy)]
struct Line([u16; LINE]);

/// `len` bfloat16 values (as bits) with a poisoned line before and at least one after them.
pub struct Bf16Buffer {
    name: &'static str,
    lines: Vec<Line>,
    len: usize,
}

impl Bf16Buffer {
    /// Holds `values`. `name` is what errors call it.
    pub fn new(name: &'static str, values: &[u16]) -> Self {
        let mut buffer = Self::poisoned(name, values.len());
        for (line, values) in buffer.lines.iter_mut().skip(1).zip(values.chunks(LINE)) {
            line.0[..values.len()].copy_from_slice(values);
        }
        buffer
    }

    /// For a result: `len` values that a kernel must write, all of them NaN before it does.
    pub fn poisoned(name: &'static str, len: usize) -> Self {
        Self { name, lines: vec![Line([POISON; LINE]); len.div_ceil(LINE) + 2], len }
    }

    /// The first value, aligned to 256 bytes. Good for reads until the buffer is dropped or borrowed mutably.
    pub fn as_ptr(&self) -> *const u16 {
        self.lines.as_ptr().wrapping_add(1).cast()
    }

    /// The first value, for a kernel to write.
    pub fn as_mut_ptr(&mut self) -> *mut u16 {
        self.lines.as_mut_ptr().wrapping_add(1).cast()
    }

    /// The `len` values.
    ///
    /// # Errors
    /// [`Error::Overrun`] if something was written next to them.
    pub fn read(&self) -> Result<Vec<u16>, Error> {
        let values: Vec<u16> = self.lines.iter().flat_map(|line| line.0).collect();
        let mine = LINE..LINE + self.len;
        match (0..values.len()).find(|at| !mine.contains(at) && values[*at] != POISON) {
            Some(at) => {
                let at = at.cast_signed() - LINE.cast_signed();
                Err(Error::Overrun { name: self.name, len: self.len, at })
            }
            None => Ok(values[mine].to_vec()),
        }
    }
}
