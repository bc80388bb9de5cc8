//! A reboot that was ordered and checked, and that the service manager is to
//! carry out: `host/order.json` in the run directory, which ends with this
//! kernel.
//!
//! ```text
//! {"version":1, "boot_id":"…", "asked":{…}, "method":"warm", "kexec":true,
//!  "next":{"kernel":"/boot/vmlinuz-7.3.0","initrd":"…","cmdline":"…"},
//!  "timeout_s":60, "force":false}
//! ```

use std::io;
use std::path::{self, PathBuf};

use hebe_types::{RebootMethod, Stamp, VmId};
use serde::{Deserialize, Serialize};

use crate::files;
use crate::host::{Host, HostError, Layout};
use crate::preflight::{NextKernel, RebootOptions, Verdict};
use crate::system::Leave;

/// Version of the file.
const VERSION: u32 = 1;

/// The order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Order {
    /// [`VERSION`].
    version: u32,
    /// The boot in which it was given: in another one it is void.
    boot_id: String,
    /// When it was given.
    pub asked: Stamp,
    /// How VMs get over the reboot.
    pub method: RebootMethod,
    /// Whether the machine is left by kexec.
    kexec: bool,
    /// The kernel that was checked and loaded.
    pub next: Option<NextKernel>,
    /// How long a guest has to power off, in seconds.
    pub timeout_s: u64,
    /// Power off guests that do not do it in time.
    pub force: bool,
}

impl Order {
    /// What `options` came to in this verdict.
    pub fn new(host: &Host, options: &RebootOptions, verdict: &Verdict, asked: Stamp) -> Self {
        let absolute = |path: &PathBuf| path::absolute(path).unwrap_or_else(|_| path.clone());
        Self {
            version: VERSION,
            boot_id: here(host),
            asked,
            method: options.method,
            kexec: verdict.leave() == Leave::Kexec,
            // Who carries it out has another working directory.
            next: verdict.next.as_ref().map(|next| NextKernel {
                kernel: absolute(&next.kernel),
                initrd: next.initrd.as_ref().map(absolute),
                cmdline: next.cmdline.clone(),
            }),
            timeout_s: options.timeout_s,
            force: options.force,
        }
    }

    /// The order that stands; `None` where there is none of this boot.
    ///
    /// # Errors
    /// It cannot be read, or is another release's.
    pub fn read(host: &Host) -> Result<Option<Self>, HostError> {
        let path = path_of(&host.layout);
        let read: io::Result<Option<Self>> = files::read_json(&path);
        let found = read.map_err(HostError::file("read", &path))?;
        let Some(order) = found.filter(|order| order.boot_id == here(host)) else {
            return Ok(None);
        };
        if order.version != VERSION {
            let text = format!("its version is {}", order.version);
            return Err(HostError::file("read", &path)(io::Error::other(text)));
        }
        Ok(Some(order))
    }

    /// Writes it down, in place of one before it.
    ///
    /// # Errors
    /// The run directory cannot be written.
    pub fn write(&self, host: &Host) -> Result<(), HostError> {
        let path = path_of(&host.layout);
        let written = path.parent().map_or(Ok(()), std::fs::create_dir_all);
        written
            .and_then(|()| files::write_json(&path, self))
            .map_err(HostError::file("write", &path))
    }

    /// Takes it back.
    pub fn withdraw(host: &Host) {
        let _ = std::fs::remove_file(path_of(&host.layout));
    }

    /// How the machine is left.
    pub fn leave(&self) -> Leave {
        if self.kexec {
            Leave::Kexec
        } else {
            Leave::Reset
        }
    }

    /// The same as an operator would ask for it.
    pub(crate) fn options(&self) -> RebootOptions {
        let next = self.next.as_ref();
        RebootOptions {
            method: self.method,
            kernel: next.map(|n| n.kernel.clone()),
            initrd: next.and_then(|n| n.initrd.clone()),
            cmdline: next.map(|n| n.cmdline.clone()),
            hard: !self.kexec && self.method == RebootMethod::Saved,
            timeout_s: self.timeout_s,
            force: self.force,
            ..RebootOptions::default()
        }
    }
}

fn here(host: &Host) -> String {
    VmId(host.system.boot_id()).to_string()
}

fn path_of(layout: &Layout) -> PathBuf {
    layout.run.join("host").join("order.json")
}
