//! SIGTERM and SIGINT, as an order like any other.
//!
//! Both are blocked in every thread, and one thread waits for them: a signal
//! then interrupts nothing, and is obeyed in turn, when no request is being
//! served. A freeze that is under way is finished first.

use std::io;
use std::mem::MaybeUninit;
use std::ptr;
use std::sync::mpsc::Sender;

use crate::vm::Event;

/// Blocks both signals in this thread and those that it starts later.
pub(crate) fn block() -> io::Result<()> {
    let set = both();
    // SAFETY: the set is initialised, and the mask is this thread's own.
    match unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &set, ptr::null_mut()) } {
        0 => Ok(()),
        failed => Err(io::Error::from_raw_os_error(failed)),
    }
}

/// Whether one of them has arrived and nobody waits for it yet.
pub(crate) fn arrived() -> bool {
    let mut pending = MaybeUninit::uninit();
    // SAFETY: sigpending initialises the set, which is then only read.
    unsafe {
        if libc::sigpending(pending.as_mut_ptr()) != 0 {
            return false;
        }
        let pending = pending.assume_init();
        libc::sigismember(&pending, libc::SIGTERM) == 1
            || libc::sigismember(&pending, libc::SIGINT) == 1
    }
}

/// Starts the thread that sends [`Event::Terminated`] for each that arrives.
/// They must be blocked in every thread.
pub(crate) fn forward(events: Sender<Event>) -> io::Result<()> {
    let set = both();
    let wait = move || {
        let mut signal = 0;
        // SAFETY: both are live for the call; the signals are blocked in
        // every thread, this one too.
        while unsafe { libc::sigwait(&set, &mut signal) } == 0 {
            let _ = events.send(Event::Terminated);
        }
    };
    hebe_sys::thread::named("signals").spawn(wait).map(drop)
}

fn both() -> libc::sigset_t {
    let mut set = MaybeUninit::uninit();
    // SAFETY: sigemptyset initialises the set, which the others then change.
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        libc::sigaddset(set.as_mut_ptr(), libc::SIGTERM);
        libc::sigaddset(set.as_mut_ptr(), libc::SIGINT);
        set.assume_init()
    }
}
