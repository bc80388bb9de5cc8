//! The execution-state area of one segment (R-12): what a VM is, besides its
//! RAM, and whether it may be resumed.
//!
//! ```text
//! 0x000000  header, copy A (one page)     0x002000  slot 0 (1016 KiB)
//! 0x001000  header, copy B (one page)     0x100000  slot 1 (1016 KiB)
//!                                         0x1fe000  guard (two pages)
//!
//!            mark_running                 commit_frozen
//!   Empty ───────────────► Running ─────────────────────► Frozen
//!                             ▲        mark_running          │
//!                             └──────────────────────────────┘
//!   any ── mark_empty ──► Ended
//! ```
//! Empty and Ended differ on purpose: both have nothing to resume, but only
//! in an Empty area is it certain that no guest ever ran, and thus that a file
//! that it was to be restored from still fits its disks.
//! One owner writes: the segment's VMM. `commit_frozen` writes the state into
//! the slot that the newest header does not name, makes it persistent, and
//! only then changes the header, as one atomic change (see the `mirror`
//! module).
//!
//! **An old frozen state must never win over newer RAM.** The header names the
//! one valid state; there is no search among the slots for "the newest that
//! checks out". `mark_running` returns only when both header copies say
//! Running, and the VMM enters the guest only after it returned. Suppose a
//! reader afterwards concludes Frozen at an old generation: it would have to
//! find that generation in a copy, and both were overwritten. One damaged copy
//! leaves the other, which says Running; two damaged copies are Damaged. If
//! `mark_running` was cut off between the copies and copy A is damaged on top
//! of that, copy B says Frozen, and that is true: the guest has not run, RAM
//! is what the state belongs to. A state whose checksum is wrong is Damaged,
//! never a reason to look at the other slot.
//!
//! All zeros but the guard is Empty: a segment's area is zeroed, and its guard
//! written, before a VM gets it. Where the guard is wrong the area is Damaged,
//! whatever its header says, and is not changed any more (see the `guard`
//! module).

use std::sync::{Mutex, PoisonError};

use hebe_types::{Extent, GRANULE, VmId};
use serde::{Deserialize, Serialize};
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

use crate::StoreError;
use crate::guard::Guard;
use crate::mapping::Mapping;
use crate::media::Media;
use crate::mirror::{self, COPY_LEN_MAX, Place, Reading};
use crate::spec::SegmentSpec;

const SLOTS_OFFSET: u64 = 2 * COPY_LEN_MAX as u64;
const GUARD_LEN: u64 = 2 * COPY_LEN_MAX as u64;
const GUARD_OFFSET: u64 = GRANULE - GUARD_LEN;
const SLOT_LEN: u64 = (GUARD_OFFSET - SLOTS_OFFSET) / 2;
/// Most bytes of an execution state.
pub const EXEC_STATE_LEN_MAX: usize = SLOT_LEN as usize;

pub(crate) const HEADER: Place = Place {
    a: 0,
    b: COPY_LEN_MAX as u64,
    magic: *b"HEBEEXEC",
    version: 2,
    payload_len: size_of::<HeaderV2>(),
};

const RUNNING: u32 = 1;
const FROZEN: u32 = 2;
const ENDED: u32 = 3;

/// The header's payload.
#[derive(Clone, Debug, PartialEq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct HeaderV2 {
    /// 1 running, 2 frozen, 3 ended.
    pub state: U32,
    /// The slot written last, 0 or 1.
    pub slot: U32,
    /// Whose state: an area mapped by a wrong placement is found out.
    pub vm: [u8; 16],
    /// When the header was written: nanoseconds since 1970.
    pub since_ns: U64,
    /// Running: the host kernel's boot id.
    pub boot_id: [u8; 16],
    /// Running: the VMM's process id.
    pub pid: U32,
    /// Frozen: CRC-32 of the state.
    pub state_crc: U32,
    /// Frozen: length of the state in bytes.
    pub len: U64,
}

const _: () = assert!(size_of::<HeaderV2>() == 64);
const _: () = assert!(SLOT_LEN.is_multiple_of(8));

/// What an execution-state area holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "status")]
pub enum ExecStatus {
    /// No VM has run in this segment yet.
    Empty,
    /// The VM ran and ended by itself or by order; nothing can be resumed.
    Ended,
    /// A VMM runs the VM, or ran it and was killed.
    Running {
        /// When it began: nanoseconds since 1970.
        since_ns: u64,
        /// The host kernel it runs under.
        boot_id: [u8; 16],
        /// The VMM's process.
        pid: u32,
    },
    /// Suspended on memory; RAM and state belong together.
    Frozen {
        /// Number of header changes so far.
        generation: u64,
        /// Length of the state in bytes.
        len: u64,
        /// When it was committed: nanoseconds since 1970.
        frozen_ns: u64,
    },
    /// Cannot be resumed, and why.
    Damaged {
        /// Why.
        reason: String,
    },
}

/// Whose area it is, and the guard that it must have.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Whose {
    vm: VmId,
    guard: Guard,
}

impl Whose {
    /// The area of `vm` at `exec` of a store.
    pub(crate) const fn new(vm: VmId, store_uuid: [u8; 16], exec: Extent) -> Self {
        let place = Extent {
            offset: exec.offset + GUARD_OFFSET,
            len: GUARD_LEN,
        };
        Self {
            vm,
            guard: Guard::new(store_uuid, place),
        }
    }

    /// The area of a segment.
    pub(crate) fn of(spec: &SegmentSpec) -> Self {
        Self::new(spec.vm, spec.store_uuid, spec.exec)
    }

    /// [`StoreError::ExecDamaged`] where the guard is wrong.
    fn check(&self, media: &impl Media) -> Result<(), StoreError> {
        let wrong = self.guard.first_wrong(media, GUARD_OFFSET);
        match wrong.map_err(StoreError::media("read"))? {
            None => Ok(()),
            Some(at) => Err(StoreError::ExecDamaged(format!(
                "something else wrote to it (at byte {at:#x} of the store), and may have written to guest RAM"
            ))),
        }
    }
}

/// Writes the guard into an area of zeros.
pub(crate) fn prepare(media: &impl Media, whose: &Whose) -> std::io::Result<()> {
    whose.guard.write(media, GUARD_OFFSET)
}

/// Reads and checks an area. Untrusted input.
pub(crate) fn status(media: &impl Media, whose: &Whose) -> Result<ExecStatus, StoreError> {
    let damaged = |reason: String| Ok(ExecStatus::Damaged { reason });
    match whose.check(media) {
        Ok(()) => {}
        Err(StoreError::ExecDamaged(why)) => return damaged(why),
        Err(other) => return Err(other),
    }
    const TRIES_MAX: usize = 4;
    let mut reason = String::new();
    for _ in 0..TRIES_MAX {
        let reading = read(media)?;
        let (generation, header) = match parse(&reading, whose.vm) {
            Ok(Some(parsed)) => parsed,
            Ok(None) => return Ok(ExecStatus::Empty),
            Err(why) => return damaged(why),
        };
        let since_ns = header.since_ns.get();
        match header.state.get() {
            ENDED => return Ok(ExecStatus::Ended),
            RUNNING => {
                return Ok(ExecStatus::Running {
                    since_ns,
                    boot_id: header.boot_id,
                    pid: header.pid.get(),
                });
            }
            _ => {}
        }
        match load_state(media, &header) {
            Ok(_) => {
                return Ok(ExecStatus::Frozen {
                    generation,
                    len: header.len.get(),
                    frozen_ns: since_ns,
                });
            }
            // Its VMM may have resumed and frozen again meanwhile: then the
            // header has changed, and is worth another look.
            Err(StoreError::ExecDamaged(why)) if read(media)? == reading => return damaged(why),
            Err(StoreError::ExecDamaged(why)) => reason = why,
            Err(other) => return Err(other),
        }
    }
    damaged(reason)
}

fn read(media: &impl Media) -> Result<Reading, StoreError> {
    mirror::read(media, &HEADER).map_err(StoreError::media("read"))
}

/// The header, if there is one; or why it is damaged.
fn parse(reading: &Reading, vm: VmId) -> Result<Option<(u64, HeaderV2)>, String> {
    let (generation, payload) = match reading {
        Reading::Blank => return Ok(None),
        Reading::Damaged(why) => return Err(format!("its header is unreadable: {why}")),
        Reading::Newer(version) => {
            return Err(format!(
                "its header has version {version}, and this release reads up to {}",
                HEADER.version
            ));
        }
        Reading::Valid {
            generation,
            payload,
            ..
        } => (*generation, payload),
    };
    let header = HeaderV2::read_from_bytes(payload).map_err(|_| "its header is cut short")?;
    if header.vm != vm.0 {
        return Err(format!("it belongs to VM {}", VmId(header.vm)));
    }
    let sane = matches!(header.state.get(), RUNNING | FROZEN | ENDED)
        && header.slot.get() < 2
        && header.len.get() <= SLOT_LEN;
    if sane {
        Ok(Some((generation, header)))
    } else {
        Err("its header has impossible values".into())
    }
}

fn slot_offset(slot: u32) -> u64 {
    SLOTS_OFFSET + u64::from(slot) * SLOT_LEN
}

/// The state that a frozen header names, if its checksum is right.
fn load_state(media: &impl Media, header: &HeaderV2) -> Result<Vec<u8>, StoreError> {
    let mut state = vec![0; header.len.get() as usize];
    media
        .load(slot_offset(header.slot.get()), &mut state)
        .map_err(StoreError::media("read"))?;
    if crc32fast::hash(&state) != header.state_crc.get() {
        return Err(StoreError::ExecDamaged(
            "the checksum of the state is wrong".into(),
        ));
    }
    Ok(state)
}

/// Loads the frozen state; see [`ExecArea::load`].
pub(crate) fn load(media: &impl Media, whose: &Whose) -> Result<Vec<u8>, StoreError> {
    whose.check(media)?;
    let header = match parse(&read(media)?, whose.vm) {
        Ok(Some((_, header))) => header,
        Ok(None) => return Err(StoreError::NotFrozen("it is empty".into())),
        Err(why) => return Err(StoreError::ExecDamaged(why)),
    };
    match header.state.get() {
        FROZEN => load_state(media, &header),
        RUNNING => Err(StoreError::NotFrozen(format!(
            "process {} has run it, and RAM is newer than any state",
            header.pid
        ))),
        _ => Err(StoreError::NotFrozen("its VM ended".into())),
    }
}

/// Commits a state; see [`ExecArea::commit_frozen`].
pub(crate) fn commit_frozen(
    media: &impl Media,
    whose: &Whose,
    state: &[u8],
    now_ns: u64,
) -> Result<(), StoreError> {
    if state.len() > EXEC_STATE_LEN_MAX {
        return Err(StoreError::StateTooLong {
            len: state.len(),
            max: EXEC_STATE_LEN_MAX,
        });
    }
    whose.check(media)?;
    let reading = read(media)?;
    let newest = parse(&reading, whose.vm).map_err(StoreError::ExecDamaged)?;
    let slot = newest.map_or(0, |(_, header)| 1 - header.slot.get());
    store_state(media, slot_offset(slot), state).map_err(StoreError::media("write"))?;
    let mut header = HeaderV2::new_zeroed();
    header.state = U32::new(FROZEN);
    header.slot = U32::new(slot);
    header.vm = whose.vm.0;
    header.since_ns = U64::new(now_ns);
    header.state_crc = U32::new(crc32fast::hash(state));
    header.len = U64::new(state.len() as u64);
    put(media, &reading, &header)
}

fn store_state(media: &impl Media, at: u64, state: &[u8]) -> std::io::Result<()> {
    let (words, rest) = state.as_chunks::<8>();
    media.store(at, words.as_flattened())?;
    if !rest.is_empty() {
        let mut last = [0; 8];
        last[..rest.len()].copy_from_slice(rest);
        media.store(at + words.as_flattened().len() as u64, &last)?;
    }
    media.fence();
    Ok(())
}

fn put(media: &impl Media, reading: &Reading, header: &HeaderV2) -> Result<(), StoreError> {
    mirror::update(media, &HEADER, reading, header.as_bytes())
        .map_err(StoreError::media("write"))?;
    Ok(())
}

/// Marks the VM as running; see [`ExecArea::mark_running`].
pub(crate) fn mark_running(
    media: &impl Media,
    whose: &Whose,
    boot_id: [u8; 16],
    pid: u32,
    now_ns: u64,
) -> Result<(), StoreError> {
    whose.check(media)?;
    let reading = read(media)?;
    let newest = parse(&reading, whose.vm).map_err(StoreError::ExecDamaged)?;
    let mut header = HeaderV2::new_zeroed();
    header.state = U32::new(RUNNING);
    header.slot = newest.map_or(U32::new(1), |(_, old)| old.slot);
    header.vm = whose.vm.0;
    header.since_ns = U64::new(now_ns);
    header.boot_id = boot_id;
    header.pid = U32::new(pid);
    put(media, &reading, &header)
}

/// Marks the VM as ended; see [`ExecArea::mark_empty`].
pub(crate) fn mark_empty(media: &impl Media, whose: &Whose, now_ns: u64) -> Result<(), StoreError> {
    whose.check(media)?;
    let reading = read(media)?;
    let newest = parse(&reading, whose.vm).map_err(StoreError::ExecDamaged)?;
    let mut header = HeaderV2::new_zeroed();
    header.state = U32::new(ENDED);
    header.slot = newest.map_or(U32::new(1), |(_, old)| old.slot);
    header.vm = whose.vm.0;
    header.since_ns = U64::new(now_ns);
    put(media, &reading, &header)
}

/// The execution-state area of a mapped segment.
#[derive(Debug)]
pub struct ExecArea {
    mapping: Mapping,
    whose: Whose,
    /// One change at a time; guards no data of this process.
    writer: Mutex<()>,
}

impl ExecArea {
    pub(crate) fn new(mapping: Mapping, spec: &SegmentSpec) -> Self {
        Self {
            mapping,
            whose: Whose::of(spec),
            writer: Mutex::new(()),
        }
    }

    /// Writes the guard into an area that was just made.
    pub(crate) fn prepare(&self) -> std::io::Result<()> {
        prepare(&self.mapping, &self.whose)
    }

    /// What the area holds now, guard and checksums verified.
    pub fn status(&self) -> ExecStatus {
        status(&self.mapping, &self.whose).unwrap_or_else(|e| ExecStatus::Damaged {
            reason: e.to_string(),
        })
    }

    /// Says that guest RAM is about to change, so that no state frozen earlier
    /// is ever resumed. Call it after everything else a resume needs, and
    /// before the first write to guest RAM or the first vCPU entry.
    ///
    /// # Errors
    /// [`StoreError::ExecDamaged`] when the area's header cannot be read or its
    /// guard is wrong; nothing is written then.
    pub fn mark_running(&self, boot_id: [u8; 16], pid: u32) -> Result<(), StoreError> {
        let _one = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        mark_running(&self.mapping, &self.whose, boot_id, pid, now_ns())
    }

    /// Records that the VM ended and that nothing can be resumed: from here on
    /// the area is [`ExecStatus::Ended`], never [`ExecStatus::Empty`] again.
    ///
    /// # Errors
    /// As for [`ExecArea::mark_running`].
    pub fn mark_empty(&self) -> Result<(), StoreError> {
        let _one = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        mark_empty(&self.mapping, &self.whose, now_ns())
    }

    /// Commits the state that belongs to guest RAM as it is now. Call it when
    /// nothing writes guest RAM any more. After a stop at any instant the
    /// area holds the old status or the new one.
    ///
    /// # Errors
    /// [`StoreError::StateTooLong`], with nothing written;
    /// [`StoreError::ExecDamaged`] when the area's header cannot be read or its
    /// guard is wrong: such a VM could not be resumed, and had better run on.
    pub fn commit_frozen(&self, state: &[u8]) -> Result<(), StoreError> {
        let _one = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        commit_frozen(&self.mapping, &self.whose, state, now_ns())
    }

    /// The frozen state; guard, bounds and checksum verified. What is in it is the
    /// reader's to check.
    ///
    /// # Errors
    /// [`StoreError::NotFrozen`] when the VM runs, ran, or never ran;
    /// [`StoreError::ExecDamaged`].
    pub fn load(&self) -> Result<Vec<u8>, StoreError> {
        load(&self.mapping, &self.whose)
    }
}

/// Nanoseconds since 1970.
pub(crate) fn now_ns() -> u64 {
    hebe_sys::clock::stamp_now().realtime_ns
}

#[cfg(test)]
#[path = "exec_tests.rs"]
mod tests;
