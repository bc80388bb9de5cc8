//! Bus, PCI, virtio devices and serial port.

mod platform;

pub use platform::{Doorbells, EventLog, MsiMessage, MsiVector, MsixBackend, Platform, Ram};
