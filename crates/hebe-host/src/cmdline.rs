//! Kernel command lines: what must be the same in the next kernel's.

pub use hebe_sys::dax::{Reservation, parse_memmap_reservations as reservations};
use hebe_types::ByteSize;

/// Whether the reservation covers `[start, start + len)`.
pub fn covers(reservation: &Reservation, start: u64, len: u64) -> bool {
    let end = |start: u64, len: u64| start.saturating_add(len);
    start >= reservation.start && end(start, len) <= end(reservation.start, reservation.len)
}

/// The reservation as one writes it on a command line.
pub fn written(reservation: &Reservation) -> String {
    let size = |bytes: u64| {
        let text = ByteSize(bytes).to_string();
        text.trim_end_matches('B').trim_end_matches('i').to_owned()
    };
    format!(
        "memmap={}!{}",
        size(reservation.len),
        size(reservation.start)
    )
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

/// The next kernel's command line: the running one's, without what a boot
/// loader put there for itself, and with `append` unless it is there already.
pub fn next(running: &str, append: Option<&str>) -> String {
    let own = |word: &&str| !word.starts_with("BOOT_IMAGE=") && !word.starts_with("initrd=");
    let mut next: Vec<&str> = words(running).into_iter().filter(own).collect();
    // What follows "--" is for init, not for the kernel.
    let mut end = next.iter().position(|w| *w == "--").unwrap_or(next.len());
    for word in words(append.unwrap_or_default()) {
        if !next[..end].contains(&word) {
            next.insert(end, word);
            end += 1;
        }
    }
    next.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reservation_covers_what_lies_inside() {
        let found = reservations("quiet memmap=256M!4G memmap=64M$1G");
        let [one] = found[..] else {
            panic!("one reservation, not {found:?}");
        };
        assert_eq!(written(&one), "memmap=256M!4G");
        assert!(covers(&one, 4 << 30, 256 << 20));
        assert!(!covers(&one, 4 << 30, (256 << 20) + 1));
        assert!(!covers(&one, (4 << 30) - 1, 2));
    }

    #[test]
    fn the_next_command_line_repeats_nothing() {
        let running = "BOOT_IMAGE=/vmlinuz root=/dev/vda1 initrd=/i dyndbg=\"file a +p\" quiet";
        let first = next(running, Some("quiet panic=1"));
        assert_eq!(first, "root=/dev/vda1 dyndbg=\"file a +p\" quiet panic=1");
        assert_eq!(next(&first, Some("panic=1")), first);
        assert_eq!(next("a -- init", Some("b")), "a b -- init");
    }
}
