//! Why a device is refused.

use std::io;
use std::path::PathBuf;

use hebe_block::{BlockError, DiskChange};

use super::function::BAR_SIZE;

/// Why a device cannot be made, saved or restored.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// Slot 0 is the host bridge; there are 32.
    #[error("PCI slot {0} cannot hold a device: use 1 to 31")]
    Slot(u8),
    /// Two devices in one slot.
    #[error("PCI slot {0} is taken: give the device another")]
    SlotTaken(u8),
    /// The BAR does not lie in the MMIO window.
    #[error("BAR address {0:#x} is not a multiple of {BAR_SIZE:#x} in the MMIO window")]
    Bar(u64),
    /// The host refused interrupts, a thread or a descriptor.
    #[error("the host refuses what the device in PCI slot {slot} needs")]
    Host {
        /// Which device.
        slot: u8,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Saved while it ran.
    #[error("the device in PCI slot {0} is not paused: pause it before it is saved")]
    NotPaused(u8),
    /// Writes could not be made durable.
    #[error("the disk in PCI slot {slot} cannot be flushed")]
    Sync {
        /// Which device.
        slot: u8,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A VM that is suspended now could not be resumed with its disk.
    #[error(transparent)]
    NotFoundAgain(BlockError),
    /// State and back end are of different kinds.
    #[error(
        "the saved device in PCI slot {slot} is of kind {saved}, and the VM is given {given}: resume it with the devices it had"
    )]
    Kind {
        /// Which device.
        slot: u8,
        /// What the state says.
        saved: &'static str,
        /// What the VM was given.
        given: &'static str,
    },
    /// The disk is smaller than the one that was saved.
    #[error(
        "the disk in PCI slot {slot} had {saved} sectors and now has {found}: resume the VM with the disk it had"
    )]
    Disk {
        /// Which device.
        slot: u8,
        /// Capacity in the state, sectors of 512 bytes.
        saved: u64,
        /// Capacity found.
        found: u64,
    },
    /// The disk is another one, or was written to by others.
    #[error(
        "disk '{}' in PCI slot {slot} changed while the VM was suspended ({how}), and the VM's memory would destroy what is on it: put the disk back as it was, or give the suspended VM up with `hebe drop`; if the disk holds the same bytes as before, `hebe resume --accept-changed-disk` takes it",
        path.display()
    )]
    DiskChanged {
        /// Which device.
        slot: u8,
        /// Where the disk lies.
        path: PathBuf,
        /// What shows it.
        how: DiskChange,
    },
    /// The guest accepted features that this back end does not have.
    #[error(
        "the guest uses features {missing:#x} of the device in PCI slot {slot} that it does not have here: resume it with the device as it was"
    )]
    Features {
        /// Which device.
        slot: u8,
        /// Bits that are missing.
        missing: u64,
    },
    /// The state contradicts itself.
    #[error("the saved device in PCI slot {slot} makes no sense: {reason}")]
    State {
        /// Which device.
        slot: u8,
        /// What is wrong.
        reason: &'static str,
    },
    /// A saved queue cannot be taken into use.
    #[error("a saved queue of the device in PCI slot {slot} makes no sense: {reason}")]
    Queue {
        /// Which device.
        slot: u8,
        /// What is wrong.
        reason: String,
    },
}
