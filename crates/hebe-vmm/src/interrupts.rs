//! Joins devices to KVM: interrupt vectors and doorbells.

use std::io;
use std::sync::Arc;

use hebe_devices::{Doorbells, MsiMessage, MsiVector, MsixBackend};
use hebe_kvm::{Machine, MsiRoute, Router};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// MSI-X vectors as GSIs with irqfds.
pub(crate) struct Vectors(pub(crate) Arc<Router>);

struct Vector {
    router: Arc<Router>,
    trigger: EventFd,
    gsi: u32,
}

impl MsixBackend for Vectors {
    fn new_vector(&self) -> io::Result<Arc<dyn MsiVector>> {
        let trigger = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        let gsi = self.0.add_msi(&trigger)?;
        Ok(Arc::new(Vector {
            router: self.0.clone(),
            trigger,
            gsi,
        }))
    }
}

impl MsiVector for Vector {
    fn trigger(&self) -> io::Result<()> {
        self.trigger.write(1)
    }

    fn route(&self, message: Option<MsiMessage>) -> io::Result<()> {
        let route = message.map(|m| MsiRoute {
            address: m.addr,
            data: m.data,
        });
        self.router.route(self.gsi, route)
    }
}

/// Doorbells as ioeventfds.
pub(crate) struct KvmDoorbells(pub(crate) Arc<Machine>);

impl Doorbells for KvmDoorbells {
    fn attach(&self, address: u64, event: &EventFd) -> io::Result<()> {
        self.0.attach_doorbell(address, event)
    }

    fn detach(&self, address: u64, event: &EventFd) -> io::Result<()> {
        self.0.detach_doorbell(address, event)
    }
}
