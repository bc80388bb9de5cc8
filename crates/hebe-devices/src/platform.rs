//! What devices need from the VMM around them.

use std::io;
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

/// Guest RAM, mapped by the VMM.
pub type Ram = vm_memory::GuestMemoryMmap<()>;

/// A message-signalled interrupt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsiMessage {
    /// Address that the message is written to.
    pub addr: u64,
    /// What is written.
    pub data: u32,
}

/// Makes interrupt vectors. The VMM gives each its own GSI and irqfd.
pub trait MsixBackend: Send + Sync {
    /// A vector without a route.
    fn new_vector(&self) -> io::Result<Arc<dyn MsiVector>>;
}

/// One interrupt vector of one function.
pub trait MsiVector: Send + Sync {
    /// Raises the interrupt. Called only while a route is set.
    fn trigger(&self) -> io::Result<()>;
    /// Sets or takes away the message that [`MsiVector::trigger`] sends.
    /// Called only when the message changes.
    fn route(&self, message: Option<MsiMessage>) -> io::Result<()>;
}

/// Lets a guest's write to an address signal an eventfd without leaving the
/// kernel (KVM API, KVM_IOEVENTFD: no datamatch, length 0).
pub trait Doorbells: Send + Sync {
    /// Begins to signal `evt` on writes to guest-physical `addr`.
    fn attach(&self, addr: u64, evt: &EventFd) -> io::Result<()>;
    /// Ends it.
    fn detach(&self, addr: u64, evt: &EventFd) -> io::Result<()>;
}

/// Takes memory of the guest that it does not use.
pub trait Reclaim: Send + Sync {
    /// Takes what lies from guest-physical `addr` on, which is RAM; the guest
    /// finds zeros there afterwards. Returns the bytes that were taken, which
    /// may be fewer, or none where this memory cannot be given back.
    ///
    /// # Errors
    /// Nothing was taken, or a part; the rest is as it was.
    fn give_back(&self, addr: u64, len: u64) -> io::Result<u64>;
}

/// Where devices report what an operator should know. Called rarely; must
/// not block for long.
pub trait EventLog: Send + Sync {
    /// Something happened to the device in PCI slot `slot`.
    fn event(&self, slot: u8, text: &str);
}

/// Discards everything.
impl EventLog for () {
    fn event(&self, _slot: u8, _text: &str) {}
}

/// The VMM, as devices see it. Cheap to clone.
#[derive(Clone)]
pub struct Platform {
    /// Guest RAM.
    pub ram: Ram,
    /// Interrupts.
    pub msix: Arc<dyn MsixBackend>,
    /// Doorbells.
    pub doorbells: Arc<dyn Doorbells>,
    /// Reports.
    pub log: Arc<dyn EventLog>,
}
