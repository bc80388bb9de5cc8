//! Virtio devices (virtio 1.2) over PCI.
//!
//! ```text
//! vCPU threads ── registers, doorbells ──► VirtioPci (function, registers)
//!                                             │ reset, activate, pause, resume
//! backend fd, kicks ── epoll ──► worker ──► Engine (device, queues) ──► Shared (interrupts, status)
//! ```
//! A device has one worker thread, which handles each request to its end
//! while it holds the engine's lock. So whoever holds that lock knows that
//! nothing is in flight: that is how pause and reset drain.

mod balloon;
pub(crate) mod block;
pub(crate) mod console;
mod device;
mod error;
mod function;
mod kind;
pub(crate) mod net;
pub(crate) mod queue;
pub(crate) mod ram;
mod registers;
pub(crate) mod rng;
mod shared;
mod transport;
pub(crate) mod vsock;
mod wire;
mod worker;

pub use balloon::BalloonFigures;
pub use block::BLOCK_QUEUES_MAX;
pub use device::Counters;
pub use error::DeviceError;
pub use function::BAR_SIZE;
pub use kind::DeviceKind;
pub use transport::VirtioPci;
pub use vsock::VsockHost;
pub use wire::{FrameStream, NetBackend};
pub use worker::on_worker_start;

/// Parts that [`crate::fuzzing`] drives one by one.
pub(crate) mod fuzzed {
    pub(crate) use super::device::{Device, Queues};
    pub(crate) use super::queue::VirtQueue;
    pub(crate) use super::ram::{Meter, MeteredRam};
    pub(crate) use super::shared::{Config, Shared};
}
