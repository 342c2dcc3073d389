//! Numbers that start on a cache line, on large pages where there are enough of them.
//!
//! A register of 64 bytes that is read across the border of two lines costs two reads; what the allocator returns
//! lies 16 bytes past such a border.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::fmt;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

use half::{bf16, f16};

/// Bytes of a cache line on every machine this runs on.
const LINE: usize = 64;
/// A large page.
const HUGE: usize = 2 << 20;

/// Types of which every byte pattern is a value and zeros are zero.
pub trait Plain: Copy + Send + Sync + 'static {}
impl Plain for f32 {}
impl Plain for f16 {}
impl Plain for bf16 {}
impl Plain for u32 {}
impl Plain for u16 {}
impl Plain for u8 {}

/// A slice of its own, aligned to a cache line.
pub struct Lines<T> {
    data: NonNull<T>,
    len: usize,
    owned: PhantomData<T>,
}

// SAFETY: the memory is this value's alone, and T may be sent and shared.
unsafe impl<T: Send> Send for Lines<T> {}
// SAFETY: as above.
unsafe impl<T: Sync> Sync for Lines<T> {}

impl<T> Lines<T> {
    fn layout(len: usize) -> Layout {
        let array = Layout::array::<T>(len).and_then(|array| array.align_to(LINE));
        array.expect("a length that fits in memory")
    }
}

impl<T: Plain> Lines<T> {
    pub fn zeros(len: usize) -> Self {
        let layout = Self::layout(len);
        if layout.size() == 0 {
            return Self { data: NonNull::dangling(), len, owned: PhantomData };
        }
        // SAFETY: the layout has a size.
        let memory = unsafe { alloc_zeroed(layout) };
        let Some(data) = NonNull::new(memory.cast()) else { handle_alloc_error(layout) };
        #[cfg(target_os = "linux")]
        if layout.size() >= HUGE {
            // Advice, from the first page that is whole. If it is not taken, pages stay small.
            let skipped = memory.align_offset(4096);
            // SAFETY: inside the allocation, which is larger than a page.
            unsafe {
                libc::madvise(memory.add(skipped).cast(), layout.size() - skipped, libc::MADV_HUGEPAGE)
            };
        }
        Self { data, len, owned: PhantomData }
    }
}

impl<T> Drop for Lines<T> {
    fn drop(&mut self) {
        let layout = Self::layout(self.len);
        if layout.size() > 0 {
            // SAFETY: allocated with this layout and dropped once.
            unsafe { dealloc(self.data.as_ptr().cast(), layout) };
        }
    }
}

impl<T> Deref for Lines<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: `len` values from the allocation's start, zeros at first; of none any aligned pointer will do.
        unsafe { std::slice::from_raw_parts(self.data.as_ptr(), self.len) }
    }
}

impl<T> DerefMut for Lines<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as above, and borrowed alone.
        unsafe { std::slice::from_raw_parts_mut(self.data.as_ptr(), self.len) }
    }
}

impl<T: Plain> From<&[T]> for Lines<T> {
    fn from(values: &[T]) -> Self {
        let mut lines = Self::zeros(values.len());
        lines.copy_from_slice(values);
        lines
    }
}

impl<T: Plain> From<Vec<T>> for Lines<T> {
    fn from(values: Vec<T>) -> Self {
        Self::from(&values[..])
    }
}

impl<T: Plain> Clone for Lines<T> {
    fn clone(&self) -> Self {
        Self::from(&**self)
    }
}

impl<T: Plain> Default for Lines<T> {
    fn default() -> Self {
        Self::zeros(0)
    }
}

impl<T: PartialEq> PartialEq for Lines<T> {
    fn eq(&self, other: &Self) -> bool {
        **self == **other
    }
}

impl<T: fmt::Debug> fmt::Debug for Lines<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (**self).fmt(f)
    }
}

impl<'a, T> IntoIterator for &'a Lines<T> {
    type Item = &'a T;
    type IntoIter = std::slice::Iter<'a, T>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check<T: Plain + PartialEq + fmt::Debug>(len: usize, zero: T, one: T) {
        let mut lines = Lines::<T>::zeros(len);
        assert_eq!((lines.len(), lines.as_ptr().align_offset(LINE)), (len, 0));
        assert!(lines.iter().all(|value| *value == zero));
        lines.fill(one);
        let copy = lines.clone();
        assert_eq!((copy.as_ptr().align_offset(LINE), &copy), (0, &lines));
        lines.iter_mut().take(1).for_each(|value| *value = zero);
        assert_eq!(copy == lines, len == 0, "a copy is its own");
    }

    #[test]
    fn numbers_of_every_kind_start_on_a_line() {
        for len in [1, 15, 16, 1000, 3 << 20] {
            check(len, 0.0f32, 1.0);
            check(len, 0u8, 1);
            check(len, 0u16, 1);
            check(len, 0u32, 1);
            check(len, f16::ZERO, f16::ONE);
            check(len, bf16::ZERO, bf16::ONE);
        }
    }

    #[test]
    fn nothing_has_no_memory() {
        let none = Lines::<f32>::zeros(0);
        assert!(none.is_empty() && none.clone().is_empty() && Lines::<f32>::default() == none);
    }
}
