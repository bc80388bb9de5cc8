//! What vCPU threads and the worker both touch: interrupts, status, the
//! device configuration. Small locks, never held across a request.

use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::ram::Meter;
use crate::EventLog;
use crate::msix::{Msix, NO_VECTOR};

/// `DEVICE_NEEDS_RESET`.
pub(crate) const STATUS_NEEDS_RESET: u8 = 0x40;
/// `DRIVER_OK`.
pub(crate) const STATUS_DRIVER_OK: u8 = 4;
const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;
/// Reports per device: a guest that breaks the rules in a loop must not fill
/// the log.
const EVENTS_MAX: u32 = 32;

pub(crate) struct Config {
    pub(crate) bytes: Vec<u8>,
    pub(crate) generation: u8,
}

pub(crate) struct Shared {
    pub(crate) slot: u8,
    pub(crate) msix: Msix,
    pub(crate) isr: AtomicU8,
    pub(crate) status: AtomicU8,
    pub(crate) config_vector: AtomicU16,
    pub(crate) queue_vectors: Vec<AtomicU16>,
    pub(crate) config: Mutex<Config>,
    pub(crate) stopped: Mutex<Option<String>>,
    pub(crate) meter: Arc<Meter>,
    log: Arc<dyn EventLog>,
    events_left: AtomicU32,
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    pub(crate) fn new(
        slot: u8,
        queues: usize,
        msix: Msix,
        config: Config,
        log: Arc<dyn EventLog>,
    ) -> Self {
        Self {
            slot,
            msix,
            isr: AtomicU8::new(0),
            status: AtomicU8::new(0),
            config_vector: AtomicU16::new(NO_VECTOR),
            queue_vectors: (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
            config: Mutex::new(config),
            stopped: Mutex::new(None),
            meter: Arc::default(),
            log,
            events_left: AtomicU32::new(EVENTS_MAX),
        }
    }

    /// Tells the operator, a bounded number of times.
    pub(crate) fn report(&self, text: &str) {
        let left = self
            .events_left
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1));
        match left {
            Ok(1) => self
                .log
                .event(self.slot, &format!("{text} (further reports are dropped)")),
            Ok(_) => self.log.event(self.slot, text),
            Err(_) => {}
        }
    }

    fn trigger(&self, vector: u16) {
        if vector == NO_VECTOR {
            return;
        }
        if let Err(e) = self.msix.trigger(vector) {
            self.report(&format!("interrupt {vector} cannot be raised: {e}"));
        }
    }

    /// Used buffers are in the queue.
    pub(crate) fn queue_interrupt(&self, queue: usize) {
        self.isr.fetch_or(ISR_QUEUE, Ordering::AcqRel);
        if let Some(vector) = self.queue_vectors.get(queue) {
            self.trigger(vector.load(Ordering::Acquire));
        }
    }

    /// The configuration, or the status, changed.
    pub(crate) fn config_interrupt(&self) {
        self.isr.fetch_or(ISR_CONFIG, Ordering::AcqRel);
        self.trigger(self.config_vector.load(Ordering::Acquire));
    }

    /// Replaces the device configuration.
    pub(crate) fn set_config(&self, bytes: Vec<u8>) {
        let mut config = lock(&self.config);
        config.bytes = bytes;
        config.generation = config.generation.wrapping_add(1);
    }

    /// Replaces the device configuration and tells the driver.
    pub(crate) fn change_config(&self, bytes: Vec<u8>) {
        self.set_config(bytes);
        self.config_interrupt();
    }

    /// Stops the device: status, reason, report, interrupt (virtio 1.2, 2.1.2).
    pub(crate) fn stop(&self, reason: &str) {
        *lock(&self.stopped) = Some(reason.to_owned());
        self.status.fetch_or(STATUS_NEEDS_RESET, Ordering::AcqRel);
        self.report(&format!("device stopped: {reason}"));
        self.config_interrupt();
    }
}
