//! Guest RAM as devices reach it: checked, and every byte counted.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::queue::QueueError;
use crate::Ram;

/// Bytes of guest RAM that one device touched, since it was made or restored
/// (architecture: suspend and resume touch nothing but rings, and this shows
/// it). Ring bytes are descriptors, indices and ring entries; data bytes are
/// what the descriptors point to.
#[derive(Debug, Default)]
pub(crate) struct Meter {
    ring: AtomicU64,
    data: AtomicU64,
    /// How long the last requests took, in nanoseconds; 0 before the first.
    request_ns: AtomicU64,
}

/// How many requests back the mean of [`Meter::request_ns`] reaches: one that
/// lies so far back counts for a third of the last.
const REQUESTS: u64 = 64;

impl Meter {
    pub(crate) fn ring(&self, bytes: u64) {
        self.ring.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Bytes that were given back to the host: the guest finds zeros there.
    pub(crate) fn given(&self, bytes: u64) {
        self.data(bytes);
    }

    fn data(&self, bytes: u64) {
        self.data.fetch_add(bytes, Ordering::Relaxed);
    }

    /// A request took so long. The device's worker alone calls this.
    pub(crate) fn took(&self, elapsed: Duration) {
        let new = u64::try_from(elapsed.as_nanos()).unwrap_or(u64::MAX).max(1);
        let old = self.request_ns.load(Ordering::Relaxed);
        let mean = match old {
            0 => new,
            // Towards the new one by a part of the distance.
            _ if new >= old => old.saturating_add((new - old).div_ceil(REQUESTS)),
            _ => old - (old - new).div_ceil(REQUESTS),
        };
        self.request_ns.store(mean, Ordering::Relaxed);
    }

    /// How long a request takes at present, in nanoseconds; `None` before the
    /// first.
    pub(crate) fn request_ns(&self) -> Option<u64> {
        Some(self.request_ns.load(Ordering::Relaxed)).filter(|ns| *ns > 0)
    }

    /// Ring bytes and data bytes.
    pub(crate) fn read(&self) -> (u64, u64) {
        (
            self.ring.load(Ordering::Relaxed),
            self.data.load(Ordering::Relaxed),
        )
    }
}

/// A piece of guest RAM that a descriptor named, checked to lie in RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Segment {
    pub(crate) addr: GuestAddress,
    pub(crate) len: u32,
}

/// Guest RAM with its meter.
#[derive(Clone)]
pub(crate) struct MeteredRam {
    ram: Ram,
    meter: Arc<Meter>,
}

impl MeteredRam {
    pub(crate) fn new(ram: Ram, meter: Arc<Meter>) -> Self {
        Self { ram, meter }
    }

    pub(crate) fn meter(&self) -> &Meter {
        &self.meter
    }

    /// For ring accesses by `virtio-queue`, which the caller counts.
    pub(crate) fn raw(&self) -> &Ram {
        &self.ram
    }

    pub(crate) fn contains(&self, addr: GuestAddress, len: u64) -> bool {
        usize::try_from(len).is_ok_and(|len| self.ram.check_range(addr, len))
    }

    fn read(&self, addr: GuestAddress, data: &mut [u8]) -> Result<(), QueueError> {
        self.meter.data(data.len() as u64);
        self.ram
            .read_slice(data, addr)
            .map_err(|_| QueueError::Access(addr.0))
    }

    fn write(&self, addr: GuestAddress, data: &[u8]) -> Result<(), QueueError> {
        self.meter.data(data.len() as u64);
        self.ram
            .write_slice(data, addr)
            .map_err(|_| QueueError::Access(addr.0))
    }
}

/// A place in a list of segments that moves on as bytes are read or written.
#[derive(Clone, Debug)]
pub(crate) struct Cursor<'a> {
    segments: &'a [Segment],
    /// Bytes of the first segment that are done.
    done: u32,
}

impl<'a> Cursor<'a> {
    pub(crate) fn new(segments: &'a [Segment]) -> Self {
        Self { segments, done: 0 }
    }

    /// Bytes that are left.
    pub(crate) fn remaining(&self) -> u64 {
        let all: u64 = self.segments.iter().map(|s| u64::from(s.len)).sum();
        all - u64::from(self.done)
    }

    /// Reads until `data` is full or the segments end; returns the bytes read.
    pub(crate) fn read(&mut self, ram: &MeteredRam, data: &mut [u8]) -> Result<usize, QueueError> {
        let mut at = 0;
        while let Some((addr, len)) = self.piece(data.len() - at) {
            ram.read(addr, &mut data[at..at + len])?;
            self.advance(len);
            at += len;
        }
        Ok(at)
    }

    /// Writes until `data` is through or the segments end; returns the bytes
    /// written.
    pub(crate) fn write(&mut self, ram: &MeteredRam, data: &[u8]) -> Result<usize, QueueError> {
        let mut at = 0;
        while let Some((addr, len)) = self.piece(data.len() - at) {
            ram.write(addr, &data[at..at + len])?;
            self.advance(len);
            at += len;
        }
        Ok(at)
    }

    fn piece(&self, want: usize) -> Option<(GuestAddress, usize)> {
        let first = self.segments.first()?;
        let left = (first.len - self.done) as usize;
        let addr = GuestAddress(first.addr.0 + u64::from(self.done));
        (want > 0).then_some((addr, left.min(want)))
    }

    fn advance(&mut self, len: usize) {
        self.done += len as u32;
        if self.segments.first().is_some_and(|s| s.len == self.done) {
            self.segments = &self.segments[1..];
            self.done = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_of_a_request_follows_the_last_ones() {
        let meter = Meter::default();
        assert_eq!(meter.request_ns(), None);
        meter.took(Duration::from_micros(100));
        assert_eq!(meter.request_ns(), Some(100_000));
        // A single slow one moves it a little, many move it there.
        meter.took(Duration::from_micros(6_500));
        assert_eq!(meter.request_ns(), Some(200_000));
        for _ in 0..2_000 {
            meter.took(Duration::from_micros(6_500));
        }
        assert_eq!(meter.request_ns(), Some(6_500_000));
        for _ in 0..2_000 {
            meter.took(Duration::ZERO);
        }
        assert_eq!(meter.request_ns(), Some(1));
        meter.took(Duration::MAX);
        meter.took(Duration::MAX);
        assert!(meter.request_ns() > Some(u64::MAX / 64));
    }
}
