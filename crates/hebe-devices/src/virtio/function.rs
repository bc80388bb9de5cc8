//! The PCI side of a virtio function: its configuration space, and where
//! things lie in its BAR (virtio 1.2, 4.1.4).

use hebe_state::v1::devices::{MsixV1, PciFunctionV1};
use hebe_types::MMIO_HOLE_START;

use super::error::DeviceError;
use super::kind::KindInfo;
use super::registers::COMMON_LEN;
use crate::pci::config::{BAR0, CACHE_LINE_SIZE, COMMAND, ConfigSpace, INTERRUPT_LINE, Identity};

/// Bytes of BAR 0, which holds everything; addresses given to
/// [`crate::VirtioPci::new`] are multiples of it.
pub const BAR_SIZE: u64 = 0x8000;
/// The MMIO window for BARs ends here; IOAPIC and LAPIC lie above.
const WINDOW_END: u64 = 0xfe00_0000;

pub(crate) const ISR_AT: u64 = 0x1000;
pub(crate) const DEVICE_AT: u64 = 0x2000;
pub(crate) const NOTIFY_AT: u64 = 0x3000;
pub(crate) const NOTIFY_MULTIPLIER: u64 = 4;
pub(crate) const TABLE_AT: u64 = 0x4000;
pub(crate) const PBA_AT: u64 = 0x5000;

const CAP_VENDOR: u8 = 0x09;
const CAP_MSIX: u8 = 0x11;
const MSIX_CAP: u8 = 0x40;
const WINDOW_CAP: u8 = 0xa0;
const MSIX_CONTROL: usize = MSIX_CAP as usize + 2;
const WINDOW_BAR: usize = WINDOW_CAP as usize + 4;
const WINDOW_OFFSET: usize = WINDOW_CAP as usize + 8;
const WINDOW_LENGTH: usize = WINDOW_CAP as usize + 12;
pub(crate) const WINDOW_DATA: usize = WINDOW_CAP as usize + 16;
const MSIX_ENABLE: u16 = 1 << 15;
const MSIX_MASK: u16 = 1 << 14;

pub(crate) fn doorbell(bar: u64, queue: usize) -> u64 {
    bar + NOTIFY_AT + NOTIFY_MULTIPLIER * queue as u64
}

pub(crate) fn in_window(bar: u64) -> bool {
    (MMIO_HOLE_START..=WINDOW_END - BAR_SIZE).contains(&bar)
}

pub(crate) fn checked_bar(addr: u64) -> Result<u32, DeviceError> {
    if !in_window(addr) || !addr.is_multiple_of(BAR_SIZE) {
        return Err(DeviceError::Bar(addr));
    }
    u32::try_from(addr).map_err(|_| DeviceError::Bar(addr))
}

/// An access to the data of the configuration access capability (virtio 1.2,
/// 4.1.4.9): where in BAR 0, how many bytes.
pub(crate) fn window_access(space: &ConfigSpace, at: usize, len: usize) -> Option<(u64, usize)> {
    let inside = at >= WINDOW_DATA && at + len <= WINDOW_DATA + 4;
    let offset = u64::from(space.u32(WINDOW_OFFSET));
    let length = space.u32(WINDOW_LENGTH) as usize;
    let sane = space.u8(WINDOW_BAR) == 0
        && matches!(length, 1 | 2 | 4)
        && offset.is_multiple_of(length as u64)
        && offset + (length as u64) <= BAR_SIZE;
    (inside && sane).then_some((offset, length))
}

/// Capabilities: MSI-X, then the five of virtio (virtio 1.2, 4.1.4).
pub(crate) fn config_space(info: &KindInfo, queues: usize, config_len: usize) -> ConfigSpace {
    let mut space = ConfigSpace::new(&Identity {
        vendor: 0x1af4,
        device: 0x1040 + info.id,
        class: info.class,
        revision: 1,
        subsystem_vendor: 0x1af4,
        subsystem: 0x1100,
    });
    space.set_bar0(BAR_SIZE as u32, 0);
    // Table size is encoded as n - 1, and there are queues + 1 vectors.
    let mut msix = (queues as u16).to_le_bytes().to_vec();
    msix.extend_from_slice(&(TABLE_AT as u32).to_le_bytes());
    msix.extend_from_slice(&(PBA_AT as u32).to_le_bytes());
    space.add_capability(MSIX_CAP, CAP_MSIX, &msix);
    let control = (MSIX_ENABLE | MSIX_MASK).to_le_bytes();
    space.allow(MSIX_CONTROL, &control);

    let notify_len = NOTIFY_MULTIPLIER * queues as u64;
    let parts = [
        (0x50, 1, 0, COMMON_LEN as u64),
        (0x60, 3, ISR_AT, 1),
        (0x70, 4, DEVICE_AT, config_len.max(4) as u64),
        (0x80, 2, NOTIFY_AT, notify_len),
    ];
    for (at, part, offset, len) in parts {
        let mut body = virtio_cap(part, offset, len);
        if part == 2 {
            body[0] = 20;
            body.extend_from_slice(&(NOTIFY_MULTIPLIER as u32).to_le_bytes());
        }
        space.add_capability(at, CAP_VENDOR, &body);
    }
    let mut body = virtio_cap(5, 0, 0);
    body[0] = 20;
    body.extend_from_slice(&[0; 4]);
    space.add_capability(WINDOW_CAP, CAP_VENDOR, &body);
    space.allow(WINDOW_BAR, &[0xff]);
    space.allow(WINDOW_OFFSET, &[0xff; 8]);
    space
}

/// The body of a virtio capability after id and next pointer.
fn virtio_cap(part: u8, offset: u64, len: u64) -> Vec<u8> {
    let mut body = vec![16, part, 0, 0, 0, 0];
    body.extend_from_slice(&(offset as u32).to_le_bytes());
    body.extend_from_slice(&(len as u32).to_le_bytes());
    body
}

pub(crate) fn restore_space(space: &mut ConfigSpace, state: &PciFunctionV1) {
    // Through the guest's own masks: a state cannot set what a guest cannot.
    space.write(BAR0, &state.bar0.to_le_bytes());
    space.write(COMMAND, &state.command.to_le_bytes());
    space.write(CACHE_LINE_SIZE, &[state.cache_line_size]);
    space.write(INTERRUPT_LINE, &[state.interrupt_line]);
    space.write(WINDOW_BAR, &[state.window_bar]);
    space.write(WINDOW_OFFSET, &state.window_offset.to_le_bytes());
    space.write(WINDOW_LENGTH, &state.window_length.to_le_bytes());
    let mut control = space.u16(MSIX_CONTROL) & !(MSIX_ENABLE | MSIX_MASK);
    if state.msix.enabled {
        control |= MSIX_ENABLE;
    }
    if state.msix.masked {
        control |= MSIX_MASK;
    }
    space.put(MSIX_CONTROL, &control.to_le_bytes());
}

pub(crate) fn save_space(slot: u8, space: &ConfigSpace, msix: MsixV1) -> PciFunctionV1 {
    PciFunctionV1 {
        slot,
        command: space.u16(COMMAND),
        cache_line_size: space.u8(CACHE_LINE_SIZE),
        interrupt_line: space.u8(INTERRUPT_LINE),
        bar0: space.u32(BAR0),
        window_bar: space.u8(WINDOW_BAR),
        window_offset: space.u32(WINDOW_OFFSET),
        window_length: space.u32(WINDOW_LENGTH),
        msix,
    }
}

/// Enable and function mask, if a write of `len` bytes at `at` reached them.
pub(crate) fn msix_control(space: &ConfigSpace, at: usize, len: usize) -> Option<(bool, bool)> {
    let control = space.u16(MSIX_CONTROL);
    let touched = (at..at + len).contains(&(MSIX_CONTROL + 1));
    touched.then_some((control & MSIX_ENABLE != 0, control & MSIX_MASK != 0))
}
