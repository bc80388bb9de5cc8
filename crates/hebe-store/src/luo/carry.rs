//! Preparing a live update in the old kernel.
//!
//! ```text
//! VMs run      Carrier::new ─► host(slots) ─► vm(slot, files, plan) for each, many at once
//!              then enter each into the host's head
//! VMs frozen   complete() for each; write the report; jump
//! ```
//! Whatever fails before the jump, dropping the values lets everything go, and
//! the VMs run on as if nothing had been. They must be alive at the jump: a
//! session whose process ended carries nothing.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use hebe_sys::clock::stamp_now;
use hebe_sys::luo::{Orchestrator, Outgoing, SessionName};
use hebe_types::{ByteSize, VmName};

use super::file::{self, MemoryFile};
use super::files::{SegmentFiles, allocated};
use super::manifest::{self, CarrierId, MANIFEST_LEN, Present, Sender};
use super::plan::Plan;
use super::{CarryError, Piece, Span, VMS_MAX, host_session, vm_session};
use crate::exec::now_ns;
use crate::layout::{Owner, REPORT_LEN_MAX};
use crate::{StoreError, report};

/// One live update, with whatever carries it.
pub struct Carrier<'a> {
    orchestrator: &'a dyn Orchestrator,
    sender: Sender,
}

/// The host's session: which VMs are carried, and the report.
#[derive(Debug)]
pub struct CarriedHost {
    head: MemoryFile,
    session: Box<dyn Outgoing>,
}

/// One VM's session.
#[derive(Debug)]
pub struct CarriedVm {
    session: Box<dyn Outgoing>,
    manifest: MemoryFile,
    sender: Sender,
    owner: Owner,
    present: Present,
    left_out: Vec<(u32, OwnedFd)>,
    /// Parts are preserved that the manifest does not name yet.
    manifest_is_behind: bool,
    figures: Figures,
}

/// What carrying a VM took so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Figures {
    /// Preserving it as planned, without what came late.
    pub span: Span,
    /// Bytes of RAM that are preserved.
    pub preserved: ByteSize,
    /// Of these, what was holes and is filled now.
    pub filled: ByteSize,
    /// What came late.
    pub late: Late,
}

/// What a VM wrote to, between being prepared and being frozen, of the parts
/// that were left out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Late {
    /// Parts.
    pub parts: u32,
    /// Bytes of holes that this filled.
    pub filled: ByteSize,
}

impl Late {
    fn add(&mut self, filled: u64) {
        self.parts += 1;
        self.filled.0 += filled;
    }
}

impl<'a> Carrier<'a> {
    /// A new live update. `kernel` is the running kernel's release, for people
    /// who read what arrived.
    ///
    /// # Errors
    /// [`CarryError::Store`].
    pub fn new(orchestrator: &'a dyn Orchestrator, kernel: &str) -> Result<Self, CarryError> {
        Ok(Self {
            orchestrator,
            sender: Sender {
                carrier: CarrierId::draw()?,
                kernel: kernel.to_owned(),
                now_ns: now_ns(),
            },
        })
    }

    /// Makes and preserves the host's head, for VMs in slots from 0 to `slots`.
    ///
    /// # Errors
    /// [`CarryError::Session`], [`CarryError::TooMany`].
    pub fn host(&self, slots: u32) -> Result<CarriedHost, CarryError> {
        if slots > VMS_MAX {
            return Err(CarryError::TooMany);
        }
        let session = self.orchestrator.create_session(&host_session())?;
        let head = MemoryFile::new(file::make("hebe-head", manifest::head_len(slots))?);
        manifest::write_head(&head, &self.sender, slots).map_err(StoreError::media("write"))?;
        preserve(&*session, Piece::Head, head.fd())?;
        Ok(CarriedHost { head, session })
    }

    /// Preserves a VM as planned. Takes long, and may be called for many VMs at
    /// once; the VM runs meanwhile. Its files are held by the kernel from here
    /// on, too.
    ///
    /// # Errors
    /// [`CarryError::Session`] and [`CarryError::Piece`]: nothing of the VM is
    /// preserved then. [`CarryError::Store`] for a plan of another VM.
    pub fn vm(
        &self,
        slot: u32,
        files: &SegmentFiles,
        plan: &Plan,
    ) -> Result<CarriedVm, CarryError> {
        if slot >= VMS_MAX {
            return Err(CarryError::TooMany);
        }
        if plan.parts.len() != files.parts().len() {
            let other = "the plan was made for another VM";
            return Err(StoreError::BadSpec(other.into()).into());
        }
        let began = stamp_now();
        let session = self.orchestrator.create_session(&vm_session(slot))?;
        preserve(&*session, Piece::Exec, files.exec())?;
        let mut present = Present {
            part_len: files.part_len(),
            parts: plan.parts.len() as u32,
            bits: 0,
        };
        let mut left_out = Vec::new();
        for ((index, fd), keep) in (0..).zip(files.parts()).zip(&plan.parts) {
            if *keep {
                preserve(&*session, Piece::Part(index), fd.as_fd())?;
                present.add(index);
            } else {
                let copy = fd.try_clone().map_err(StoreError::media("keep"))?;
                left_out.push((index, copy));
            }
        }
        let owner = manifest::owner_in(slot, files.spec(), self.sender.now_ns);
        let manifest = MemoryFile::new(file::make("hebe-manifest", MANIFEST_LEN)?);
        manifest::write_manifest(&manifest, &self.sender, &owner, &present)
            .map_err(StoreError::media("write"))?;
        preserve(&*session, Piece::Manifest, manifest.fd())?;
        Ok(CarriedVm {
            session,
            manifest,
            sender: self.sender.clone(),
            owner,
            present,
            left_out,
            manifest_is_behind: false,
            figures: Figures {
                span: Span {
                    began,
                    ended: stamp_now(),
                },
                preserved: ByteSize(plan.memory.0 - plan.left_out.0),
                filled: plan.fill,
                late: Late::default(),
            },
        })
    }
}

fn preserve(session: &dyn Outgoing, piece: Piece, fd: BorrowedFd<'_>) -> Result<(), CarryError> {
    session
        .preserve(fd, piece.token())
        .map_err(CarryError::piece(piece))
}

impl CarriedHost {
    /// Its session: who else has this open holds it beside this value.
    pub fn session(&self) -> (SessionName, BorrowedFd<'_>) {
        (host_session(), self.session.descriptor())
    }

    /// Enters a VM, so that it is missed if it does not arrive.
    ///
    /// # Errors
    /// [`CarryError::Store`], for a slot beyond the head's for instance.
    pub fn enter(&mut self, vm: &CarriedVm) -> Result<(), CarryError> {
        let entered = manifest::write_entry(&self.head, &vm.owner);
        Ok(entered.map_err(StoreError::media("write"))?)
    }

    /// Takes a VM out again, which is kept in another way than by its session.
    ///
    /// # Errors
    /// [`CarryError::Store`]: the next kernel misses it.
    pub fn strike(&mut self, vm: &CarriedVm) -> Result<(), CarryError> {
        let struck = manifest::strike_entry(&self.head, &vm.owner, vm.sender.carrier);
        Ok(struck.map_err(StoreError::media("write"))?)
    }

    /// Replaces the report: opaque text for the next kernel.
    ///
    /// # Errors
    /// [`StoreError::ReportTooLong`].
    pub fn write_report(&mut self, text: &[u8]) -> Result<(), StoreError> {
        if text.len() > REPORT_LEN_MAX {
            return Err(StoreError::ReportTooLong { len: text.len() });
        }
        report::write(&self.head, text).map_err(StoreError::media("write"))
    }
}

impl CarriedVm {
    /// The VM's name.
    pub fn name(&self) -> &VmName {
        &self.owner.spec.name
    }

    /// The slot that its session is named by.
    pub fn slot(&self) -> u32 {
        self.owner.spec.id.0
    }

    /// Its session, as [`CarriedHost::session`].
    pub fn session(&self) -> (SessionName, BorrowedFd<'_>) {
        (vm_session(self.slot()), self.session.descriptor())
    }

    /// What it took so far.
    pub fn figures(&self) -> Figures {
        self.figures
    }

    /// Parts that are not in the session, because they were empty.
    pub fn left_out(&self) -> usize {
        self.left_out.len()
    }

    /// Preserves what the guest began to use since it was prepared: one look per
    /// part that was left out. Call it when the VM is frozen, and nothing writes
    /// its RAM any more; and shortly before, so that little is left for the pause.
    ///
    /// # Errors
    /// [`CarryError::Piece`]: without that part the VM must not be carried; let
    /// it run again.
    ///
    /// After an error everything that is not preserved is still left out, and
    /// the next call tries it again: a part is never forgotten, for it would
    /// arrive as zeros.
    pub fn complete(&mut self) -> Result<Late, CarryError> {
        let mut late = Late::default();
        let mut still = Vec::new();
        let mut result = Ok(());
        for (index, fd) in std::mem::take(&mut self.left_out) {
            // After the first error the rest is only put back.
            let preserved = match result {
                Ok(()) => self.preserve_late(index, &fd, &mut late),
                Err(_) => Ok(false),
            };
            if !matches!(preserved, Ok(true)) {
                still.push((index, fd));
            }
            result = result.and(preserved.map(drop));
        }
        self.left_out = still;
        if self.manifest_is_behind {
            manifest::update_present(&self.manifest, &self.sender, &self.present)
                .map_err(StoreError::media("write"))?;
            self.manifest_is_behind = false;
        }
        result.map(|()| late)
    }

    /// Preserves a part, unless it is empty still.
    fn preserve_late(
        &mut self,
        index: u32,
        fd: &OwnedFd,
        late: &mut Late,
    ) -> Result<bool, CarryError> {
        let used = allocated(fd.as_fd())?;
        if used == 0 {
            return Ok(false);
        }
        let len = file::len(fd.as_fd())?;
        preserve(&*self.session, Piece::Part(index), fd.as_fd())?;
        self.present.add(index);
        self.manifest_is_behind = true;
        let filled = len.saturating_sub(used);
        late.add(filled);
        self.figures.late.add(filled);
        self.figures.preserved.0 += len;
        self.figures.filled.0 += filled;
        Ok(true)
    }
}
