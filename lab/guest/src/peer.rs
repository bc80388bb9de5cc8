//! VMs that QEMU runs in a lab host: the peer that Hebe is measured beside.

use serde::{Deserialize, Serialize};

/// Folder of the peer's programs and files, on the host's disk.
pub const PEER_FOLDER: &str = "/data/peer";
/// Where the definitions lie in the host: a JSON array of [`PeerVm`].
pub const PEER_VMS: &str = "/data/peer/vms.json";
/// The last reboot's report; written before the jump, completed after it.
pub const PEER_REPORT: &str = "/data/peer/report.json";

/// One VM of QEMU.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerVm {
    /// Its name.
    pub name: String,
    /// The host's end of its network card; made if it is not there.
    pub tap: String,
    /// The bridge that the tap joins.
    pub bridge: String,
    /// Folder that is made for QEMU's output (`log`), the console
    /// (`console.log`) and the control socket (`qmp`).
    pub folder: String,
    /// What runs QEMU: program and arguments, without the control socket.
    pub argv: Vec<String>,
}

impl PeerVm {
    /// The control socket.
    pub fn socket(&self) -> String {
        format!("{}/qmp", self.folder)
    }

    /// Where its state lies while there is no kernel under it.
    pub fn state(&self) -> String {
        format!("{PEER_FOLDER}/{}.state", self.name)
    }
}
