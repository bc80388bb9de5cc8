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
    let named = [args.lock_fd, args.config_fd].into_iter().flatten();
    for (first, last) in gaps(named.chain(args.segment_fd.iter().copied())) {
        // SAFETY: the caller says that nobody owns these descriptors.
        if unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) } != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
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
    use super::*;

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
