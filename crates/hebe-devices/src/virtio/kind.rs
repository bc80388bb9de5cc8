//! The kinds of device, with the host's side of each.

use std::sync::Arc;

use hebe_block::BlockBackend;
use hebe_state::v2::devices::DeviceV2;
use hebe_types::MacAddr;

use super::balloon::Balloon;
use super::block::Block;
use super::console::Console;
use super::device::Device;
use super::error::DeviceError;
use super::net::Net;
use super::rng::Rng;
use super::vsock::{Vsock, VsockHost};
use super::wire::NetBackend;
use crate::{ConsoleHub, Reclaim};

/// A kind of device and what it stands on.
pub enum DeviceKind {
    /// A disk.
    Block {
        /// What is on it.
        backend: BlockBackend,
        /// Queues of a new device, 1 to [`crate::BLOCK_QUEUES_MAX`]; one that
        /// is restored has as many as its state.
        queues: usize,
    },
    /// A NIC.
    Net {
        /// What it is connected to.
        wire: NetBackend,
        /// The NIC's address.
        mac: MacAddr,
    },
    /// A console with one port.
    Console {
        /// Where its output goes and its input comes from.
        hub: Arc<ConsoleHub>,
        /// Whether it takes the hub's input: true only if the VM has no
        /// serial port.
        takes_input: bool,
    },
    /// An entropy source on the host's random number generator.
    Rng,
    /// Sockets between host and guest.
    Vsock {
        /// The host's side.
        host: VsockHost,
        /// The guest's context id, 3 or more.
        cid: u64,
    },
    /// A balloon.
    Balloon {
        /// Takes what the guest gives back.
        reclaim: Arc<dyn Reclaim>,
        /// Bytes of guest RAM.
        ram: u64,
        /// A guest in need takes memory out of it by itself.
        deflate_on_oom: bool,
        /// The guest may report memory that it freed.
        reporting: bool,
    },
}

/// Identity of a kind: virtio device id, PCI class, name in reports.
pub(crate) struct KindInfo {
    pub(crate) id: u16,
    pub(crate) class: [u8; 3],
    pub(crate) name: &'static str,
}

impl DeviceKind {
    pub(crate) fn info(&self) -> KindInfo {
        let (id, class, name) = match self {
            Self::Net { .. } => (1, [0x02, 0x00, 0x00], "net"),
            Self::Block { .. } => (2, [0x01, 0x80, 0x00], "block"),
            Self::Console { .. } => (3, [0x07, 0x80, 0x00], "console"),
            Self::Rng => (4, [0xff, 0x00, 0x00], "rng"),
            Self::Balloon { .. } => (5, [0xff, 0x00, 0x00], "balloon"),
            Self::Vsock { .. } => (19, [0x07, 0x80, 0x00], "vsock"),
        };
        KindInfo { id, class, name }
    }

    /// A new device.
    pub(crate) fn build(self, slot: u8) -> Box<dyn Device> {
        match self {
            Self::Block { backend, queues } => Box::new(Block::new(backend, queues, slot)),
            Self::Net { wire, mac } => Box::new(Net::new(wire, mac)),
            Self::Console { hub, takes_input } => Box::new(Console::new(hub, takes_input)),
            Self::Rng => Box::new(Rng::default()),
            Self::Vsock { host, cid } => Box::new(Vsock::new(host, cid)),
            Self::Balloon {
                reclaim,
                ram,
                deflate_on_oom,
                reporting,
            } => Box::new(Balloon::new(reclaim, ram, deflate_on_oom, reporting)),
        }
    }

    /// The device as saved, with so many `queues`, on a back end that must fit
    /// it.
    pub(crate) fn rebuild(
        self,
        slot: u8,
        state: &DeviceV2,
        queues: usize,
    ) -> Result<Box<dyn Device>, DeviceError> {
        let given = self.info().name;
        let device: Box<dyn Device> = match (self, state) {
            (Self::Block { backend, .. }, DeviceV2::Block(saved)) => {
                Box::new(Block::restore(saved, backend, queues, slot)?)
            }
            (Self::Net { wire, .. }, DeviceV2::Net(saved)) => Box::new(Net::restore(saved, wire)),
            (Self::Console { hub, takes_input }, DeviceV2::Console(saved)) => {
                Box::new(Console::restore(saved, hub, takes_input))
            }
            (Self::Rng, DeviceV2::Rng(_)) => Box::new(Rng::default()),
            (Self::Vsock { host, .. }, DeviceV2::Vsock(saved)) => {
                Box::new(Vsock::restore(saved, host))
            }
            (
                Self::Balloon {
                    reclaim,
                    ram,
                    deflate_on_oom,
                    reporting,
                },
                DeviceV2::Balloon(saved),
            ) => Box::new(Balloon::new(reclaim, ram, deflate_on_oom, reporting).restored(saved)),
            (_, saved) => {
                return Err(DeviceError::Kind {
                    slot,
                    saved: state_name(saved),
                    given,
                });
            }
        };
        Ok(device)
    }
}

fn state_name(state: &DeviceV2) -> &'static str {
    match state {
        DeviceV2::Block(_) => "block",
        DeviceV2::Net(_) => "net",
        DeviceV2::Console(_) => "console",
        DeviceV2::Rng(_) => "rng",
        DeviceV2::Vsock(_) => "vsock",
        DeviceV2::Balloon(_) => "balloon",
    }
}
