//! Descriptors that come from whoever started this process.
//!
//! A VMM has what its arguments name, and nothing else: through a descriptor
//! that somebody left open by mistake it could reach another VM's memory, or
//! keep a device or a lock of it in use for as long as its VM lives.

use std::io;
use std::os::fd::RawFd;

use crate::args::Args;

/// Closes every descriptor but standard input, output and error, and those
/// that `args` names.
///
/// # Errors
/// What `close_range(2)` says: Linux has it since 5.9.
///
/// # Safety
/// Nothing in this process may own a descriptor yet: this comes first in the
/// program.
pub unsafe fn close_others(args: &Args) -> io::Result<()> {
    for (first, last) in gaps(named(args)) {
        // SAFETY: the caller says that nobody owns these descriptors.
        if unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) } != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Those that the arguments name.
fn named(args: &Args) -> impl Iterator<Item = RawFd> {
    let single = [args.lock_fd, args.config_fd, args.limits_fd, args.gate_fd];
    let single = single.into_iter().flatten();
    let segment = args.segment_fd.iter().copied();
    single
        .chain(segment)
        .chain(args.net_fd.iter().map(|(_, fd)| *fd))
}

/// All numbers above 2 that are not in `kept`, as ranges with both ends in.
fn gaps(kept: impl Iterator<Item = RawFd>) -> Vec<(u32, u32)> {
    let mut kept: Vec<u32> = kept.filter_map(|fd| u32::try_from(fd).ok()).collect();
    kept.sort_unstable();
    let mut first = 3;
    let mut gaps = Vec::new();
    for fd in kept {
        if fd > first {
            gaps.push((first, fd - 1));
        }
        first = first.max(fd + 1);
    }
    gaps.push((first, u32::MAX));
    gaps
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory, Parser};

    use super::*;

    /// One that were closed would be another file by the time it is used.
    #[test]
    fn every_descriptor_that_an_argument_names_is_kept() {
        let plain = ["hebe-vmm", "--name", "web", "--run-dir", "/x", "--vm-id"];
        let id = "00112233445566778899aabbccddeeff";
        let mut words: Vec<String> = plain.map(str::to_owned).to_vec();
        words.push(id.to_owned());
        let command = Args::command();
        let longs = command.get_arguments().filter_map(|a| a.get_long());
        let fds: Vec<&str> = longs.filter(|long| long.ends_with("-fd")).collect();
        let mut expected = Vec::new();
        for (number, long) in (10..).zip(&fds) {
            // It needs a segment's place, which is no matter of descriptors.
            if *long == "segment-fd" {
                continue;
            }
            expected.push(number);
            let value = match *long {
                "net-fd" => format!("0={number}"),
                _ => number.to_string(),
            };
            words.extend([format!("--{long}"), value]);
        }
        let mut args = Args::try_parse_from(words).expect("a command line");
        args.segment_fd = vec![70, 71];
        expected.extend([70, 71]);
        let mut kept: Vec<RawFd> = named(&args).collect();
        kept.sort_unstable();
        assert_eq!(kept, expected);
    }

    #[test]
    fn the_gaps_are_all_but_the_kept_ones() {
        let all = |kept: &[RawFd]| gaps(kept.iter().copied());
        assert_eq!(all(&[]), [(3, u32::MAX)]);
        assert_eq!(all(&[3, 5, 4]), [(6, u32::MAX)]);
        assert_eq!(all(&[9, 4, 4]), [(3, 3), (5, 8), (10, u32::MAX)]);
        assert_eq!(all(&[-1, 0, 2, 3]), [(4, u32::MAX)]);
        assert_eq!(
            all(&[RawFd::MAX]),
            [
                (3, RawFd::MAX as u32 - 1),
                (RawFd::MAX as u32 + 1, u32::MAX)
            ]
        );
    }
}
