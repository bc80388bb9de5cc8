//! Which of the machine's memory to reserve. Pure.

use hebe_types::ByteSize;
use serde::Serialize;

use crate::cmdline;

/// A devdax device lies in whole sections of memory (`SECTION_SIZE_BITS` of
/// x86-64), else the kernel leaves its edges out.
const ALIGN: u64 = 128 << 20;
/// What the host itself keeps at least.
const HOST_MIN: u64 = 1 << 30;

/// Memory, by physical address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Range {
    /// Its first byte.
    pub start: u64,
    /// How long it is, in bytes.
    pub len: u64,
}

/// RAM as `/proc/iomem` tells it: lines `START-END : System RAM`, the end
/// included. Without rights all addresses there are zero, and nothing is found.
pub fn from_iomem(text: &str) -> Vec<Range> {
    // Lines that are indented say what lies within a range.
    let lines = text.lines().filter(|line| !line.starts_with(' '));
    lines
        .filter_map(|line| {
            let (span, what) = line.split_once(" : ")?;
            // A range that is reserved already is RAM as well.
            let ram = ["System RAM", "Persistent Memory (legacy)"];
            let (start, end) = span.split_once('-')?;
            let of = |digits: &str| u64::from_str_radix(digits.trim(), 16).ok();
            ram.contains(&what.trim()).then_some(())?;
            range(of(start)?, of(end)?)
        })
        .collect()
}

/// `start` to `end`, both included.
pub(super) fn range(start: u64, end: u64) -> Option<Range> {
    let len = end.checked_sub(start)?.checked_add(1)?;
    (len > 1).then_some(Range { start, len })
}

/// Ranges that touch, as one.
fn joined(ram: &[Range]) -> Vec<Range> {
    let mut sorted = ram.to_vec();
    sorted.sort_by_key(|r| r.start);
    let mut whole: Vec<Range> = Vec::new();
    for next in sorted {
        match whole.last_mut() {
            Some(last) if last.start.saturating_add(last.len) >= next.start => {
                let end = next.start.saturating_add(next.len);
                last.len = last.len.max(end.saturating_sub(last.start));
            }
            _ => whole.push(next),
        }
    }
    whole
}

/// The end of the topmost range, `size` long, or half of all RAM where nobody
/// says: a kernel that is booted without the words by mistake hands memory out
/// from the top, and is found out soon.
///
/// # Errors
/// One sentence with the way out.
pub fn choose(ram: &[Range], size: Option<ByteSize>) -> Result<Range, String> {
    let ram = joined(ram);
    let all: u64 = ram.iter().map(|r| r.len).sum();
    let top = ram.last().ok_or(
        "the machine's memory map cannot be read: run this as root, or name the range in GRUB yourself",
    )?;
    let end = (top.start.saturating_add(top.len)) / ALIGN * ALIGN;
    let first = top.start.next_multiple_of(ALIGN);
    let room = end.saturating_sub(first);
    let spare = all.saturating_sub(HOST_MIN) / ALIGN * ALIGN;
    let most = room.min(spare);
    let wanted = match size {
        Some(ByteSize(bytes)) if bytes == 0 || !bytes.is_multiple_of(ALIGN) => {
            return Err(format!(
                "{} is no multiple of 128 MiB, in which memory is reserved",
                ByteSize(bytes)
            ));
        }
        Some(ByteSize(bytes)) => bytes,
        None => (all / 2 / ALIGN * ALIGN).min(most),
    };
    if wanted == 0 || wanted > most {
        return Err(format!(
            "{} cannot be reserved: the topmost range of memory has {}, and the host keeps 1 GiB of {} for itself; at most {} are left for --size",
            ByteSize(wanted),
            ByteSize(room),
            ByteSize(all / ALIGN * ALIGN),
            ByteSize(most)
        ));
    }
    Ok(Range {
        start: end - wanted,
        len: wanted,
    })
}

/// As a word of the kernel's command line.
pub fn word(range: Range) -> String {
    cmdline::written(&cmdline::Reservation {
        start: range.start,
        len: range.len,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const IOMEM: &str = "\
00000000-00000fff : Reserved
00001000-0009fbff : System RAM
000a0000-000bffff : PCI Bus 0000:00
00100000-bffdffff : System RAM
  01000000-01ffffff : Kernel code
fee00000-fee00fff : Local APIC
100000000-43fffffff : System RAM
440000000-7ffffffff : PCI
";

    #[test]
    fn the_topmost_range_of_ram_is_taken() {
        let ram = from_iomem(IOMEM);
        assert_eq!(ram.len(), 3);
        let half = choose(&ram, None).expect("fits");
        assert_eq!(half.start + half.len, 0x4_4000_0000);
        // 16 GiB less what lies below 1 MiB and the firmware's.
        assert_eq!(half.len, 0x4_0000_0000 / 2 - (128 << 20));
        let four = choose(&ram, Some(ByteSize::mib(4096))).expect("fits");
        assert_eq!(word(four), "memmap=4G!13G");
        assert_eq!(word(half), "memmap=8064M!9344M");
    }

    #[test]
    fn what_does_not_fit_is_refused_with_what_does() {
        let ram = from_iomem(IOMEM);
        let much = choose(&ram, Some(ByteSize::mib(1 << 20))).expect_err("too much");
        assert!(much.contains("at most"), "{much}");
        for odd in [0, 1, 100 << 20] {
            assert!(choose(&ram, Some(ByteSize(odd))).is_err(), "{odd}");
        }
        let small = [Range {
            start: 0,
            len: 1 << 30,
        }];
        assert!(choose(&small, None).is_err(), "the host needs it");
        // As a user who may not see addresses gets it.
        let blind = from_iomem("00000000-00000000 : System RAM\n");
        assert!(choose(&blind, None).expect_err("blind").contains("root"));
        for nonsense in [
            "",
            "x",
            "1-0 : System RAM",
            "ffffffffffffffff-0 : System RAM",
            "0-ffffffffffffffff : System RAM",
        ] {
            let _ = choose(&from_iomem(nonsense), None);
        }
    }

    #[test]
    fn memory_that_is_reserved_already_counts_as_ram() {
        let text = IOMEM.replace(
            "100000000-43fffffff : System RAM",
            "100000000-33fffffff : System RAM\n340000000-43fffffff : Persistent Memory (legacy)",
        );
        assert_eq!(
            choose(&from_iomem(&text), None),
            choose(&from_iomem(IOMEM), None)
        );
    }
}
