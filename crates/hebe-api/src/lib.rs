//! The control protocol between `hebe` and `hebe-vmm`.
//!
//! One unix stream socket per VM. A frame is a little-endian `u32` length
//! followed by that many bytes of JSON: an [`Order`], which is a [`Request`]
//! with the time that the client waits, and one [`Response`] back. Frames are bounded by [`FRAME_LEN_MAX`]; a longer one
//! ends the connection. After [`Request::Console`] is answered with
//! [`Response::Done`], the connection carries raw console bytes both ways.

mod balloon;
mod cage;
mod frame;
mod order;
mod words;

use std::path::PathBuf;

use hebe_types::{ByteSize, Stamp, VmId, VmName};
use serde::{Deserialize, Serialize};

pub use balloon::{BalloonStatus, GuestMemory};
pub use cage::{CagePart, CageReport};
pub use frame::{Client, ClientError, FRAME_LEN_MAX, fits_a_frame, read_frame, write_frame};
pub use order::{Deadline, Order};
pub use words::plain;

/// What a client asks of a VMM.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "kebab-case")]
pub enum Request {
    /// Answered with [`Response::Status`].
    Status,
    /// Stop the vCPUs; RAM and devices stay as they are.
    Pause,
    /// Let a paused VM run again.
    Unpause,
    /// On-memory suspend: stop vCPUs, drain devices, save and commit
    /// the execution state into the VM's segment. The process stays alive,
    /// so that [`Request::Thaw`] can undo it. Answered with [`Response::Frozen`].
    Freeze,
    /// Undo a freeze in the same process: the committed state is withdrawn
    /// first, then the vCPUs run.
    Thaw,
    /// Stop the VM and write RAM and state to a file, fsynced. The VM stays
    /// paused. Answered with [`Response::Saved`]. The file's descriptor
    /// follows the request (`hebe_sys::fdpass`): a VMM opens nothing itself,
    /// because its cage does not let it, and because one that was started
    /// before the host's root file system was mounted would look in another.
    Save {
        /// What the file is called in messages.
        name: PathBuf,
    },
    /// Press the ACPI power button. A VM that failed has no guest that could
    /// see it: it is ended at once.
    PowerButton,
    /// End the process. A frozen VM stays frozen in its segment; a running
    /// one is powered off at once.
    Quit {
        /// Refuse unless the VM is in this state; nothing is asked of it
        /// after the answer. `None` ends it whatever it does.
        #[serde(default)]
        expected: Option<VmmState>,
    },
    /// Turn this connection into the VM's console.
    Console,
    /// Hand out the files that the VM's RAM lies in (store `luo`). Answered
    /// with [`Response::SegmentFiles`]; the descriptors follow it
    /// (`hebe_sys::fdpass`). The VM is not touched.
    SegmentFiles,
    /// Look at the VM's balloon, and set it. The guest is asked for its
    /// statistics, and the answer holds those that it gave last:
    /// [`BalloonStatus::answers`] tells new ones. Answered with
    /// [`Response::Balloon`].
    Balloon {
        /// RAM that the guest is to be left with; `None` changes nothing.
        #[serde(default)]
        target: Option<ByteSize>,
    },
}

/// What the VMM answers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "response", rename_all = "kebab-case")]
pub enum Response {
    /// Done; nothing more to say.
    Done,
    /// The VM as it is.
    Status(VmStatus),
    /// The VM is frozen and committed.
    Frozen(FreezeReport),
    /// The VM is saved.
    Saved(SaveReport),
    /// The files of the VM's RAM: so many descriptors follow this frame.
    SegmentFiles {
        /// How many.
        count: usize,
        /// The `hebe_store::SegmentSpec` as JSON.
        spec: String,
    },
    /// The VM's balloon.
    Balloon(BalloonStatus),
    /// Refused or failed; the VM is as it was.
    Failed {
        /// One sentence, with the way out.
        message: String,
    },
}

/// Where a VM stands in its VMM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum VmmState {
    /// vCPUs run.
    Running,
    /// vCPUs are stopped, nothing is committed. See also [`VmStatus::failed`].
    Paused,
    /// Execution state is committed in the segment.
    Frozen,
    /// RAM and state are in a file; the VM waits to be ended or unpaused.
    Saved,
}

/// One VM as its VMM sees it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VmStatus {
    /// Name.
    pub name: VmName,
    /// Identity.
    pub id: VmId,
    /// State.
    pub state: VmmState,
    /// The VMM's process id; what a [`Client`] gives is the kernel's word.
    pub pid: u32,
    /// The VMM's release.
    pub version: String,
    /// Times this VM was resumed from memory or file since it booted.
    pub resumes: u32,
    /// Why the VM stands still for good, if it does: KVM could not go on. It
    /// is paused, to be looked at, and can only be ended.
    #[serde(default)]
    pub failed: Option<String>,
    /// The guest told that its kernel panicked, since it booted.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub guest_panicked: bool,
    /// Devices that stopped, with the reason (`virtio-blk 0: descriptor loop`).
    pub stopped_devices: Vec<String>,
    /// Bytes of guest RAM that device code touched so far.
    pub ram_meter: RamMeter,
    /// How long a request of the slowest disk takes at present, in nanoseconds:
    /// a mean over about the last sixty. `None` before the first, and from a
    /// release that did not tell.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_request_ns: Option<u64>,
    /// For each disk, in the order of the definition, whether reads that must
    /// wait for it are under way beside each other, by io_uring. Empty from a
    /// release that did not tell.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub disk_rings: Vec<bool>,
    /// Stamp of the first frame that the guest sent after the last resume or start.
    pub first_tx: Option<Stamp>,
    /// Stamps of the last resume, if the VM was resumed.
    pub resume: Option<ResumeReport>,
    /// How the VMM is confined; `None` from a release that did not confine it.
    #[serde(default)]
    pub cage: Option<CageReport>,
    /// The balloon, if the VM has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub balloon: Option<Box<BalloonStatus>>,
}

/// Guest RAM touched by the VMM, in bytes, since it started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RamMeter {
    /// Rings: descriptors, available and used.
    pub ring_bytes: u64,
    /// Data that guests asked devices to move.
    pub data_bytes: u64,
}

/// Instants of one freeze.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FreezeReport {
    /// The request arrived.
    pub asked: Stamp,
    /// All vCPUs were out of the guest.
    pub vcpus_stopped: Stamp,
    /// All devices were drained.
    pub devices_drained: Stamp,
    /// The state was built.
    pub saved: Stamp,
    /// The commit record was written.
    pub committed: Stamp,
    /// Bytes of execution state.
    pub state_bytes: u64,
    /// Guest RAM touched between `vcpus_stopped` and `committed`.
    pub ram_touched: RamMeter,
}

/// Instants of one save.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SaveReport {
    /// The request arrived.
    pub asked: Stamp,
    /// All vCPUs were out of the guest.
    pub vcpus_stopped: Stamp,
    /// The file was complete and on disk.
    pub durable: Stamp,
    /// Bytes written, holes not counted.
    pub bytes_written: u64,
}

/// Instants of one resume.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ResumeReport {
    /// The process began.
    pub process_started: Stamp,
    /// The state was read and checked.
    pub state_read: Stamp,
    /// The VM was built around its RAM.
    pub constructed: Stamp,
    /// The first vCPU entered the guest.
    pub running: Stamp,
    /// Guest RAM touched up to `running`.
    pub ram_touched: RamMeter,
    /// What came between `state_read` and `constructed`, where the VMM says so.
    #[serde(default)]
    pub steps: Option<Box<ResumeSteps>>,
}

/// Where the time goes in which a VM is built around its RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResumeSteps {
    /// The process was in its cage, with all that it holds open.
    pub caged: Stamp,
    /// KVM had made a VM, with its interrupt controllers.
    pub machine_made: Stamp,
    /// KVM knew the guest's RAM.
    pub ram_known: Stamp,
    /// The vCPUs had their registers.
    pub vcpus_restored: Stamp,
}
