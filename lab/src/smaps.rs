//! What a process's memory costs: its share of it (`Pss` in `/proc/PID/smaps`,
//! proc_pid_smaps(5)), with the guest's RAM told apart.
//!
//! Guest RAM is a mapping of a devdax device or of a memfd; both VMMs of the lab
//! have no other mappings of either kind, but for the pages that hold a frozen
//! VM's state behind Hebe's. A page that several processes map counts for each
//! by its part, as the kernel divides it: a program that eleven VMMs run counts
//! once for all of them. What the kernel itself keeps for a VM (page tables,
//! KVM's structures, sockets) is in no process's `smaps`, and not in here.

use serde::Serialize;

/// One process's share, by what it is of, in KiB.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Share {
    /// Guest RAM.
    pub guest_kib: u64,
    /// The program and its libraries: whatever is mapped from other files.
    pub files_kib: u64,
    /// The heap that grows by `brk`.
    pub heap_kib: u64,
    /// The first thread's stack.
    pub stack_kib: u64,
    /// Memory without a file: other heaps, other threads' stacks, buffers.
    pub anonymous_kib: u64,
}

impl Share {
    /// Reads `smaps`; a mapping whose share is not told counts for nothing.
    pub fn read(smaps: &str) -> Self {
        let mut share = Self::default();
        let mut name = "";
        for line in smaps.lines() {
            match heading(line) {
                Some(of) => name = of,
                None => *share.part(name) += pss_kib(line).unwrap_or(0),
            }
        }
        share
    }

    /// All of it without guest RAM.
    pub fn overhead_kib(&self) -> u64 {
        self.files_kib + self.heap_kib + self.stack_kib + self.anonymous_kib
    }

    fn part(&mut self, mapping: &str) -> &mut u64 {
        match mapping {
            name if name.starts_with("/dev/dax") || name.starts_with("/memfd:") => {
                &mut self.guest_kib
            }
            "[heap]" => &mut self.heap_kib,
            "[stack]" => &mut self.stack_kib,
            name if name.starts_with('/') => &mut self.files_kib,
            // Named by prctl(PR_SET_VMA_ANON_NAME), or by the kernel.
            _ => &mut self.anonymous_kib,
        }
    }
}

/// The name of the mapping that a line begins, empty if it has none.
fn heading(line: &str) -> Option<&str> {
    let (range, rest) = line.split_once(' ')?;
    let (from, to) = range.split_once('-')?;
    let is_hex = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_hexdigit());
    if !is_hex(from) || !is_hex(to) {
        return None;
    }
    // Permissions, offset, device, inode, name.
    let mut rest = rest.trim_start();
    for _ in 0..4 {
        rest = rest
            .split_once(' ')
            .map_or("", |(_, rest)| rest.trim_start());
    }
    Some(rest)
}

fn pss_kib(line: &str) -> Option<u64> {
    let value = line.strip_prefix("Pss:")?.trim();
    value.strip_suffix("kB")?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMAPS: &str = "\
5581a0000000-5581a0100000 r-xp 00000000 00:02 123                        /bin/hebe-vmm
Size:               1024 kB
Rss:                 900 kB
Pss:                 450 kB
Pss_Dirty:             7 kB
5581a1000000-5581a1021000 rw-p 00000000 00:00 0                          [heap]
Pss:                  80 kB
7f0000000000-7f0010000000 rw-s 00000000 00:01 5                          /memfd:hebe-vm1 (deleted)
Pss:              131072 kB
7f0020000000-7f0030000000 rw-s 00200000 00:06 77                         /dev/dax0.0
Pss:                4096 kB
7f0040000000-7f0040021000 rw-p 00000000 00:00 0
Pss:                  12 kB
7f0040030000-7f0040031000 rw-p 00000000 00:00 0 [anon:buffers]
Pss:                   3 kB
7f0041000000-7f0041001000 rw-s 00000000 00:0e 9                          anon_inode:kvm-vcpu:0
Pss:                   4 kB
7ffd00000000-7ffd00021000 rw-p 00000000 00:00 0                          [stack]
Pss:                  16 kB
";

    #[test]
    fn guest_ram_is_told_from_what_the_process_costs() {
        let share = Share::read(SMAPS);
        assert_eq!(share.guest_kib, 131_072 + 4096);
        assert_eq!(share.files_kib, 450);
        assert_eq!(share.heap_kib, 80);
        assert_eq!(share.stack_kib, 16);
        assert_eq!(share.anonymous_kib, 12 + 3 + 4);
        assert_eq!(share.overhead_kib(), 450 + 80 + 16 + 19);
    }

    #[test]
    fn what_is_no_smaps_is_no_memory() {
        assert_eq!(Share::read("a-b c\nPss: many kB\n-\n"), Share::default());
    }

    #[test]
    fn this_process_has_some() {
        let text = std::fs::read_to_string("/proc/self/smaps").expect("smaps");
        let share = Share::read(&text);
        assert!(share.files_kib > 0 && share.stack_kib > 0, "{share:?}");
    }
}
