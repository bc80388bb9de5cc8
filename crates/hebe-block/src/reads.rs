//! Reads that are under way while others are answered.
//!
//! ```text
//!            in the page cache
//!   read ───────────────────────────► answered at once
//!    │ not there             sent
//!    └──────► begun ────────────────► under way ───► ended
//!    no room: later, or one by one
//! ```
//! What lies in the host's page cache is copied, which takes no longer than by
//! any other way. What must be fetched from the disk goes to a ring, so that the
//! disk has many reads to choose from. A read that fails there, or is short, is
//! done once more one by one, and that is the answer.
//!
//! Nothing but reads: a write goes into the page cache, and there a ring would
//! only hand it to a thread. So a flush has no writes to wait for.

use std::io::{self, IoSliceMut};
use std::os::fd::{AsFd, RawFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use hebe_sys::ring::{Done, Ring};
use rustix::io::{Errno, ReadWriteFlags, preadv2};

use crate::raw::{BlockBackend, SECTOR_SIZE};

pub use hebe_sys::ring::READS_MAX;

/// Most bytes that are under way for one disk.
const BYTES_MAX: usize = 1 << 20;
/// Most bytes that are under way for all disks of this process: a part of what
/// a VMM may cost beside its guest's RAM.
const BYTES_ALL_MAX: usize = 2 << 20;

static BYTES_ALL: AtomicUsize = AtomicUsize::new(0);

/// Why a disk's reads are carried out one by one.
#[derive(Debug, thiserror::Error)]
pub enum NoRing {
    /// Others lie behind it, and what is read must be looked up.
    #[error("it is an image")]
    Image,
    /// Nobody can tell what has to be waited for.
    #[error("its file system cannot tell what is in the page cache")]
    FileSystem,
    /// There is no ring, or none that refuses what it must.
    #[error("this kernel gives no io_uring: {0}")]
    Kernel(#[source] io::Error),
}

/// The reads of a disk that are under way.
#[derive(Debug)]
pub(crate) struct Reads {
    state: Mutex<State>,
    readable: RawFd,
}

#[derive(Debug)]
struct State {
    ring: Ring,
    bytes: usize,
}

impl Reads {
    fn new(ring: Ring) -> Self {
        Self {
            readable: ring.readable(),
            state: Mutex::new(State { ring, bytes: 0 }),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Takes room for so many bytes, if there is any.
    fn reserve(&mut self, len: usize) -> bool {
        if self.bytes + len > BYTES_MAX {
            return false;
        }
        let all = BYTES_ALL.fetch_add(len, Ordering::Relaxed) + len;
        if all > BYTES_ALL_MAX {
            BYTES_ALL.fetch_sub(len, Ordering::Relaxed);
            return false;
        }
        self.bytes += len;
        true
    }

    fn release(&mut self, len: usize) {
        self.bytes -= len;
        BYTES_ALL.fetch_sub(len, Ordering::Relaxed);
    }

    fn done(&mut self) -> Option<Done> {
        let done = self.ring.done()?;
        self.release(done.data.len());
        Some(done)
    }
}

impl Drop for State {
    fn drop(&mut self) {
        self.release(self.bytes);
    }
}

/// Only who has called [`BlockBackend::open_ring`] calls the others, and one
/// thread for a disk: reads end on the thread that sent them.
impl BlockBackend {
    /// Lets reads be under way beside each other from now on, also for
    /// [`BlockBackend::again`]. To be called where a ring may still be made.
    ///
    /// # Errors
    /// [`NoRing`]; everything else works as before.
    pub fn open_ring(&mut self) -> Result<(), NoRing> {
        self.take_ring(Ring::new)
    }

    /// [`BlockBackend::open_ring`], with a ring that refuses every read.
    ///
    /// # Errors
    /// As there.
    #[cfg(any(test, feature = "testing"))]
    pub fn open_refusing_ring(&mut self) -> Result<(), NoRing> {
        self.take_ring(Ring::refusing)
    }

    fn take_ring(&mut self, make: impl FnOnce() -> io::Result<Ring>) -> Result<(), NoRing> {
        if !self.is_plain() {
            return Err(NoRing::Image);
        }
        if self.read_at_once(&mut [0; SECTOR_SIZE as usize], 0) == Err(Errno::OPNOTSUPP) {
            return Err(NoRing::FileSystem);
        }
        let ring = make().map_err(NoRing::Kernel)?;
        self.reads = Some(Reads::new(ring).into());
        Ok(())
    }

    /// Whether reads may be under way.
    pub fn has_ring(&self) -> bool {
        self.reads.is_some()
    }

    /// Readable while a read has ended that nobody took.
    pub fn reads_ended(&self) -> Option<RawFd> {
        self.reads.as_ref().map(|reads| reads.readable)
    }

    /// Reads that were begun, and not taken yet.
    pub fn reads_under_way(&self) -> usize {
        let reads = self.reads.as_ref();
        reads.map_or(0, |reads| reads.state().ring.under_way())
    }

    /// Fills `data` from byte `offset` on if nothing has to be waited for, and
    /// says whether it did.
    pub fn read_cached(&self, data: &mut [u8], offset: u64) -> bool {
        let whole = self.check(data.len(), offset).is_ok()
            && self.read_at_once(data, offset) == Ok(data.len());
        if whole {
            self.count_read(data.len());
        }
        whole
    }

    fn read_at_once(&self, data: &mut [u8], offset: u64) -> Result<usize, Errno> {
        let data = &mut [IoSliceMut::new(data)];
        preadv2(&self.file, data, offset, ReadWriteFlags::NOWAIT)
    }

    /// Prepares a read of `len` bytes from byte `offset` on, and gives it a
    /// number below [`READS_MAX`]. It begins with [`BlockBackend::send_reads`].
    /// `None` if there is no room for it now, or no ring.
    pub fn begin_read(&self, len: usize, offset: u64) -> Option<usize> {
        self.check(len, offset).ok()?;
        let mut state = self.reads.as_ref()?.state();
        let bytes = u32::try_from(len).ok().filter(|len| *len > 0)?;
        if !state.reserve(len) {
            return None;
        }
        let number = state.ring.read(self.file.as_fd(), offset, bytes);
        if number.is_none() {
            state.release(len);
        }
        number
    }

    /// Lets reads begin that were prepared.
    ///
    /// # Errors
    /// Some could not, and none ever will: [`BlockBackend::ended_read`] has them.
    pub fn send_reads(&self) -> io::Result<()> {
        let reads = self.reads.as_ref();
        reads.map_or(Ok(()), |reads| reads.state().ring.send())
    }

    /// A read that has ended: its number, and what was read.
    pub fn ended_read(&self) -> Option<(usize, io::Result<Vec<u8>>)> {
        let done = self.reads.as_ref()?.state().done()?;
        let Done {
            number,
            offset,
            mut data,
            read,
        } = done;
        let result = match read {
            Ok(len) if len == data.len() => {
                self.count_read(len);
                Ok(())
            }
            _ => self.read_at(&mut data, offset),
        };
        Some((number, result.map(|()| data)))
    }

    /// Waits until no read is under way; whatever was read is dropped.
    pub fn await_reads(&self) {
        let Some(reads) = &self.reads else { return };
        let mut state = reads.state();
        loop {
            while state.done().is_some() {}
            if state.ring.under_way() == 0 || state.ring.wait().is_err() {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests;
