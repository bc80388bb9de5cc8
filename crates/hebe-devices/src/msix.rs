//! MSI-X: capability bits, table and pending bits of one function (PCI local
//! bus 3.0, 6.8.2).

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use hebe_state::v1::devices::{MsixEntryV1, MsixV1};

use crate::{MsiMessage, MsiVector, MsixBackend};

/// Bytes of a table entry.
pub(crate) const ENTRY_LEN: u64 = 16;
/// "No vector" (virtio 1.2, 4.1.4.3).
pub(crate) const NO_VECTOR: u16 = 0xffff;

struct Entry {
    regs: MsixEntryV1,
    vector: Arc<dyn MsiVector>,
    /// What the vector sends now.
    routed: Option<MsiMessage>,
}

struct Inner {
    enabled: bool,
    masked: bool,
    entries: Vec<Entry>,
}

/// MSI-X of one function. Shared by vCPU threads, which write the table, and
/// the device's worker, which raises interrupts.
pub(crate) struct Msix(Mutex<Inner>);

impl Msix {
    /// A function with `vectors` vectors, all masked, as after a reset.
    pub(crate) fn new(vectors: usize, backend: &dyn MsixBackend) -> io::Result<Self> {
        let entry = MsixEntryV1 {
            masked: true,
            ..MsixEntryV1::default()
        };
        Self::restore(
            &MsixV1 {
                enabled: false,
                masked: false,
                entries: vec![entry; vectors],
            },
            backend,
        )
    }

    /// As saved, with the routes set.
    pub(crate) fn restore(state: &MsixV1, backend: &dyn MsixBackend) -> io::Result<Self> {
        let mut entries = Vec::with_capacity(state.entries.len());
        for &regs in &state.entries {
            entries.push(Entry {
                regs,
                vector: backend.new_vector()?,
                routed: None,
            });
        }
        let mut inner = Inner {
            enabled: state.enabled,
            masked: state.masked,
            entries,
        };
        for entry in &mut inner.entries {
            entry.update_route(inner.enabled)?;
        }
        Ok(Self(Mutex::new(inner)))
    }

    pub(crate) fn save(&self) -> MsixV1 {
        let inner = self.lock();
        MsixV1 {
            enabled: inner.enabled,
            masked: inner.masked,
            entries: inner.entries.iter().map(|e| e.regs).collect(),
        }
    }

    pub(crate) fn vectors(&self) -> usize {
        self.lock().entries.len()
    }

    /// Enable and function mask, bits 15 and 14 of message control.
    pub(crate) fn set_control(&self, enabled: bool, masked: bool) -> io::Result<()> {
        let mut inner = self.lock();
        (inner.enabled, inner.masked) = (enabled, masked);
        inner.settle()
    }

    /// Raises a vector, or remembers it while it is masked. Dropped while
    /// MSI-X is off: there is no INTx.
    pub(crate) fn trigger(&self, vector: u16) -> io::Result<()> {
        let mut inner = self.lock();
        if !inner.enabled {
            return Ok(());
        }
        let masked = inner.masked;
        match inner.entries.get_mut(usize::from(vector)) {
            None => Ok(()),
            Some(entry) if masked || entry.regs.masked || entry.routed.is_none() => {
                entry.regs.pending = true;
                Ok(())
            }
            Some(entry) => entry.vector.trigger(),
        }
    }

    /// Reads the table at a byte offset. Accesses are 4 or 8 bytes, aligned.
    pub(crate) fn table_read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if !aligned(offset, data.len()) {
            return;
        }
        let inner = self.lock();
        for (i, word) in data.chunks_exact_mut(4).enumerate() {
            let at = offset + 4 * i as u64;
            let value = usize::try_from(at / ENTRY_LEN)
                .ok()
                .and_then(|index| inner.entries.get(index))
                .map_or(0, |entry| entry.read(at % ENTRY_LEN));
            word.copy_from_slice(&value.to_le_bytes());
        }
    }

    /// Writes the table at a byte offset.
    pub(crate) fn table_write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        if !aligned(offset, data.len()) {
            return Ok(());
        }
        let mut inner = self.lock();
        for (i, word) in data.chunks_exact(4).enumerate() {
            let at = offset + 4 * i as u64;
            let value = u32::from_le_bytes([word[0], word[1], word[2], word[3]]);
            if let Some(entry) = usize::try_from(at / ENTRY_LEN)
                .ok()
                .and_then(|index| inner.entries.get_mut(index))
            {
                entry.write(at % ENTRY_LEN, value);
            }
        }
        inner.settle()
    }

    /// Reads the pending bits at a byte offset.
    pub(crate) fn pba_read(&self, offset: u64, data: &mut [u8]) {
        let inner = self.lock();
        let mut bits = [0u8; 8];
        for (i, entry) in inner.entries.iter().enumerate().take(64) {
            bits[i / 8] |= u8::from(entry.regs.pending) << (i % 8);
        }
        for (i, byte) in data.iter_mut().enumerate() {
            let at = offset.saturating_add(i as u64);
            *byte = usize::try_from(at)
                .ok()
                .and_then(|at| bits.get(at).copied())
                .unwrap_or(0);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn aligned(offset: u64, len: usize) -> bool {
    matches!(len, 4 | 8) && offset.is_multiple_of(len as u64)
}

impl Inner {
    /// After a change: sets routes, and fires what was pending and is no
    /// longer masked.
    fn settle(&mut self) -> io::Result<()> {
        let mut result = Ok(());
        for entry in &mut self.entries {
            if let Err(e) = entry.update_route(self.enabled) {
                result = Err(e);
                continue;
            }
            let open = self.enabled && !self.masked && !entry.regs.masked;
            if open && entry.regs.pending && entry.routed.is_some() {
                entry.regs.pending = false;
                result = result.and(entry.vector.trigger());
            }
        }
        result
    }
}

impl Entry {
    fn read(&self, offset: u64) -> u32 {
        match offset {
            0 => self.regs.address as u32,
            4 => (self.regs.address >> 32) as u32,
            8 => self.regs.data,
            _ => u32::from(self.regs.masked),
        }
    }

    fn write(&mut self, offset: u64, value: u32) {
        let wide = u64::from(value);
        match offset {
            0 => self.regs.address = self.regs.address & !0xffff_ffff | wide & !3,
            4 => self.regs.address = self.regs.address & 0xffff_ffff | wide << 32,
            8 => self.regs.data = value,
            _ => self.regs.masked = value & 1 != 0,
        }
    }

    /// Routing is costly in KVM, so it changes only when an unmasked entry's
    /// message does; a masked entry is half-written by the driver and waits.
    fn update_route(&mut self, enabled: bool) -> io::Result<()> {
        let wanted = if !enabled {
            None
        } else if self.regs.masked {
            return Ok(());
        } else {
            Some(MsiMessage {
                addr: self.regs.address,
                data: self.regs.data,
            })
        };
        if wanted != self.routed {
            // A message that cannot be routed must not leave the old one.
            self.routed = None;
            self.vector.route(wanted)?;
            self.routed = wanted;
        }
        Ok(())
    }
}
