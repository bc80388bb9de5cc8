//! Numbers of things, in sentences.

use std::fmt::Display;

/// A number with its noun: `1 VM`, `2 VMs`, `0 VMs`. Only for nouns that take an s.
pub fn counted<N: Display + PartialEq + From<u8>>(number: N, noun: &str) -> String {
    let plural = if number == N::from(1) { "" } else { "s" };
    format!("{number} {noun}{plural}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_is_told_from_many() {
        assert_eq!(counted(1usize, "VM"), "1 VM");
        assert_eq!(counted(0u32, "file system"), "0 file systems");
        assert_eq!(counted(2u64, "sample"), "2 samples");
    }
}
