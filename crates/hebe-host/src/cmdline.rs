//! Kernel command lines: what must be the same in the next kernel's.

use serde::Serialize;

/// One `memmap=SIZE!START`: physical memory kept out of the kernel's hands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Reservation {
    /// First physical address.
    pub start: u64,
    /// Length in bytes.
    pub len: u64,
}

impl Reservation {
    /// Whether `[start, start + len)` lies inside.
    pub fn covers(&self, start: u64, len: u64) -> bool {
        start >= self.start && start.saturating_add(len) <= self.start.saturating_add(self.len)
    }
}

impl std::fmt::Display for Reservation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let size = |bytes: u64| hebe_types::ByteSize(bytes).to_string();
        let short = |text: String| text.replace("iB", "");
        write!(
            f,
            "memmap={}!{}",
            short(size(self.len)),
            short(size(self.start))
        )
    }
}

/// The words of a command line; double quotes keep spaces together, as the
/// kernel's own parser has it.
pub fn words(cmdline: &str) -> Vec<&str> {
    let mut words = Vec::new();
    let (mut start, mut quoted) = (None, false);
    for (at, c) in cmdline.char_indices() {
        match (c.is_whitespace() && !quoted, start) {
            (true, Some(from)) => {
                words.push(&cmdline[from..at]);
                start = None;
            }
            (false, None) => start = Some(at),
            _ => {}
        }
        quoted ^= c == '"';
    }
    if let Some(from) = start {
        words.push(&cmdline[from..]);
    }
    words
}

/// A number as the kernel's `memparse` reads it: decimal, octal or hexadecimal,
/// with K, M, G or T. Returns what follows it.
fn memparse(text: &str) -> Option<(u64, &str)> {
    let (digits, radix) = match text.strip_prefix("0x").or(text.strip_prefix("0X")) {
        Some(rest) => (rest, 16),
        None => (text, 10),
    };
    let end = digits
        .find(|c: char| !c.is_digit(radix))
        .unwrap_or(digits.len());
    let number = u64::from_str_radix(&digits[..end], radix).ok()?;
    let rest = &digits[end..];
    let shift = match rest.chars().next().map(|c| c.to_ascii_uppercase()) {
        Some('K') => 10,
        Some('M') => 20,
        Some('G') => 30,
        Some('T') => 40,
        _ => return Some((number, rest)),
    };
    Some((number.checked_mul(1 << shift)?, &rest[1..]))
}

/// Every reservation of persistent-like memory on a command line, sorted.
pub fn reservations(cmdline: &str) -> Vec<Reservation> {
    let values = words(cmdline)
        .into_iter()
        .filter_map(|word| word.strip_prefix("memmap="));
    let mut found: Vec<Reservation> = values
        .flat_map(|value| value.trim_matches('"').split(','))
        .filter_map(|part| {
            let (len, rest) = memparse(part)?;
            let (start, rest) = memparse(rest.strip_prefix('!')?)?;
            rest.is_empty().then_some(Reservation { start, len })
        })
        .collect();
    found.sort();
    found
}

/// The next kernel's command line: the running one's, without what a boot
/// loader put there for itself, and with `append` unless it is there already.
pub fn next(running: &str, append: Option<&str>) -> String {
    let own = |word: &&str| !word.starts_with("BOOT_IMAGE=") && !word.starts_with("initrd=");
    let mut next: Vec<&str> = words(running).into_iter().filter(own).collect();
    for word in words(append.unwrap_or_default()) {
        if !next.contains(&word) {
            next.push(word);
        }
    }
    next.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reservations_are_read_as_the_kernel_reads_them() {
        let found =
            reservations("quiet memmap=256M!4G memmap=64M$1G memmap=0x10000000!0x200000000");
        let expected = [
            Reservation {
                start: 4 << 30,
                len: 256 << 20,
            },
            Reservation {
                start: 8 << 30,
                len: 256 << 20,
            },
        ];
        assert_eq!(found, expected);
        assert_eq!(reservations("memmap=256M!4G,1G!8G").len(), 2);
        assert_eq!(reservations("memmap=exactmap memmap=5 xmemmap=1M!2M"), []);
        assert_eq!(expected[0].to_string(), "memmap=256M!4G");
        assert!(expected[0].covers(4 << 30, 256 << 20));
        assert!(!expected[0].covers(4 << 30, (256 << 20) + 1));
    }

    #[test]
    fn the_next_command_line_repeats_nothing() {
        let running = "BOOT_IMAGE=/vmlinuz root=/dev/vda1 initrd=/i dyndbg=\"file a +p\" quiet";
        let first = next(running, Some("quiet panic=1"));
        assert_eq!(first, "root=/dev/vda1 dyndbg=\"file a +p\" quiet panic=1");
        assert_eq!(next(&first, Some("panic=1")), first);
    }
}
