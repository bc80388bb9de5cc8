//! SIGTERM and SIGINT, as an order like any other.
//!
//! Both are blocked in every thread, and one thread waits for them: a signal
//! then interrupts nothing, and is obeyed in turn, when no request is being
//! served. A freeze that is under way is finished first.

use std::io;
use std::mem::MaybeUninit;
use std::ptr;
use std::sync::mpsc::Sender;
use std::thread;

use crate::vm::Event;

/// Blocks both signals in this thread and those that it starts later, and
/// sends [`Event::Terminated`] for each that arrives.
pub(crate) fn forward(events: Sender<Event>) -> io::Result<()> {
    let mut set = MaybeUninit::uninit();
    // SAFETY: sigemptyset initialises the set, which the others then read or
    // change; the mask is this thread's own.
    let (set, failed) = unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        libc::sigaddset(set.as_mut_ptr(), libc::SIGTERM);
        libc::sigaddset(set.as_mut_ptr(), libc::SIGINT);
        let set = set.assume_init();
        let failed = libc::pthread_sigmask(libc::SIG_BLOCK, &set, ptr::null_mut());
        (set, failed)
    };
    if failed != 0 {
        return Err(io::Error::from_raw_os_error(failed));
    }
    let wait = move || {
        let mut signal = 0;
        // SAFETY: both are live for the call; the signals are blocked in
        // every thread, this one too.
        while unsafe { libc::sigwait(&set, &mut signal) } == 0 {
            let _ = events.send(Event::Terminated);
        }
    };
    thread::Builder::new()
        .name("signals".into())
        .spawn(wait)
        .map(drop)
}
