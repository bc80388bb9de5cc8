//! Reads that are under way beside each other: io_uring, shut to all else.
//!
//! ```text
//!  made, disabled ─► restricted ─► enabled, and tried ─► reading ─► dropped,
//!                                                             when all is read
//! ```
//! A ring does one thing: it reads from an open file, as `pread(2)` does. The
//! kernel holds it to that (`IORING_REGISTER_RESTRICTIONS`, Linux 5.10): another
//! operation, a flag of a request, or another registration is refused with
//! `EACCES`, and that cannot be taken back.
//!
//! **Buffers are the ring's.** Each read has one of its own, which nobody sees
//! until the kernel has said that it is done with it. No read goes to memory
//! that somebody else owns.
//!
//! **No file is registered.** The kernel tears a ring down some time after its
//! process is gone, and would keep a registered file open until then, and the
//! disk's lock with it: a VM could not be resumed at once.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};

use io_uring::register::Restriction;
use io_uring::{EnterFlags, IoUring, opcode, types};

/// Most reads that are under way in one ring.
pub const READS_MAX: usize = 64;
/// Most threads that the kernel may start for a ring, which it does where a
/// file system cannot wait by itself.
pub const WORKERS_MAX: u32 = 4;
/// `IORING_REGISTER_ENABLE_RINGS`. A ring that is enabled refuses it. Naming one
/// shuts out all others; a kernel may take none named for all allowed.
const ENABLE_RINGS: u8 = 12;
/// Marks what is no read.
const NO_READ: u64 = u64::MAX;

/// A read that has ended.
#[derive(Debug)]
pub struct Done {
    /// Its number, which is free again.
    pub number: usize,
    /// Where in the file it began.
    pub offset: u64,
    /// As long as was asked for.
    pub data: Vec<u8>,
    /// How many bytes of `data` were read.
    pub read: io::Result<usize>,
}

struct Read {
    offset: u64,
    data: Vec<u8>,
}

/// See the module's documentation.
pub struct Ring {
    uring: IoUring,
    /// Reads under way, by their numbers.
    reads: Vec<Option<Read>>,
    free: Vec<usize>,
    /// Those that the kernel does not know yet, in order.
    unsent: VecDeque<usize>,
    /// The kernel takes no more: nothing is ever sent again.
    broken: bool,
}

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Ring({} under way)", self.under_way())
    }
}

impl Ring {
    /// A ring that reads, and proved that it does nothing else.
    ///
    /// # Errors
    /// The kernel has no io_uring, has it switched off
    /// (`kernel.io_uring_disabled`), or does not restrict it.
    pub fn new() -> io::Result<Self> {
        Self::restricted_to(&[opcode::Read::CODE])
    }

    /// One that refuses each read, as a kernel might.
    ///
    /// # Errors
    /// As [`Ring::new`].
    #[cfg(any(test, feature = "testing"))]
    pub fn refusing() -> io::Result<Self> {
        Self::restricted_to(&[])
    }

    fn restricted_to(operations: &[u8]) -> io::Result<Self> {
        let uring = IoUring::builder()
            .setup_r_disabled()
            .build(READS_MAX as u32)?;
        let submitter = uring.submitter();
        // Not known to each kernel, and no more than a bound.
        let _ = submitter.register_iowq_max_workers(&mut [WORKERS_MAX, 1]);
        let operations = operations.iter().map(|code| Restriction::sqe_op(*code));
        let mut all: Vec<Restriction> = operations.collect();
        all.push(Restriction::sqe_flags_allowed(0));
        all.push(Restriction::register_op(ENABLE_RINGS));
        submitter.register_restrictions(&mut all)?;
        submitter.register_enable_rings()?;
        let mut ring = Self {
            uring,
            reads: (0..READS_MAX).map(|_| None).collect(),
            free: (0..READS_MAX).rev().collect(),
            unsent: VecDeque::new(),
            broken: false,
        };
        let refused = ring.try_entry(&opcode::Nop::new().build())?;
        if refused != -libc::EACCES {
            return Err(io::Error::other("the kernel does not restrict a ring"));
        }
        Ok(ring)
    }

    /// Has the kernel carry out what needs no memory, and says what it answers.
    fn try_entry(&mut self, entry: &io_uring::squeue::Entry) -> io::Result<i32> {
        let entry = entry.clone().user_data(NO_READ);
        // SAFETY: the caller's operation refers to no memory.
        let pushed = unsafe { self.uring.submission().push(&entry) };
        pushed.map_err(io::Error::other)?;
        self.uring.submit_and_wait(1)?;
        let answer = self.uring.completion().next().map(|entry| entry.result());
        answer.ok_or_else(|| io::Error::other("the kernel does not answer"))
    }

    /// Readable while a read has ended that nobody took. Its reads end on the
    /// thread that sent them, while that waits in the kernel, as for this.
    pub fn readable(&self) -> RawFd {
        self.uring.as_raw_fd()
    }

    /// Reads that nobody has taken yet.
    pub fn under_way(&self) -> usize {
        self.reads.len() - self.free.len()
    }

    /// Prepares a read of `len` bytes, and gives it a number below
    /// [`READS_MAX`]. It begins with [`Ring::send`], until when `file` must be
    /// open. `None` if so many are under way, or the ring is broken.
    pub fn read(&mut self, file: BorrowedFd<'_>, offset: u64, len: u32) -> Option<usize> {
        if self.broken {
            return None;
        }
        let number = self.free.pop()?;
        let mut data = vec![0; len as usize];
        let file = types::Fd(file.as_raw_fd());
        let entry = opcode::Read::new(file, data.as_mut_ptr(), len)
            .offset(offset)
            .build()
            .user_data(number as u64);
        // SAFETY: `data` is `len` bytes that stay where they are: they are
        // neither touched nor let go before the kernel has said that this read
        // has ended ([`Ring::done`]), or can never know of it (`broken`). Who
        // drops the ring waits for that, too.
        if unsafe { self.uring.submission().push(&entry) }.is_err() {
            self.free.push(number);
            return None;
        }
        self.reads[number] = Some(Read { offset, data });
        self.unsent.push_back(number);
        Some(number)
    }

    /// Lets what was prepared begin.
    ///
    /// # Errors
    /// The ring is broken: those that the kernel did not take are told by
    /// [`Ring::done`] as failed, and there will be no others.
    pub fn send(&mut self) -> io::Result<()> {
        while !self.unsent.is_empty() && !self.broken {
            let sent = self.uring.submit();
            let left = self.uring.submission().len();
            let taken = self.unsent.len().saturating_sub(left);
            self.unsent.drain(..taken);
            match sent {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => self.broken = true,
                // Never: what it does not take it gives a reason for.
                Ok(_) if taken == 0 => self.broken = true,
                Ok(_) => {}
            }
        }
        match self.unsent.is_empty() {
            true => Ok(()),
            false => Err(io::Error::other("the kernel takes no more reads")),
        }
    }

    /// A read that has ended, if there is one.
    pub fn done(&mut self) -> Option<Done> {
        loop {
            let ended = self.uring.completion().next();
            let ended = ended.map(|entry| (entry.user_data(), entry.result()));
            let (number, result) = match ended {
                Some((number, result)) => (usize::try_from(number).ok(), result),
                None if self.broken => (Some(self.unsent.pop_front()?), -libc::ECANCELED),
                None => return None,
            };
            let Some(number) = number else { continue };
            let Some(Read { offset, data }) = self.reads.get_mut(number).and_then(Option::take)
            else {
                continue;
            };
            self.free.push(number);
            let read = usize::try_from(result).map_err(|_| io::Error::from_raw_os_error(-result));
            return Some(Done {
                number,
                offset,
                data,
                read,
            });
        }
    }

    /// Waits until a read has ended, if one is under way.
    ///
    /// # Errors
    /// The kernel cannot wait.
    pub fn wait(&self) -> io::Result<()> {
        while self.under_way() > self.unsent.len() {
            let submitter = self.uring.submitter();
            let flags = EnterFlags::GETEVENTS.bits();
            // SAFETY: nothing is submitted, and no argument is given.
            match unsafe { submitter.enter::<libc::sigset_t>(0, 1, flags, None) } {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                result => return result.map(drop),
            }
        }
        Ok(())
    }
}

impl Drop for Ring {
    /// Lets no buffer go that the kernel may still write to.
    fn drop(&mut self) {
        // What the kernel does not know it will never know.
        self.broken = true;
        while self.under_way() > 0 {
            while self.done().is_some() {}
            if self.under_way() > 0 && self.wait().is_err() {
                std::mem::forget(std::mem::take(&mut self.reads));
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests;
