//! A VMM's process, held so that a signal reaches it or nobody.
//!
//! Process ids are used again. A descriptor of a process is not: it is taken, and
//! then it is looked whether the id was the VMM's still. Whatever has the id later
//! gets no signal.

use std::fs;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::host::Host;
use crate::listing::VmRow;
use crate::vmm;

/// The process of one VMM.
#[derive(Debug)]
pub(crate) struct VmmProcess {
    pub(crate) pid: u32,
    held: OwnedFd,
}

impl VmmProcess {
    /// The VMM that was listed. By its control socket, of which the kernel tells who
    /// listens there; or else, as for one that does not listen yet, by the directory
    /// on its command line. `None` where it is gone, or is another one by now.
    pub(crate) fn of(host: &Host, row: &VmRow) -> Option<Self> {
        let is_listed = |pid: &u32| row.pid.is_none_or(|listed| listed == *pid);
        let socket = host.layout.socket(&row.name);
        if let Some(pid) = vmm::process(&socket).filter(is_listed) {
            return Self::hold(pid, |pid| vmm::process(&socket) == Some(pid));
        }
        let dir = host.layout.vm_dir(&row.name);
        let pid = all().find(|pid| is_listed(pid) && is_started_in(*pid, &dir))?;
        Self::hold(pid, |pid| is_started_in(pid, &dir))
    }

    /// As long as `is_it` holds of a process id that a process has, the process has
    /// had it since before.
    pub(crate) fn hold(pid: u32, is_it: impl FnOnce(u32) -> bool) -> Option<Self> {
        let number = Pid::from_raw(i32::try_from(pid).ok()?)?;
        let held = pidfd_open(number, PidfdFlags::empty()).ok()?;
        is_it(pid).then_some(Self { pid, held })
    }

    /// Ends it at once, if it is still there.
    pub(crate) fn kill(&self) {
        let _ = pidfd_send_signal(&self.held, Signal::KILL);
    }
}

fn all() -> impl Iterator<Item = u32> {
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    processes.filter_map(|process| process.file_name().to_str()?.parse().ok())
}

/// Whether a process was started with `--run-dir DIR`.
fn is_started_in(pid: u32, dir: &Path) -> bool {
    let wanted = [b"--run-dir\0", dir.as_os_str().as_encoded_bytes(), b"\0"].concat();
    // Empty for one that is gone but for its exit status.
    let arguments = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    arguments.windows(wanted.len()).any(|words| words == wanted)
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn a_process_is_held_only_where_it_is_the_one_once_it_is_held() {
        let mut child = Command::new("sleep").arg("600").spawn().expect("sleep");
        let pid = child.id();
        assert!(VmmProcess::hold(pid, |_| false).is_none());
        let held = VmmProcess::hold(pid, |held| held == pid).expect("it lives");
        held.kill();
        child.wait().expect("it ended");
        // Nobody has the id now, or somebody else.
        held.kill();
        assert!(VmmProcess::hold(u32::MAX, |_| true).is_none());
    }
}
