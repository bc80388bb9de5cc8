use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use io_uring::squeue::{Entry, Flags};

use super::*;

/// A ring, or a word why this kernel has none.
fn ring_or_skip(made: io::Result<Ring>) -> Option<Ring> {
    made.inspect_err(|error| println!("skipped: no io_uring here: {error}"))
        .ok()
}

/// Xorshift: what it gives follows from the seed.
struct Dice(u64);

impl Dice {
    fn seeded() -> Self {
        let seed = u64::from(std::process::id()) << 20 | 0x9e37;
        println!("seed {seed}");
        Self(seed)
    }

    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % end
    }
}

fn patterned(len: usize) -> (File, Vec<u8>) {
    let bytes: Vec<u8> = (0..len).map(|i| (i * 31 + i / 977) as u8).collect();
    let file = tempfile::tempfile().expect("file");
    file.write_all_at(&bytes, 0).expect("write");
    (file, bytes)
}

#[test]
fn what_is_read_is_what_lies_there_however_many_are_under_way() {
    let Some(mut ring) = ring_or_skip(Ring::new()) else {
        return;
    };
    let mut dice = Dice::seeded();
    let (file, bytes) = patterned(1 << 20);
    let mut wanted = vec![None; READS_MAX];
    let (mut begun, mut ended) = (0, 0);
    while ended < 5_000 {
        let burst = dice.below(READS_MAX as u64 + 8);
        for _ in 0..burst {
            let at = dice.below(bytes.len() as u64 - 9_000);
            let len = dice.below(9_000) + 1;
            match ring.read(file.as_fd(), at, len as u32) {
                Some(number) => {
                    assert!(wanted[number].replace((at, len)).is_none(), "{number}");
                    begun += 1;
                }
                None => assert_eq!(ring.under_way(), READS_MAX),
            }
        }
        ring.send().expect("sent");
        if ring.under_way() > 0 {
            ring.wait().expect("wait");
        }
        while let Some(done) = ring.done() {
            let (at, len) = wanted[done.number].take().expect("it was under way");
            assert_eq!((done.offset, done.data.len() as u64), (at, len));
            assert_eq!(done.read.expect("read"), len as usize);
            assert!(done.data == bytes[at as usize..][..len as usize]);
            ended += 1;
        }
        assert_eq!(begun - ended, ring.under_way());
    }
}

#[test]
fn an_end_of_file_and_a_bad_file_are_told() {
    let Some(mut ring) = ring_or_skip(Ring::new()) else {
        return;
    };
    let (file, _) = patterned(1000);
    let folder = File::open("/").expect("open");
    let mut ends = Vec::new();
    for (file, at) in [(&file, 600), (&file, 2000), (&folder, 0)] {
        ring.read(file.as_fd(), at, 512).expect("room");
        ring.send().expect("sent");
        ring.wait().expect("wait");
        ends.push(ring.done().expect("done").read.ok());
    }
    assert_eq!(ends, [Some(400), Some(0), None]);
}

#[test]
fn a_ring_refuses_everything_but_plain_reads() {
    let Some(mut ring) = ring_or_skip(Ring::new()) else {
        return;
    };
    let (file, _) = patterned(1000);
    let fd = types::Fd(file.as_raw_fd());
    let here = types::Fd(libc::AT_FDCWD);
    let mut byte = [0_u8; 1];
    let at = byte.as_mut_ptr();
    let read = || opcode::Read::new(fd, at, 1).build();
    let all: [(&str, Entry); 11] = [
        ("nop", opcode::Nop::new().build()),
        ("open", opcode::OpenAt::new(here, c"/".as_ptr()).build()),
        ("write", opcode::Write::new(fd, at, 1).build()),
        ("fsync", opcode::Fsync::new(fd).build()),
        ("close", opcode::Close::new(fd).build()),
        ("send", opcode::Send::new(fd, at, 1).build()),
        ("a flag: link", read().flags(Flags::IO_LINK)),
        ("a flag: drain", read().flags(Flags::IO_DRAIN)),
        ("a flag: async", read().flags(Flags::ASYNC)),
        ("a flag: buffer", read().flags(Flags::BUFFER_SELECT)),
        ("a flag: fixed", read().flags(Flags::FIXED_FILE)),
    ];
    for (name, entry) in all {
        let answer = ring.try_entry(&entry).expect("an answer");
        assert_eq!(answer, -libc::EACCES, "{name}");
    }
    // The control: one that is refused anyhow would prove nothing.
    assert_eq!(ring.try_entry(&read()).expect("an answer"), 1);
    let submitter = ring.uring.submitter();
    let refused = [
        submitter.register_files(&[file.as_raw_fd()]),
        submitter.register_eventfd(file.as_raw_fd()),
        submitter.register_personality().map(drop),
        submitter.register_iowq_max_workers(&mut [8, 8]),
        submitter.register_restrictions(&mut [Restriction::sqe_flags_allowed(0xff)]),
    ];
    for (n, refused) in refused.into_iter().enumerate() {
        let code = refused.expect_err("refused").raw_os_error();
        assert_eq!(code, Some(libc::EACCES), "registration {n}");
    }
    assert!(submitter.register_enable_rings().is_err());
}

#[test]
fn what_a_kernel_refuses_is_told_and_the_ring_goes_on() {
    let Some(mut ring) = ring_or_skip(Ring::refusing()) else {
        return;
    };
    let (file, _) = patterned(1000);
    for _ in 0..3 {
        for _ in 0..READS_MAX {
            ring.read(file.as_fd(), 0, 512).expect("room");
        }
        ring.send().expect("sent");
        let mut seen = 0;
        while let Some(done) = ring.done() {
            let error = done.read.expect_err("refused");
            assert_eq!(error.raw_os_error(), Some(libc::EACCES));
            seen += 1;
        }
        assert_eq!((seen, ring.under_way()), (READS_MAX, 0));
    }
}

/// Puts another file in the place of the ring's descriptor, which the kernel
/// then does not know as a ring.
fn break_it(ring: &Ring) {
    let other = File::open("/dev/null").expect("open");
    // SAFETY: both are open; the ring's mappings stay.
    let put = unsafe { libc::dup2(other.as_raw_fd(), ring.readable()) };
    assert!(put >= 0);
}

#[test]
fn a_broken_ring_gives_back_what_it_could_not_send_and_takes_no_more() {
    let Some(mut ring) = ring_or_skip(Ring::new()) else {
        return;
    };
    let (file, _) = patterned(1000);
    for n in 0..5 {
        assert!(ring.read(file.as_fd(), n * 100, 50).is_some());
    }
    break_it(&ring);
    assert!(ring.send().is_err());
    let failed: Vec<u64> = std::iter::from_fn(|| ring.done())
        .map(|done| {
            assert!(done.read.is_err());
            done.offset
        })
        .collect();
    assert_eq!(failed, [0, 100, 200, 300, 400]);
    assert_eq!(ring.under_way(), 0);
    assert!(ring.read(file.as_fd(), 0, 1).is_none());
    ring.send().expect("nothing to send");
}

/// Reads of a file that nobody has in memory are under way, or prepared, when
/// the ring goes.
#[test]
fn a_ring_that_goes_waits_for_its_reads() {
    for sent in [false, true] {
        let Some(mut ring) = ring_or_skip(Ring::new()) else {
            return;
        };
        let (file, _) = patterned(4 << 20);
        file.sync_all().expect("sync");
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).expect("advice");
        for n in 0..READS_MAX as u64 {
            ring.read(file.as_fd(), n << 16, 4096).expect("room");
        }
        if sent {
            ring.send().expect("sent");
        }
        drop(ring);
    }
}
