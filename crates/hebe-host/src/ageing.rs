//! Samples of how the host is doing: taking them, and keeping them.
//!
//! The store is one file of bounded size, a ring of slots. One sampler owns it
//! at a time (a lock beside it); anybody may read. Each slot has a number that
//! only grows and a checksum, and is written in one piece over the oldest one:
//! a stop in the midst of a write costs that sample and the one it replaces,
//! nothing else.
//!
//! ```text
//! header   4096 bytes: magic, version, number of slots, checksum
//! slot     256 bytes each: number, boot id, seconds since boot, wall clock,
//!          count of readings, value and limit of each (NaN: not told), checksum
//! ```
//!
//! All numbers are little-endian. What is sampled is in `sensors`'s head; what
//! the samples mean is [`hebe_policy::ageing`]'s.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use hebe_policy::ageing::{Indicator, Reading, Sample};
use hebe_sys::lock::FileLock;

use crate::files;

mod sensors;

pub use sensors::{sample, sample_quietly};

const MAGIC: &[u8; 8] = b"HEBEAGE\0";
const VERSION: u32 = 1;
const HEADER_LEN: usize = 4096;
const SLOT_LEN: usize = 256;
/// Samples that are kept: sixty days of one every ten minutes.
pub const SLOTS: u32 = 8640;
/// Most readings that fit into a slot.
const READINGS_MAX: usize = 12;
/// Before the readings: number, boot id, two times, count.
const READINGS_AT: usize = 8 + 16 + 8 + 8 + 4;
const SUM_AT: usize = SLOT_LEN - 4;

const _: () = assert!(Indicator::ALL.len() <= READINGS_MAX);
const _: () = assert!(READINGS_AT + 16 * READINGS_MAX <= SUM_AT);

/// What can go wrong.
#[derive(Debug, thiserror::Error)]
pub enum AgeingError {
    /// Another sampler is at it.
    #[error("another sampler writes to {}: one is enough", .0.display())]
    Owned(PathBuf),
    /// Not a store of this release.
    #[error("{} is damaged or of another release: move it away, and samples begin anew", .0.display())]
    Damaged(PathBuf),
    /// The system's.
    #[error("cannot use the samples in {}", path.display())]
    Io {
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Where samples lie below the state directory.
pub fn path_below(state: &Path) -> PathBuf {
    state.join("ageing").join("samples")
}

/// The store, owned by this process.
#[derive(Debug)]
pub struct SampleStore {
    path: PathBuf,
    file: File,
    slots: u32,
    /// Number of the newest sample; 0 for none.
    newest: u64,
    /// Held as long as the store is.
    _lock: FileLock,
}

impl SampleStore {
    /// Opens the store, or makes one of `slots` slots.
    pub fn open(path: &Path, slots: u32) -> Result<Self, AgeingError> {
        let io = |source| AgeingError::Io {
            path: path.to_owned(),
            source,
        };
        if let Some(dir) = path.parent() {
            fs::create_dir_all(dir).map_err(io)?;
        }
        let lock = FileLock::open(&path.with_extension("lock")).map_err(io)?;
        let lock = lock.ok_or_else(|| AgeingError::Owned(path.to_owned()))?;
        if !path.try_exists().map_err(io)? {
            files::write_durably(path, &header(slots)).map_err(io)?;
        }
        let file = OpenOptions::new().read(true).write(true).open(path);
        let bytes = read_all(path)?;
        let (slots, samples) =
            parse(&bytes).ok_or_else(|| AgeingError::Damaged(path.to_owned()))?;
        Ok(Self {
            path: path.to_owned(),
            file: file.map_err(io)?,
            slots,
            newest: samples.last().map_or(0, |(number, _)| *number),
            _lock: lock,
        })
    }

    /// Adds a sample in the place of the oldest; on disk when this returns.
    pub fn append(&mut self, sample: &Sample) -> Result<(), AgeingError> {
        let number = self.newest + 1;
        let at = slot_at(number, self.slots);
        let written = self
            .file
            .write_all_at(&encode(number, sample), at)
            .and_then(|()| self.file.sync_data());
        written.map_err(|source| AgeingError::Io {
            path: self.path.clone(),
            source,
        })?;
        self.newest = number;
        Ok(())
    }
}

/// All samples, the oldest first; none where there is no store. Damaged slots
/// are passed over.
pub fn read(path: &Path) -> Result<Vec<Sample>, AgeingError> {
    if !path.exists() {
        return Ok(Vec::new());
    }
    let bytes = read_all(path)?;
    let (_, samples) = parse(&bytes).ok_or_else(|| AgeingError::Damaged(path.to_owned()))?;
    Ok(samples.into_iter().map(|(_, sample)| sample).collect())
}

fn read_all(path: &Path) -> Result<Vec<u8>, AgeingError> {
    fs::read(path).map_err(|source| AgeingError::Io {
        path: path.to_owned(),
        source,
    })
}

fn slot_at(number: u64, slots: u32) -> u64 {
    let slot = (number - 1) % u64::from(slots);
    HEADER_LEN as u64 + slot * SLOT_LEN as u64
}

fn header(slots: u32) -> Vec<u8> {
    let mut bytes = vec![0; HEADER_LEN];
    bytes[..8].copy_from_slice(MAGIC);
    bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
    bytes[12..16].copy_from_slice(&slots.to_le_bytes());
    let sum = crc32fast::hash(&bytes[..16]);
    bytes[16..20].copy_from_slice(&sum.to_le_bytes());
    bytes
}

fn encode(number: u64, sample: &Sample) -> [u8; SLOT_LEN] {
    let mut bytes = [0; SLOT_LEN];
    bytes[..8].copy_from_slice(&number.to_le_bytes());
    bytes[8..24].copy_from_slice(&sample.boot);
    bytes[24..32].copy_from_slice(&sample.up_s.to_le_bytes());
    bytes[32..40].copy_from_slice(&sample.at_s.to_le_bytes());
    let count = sample.readings.len() as u32;
    bytes[40..44].copy_from_slice(&count.to_le_bytes());
    let room = bytes[READINGS_AT..SUM_AT].chunks_exact_mut(16);
    for (place, reading) in room.zip(&sample.readings) {
        let (value, limit) = reading.map_or((f64::NAN, f64::NAN), |r| (r.value, r.limit));
        place[..8].copy_from_slice(&value.to_le_bytes());
        place[8..].copy_from_slice(&limit.to_le_bytes());
    }
    let sum = crc32fast::hash(&bytes[..SUM_AT]);
    bytes[SUM_AT..].copy_from_slice(&sum.to_le_bytes());
    bytes
}

fn four(bytes: &[u8], at: usize) -> Option<[u8; 4]> {
    bytes.get(at..at + 4)?.try_into().ok()
}

fn eight(bytes: &[u8], at: usize) -> Option<[u8; 8]> {
    bytes.get(at..at + 8)?.try_into().ok()
}

/// The number of slots, and the whole samples in order of their numbers.
fn parse(bytes: &[u8]) -> Option<(u32, Vec<(u64, Sample)>)> {
    let sum = u32::from_le_bytes(four(bytes, 16)?);
    let version = u32::from_le_bytes(four(bytes, 8)?);
    let slots = u32::from_le_bytes(four(bytes, 12)?);
    let known = &bytes[..8] == MAGIC && version == VERSION && slots > 0;
    if !known || crc32fast::hash(&bytes[..16]) != sum {
        return None;
    }
    let room = bytes.get(HEADER_LEN..).unwrap_or_default();
    let mut samples: Vec<(u64, Sample)> = room
        .chunks_exact(SLOT_LEN)
        .take(slots as usize)
        .enumerate()
        .filter_map(|(index, slot)| {
            let (number, sample) = decode(slot)?;
            // A slot knows where it belongs.
            let place = (number.checked_sub(1)? % u64::from(slots)) as usize;
            (place == index).then_some((number, sample))
        })
        .collect();
    samples.sort_by_key(|(number, _)| *number);
    Some((slots, samples))
}

fn decode(slot: &[u8]) -> Option<(u64, Sample)> {
    let sum = u32::from_le_bytes(four(slot, SUM_AT)?);
    if crc32fast::hash(&slot[..SUM_AT]) != sum {
        return None;
    }
    let number = |at| Some(f64::from_le_bytes(eight(slot, at)?));
    let count = u32::from_le_bytes(four(slot, 40)?) as usize;
    let mut readings = [None; Indicator::ALL.len()];
    // Fewer were written by an older release, more by a newer one.
    for (i, reading) in readings.iter_mut().enumerate().take(count) {
        let value = number(READINGS_AT + 16 * i)?;
        let limit = number(READINGS_AT + 16 * i + 8)?;
        *reading = (!value.is_nan()).then_some(Reading { value, limit });
    }
    let sample = Sample {
        boot: slot[8..24].try_into().ok()?,
        up_s: number(24)?,
        at_s: number(32)?,
        readings,
    };
    Some((u64::from_le_bytes(eight(slot, 0)?), sample))
}

#[cfg(test)]
#[path = "ageing_tests.rs"]
mod tests;
