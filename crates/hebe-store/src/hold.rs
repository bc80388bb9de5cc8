//! Who has a segment mapped: the lock that cannot be lost.
//!
//! Two VMMs never run the same RAM. A VM's lock in the runtime directory goes
//! with that directory, and a frozen segment names no process; so whoever maps
//! a segment takes a lock on the bytes of its execution-state area, on the
//! store itself. It is an open file description lock: a mapping keeps the
//! description it was made through open, so the lock lasts exactly as long as
//! the mapping, whatever becomes of descriptors and directories, and however
//! the process ends. Mappings are not inherited by children.
//!
//! What drops a segment takes the same lock on all that the segment owns (or,
//! where its record is damaged, may own), and holds it until the memory is
//! scrubbed.

use std::os::fd::BorrowedFd;
use std::thread;
use std::time::{Duration, Instant};

use hebe_sys::lock;
use hebe_types::{Extent, SegmentId};

use crate::StoreError;

/// How long a holder may take to go: the system gives the locks of a process
/// that ended back a little after those that others wait for.
const HOLDER_WAIT: Duration = Duration::from_secs(2);
const PAUSE: Duration = Duration::from_micros(200);

/// Takes the lock on every extent, for the open file description of `fd`.
///
/// # Errors
/// [`StoreError::Held`] when another has one of them.
pub(crate) fn take(
    fd: BorrowedFd<'_>,
    id: SegmentId,
    extents: &[Extent],
) -> Result<(), StoreError> {
    let began = Instant::now();
    for extent in extents {
        let taken = || lock::try_lock_range(fd, extent.offset, extent.len);
        while !taken().map_err(StoreError::media("lock"))? {
            if began.elapsed() >= HOLDER_WAIT {
                return Err(StoreError::Held(id));
            }
            thread::sleep(PAUSE);
        }
    }
    Ok(())
}

/// Whether another open file description than that of `fd` has a lock in one of
/// the extents.
pub(crate) fn is_held(fd: BorrowedFd<'_>, extents: &[Extent]) -> Result<bool, StoreError> {
    for extent in extents {
        let locked = lock::is_range_locked(fd, extent.offset, extent.len);
        if locked.map_err(StoreError::media("look for locks on"))? {
            return Ok(true);
        }
    }
    Ok(false)
}
