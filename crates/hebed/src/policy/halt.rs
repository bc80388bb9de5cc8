//! What stops the policy: a reboot that it ordered, and that touched VMs
//! without coming to its end.
//!
//! Each such attempt freezes and thaws every VM, so that nobody repeats it by
//! himself. It is written down *before* the reboot is begun, because the
//! reboot may stop this daemon as one of the host's services, and its undoing
//! may start another one, which remembers nothing. The file ends with the
//! kernel.
//!
//! A person says that the policy may go on by changing one of its files. They
//! are compared with what they were, not with a clock, which may have been set
//! back since.

use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use hebe_host::listing::with_cause;
use hebe_host::{Host, files};
use hebe_types::VmId;
use serde::{Deserialize, Serialize};

use super::sentinel::changed_ns;

/// Why, until somebody saw how it ended.
const BEGUN: &str = "a reboot was begun, and nobody saw how it ended: hebed/policy.log in the run directory may say";

/// The file.
#[derive(Debug, Serialize, Deserialize)]
struct Halt {
    boot_id: String,
    why: String,
    /// The files by which a person says that it may go on, as they were.
    #[serde(default)]
    files: Vec<Was>,
}

/// When a file was changed, in nanoseconds since 1970; `None` if it was not
/// there.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Was {
    path: PathBuf,
    changed_ns: Option<i64>,
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

fn write(host: &Host, why: &str, files: &[Was]) -> io::Result<()> {
    let halt = Halt {
        boot_id: boot_id(host),
        why: why.to_owned(),
        files: files.to_vec(),
    };
    files::write_json(&path(host), &halt)
}

/// Lets `attempt` reboot, and writes down what stops the next one until one of
/// `files` is changed. Without that nothing is begun.
pub fn guarded(
    host: &Host,
    files: &[PathBuf],
    attempt: impl FnOnce() -> Result<(), Failed>,
) -> Result<(), Failed> {
    let was: Vec<Was> = files
        .iter()
        .map(|path| Was {
            path: path.clone(),
            changed_ns: changed_ns(path),
        })
        .collect();
    write(host, BEGUN, &was).map_err(|e| Failed {
        why: format!("cannot write {}: {}", path(host).display(), with_cause(&e)),
        touched: false,
    })?;
    let done = attempt();
    match &done {
        // If this fails, what was written before says enough.
        Err(failed) if failed.touched => drop(write(host, &failed.why, &was)),
        _ => drop(files::remove_durably(&path(host))),
    }
    done
}

/// Why the policy does not go, unless one of these files was changed since.
pub fn in_force(host: &Host, unless_changed: &[&Path]) -> Option<String> {
    let path = path(host);
    let (why, was) = match files::read_json::<Halt>(&path) {
        Ok(None) => return None,
        Ok(Some(halt)) if halt.boot_id != boot_id(host) => return None,
        Ok(Some(halt)) => (halt.why, halt.files),
        Err(e) => {
            let why = format!("{} cannot be read: {}", path.display(), with_cause(&e));
            (why, Vec::new())
        }
    };
    let at = |path: &Path| -> Option<SystemTime> { path.metadata().ok()?.modified().ok() };
    let is_changed = |file: &&Path| match was.iter().find(|was| was.path == *file) {
        Some(was) => changed_ns(file) != was.changed_ns,
        // Another one than it was then.
        None => at(file) > at(&path),
    };
    (!unless_changed.iter().any(is_changed)).then_some(why)
}
