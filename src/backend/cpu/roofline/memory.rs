//! Memory to read from: too large for any cache, in huge pages where the system has them.

use std::io;

/// Whatever the caches hold, this is not it.
const AT_LEAST: usize = 512 << 20;
/// Enough for the largest caches, and no more than a small machine has.
const AT_MOST: usize = 4 << 30;
/// How many times the last cache is read.
const CACHES: usize = 8;

/// Bytes to read in all.
pub fn size() -> usize {
    (CACHES * last_cache()).clamp(AT_LEAST, AT_MOST)
}

/// `bytes` of words that the calling thread has written.
pub fn share(bytes: usize) -> io::Result<Vec<u64>> {
    let mut words = Vec::new();
    words.try_reserve_exact(bytes / 8).map_err(|_| io::ErrorKind::OutOfMemory)?;
    ask_for_huge_pages(&mut words);
    words.resize(bytes / 8, 1);
    Ok(words)
}

#[cfg(target_os = "linux")]
fn ask_for_huge_pages(words: &mut Vec<u64>) {
    const PAGE: usize = 2 << 20;
    let room = words.spare_capacity_mut();
    let skipped = room.as_ptr().cast::<u8>().align_offset(PAGE);
    let bytes = size_of_val(room).saturating_sub(skipped) / PAGE * PAGE;
    if bytes > 0 {
        // SAFETY: the range lies inside what `words` has reserved; the advice changes no content, and where it is
        // refused pages stay small.
        unsafe {
            libc::madvise(room.as_mut_ptr().cast::<u8>().add(skipped).cast(), bytes, libc::MADV_HUGEPAGE);
        }
    }
}

#[cfg(not(target_os = "linux"))]
fn ask_for_huge_pages(_: &mut Vec<u64>) {}

/// Bytes of the last cache of the first core; 0 where the system does not say.
fn last_cache() -> usize {
    let size = |index: u32| {
        let path = format!("/sys/devices/system/cpu/cpu0/cache/index{index}/size");
        parse(std::fs::read_to_string(path).ok()?.trim())
    };
    (0..8).map_while(size).max().unwrap_or(0)
}

/// `32768K` as bytes.
fn parse(text: &str) -> Option<usize> {
    let (digits, unit) = match text.strip_suffix(['K', 'k']) {
        Some(digits) => (digits, 1 << 10),
        None => text.strip_suffix(['M', 'm']).map_or((text, 1), |digits| (digits, 1 << 20)),
    };
    digits.parse::<usize>().ok()?.checked_mul(unit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_of_caches_are_read() {
        assert_eq!([parse("32768K"), parse("4M"), parse("512")], [Some(32 << 20), Some(4 << 20), Some(512)]);
        assert_eq!([parse(""), parse("K"), parse("many")], [None; 3]);
        assert!((AT_LEAST..=AT_MOST).contains(&size()));
    }
}
