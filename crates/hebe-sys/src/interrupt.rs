//! Ctrl-C and SIGTERM, noted instead of obeyed at once: for work that has
//! something to clean up.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};

static ASKED: AtomicBool = AtomicBool::new(false);

extern "C" fn note(_signal: libc::c_int) {
    ASKED.store(true, Ordering::Relaxed);
}

/// From now on SIGINT, SIGTERM and SIGHUP only set what is returned. Programs
/// that are started afterwards obey them as ever.
///
/// # Errors
/// As sigaction(2) has them.
pub fn noted() -> io::Result<&'static AtomicBool> {
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        // SAFETY: sigaction is plain data; all zeroes is a valid value, with an
        // empty mask and no flags but the one set here.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = note as *const () as libc::sighandler_t;
        action.sa_flags = libc::SA_RESTART;
        // SAFETY: the handler only stores to an atomic, which is
        // async-signal-safe; `action` lives through the call.
        if unsafe { libc::sigaction(signal, &action, std::ptr::null_mut()) } != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(&ASKED)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signal_is_noted_and_ends_nothing() {
        let asked = noted().expect("handlers");
        assert!(!asked.load(Ordering::Relaxed));
        // SAFETY: raise(3) takes no pointer.
        unsafe { libc::raise(libc::SIGTERM) };
        assert!(asked.load(Ordering::Relaxed));
    }
}
