//! Bus, PCI, virtio devices and serial port.
//!
//! A guest sees a PCI bus ([`PciRoot`]) with virtio 1.x functions
//! ([`VirtioPci`]: block, net, console, rng, vsock,
//! balloon) and a 16550 ([`SerialPort`]).
//! The VMM gives them what they need as a [`Platform`].
//!
//! **Suspend and resume.** Each device pauses with nothing in flight, is
//! saved into a struct of [`hebe_state::v1::devices`], and is constructed
//! from that, never loaded into. Between pause and resume no device touches
//! guest RAM; [`VirtioPci::meter`] counts every byte that one touches at any
//! other time, so that this can be observed.
//!
//! **Guests are hostile.** What a guest writes into registers, rings and
//! descriptors is checked before use. A guest that breaks the rules of a
//! queue stops that device ([`VirtioPci::stopped_reason`]) until it resets
//! it, and nothing else.

mod announce;
#[doc(hidden)]
pub mod fuzzing;
mod hub;
mod msix;
mod pci;
mod platform;
mod pvpanic;
mod rtc;
mod serial;
mod virtio;

pub use hub::{ConsoleHub, ConsoleLog, SCROLLBACK_LEN};
pub use pci::PciRoot;
pub use platform::{
    Doorbells, EventLog, MsiMessage, MsiVector, MsixBackend, Platform, Ram, Reclaim,
};
pub use pvpanic::Pvpanic;
pub use rtc::Rtc;
pub use serial::{SERIAL_IRQ, SERIAL_PORT, SerialPort, SerialStateError};
pub use virtio::{
    BAR_SIZE, BLOCK_QUEUES_MAX, BalloonFigures, Counters, DeviceError, DeviceKind, FrameStream,
    NetBackend, VirtioPci, VsockHost, on_worker_start,
};
