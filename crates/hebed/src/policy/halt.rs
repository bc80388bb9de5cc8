//! What stops the policy: a reboot that it ordered, and that touched VMs
//! without coming to its end.
//!
//! Each such attempt freezes and thaws every VM, so that nobody repeats it by
//! himself. It is written down *before* the reboot is begun, because the
//! reboot may stop this daemon as one of the host's services, and its undoing
//! may start another one, which remembers nothing. The file ends with the
//! kernel.

use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use hebe_host::listing::with_cause;
use hebe_host::{Host, files};
use hebe_types::VmId;
use serde::{Deserialize, Serialize};

/// Why, until somebody saw how it ended.
const BEGUN: &str = "a reboot was begun, and nobody saw how it ended: hebed/policy.log in the run directory may say";

/// The file.
#[derive(Debug, Serialize, Deserialize)]
struct Halt {
    boot_id: String,
    why: String,
}

/// A reboot that did not happen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failed {
    /// One sentence.
    pub why: String,
    /// VMs may have been touched.
    pub touched: bool,
}

/// Where it lies.
pub fn path(host: &Host) -> PathBuf {
    host.layout.run.join("hebed").join("policy.halted")
}

fn boot_id(host: &Host) -> String {
    VmId(host.system.boot_id()).to_string()
}

fn write(host: &Host, why: &str) -> io::Result<()> {
    let halt = Halt {
        boot_id: boot_id(host),
        why: why.to_owned(),
    };
    files::write_json(&path(host), &halt)
}

/// Lets `attempt` reboot, and writes down what stops the next one. Without
/// that nothing is begun.
pub fn guarded(host: &Host, attempt: impl FnOnce() -> Result<(), Failed>) -> Result<(), Failed> {
    write(host, BEGUN).map_err(|e| Failed {
        why: format!("cannot write {}: {}", path(host).display(), with_cause(&e)),
        touched: false,
    })?;
    let done = attempt();
    match &done {
        // If this fails, what was written before says enough.
        Err(failed) if failed.touched => drop(write(host, &failed.why)),
        _ => drop(files::remove_durably(&path(host))),
    }
    done
}

/// Why the policy does not go, unless one of these files was changed since.
pub fn in_force(host: &Host, unless_newer: &[&Path]) -> Option<String> {
    let path = path(host);
    let changed = |path: &Path| -> Option<SystemTime> { path.metadata().ok()?.modified().ok() };
    let why = match files::read_json::<Halt>(&path) {
        Ok(None) => return None,
        Ok(Some(halt)) if halt.boot_id != boot_id(host) => return None,
        Ok(Some(halt)) => halt.why,
        Err(e) => format!("{} cannot be read: {}", path.display(), with_cause(&e)),
    };
    let since = changed(&path);
    let newer = |file: &&Path| changed(file) > since;
    (!unless_newer.iter().any(newer)).then_some(why)
}
