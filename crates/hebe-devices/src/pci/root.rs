//! The PCI root: configuration mechanism #1 and the MMIO window.
//!
//! Bus 0 only: a host bridge at 00:00.0 and virtio functions at slots 1 to
//! 31. An MMIO address is resolved through the BARs as they are at that
//! moment, so a guest may move them. Where a guest lays two BARs over each
//! other, the lower slot answers; nobody but the guest is harmed.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use hebe_state::v1::devices::PciRootV1;

use super::config::{COMMAND, COMMAND_MASK, ConfigSpace, Identity};
use crate::virtio::{DeviceError, VirtioPci};

/// The address latch.
const CONFIG_ADDRESS: u16 = 0xcf8;
/// The data window, four bytes.
const CONFIG_DATA: u16 = 0xcfc;
const ENABLE: u32 = 1 << 31;
/// Bits of the latch that exist.
const ADDRESS_MASK: u32 = 0x80ff_fffc;

struct Bridge {
    address: u32,
    space: ConfigSpace,
}

/// The PCI host bridge, and what hangs on it.
pub struct PciRoot {
    bridge: Mutex<Bridge>,
    slots: RwLock<BTreeMap<u8, Arc<VirtioPci>>>,
}

impl Default for PciRoot {
    fn default() -> Self {
        Self::new()
    }
}

impl PciRoot {
    /// An empty bus.
    pub fn new() -> Self {
        Self::restore(&PciRootV1::default())
    }

    /// An empty bus, with the bridge as saved. Functions are added as on a
    /// new one.
    pub fn restore(state: &PciRootV1) -> Self {
        let mut space = ConfigSpace::new(&Identity {
            vendor: 0x8086,
            device: 0x0d57,
            class: [6, 0, 0],
            revision: 0,
            subsystem_vendor: 0,
            subsystem: 0,
        });
        space.put(
            COMMAND,
            &(state.bridge_command & COMMAND_MASK).to_le_bytes(),
        );
        Self {
            bridge: Mutex::new(Bridge {
                address: state.address & ADDRESS_MASK,
                space,
            }),
            slots: RwLock::default(),
        }
    }

    /// The bridge's own state; functions are saved one by one.
    pub fn save(&self) -> PciRootV1 {
        let bridge = self.bridge();
        PciRootV1 {
            address: bridge.address,
            bridge_command: bridge.space.u16(COMMAND),
        }
    }

    /// Puts a function into its slot. Refused if the slot is taken.
    pub fn add(&self, function: Arc<VirtioPci>) -> Result<(), DeviceError> {
        let slot = function.slot();
        let mut slots = self.slots.write().unwrap_or_else(PoisonError::into_inner);
        if slots.contains_key(&slot) {
            return Err(DeviceError::SlotTaken(slot));
        }
        slots.insert(slot, function);
        Ok(())
    }

    /// The function in a slot.
    pub fn function(&self, slot: u8) -> Option<Arc<VirtioPci>> {
        let slots = self.slots.read().unwrap_or_else(PoisonError::into_inner);
        slots.get(&slot).cloned()
    }

    /// All functions, by slot.
    pub fn functions(&self) -> Vec<Arc<VirtioPci>> {
        let slots = self.slots.read().unwrap_or_else(PoisonError::into_inner);
        slots.values().cloned().collect()
    }

    /// A read of port 0xcf8 to 0xcff.
    pub fn pio_read(&self, port: u16, data: &mut [u8]) {
        data.fill(0xff);
        let address = self.bridge().address;
        if port < CONFIG_DATA {
            let at = usize::from(port.saturating_sub(CONFIG_ADDRESS));
            let bytes = address.to_le_bytes();
            for (byte, latch) in data.iter_mut().zip(bytes.iter().skip(at)) {
                *byte = *latch;
            }
            return;
        }
        let Some((slot, register)) = decode(address, port, data.len()) else {
            return;
        };
        if slot == 0 {
            self.bridge().space.read(register, data);
        } else if let Some(function) = self.function(slot) {
            function.config_read(register, data);
        }
    }

    /// A write of port 0xcf8 to 0xcff. Only a 4-byte write reaches the
    /// latch; narrower ones belong to other registers of a PC's chipset.
    pub fn pio_write(&self, port: u16, data: &[u8]) {
        if port < CONFIG_DATA {
            if let (CONFIG_ADDRESS, &[a, b, c, d]) = (port, data) {
                self.bridge().address = u32::from_le_bytes([a, b, c, d]) & ADDRESS_MASK;
            }
            return;
        }
        let address = self.bridge().address;
        let Some((slot, register)) = decode(address, port, data.len()) else {
            return;
        };
        if slot == 0 {
            self.bridge().space.write(register, data);
        } else if let Some(function) = self.function(slot) {
            function.config_write(register, data);
        }
    }

    /// A read of guest-physical memory that is no RAM. False if no BAR is
    /// there; `data` is then all ones.
    pub fn mmio_read(&self, addr: u64, data: &mut [u8]) -> bool {
        match self.resolve(addr) {
            Some((function, offset)) => {
                function.bar_read(offset, data);
                true
            }
            None => {
                data.fill(0xff);
                false
            }
        }
    }

    /// A write of guest-physical memory that is no RAM. False if no BAR is
    /// there.
    pub fn mmio_write(&self, addr: u64, data: &[u8]) -> bool {
        match self.resolve(addr) {
            Some((function, offset)) => {
                function.bar_write(offset, data);
                true
            }
            None => false,
        }
    }

    fn resolve(&self, addr: u64) -> Option<(Arc<VirtioPci>, u64)> {
        let slots = self.slots.read().unwrap_or_else(PoisonError::into_inner);
        slots
            .values()
            .find_map(|f| Some((Arc::clone(f), f.bar_offset(addr)?)))
    }

    fn bridge(&self) -> std::sync::MutexGuard<'_, Bridge> {
        self.bridge.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Slot and register of an access to the data window; `None` for what is not
/// on bus 0, function 0, or crosses the window's end.
fn decode(address: u32, port: u16, len: usize) -> Option<(u8, usize)> {
    let offset = usize::from(port.checked_sub(CONFIG_DATA)?);
    let on_bus = address & ENABLE != 0 && address & 0x00ff_0700 == 0;
    if !on_bus || offset + len > 4 {
        return None;
    }
    let slot = (address >> 11 & 0x1f) as u8;
    Some((slot, (address & 0xfc) as usize + offset))
}
