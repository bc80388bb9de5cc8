//! The memory checker: a working set that is verified and rewritten for ever.
//!
//! A page holds its index, a sequence number, words derived from both, and a
//! checksum over them. The expected sequence number of each page is kept
//! apart, so that a page from an older moment is found, too.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use super::Findings;

const WORDS: usize = 512;
/// Pages checked between two sleeps.
const SLICE: usize = 32;
/// Usual sleep between two slices, in milliseconds.
pub const PAUSE_MS: u64 = 50;

struct Page([u64; WORDS]);

impl Page {
    fn write(&mut self, index: u64, sequence: u64) {
        let words = &mut self.0;
        words[0] = index;
        words[1] = sequence;
        let mut state = index.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ sequence;
        for word in &mut words[2..WORDS - 1] {
            state = step(state);
            *word = state;
        }
        words[WORDS - 1] = sum(&words[..WORDS - 1]);
    }

    fn good(&self, index: u64, sequence: u64) -> bool {
        let words = &self.0;
        words[0] == index && words[1] == sequence && words[WORDS - 1] == sum(&words[..WORDS - 1])
    }
}

fn step(mut state: u64) -> u64 {
    state = state.wrapping_add(0x2545_f491_4f6c_dd1d);
    state ^= state << 13;
    state ^= state >> 7;
    state ^ (state << 17)
}

fn sum(words: &[u64]) -> u64 {
    words.iter().fold(1, |sum, word| {
        sum.rotate_left(5) ^ word.wrapping_mul(0xff51_afd7_ed55_8ccd)
    })
}

/// Starts checking `mib` MiB, with sleep of `pause` between two slices.
pub fn start(findings: Arc<Findings>, mib: u64, pause: Duration) {
    thread::spawn(move || {
        let count = (mib as usize) << 8;
        let mut pages: Vec<Page> = Vec::with_capacity(count);
        let mut sequences = vec![1u64; count];
        for index in 0..count {
            let mut page = Page([0; WORDS]);
            page.write(index as u64, 1);
            pages.push(page);
        }
        if let Ok(mut memory) = findings.memory.lock() {
            memory.pages = count as u64;
        }
        if count == 0 {
            return;
        }
        loop {
            for start in (0..count).step_by(SLICE) {
                let mut errors = 0;
                let end = (start + SLICE).min(count);
                for index in start..end {
                    let page = &mut pages[index];
                    if !page.good(index as u64, sequences[index]) {
                        errors += 1;
                    }
                    sequences[index] += 1;
                    page.write(index as u64, sequences[index]);
                }
                if let Ok(mut memory) = findings.memory.lock() {
                    memory.verified += (end - start) as u64;
                    memory.errors += errors;
                    memory.passes += u64::from(end == count);
                }
                thread::sleep(pause);
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_changed_bit_an_old_page_and_a_moved_page_are_found() {
        let mut page = Page([0; WORDS]);
        page.write(7, 3);
        assert!(page.good(7, 3));
        assert!(!page.good(7, 4), "an older page");
        assert!(!page.good(8, 3), "another page");
        for word in 0..WORDS {
            page.0[word] ^= 1 << (word % 64);
            assert!(!page.good(7, 3), "word {word}");
            page.0[word] ^= 1 << (word % 64);
        }
    }
}
