//! What the kernel before handed over, checked.
//!
//! Retrieving goes through every page of a VM, so it is done for many VMs at
//! once, and each is handed on as soon as it is there: nobody waits for the
//! largest. Within one session the kernel serves one token at a time.

use std::os::fd::{AsFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use hebe_sys::clock::stamp_now;
use hebe_sys::luo::{Incoming, LuoError, Orchestrator};
use hebe_types::{ByteSize, VmId, VmName};

use super::file::{self, MemoryFile};
use super::files::{SegmentFiles, make_part};
use super::manifest::{self, CarrierId, MANIFEST_LEN, Manifest, Roster};
use super::plan::part_lens;
use super::{CarryError, Piece, Span, VMS_MAX, host_session, vm_session};
use crate::exec::ExecStatus;
use crate::layout::Owner;
use crate::spec::SegmentSpec;
use crate::table::SegmentInfo;
use crate::{StoreError, report};

/// What arrived for the host itself.
#[derive(Clone, Debug)]
pub struct ArrivedHost {
    /// Which live update it was.
    pub carrier: CarrierId,
    /// The kernel that sent it.
    pub kernel: String,
    /// The report, if one was written.
    pub report: Option<Vec<u8>>,
    entries: Vec<(u32, Result<Owner, String>)>,
}

/// One VM that arrived, whole or not.
#[derive(Debug)]
pub struct Arrival {
    /// The slot that its session is named by.
    pub slot: u32,
    /// Its name, as far as anything says it.
    pub name: Option<VmName>,
    /// Its id, as far as anything says it.
    pub vm: Option<VmId>,
    /// How long retrieving it took, failed or not.
    pub span: Span,
    /// The VM, or why it is lost.
    pub outcome: Result<ArrivedVm, Lost>,
}

/// A VM whose memory is all there.
#[derive(Debug)]
pub struct ArrivedVm {
    /// Its memory; as long as this is held, it is there.
    pub files: SegmentFiles,
    /// What its execution-state area says: only a frozen VM may be resumed.
    pub status: ExecStatus,
    /// When it was preserved: nanoseconds since 1970.
    pub created_ns: u64,
    /// The kernel that sent it.
    pub kernel: String,
    /// Bytes of RAM that the kernel brought back; the rest was left out as empty.
    pub retrieved: ByteSize,
    /// Kept where it could not be finished.
    _session: Option<Box<dyn Incoming>>,
}

/// A VM that cannot be resumed.
#[derive(Debug)]
pub struct Lost {
    /// Why.
    pub reason: CarryError,
    /// What is left of it stays in memory as long as this is held.
    session: Option<Box<dyn Incoming>>,
}

impl Lost {
    /// Of a VM that is not retrieved any more, because whoever did that panicked.
    pub fn died() -> Self {
        Self {
            reason: CarryError::Died,
            session: None,
        }
    }
}

impl Drop for Lost {
    fn drop(&mut self) {
        if let Some(session) = &self.session {
            // Who handed the session over may have it open, too. Where that
            // fails, it ends with its last descriptor.
            let _ = session.finish();
        }
    }
}

impl ArrivedVm {
    /// The same as a store on devdax tells of its segments.
    pub fn info(&self) -> SegmentInfo {
        SegmentInfo {
            spec: self.files.spec().clone(),
            created_ns: self.created_ns,
            exec: self.status.clone(),
        }
    }
}

impl ArrivedHost {
    /// The VMs that were sent: slot, and whose memory it is, or why its record
    /// cannot be read.
    pub fn expected(&self) -> impl Iterator<Item = (u32, Result<&SegmentSpec, &str>)> {
        self.entries.iter().map(|(slot, entry)| {
            let spec = entry.as_ref().map(|owner| &owner.spec);
            (*slot, spec.map_err(String::as_str))
        })
    }
}

/// Retrieves the host's session. `Ok(None)` when no such session was handed over.
///
/// # Errors
/// [`CarryError::Piece`] and [`CarryError::Damaged`]: the VMs are looked for all
/// the same.
pub fn host(orchestrator: &dyn Orchestrator) -> Result<Option<ArrivedHost>, CarryError> {
    let session = match orchestrator.retrieve_session(&host_session()) {
        Ok(session) => session,
        Err(LuoError::NoSession(_)) => return Ok(None),
        Err(other) => return Err(other.into()),
    };
    let fd = retrieve(&*session, Piece::Head)?;
    let len = file::len(fd.as_fd())?;
    if len < manifest::head_len(0) {
        return Err(CarryError::damaged(Piece::Head, "it is too short"));
    }
    let head = MemoryFile::new(fd);
    let Roster {
        carrier,
        kernel,
        entries,
    } = manifest::read_head(&head, len)?;
    Ok(Some(ArrivedHost {
        carrier,
        kernel,
        report: report::read(&head).map_err(StoreError::media("read"))?,
        entries,
    }))
}

/// Retrieves every VM, `workers` at once, small ones first, and hands each to
/// `each` as soon as it is there. With `host` those that it lists; without it, whatever
/// is found in any slot.
pub fn arrive(
    orchestrator: &dyn Orchestrator,
    host: Option<&ArrivedHost>,
    workers: usize,
    each: &(dyn Fn(Arrival) + Sync),
) {
    let mut slots: Vec<(u32, Option<&Owner>)> = match host {
        Some(host) => {
            let entries = host.entries.iter();
            entries
                .map(|(slot, owner)| (*slot, owner.as_ref().ok()))
                .collect()
        }
        None => (0..VMS_MAX).map(|slot| (slot, None)).collect(),
    };
    slots.sort_by_key(|(_, owner)| owner.map(|owner| owner.spec.memory()));
    let carrier = host.map(|h| h.carrier);
    let next = AtomicUsize::new(0);
    let work = || {
        while let Some((slot, owner)) = slots.get(next.fetch_add(1, Ordering::Relaxed)) {
            let arrival = vm(orchestrator, *slot, *owner, carrier);
            let absent = matches!(
                &arrival.outcome,
                Err(lost) if matches!(lost.reason, CarryError::Session(LuoError::NoSession(_)))
            );
            // Without a list, an empty slot is nothing that is missing.
            if host.is_some() || !absent {
                each(arrival);
            }
        }
    };
    thread::scope(|scope| {
        for _ in 1..workers.min(slots.len()) {
            // Where no thread can be started, the others do its part.
            let _ = thread::Builder::new().spawn_scoped(scope, work);
        }
        work();
    });
}

fn vm(
    orchestrator: &dyn Orchestrator,
    slot: u32,
    expected: Option<&Owner>,
    carrier: Option<CarrierId>,
) -> Arrival {
    let began = stamp_now();
    let mut name = expected.map(|owner| owner.spec.name.clone());
    let mut vm = expected.map(|owner| owner.spec.vm);
    let mut retrieve = || {
        let lost = |reason, session| Lost { reason, session };
        let session = orchestrator
            .retrieve_session(&vm_session(slot))
            .map_err(|why| lost(why.into(), None))?;
        let found = read_manifest(&*session, slot).and_then(|manifest| {
            let spec = &manifest.owner.spec;
            name.get_or_insert(spec.name.clone());
            vm.get_or_insert(spec.vm);
            same(&manifest, expected, carrier)?;
            let files = retrieve_files(&*session, &manifest)?;
            let status = files.status()?;
            Ok((manifest, files, status))
        });
        match found {
            Ok((manifest, files, status)) => Ok(ArrivedVm {
                retrieved: retrieved(&manifest),
                files,
                status,
                created_ns: manifest.owner.created_ns,
                kernel: manifest.kernel,
                // All of it is in our hands; the kernel's hold on it would keep
                // it from being preserved again.
                _session: session.finish().is_err().then_some(session),
            }),
            Err(reason) => Err(lost(reason, Some(session))),
        }
    };
    // What a VM's session holds is not trusted, and costs no other VM.
    let outcome = catch_unwind(AssertUnwindSafe(&mut retrieve));
    let outcome = outcome.unwrap_or_else(|_| Err(Lost::died()));
    Arrival {
        slot,
        name,
        vm,
        span: Span {
            began,
            ended: stamp_now(),
        },
        outcome,
    }
}

/// Bytes of RAM in the session.
fn retrieved(manifest: &Manifest) -> ByteSize {
    let Manifest { owner, present, .. } = manifest;
    let lens = (0..).zip(part_lens(owner.spec.memory(), present.part_len));
    ByteSize(
        lens.filter(|(part, _)| present.has(*part))
            .map(|(_, len)| len)
            .sum(),
    )
}

/// Whether the manifest is the one that the host's list speaks of.
fn same(
    manifest: &Manifest,
    expected: Option<&Owner>,
    carrier: Option<CarrierId>,
) -> Result<(), CarryError> {
    let refuse = |why: &str| Err(CarryError::damaged(Piece::Manifest, why));
    if carrier.is_some_and(|carrier| carrier != manifest.carrier) {
        return refuse("it belongs to another live update");
    }
    if expected.is_some_and(|owner| *owner != manifest.owner) {
        return refuse("it is not the VM that the list of carried VMs names");
    }
    Ok(())
}

fn retrieve(session: &dyn Incoming, piece: Piece) -> Result<OwnedFd, CarryError> {
    session
        .retrieve(piece.token())
        .map_err(CarryError::piece(piece))
}

fn read_manifest(session: &dyn Incoming, slot: u32) -> Result<Manifest, CarryError> {
    let fd = retrieve(session, Piece::Manifest)?;
    if file::len(fd.as_fd())? != MANIFEST_LEN {
        return Err(CarryError::damaged(
            Piece::Manifest,
            "it has another length",
        ));
    }
    manifest::read_manifest(&MemoryFile::new(fd), slot)
}

/// Every file of a VM: those in the session, and new ones for empty parts.
fn retrieve_files(session: &dyn Incoming, manifest: &Manifest) -> Result<SegmentFiles, CarryError> {
    let spec = &manifest.owner.spec;
    let present = manifest.present;
    let exec = retrieve(session, Piece::Exec)?;
    file::seal(exec.as_fd())?;
    let mut parts = Vec::new();
    for (index, len) in (0..).zip(part_lens(spec.memory(), present.part_len)) {
        if present.has(index) {
            let fd = retrieve(session, Piece::Part(index))?;
            file::seal(fd.as_fd())?;
            parts.push(fd);
        } else {
            parts.push(make_part(&spec.name, index as usize, len)?);
        }
    }
    Ok(SegmentFiles::arrived(
        spec.clone(),
        exec,
        parts,
        present.part_len,
    )?)
}
