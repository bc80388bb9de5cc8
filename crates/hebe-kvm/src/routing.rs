//! GSI routing: which interrupt an irqfd raises.
//!
//! KVM takes the whole table at each change, so one owner keeps it: the
//! [`Router`]. GSI 0 to 23 go to the IOAPIC pins, MSI vectors get the numbers
//! above. Nothing goes to the PICs: a hardware-reduced guest never sets them
//! up, and a PIC left as it comes would deliver IRQ 4 as vector 4.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KvmIrqRouting,
    kvm_irq_routing_entry,
};
use kvm_ioctls::VmFd;
use vmm_sys_util::eventfd::EventFd;

const IOAPIC_PINS: u32 = 24;
/// Most GSIs of one VM; KVM's own limit is 4096.
const GSI_MAX: u32 = 1024;

/// Where a message-signalled interrupt goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsiRoute {
    /// Message address.
    pub address: u64,
    /// Message data.
    pub data: u32,
}

/// Owner of a VM's routing table.
#[derive(Debug)]
pub struct Router {
    vm: Arc<VmFd>,
    table: Mutex<Table>,
}

#[derive(Debug)]
struct Table {
    next_gsi: u32,
    msi: BTreeMap<u32, MsiRoute>,
}

impl Router {
    pub(crate) fn new(vm: Arc<VmFd>) -> io::Result<Self> {
        let table = Table {
            next_gsi: IOAPIC_PINS,
            msi: BTreeMap::new(),
        };
        let router = Self {
            vm,
            table: Mutex::new(table),
        };
        router.write(&BTreeMap::new())?;
        Ok(router)
    }

    fn write(&self, msi: &BTreeMap<u32, MsiRoute>) -> io::Result<()> {
        let routing = KvmIrqRouting::from_entries(&entries(msi))
            .map_err(|_| io::Error::other("the routing table is too long"))?;
        Ok(self.vm.set_gsi_routing(&routing)?)
    }

    /// A GSI with an irqfd: writing to `trigger` raises it. It raises nothing
    /// until [`Router::route`] says where it goes.
    pub fn add_msi(&self, trigger: &EventFd) -> io::Result<u32> {
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        if table.next_gsi >= GSI_MAX {
            return Err(io::Error::other("a VM has at most 1000 MSI vectors"));
        }
        let gsi = table.next_gsi;
        self.vm.register_irqfd(trigger, gsi)?;
        table.next_gsi += 1;
        Ok(gsi)
    }

    /// An irqfd for one IOAPIC pin.
    pub fn add_pin(&self, trigger: &EventFd, pin: u32) -> io::Result<()> {
        debug_assert!(pin < IOAPIC_PINS);
        Ok(self.vm.register_irqfd(trigger, pin)?)
    }

    /// Sets or clears where `gsi` goes, and tells KVM.
    pub fn route(&self, gsi: u32, route: Option<MsiRoute>) -> io::Result<()> {
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        let before = match route {
            Some(route) => table.msi.insert(gsi, route),
            None => table.msi.remove(&gsi),
        };
        if before == route {
            return Ok(());
        }
        self.write(&table.msi)
    }
}

fn entries(msi: &BTreeMap<u32, MsiRoute>) -> Vec<kvm_irq_routing_entry> {
    let mut entries = Vec::with_capacity(64 + msi.len());
    for gsi in 0..IOAPIC_PINS {
        entries.push(pin(gsi));
    }
    for (&gsi, route) in msi {
        let mut entry = kvm_irq_routing_entry {
            gsi,
            type_: KVM_IRQ_ROUTING_MSI,
            ..Default::default()
        };
        entry.u.msi.address_lo = route.address as u32;
        entry.u.msi.address_hi = (route.address >> 32) as u32;
        entry.u.msi.data = route.data;
        entries.push(entry);
    }
    entries
}

fn pin(gsi: u32) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_IRQCHIP,
        ..Default::default()
    };
    entry.u.irqchip.irqchip = KVM_IRQCHIP_IOAPIC;
    entry.u.irqchip.pin = gsi;
    entry
}
