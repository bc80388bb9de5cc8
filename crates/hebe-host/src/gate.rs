//! The last look before a guest boots, between its disks' locks and its first
//! instruction.
//!
//! A VM that comes to rest keeps the locks of its disks until its state is
//! committed where it is found: its VMM has them to its end, and the file of a
//! saved one is named before. So whoever looks for VMs at rest while it has a
//! disk locked misses none that has that disk, and none can join them meanwhile. A
//! look before that is for a refusal that costs nothing.

use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::time::Duration;

/// What the VMM says when its disks are locked, and what it is told when it may
/// run: a byte each.
const WORD: [u8; 1] = [1];

/// Holds a VMM that boots its VM back until somebody looked.
pub(crate) struct Gate {
    ours: UnixStream,
    theirs: OwnedFd,
}

/// [`Gate`], with the VMM on its other side.
pub(crate) struct Held(UnixStream);

impl Gate {
    pub(crate) fn new() -> io::Result<Self> {
        let (ours, theirs) = UnixStream::pair()?;
        let theirs = theirs.into();
        Ok(Self { ours, theirs })
    }

    /// For the VMM that is about to be started.
    pub(crate) fn order(self, command: &mut Command, keep: &mut Vec<OwnedFd>) -> Held {
        command.arg("--gate-fd");
        command.arg(self.theirs.as_raw_fd().to_string());
        keep.push(self.theirs);
        Held(self.ours)
    }
}

impl Held {
    /// Waits so long at most until the VMM has its disks locked, looks, and lets
    /// it run if all is well. One that ended or is not so far is not let run: the
    /// rest tells why.
    ///
    /// # Errors
    /// What `look` found. The VMM waits then, until it is ended.
    pub(crate) fn pass<E>(
        mut self,
        wait: Duration,
        look: impl FnOnce() -> Result<(), E>,
    ) -> Result<(), E> {
        let timed = self.0.set_read_timeout(Some(wait));
        let mut word = [0; WORD.len()];
        if timed.is_ok() && self.0.read_exact(&mut word).is_ok() {
            look()?;
            // It may have ended.
            let _ = self.0.write_all(&WORD);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pass(said: &[u8], found: Result<(), &str>) -> (bool, Result<(), String>, Vec<u8>) {
        let gate = Gate::new().expect("a pair");
        let mut keep = Vec::new();
        let held = gate.order(&mut Command::new("x"), &mut keep);
        let mut theirs = UnixStream::from(keep.pop().expect("its end"));
        theirs.write_all(said).expect("write");
        theirs.shutdown(std::net::Shutdown::Write).expect("shut");
        let mut looked = false;
        let passed = held.pass(Duration::from_secs(60), || {
            looked = true;
            found.map_err(str::to_owned)
        });
        let mut told = Vec::new();
        theirs.read_to_end(&mut told).expect("read");
        (looked, passed, told)
    }

    #[test]
    fn a_vmm_is_let_run_after_a_look_with_its_disks_locked() {
        assert_eq!(pass(&WORD, Ok(())), (true, Ok(()), WORD.to_vec()));
        let taken = Err("taken".to_owned());
        assert_eq!(pass(&WORD, Err("taken")), (true, taken, Vec::new()));
        // It ended before.
        assert_eq!(pass(&[], Ok(())), (false, Ok(()), Vec::new()));
    }

    #[test]
    fn a_vmm_that_does_not_come_so_far_is_not_waited_for_without_end() {
        let gate = Gate::new().expect("a pair");
        let mut keep = Vec::new();
        let held = gate.order(&mut Command::new("x"), &mut keep);
        let mut theirs = UnixStream::from(keep.pop().expect("its end"));
        let passed = held.pass(Duration::from_millis(1), || Err("no look"));
        assert_eq!(passed, Ok(()));
        let mut told = Vec::new();
        theirs.read_to_end(&mut told).expect("read");
        assert!(told.is_empty(), "it does not run");
    }
}
