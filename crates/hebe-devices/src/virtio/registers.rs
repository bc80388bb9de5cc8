//! The common configuration structure (virtio 1.2, 4.1.4.3).

use std::sync::atomic::Ordering;

use hebe_state::v1::devices::QueueV1;

use super::queue::QUEUE_SIZE_MAX;
use super::shared::{STATUS_DRIVER_OK, Shared, lock};
use crate::msix::NO_VECTOR;

/// Bytes of the structure.
pub(crate) const COMMON_LEN: usize = 56;
pub(crate) const STATUS_FEATURES_OK: u8 = 8;

/// What a write asks the transport to do beyond storing a value.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Effect {
    None,
    /// The driver wrote this to the device status.
    Status(u8),
}

/// The registers that only the driver changes. Vectors and status live in
/// [`Shared`], because the worker needs them.
#[derive(Clone, Debug)]
pub(crate) struct Registers {
    pub(crate) offered: u64,
    pub(crate) device_feature_select: u32,
    pub(crate) driver_feature_select: u32,
    pub(crate) driver_features: u64,
    pub(crate) queue_select: u16,
    pub(crate) queues: Vec<QueueV1>,
}

impl Registers {
    pub(crate) fn new(offered: u64, queues: usize) -> Self {
        Self {
            offered,
            device_feature_select: 0,
            driver_feature_select: 0,
            driver_features: 0,
            queue_select: 0,
            queues: vec![
                QueueV1 {
                    size: QUEUE_SIZE_MAX,
                    vector: NO_VECTOR,
                    ..QueueV1::default()
                };
                queues
            ],
        }
    }

    pub(crate) fn reset(&mut self) {
        *self = Self::new(self.offered, self.queues.len());
    }

    /// The structure as the driver reads it.
    pub(crate) fn image(&self, shared: &Shared) -> [u8; COMMON_LEN] {
        let mut image = [0; COMMON_LEN];
        let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
        let half = |features: u64, select: u32| match select {
            0 => features as u32,
            1 => (features >> 32) as u32,
            _ => 0,
        };
        put(0, &self.device_feature_select.to_le_bytes());
        let offered = half(self.offered, self.device_feature_select);
        put(4, &offered.to_le_bytes());
        put(8, &self.driver_feature_select.to_le_bytes());
        let accepted = half(self.driver_features, self.driver_feature_select);
        put(12, &accepted.to_le_bytes());
        let config_vector = shared.config_vector.load(Ordering::Acquire);
        put(16, &config_vector.to_le_bytes());
        put(18, &(self.queues.len() as u16).to_le_bytes());
        put(20, &[shared.status.load(Ordering::Acquire)]);
        put(21, &[lock(&shared.config).generation]);
        put(22, &self.queue_select.to_le_bytes());
        // A queue that does not exist reads as size 0.
        if let Some(queue) = self.queues.get(usize::from(self.queue_select)) {
            let vector = &shared.queue_vectors[usize::from(self.queue_select)];
            put(24, &queue.size.to_le_bytes());
            put(26, &vector.load(Ordering::Acquire).to_le_bytes());
            put(28, &u16::from(queue.enabled).to_le_bytes());
            put(30, &self.queue_select.to_le_bytes());
            put(32, &queue.desc.to_le_bytes());
            put(40, &queue.avail.to_le_bytes());
            put(48, &queue.used.to_le_bytes());
        }
        image
    }

    /// A write of 1, 2, 4 or 8 bytes. One that is not a whole field, or half
    /// of a 64-bit one, has no effect.
    pub(crate) fn write(&mut self, offset: u64, data: &[u8], shared: &Shared) -> Effect {
        match (offset, data) {
            (20, &[status]) => return Effect::Status(status),
            (16.., &[a, b]) => self.write_u16(offset, u16::from_le_bytes([a, b]), shared),
            (_, &[a, b, c, d]) => self.write_u32(offset, u32::from_le_bytes([a, b, c, d]), shared),
            (32 | 40 | 48, &[a, b, c, d, e, f, g, h]) => {
                self.write_u32(offset, u32::from_le_bytes([a, b, c, d]), shared);
                self.write_u32(offset + 4, u32::from_le_bytes([e, f, g, h]), shared);
            }
            _ => {}
        }
        Effect::None
    }

    fn write_u16(&mut self, offset: u64, value: u16, shared: &Shared) {
        let select = usize::from(self.queue_select);
        let vector = if usize::from(value) < shared.msix.vectors() {
            value
        } else {
            NO_VECTOR
        };
        match offset {
            16 => shared.config_vector.store(vector, Ordering::Release),
            22 => self.queue_select = value,
            24 => self.with_queue(|queue| queue.size = value),
            26 => {
                if let Some(slot) = shared.queue_vectors.get(select) {
                    slot.store(vector, Ordering::Release);
                }
            }
            // Queues are set up before the driver is ready (virtio 1.2, 3.1.1):
            // one that came later would be in no use, and in a saved state that
            // nobody checked.
            28 if value == 1 && shared.status.load(Ordering::Acquire) & STATUS_DRIVER_OK == 0 => {
                self.with_queue(|queue| queue.enabled = true);
            }
            _ => {}
        }
    }

    fn write_u32(&mut self, offset: u64, value: u32, shared: &Shared) {
        let low = |field: &mut u64| *field = *field & !0xffff_ffff | u64::from(value);
        let high = |field: &mut u64| *field = *field & 0xffff_ffff | u64::from(value) << 32;
        match offset {
            0 => self.device_feature_select = value,
            8 => self.driver_feature_select = value,
            12 if shared.status.load(Ordering::Acquire) & STATUS_FEATURES_OK == 0 => {
                match self.driver_feature_select {
                    0 => low(&mut self.driver_features),
                    1 => high(&mut self.driver_features),
                    _ => {}
                }
            }
            32 => self.with_queue(|queue| low(&mut queue.desc)),
            36 => self.with_queue(|queue| high(&mut queue.desc)),
            40 => self.with_queue(|queue| low(&mut queue.avail)),
            44 => self.with_queue(|queue| high(&mut queue.avail)),
            48 => self.with_queue(|queue| low(&mut queue.used)),
            52 => self.with_queue(|queue| high(&mut queue.used)),
            _ => {}
        }
    }

    /// The selected queue, unless the driver enabled it already: then its
    /// place is settled until a reset.
    fn with_queue(&mut self, change: impl FnOnce(&mut QueueV1)) {
        let selected = self.queues.get_mut(usize::from(self.queue_select));
        if let Some(queue) = selected.filter(|queue| !queue.enabled) {
            change(queue);
        }
    }
}
