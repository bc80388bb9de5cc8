//! Store `luo`: guest RAM in ordinary memory, carried over a kexec by Linux's
//! Live Update Orchestrator ([`hebe_sys::luo`]). No reservation is needed.
//!
//! ```text
//! VM's files          exec 2 MiB │ part 0 │ part 1 │ … (shared memory, sealed)
//!                          │         │        │
//! session hebe.vm.SLOT   token 1   token 2  token 3 …     token 0: manifest
//! session hebe.host      token 0: head: roster, report, copies of the records
//! ```
//! **Files.** A segment is its execution-state area and its RAM in up to 64
//! parts of one size ([`SegmentFiles`]), which follow each other in one address
//! space; the same [`crate::SegmentSpec`] as in a store on devdax says where in
//! it guest RAM lies, and the same [`crate::ExecArea`] says whether it may be
//! resumed. While a VM runs its VMM holds the files. There is no table of what
//! exists: memory that nobody holds is gone.
//!
//! **Preparing** ([`Carrier`]) is done while VMs run, and paid before the pause:
//! one session per VM, its manifest, and every part preserved. The kernel fills
//! the holes of what it preserves, so what that costs is measured first
//! ([`SegmentFiles::measure`]) and a [`Plan`] is made: all parts, or only those
//! that hold something. Parts are never copied together: guest RAM is neither
//! read nor moved (R-14). A part that was left out and written to meanwhile is
//! preserved when its VM is frozen ([`CarriedVm::complete`]).
//!
//! **Aborting** is dropping the sessions. VMs notice nothing, but memory that
//! was filled stays filled.
//!
//! **Arriving** ([`arrive`]) in the new kernel: each VM's session stands for
//! itself, with a record of its own, and what is wrong with one costs that VM
//! alone. The roster in the host's session says which VMs must be there, so
//! that none is missing unnoticed; where the roster is unreadable, the slots
//! are tried one by one. What arrives is checked like anything from outside:
//! lengths, checksums, guard. A VM with a token that failed is reported with
//! the reason and never resumed; its session is kept until it is given up, for
//! frozen RAM is freed only on order.

mod arrive;
mod carry;
mod file;
mod files;
mod manifest;
mod plan;

#[cfg(test)]
mod tests;

use std::fmt;

use hebe_sys::luo::{LuoError, SessionName, Token};
use hebe_types::{ByteSize, Stamp, VmName};

use crate::StoreError;
use crate::layout::SEGMENTS_MAX;

pub(crate) use files::allocated;

pub use arrive::{Arrival, ArrivedHost, ArrivedVm, Lost, arrive, host};
pub use carry::{CarriedHost, CarriedVm, Carrier, Figures, Late};
pub use files::SegmentFiles;
pub use manifest::CarrierId;
pub use plan::{HolePolicy, PARTS_MAX, PartUse, Plan};

/// Most VMs that one host carries.
pub const VMS_MAX: u32 = SEGMENTS_MAX;

/// What one token stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Piece {
    /// Roster, report and records: the host's one file.
    Head,
    /// What a VM's session holds.
    Manifest,
    /// A VM's execution-state area.
    Exec,
    /// A part of a VM's RAM, counted from 0.
    Part(u32),
}

impl Piece {
    /// The token under which it is preserved.
    pub fn token(self) -> Token {
        Token(match self {
            Self::Head | Self::Manifest => 0,
            Self::Exec => 1,
            Self::Part(index) => 2 + u64::from(index),
        })
    }
}

impl fmt::Display for Piece {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Head => f.write_str("the list of carried VMs"),
            Self::Manifest => f.write_str("its manifest"),
            Self::Exec => f.write_str("its execution-state area"),
            Self::Part(index) => write!(f, "part {index} of its RAM"),
        }
    }
}

/// The session of what is the host's.
pub fn host_session() -> SessionName {
    name("hebe.host".to_owned())
}

/// What the names of all VMs' sessions begin with.
pub const VM_SESSIONS: &str = "hebe.vm.";

/// The session of the VM in a slot. It is named by slot, so that VMs are found
/// even where the roster cannot be read.
pub fn vm_session(slot: u32) -> SessionName {
    name(format!("{VM_SESSIONS}{slot:03}"))
}

fn name(text: String) -> SessionName {
    // Both texts above are short and have no NUL.
    text.parse().unwrap_or_else(|_| unreachable!())
}

/// From when to when the kernel was busy with a VM's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// Its first call.
    pub began: Stamp,
    /// The end of its last.
    pub ended: Stamp,
}

/// Why memory is not carried, or did not arrive.
#[derive(Debug, thiserror::Error)]
pub enum CarryError {
    /// The kernel's own reason, with a whole session.
    #[error(transparent)]
    Session(#[from] LuoError),
    /// The kernel's own reason, with one file.
    #[error("{piece}: {source}")]
    Piece {
        /// Which file.
        piece: Piece,
        /// Why.
        source: LuoError,
    },
    /// A file cannot be made, read or mapped.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// What arrived is not what was sent.
    #[error("{piece} is damaged: {reason}")]
    Damaged {
        /// Which file.
        piece: Piece,
        /// In which way.
        reason: String,
    },
    /// Preserving would fill more holes than is allowed.
    #[error(
        "preserving VM {name} would fill {fill} of memory that its guest does not use, and at most {limit} is allowed: leave empty parts out, raise the limit, or reboot it by file"
    )]
    WouldFill {
        /// Which VM.
        name: VmName,
        /// How much.
        fill: ByteSize,
        /// The limit.
        limit: ByteSize,
    },
    /// More VMs than slots.
    #[error("more than {VMS_MAX} VMs cannot be carried at once: stop some, or reboot them by file")]
    TooMany,
    /// Retrieving it panicked.
    #[error("the thread that retrieved it ended early: please report this")]
    Died,
}

impl CarryError {
    fn piece(piece: Piece) -> impl FnOnce(LuoError) -> Self {
        move |source| Self::Piece { piece, source }
    }

    fn damaged(piece: Piece, reason: impl Into<String>) -> Self {
        Self::Damaged {
            piece,
            reason: reason.into(),
        }
    }
}
