//! What was retrieved in this boot, noted beside the keeper's socket: a report
//! is made from it when the keeper may be gone, and a VM that is missed is told
//! apart from one that nobody has asked the kernel for yet.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use hebe_store::luo::Arrival;
use hebe_types::{ByteSize, Stamp, VmId, VmName};
use serde::{Deserialize, Serialize};

use crate::files;
use crate::host::{Host, Layout};
use crate::listing::with_cause;

/// What the keeper of one boot retrieved so far.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Arrivals {
    /// The boot.
    boot_id: String,
    /// Nothing is to come any more.
    pub complete: bool,
    /// VMs, in the order in which they arrived.
    pub vms: Vec<ArrivalNote>,
}

/// One VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ArrivalNote {
    /// Its name, as far as anything says it.
    pub name: Option<VmName>,
    /// The first call to the kernel for it.
    pub began: Stamp,
    /// The end of the last one.
    pub ended: Stamp,
    /// RAM that came back.
    pub retrieved: ByteSize,
    /// Why it is lost, if it is.
    pub lost: Option<String>,
}

impl ArrivalNote {
    pub(super) fn of(arrival: &Arrival) -> Self {
        let outcome = arrival.outcome.as_ref();
        Self {
            name: arrival.name.clone(),
            began: arrival.span.began,
            ended: arrival.span.ended,
            retrieved: outcome.map_or(ByteSize(0), |vm| vm.retrieved),
            lost: outcome.err().map(|lost| with_cause(&lost.reason)),
        }
    }
}

impl Arrivals {
    pub(super) fn path(layout: &Layout) -> PathBuf {
        layout.run.join("host").join("arrivals.json")
    }

    /// For a keeper that begins: a former one of the same boot may have been
    /// killed.
    pub(super) fn begin(path: &Path, boot_id: [u8; 16]) -> Self {
        let former = Self::read_from(path, boot_id);
        Self {
            boot_id: VmId(boot_id).to_string(),
            complete: false,
            vms: former.map(|former| former.vms).unwrap_or_default(),
        }
    }

    /// What was retrieved in this boot; `None` where nobody tried yet.
    pub fn read(host: &Host) -> Option<Self> {
        Self::read_from(&Self::path(&host.layout), host.system.boot_id())
    }

    fn read_from(path: &Path, boot_id: [u8; 16]) -> Option<Self> {
        let found: io::Result<Option<Self>> = files::read_json(path);
        let here = VmId(boot_id).to_string();
        found.ok().flatten().filter(|a| a.boot_id == here)
    }

    /// Whole or not at all, and not durable: it is about this boot. Where it
    /// cannot be written a report lacks some lines.
    pub(super) fn write(&self, path: &Path) {
        let write = || {
            let fresh = path.with_extension("new");
            fs::write(&fresh, serde_json::to_vec(self)?)?;
            fs::rename(&fresh, path)
        };
        let _: io::Result<()> = write();
    }
}
