//! The cage: what is left to a VMM that its guest has taken over.
//!
//! It is entered once, by the main thread, when everything is open that the
//! VM needs from outside (its segment, its disks, its taps, its sockets, what it boots
//! from when its guest resets) and before any
//! other thread exists: all threads inherit it. From then on the process can
//!
//! - use what is open, and open nothing more: no file has a name for it, not
//!   even one of its own, by landlock and, also where the kernel lacks that, by
//!   seccomp. A file that it is to save its VM in is handed to it, open;
//! - make the system calls that a VMM makes, and none that starts a program,
//!   opens a socket, or reaches another process: seccomp, once for the
//!   process and again, narrower, for each vCPU and each device;
//! - is nobody that other processes know: a user of its own, where root started it;
//! - and has no capability, no way to get one back, no network, and leaves no
//!   core file, which would hold guest RAM.
//!
//! A VM's life comes before its cage: a part that this kernel lacks is left
//! off, said in the log and in the VM's status, unless the operator demanded
//! the whole cage.

mod files;
mod group;
mod privileges;
mod syscalls;
mod verdict;

use std::io::Read;

use clap::ValueEnum;
use hebe_api::{CagePart, CageReport};

use crate::log;

pub use group::{Awaited, Confined};
pub(crate) use syscalls::has_filters;
pub use syscalls::{narrow_device, narrow_vcpu};
pub use verdict::EXIT_STATUS;

/// Whether a VMM is confined.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Wish {
    /// As far as this kernel can.
    #[default]
    On,
    /// Wholly, or the VM does not run.
    Required,
    /// Not at all: for debugging.
    Off,
}

/// The whole cage was demanded, and cannot be had.
#[derive(Debug, thiserror::Error)]
#[error(
    "the VM does not run, because its VMM cannot be confined as demanded: {0}. Use a kernel that has it, or set cage = \"on\" in host.toml to run with what there is"
)]
pub struct CageError(String);

/// Confines this thread, and all that it starts from now on. Whatever is open
/// stays usable. With `word`, whoever started this process tells there that it is in its
/// control group, and whether that has limits: it is waited for at the end, because a VM
/// that is made before has threads of the kernel that stay behind.
///
/// # Errors
/// With [`Wish::Required`], that a part cannot be had. The thread is then
/// confined as far as it could be.
pub fn enter(wish: Wish, word: Option<impl Read>) -> Result<CageReport, CageError> {
    let group = |word: Option<_>| word.map(|word| group::of(group::heard(word)));
    if wish == Wish::Off {
        log::log_error(
            "NOT CAGED: by --no-sandbox this VMM has all rights of whoever started it; a guest that breaks out has them too",
        );
        group(word);
        return Ok(CageReport::default());
    }
    // Capabilities go after what needs them, system calls after all that
    // makes calls which a VMM never makes.
    let mut parts = vec![
        part("limits", privileges::limit()),
        part("namespaces", privileges::leave_namespaces()),
        part("user", privileges::become_nobody_else()),
        part("capabilities", privileges::drop_capabilities()),
        part("landlock", files::confine()),
        part("seccomp", syscalls::confine()),
    ];
    // Its place is found meanwhile.
    parts.splice(0..0, group(word));
    let report = CageReport { parts };
    for open in report.open() {
        log::log_error(&format!(
            "this VMM's cage lacks {}: {}",
            open.name, open.detail
        ));
    }
    if let (Wish::Required, Some(open)) = (wish, report.open().next()) {
        return Err(CageError(format!("{}: {}", open.name, open.detail)));
    }
    Ok(report)
}

/// `outcome`: how far it holds, or why it does not.
fn part(name: &str, outcome: Result<String, String>) -> CagePart {
    let on = outcome.is_ok();
    let (Ok(detail) | Err(detail)) = outcome;
    CagePart {
        name: name.to_owned(),
        on,
        detail,
    }
}
