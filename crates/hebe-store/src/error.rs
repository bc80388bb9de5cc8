//! What can go wrong with a store, each in one sentence with the way out.

use std::io;
use std::path::PathBuf;

use hebe_types::{ByteSize, SegmentId, VmName, counted};

/// Why a store or a segment cannot be used as asked.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The device or file cannot be opened.
    #[error(
        "cannot open store {path}: is the device there? 'hebe host check' says what is missing"
    )]
    Open {
        /// Which store.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Reading, writing or mapping failed.
    #[error("cannot {what} the store's memory")]
    Media {
        /// What was tried.
        what: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Neither a devdax device nor a regular file.
    #[error("{0} is neither a devdax device nor a regular file: a store needs one of them")]
    NotUsable(PathBuf),
    /// The devdax device has another alignment.
    #[error(
        "{path} has alignment {align}, and a store needs 2097152 (2MiB): set the device up again with that alignment"
    )]
    Align {
        /// Which device.
        path: PathBuf,
        /// Its alignment in bytes.
        align: u64,
    },
    /// Smaller than the smallest store.
    #[error("{path} has {size}, and the smallest store has {min}: reserve more memory")]
    TooSmall {
        /// Which device.
        path: PathBuf,
        /// Its size.
        size: ByteSize,
        /// The least.
        min: ByteSize,
    },
    /// No superblock at the head.
    #[error("{0} holds no Hebe store: 'hebe store init' makes one, if nothing else lives there")]
    NoStore(PathBuf),
    /// A regular file that holds something, and never was a store.
    #[error(
        "{0} holds something else than a store, a VM's disk for one: name a new file, or say --force to overwrite it"
    )]
    NotBlank(PathBuf),
    /// Both copies of the superblock are unreadable, yet this was a store.
    #[error(
        "{path} held a Hebe store and its head is damaged ({reason}): nothing was written; formatting with force gives its VMs up"
    )]
    HeadDamaged {
        /// Which store.
        path: PathBuf,
        /// In which way.
        reason: String,
    },
    /// Written by a release with another format.
    #[error(
        "the store has format {found}, and this release reads {known}: use the release that wrote it; 'hebe store init --force' makes it anew and gives its VMs up"
    )]
    OtherFormat {
        /// Format found.
        found: u32,
        /// The format known.
        known: u32,
    },
    /// The guard at the end is not what was written there.
    #[error(
        "something else used the store's memory since the store was made (its guard is overwritten at byte {at:#x}), so no VM in it is resumed and nothing was written: see that every kernel boots with the reservation, then make the store anew with 'hebe store init --force', which gives its VMs up"
    )]
    Overrun {
        /// The first overwritten word, in bytes from the store's start.
        at: u64,
    },
    /// The device is smaller than the store on it.
    #[error(
        "the reservation shrank: the store has {capacity} and the device {size}; nothing was written; boot with the reservation the store was made with"
    )]
    Shrank {
        /// What the superblock says.
        capacity: ByteSize,
        /// What the device has.
        size: ByteSize,
    },
    /// The device lies at another physical address.
    #[error(
        "the reservation moved: the store was made at physical address {made:#x} and the device is at {found:#x}; nothing was written; boot with the reservation the store was made with"
    )]
    Moved {
        /// Physical address in the superblock.
        made: u64,
        /// Physical address of the device.
        found: u64,
    },
    /// Formatting would destroy a store.
    #[error(
        "{path} already holds a Hebe store with {}: formatting it needs force, and gives up all that is in it",
        counted(*segments, "segment")
    )]
    Formatted {
        /// Which store.
        path: PathBuf,
        /// Segments in use, damaged ones counted.
        segments: usize,
    },
    /// Another manager has the store open.
    #[error("another process manages store {0}: wait until it is done, or end it")]
    Busy(PathBuf),
    /// A change was asked of a store opened for reading.
    #[error("the store was opened for reading only: open it with Access::Manage to change it")]
    ReadOnly,
    /// RAM size of zero or not a multiple of 2 MiB.
    #[error("a segment of {0} is not possible: RAM is a multiple of 2MiB and not zero")]
    Memory(ByteSize),
    /// Not enough free granules.
    #[error(
        "the store has {free} free and the VM needs {needed}: drop a segment or reserve more memory"
    )]
    OutOfSpace {
        /// RAM and execution-state area.
        needed: ByteSize,
        /// Free now.
        free: ByteSize,
    },
    /// Enough free granules, in too many pieces.
    #[error(
        "the free {free} lie in more than {} pieces: stop and start a VM, so that larger pieces come together",
        crate::EXTENTS_MAX
    )]
    Fragmented {
        /// Free now.
        free: ByteSize,
    },
    /// Every slot of the table is used.
    #[error("the store has {} segments already: drop one", crate::SEGMENTS_MAX)]
    TableFull,
    /// A damaged record hides which granules are its own.
    #[error(
        "segment record {0} is damaged, so free memory cannot be told from that VM's: give that VM up with 'hebe store drop {0} --yes', then try again"
    )]
    DamagedRecord(SegmentId),
    /// The VM has a segment.
    #[error(
        "VM {name} already has segment {id}: resume it, or give it up with 'hebe store drop {id}'"
    )]
    Exists {
        /// Which VM.
        name: VmName,
        /// Its segment.
        id: SegmentId,
    },
    /// No segment in that slot.
    #[error("there is no segment {0} in this store: 'hebe store list' shows those there are")]
    NoSuchSegment(SegmentId),
    /// Somebody has the segment mapped.
    #[error(
        "a VMM has the memory of segment {0} mapped: two never run the same RAM, and it is not freed under one; see 'hebe list', and end that VMM first"
    )]
    Held(SegmentId),
    /// Somebody has a segment of the store mapped.
    #[error(
        "a VMM has memory of store {0} mapped: see 'hebe list', and end every VMM before the store is made anew"
    )]
    InUse(PathBuf),
    /// The slot holds another VM's segment than the caller listed.
    #[error(
        "segment {0} is not what it was when it was listed, and is left alone: see 'hebe store list'"
    )]
    Reused(SegmentId),
    /// A placement table that cannot be mapped safely.
    #[error("the segment's placement table is refused: {0}")]
    BadSpec(String),
    /// The file or device ends before an extent does.
    #[error(
        "the segment reaches to byte {needed} and the store ends at {size}: the reservation shrank; boot with the one the store was made with"
    )]
    BeyondEnd {
        /// End of the last extent.
        needed: u64,
        /// End of the file or device.
        size: u64,
    },
    /// Not enough huge pages for a memfd segment.
    #[error(
        "there are not {pages} free huge pages of 2MiB: raise vm.nr_hugepages, or set hugepages = false"
    )]
    HugePages {
        /// How many are needed.
        pages: u64,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// An execution state that does not fit its slot.
    #[error(
        "the execution state has {len} bytes and its area holds {max}: this is a fault of Hebe's, please report it"
    )]
    StateTooLong {
        /// Its length.
        len: usize,
        /// The most.
        max: usize,
    },
    /// There is no frozen state to load.
    #[error("the segment holds no frozen state: {0}")]
    NotFrozen(String),
    /// The execution-state area is damaged.
    #[error(
        "the execution-state area is damaged: {0}; the VM stays listed, and 'hebe store drop' with --yes gives it up"
    )]
    ExecDamaged(String),
    /// A report that does not fit.
    #[error(
        "the report has {len} bytes, and the store keeps at most {}",
        crate::REPORT_LEN_MAX
    )]
    ReportTooLong {
        /// Its length.
        len: usize,
    },
    /// What the system says about DAX devices cannot be read.
    #[error(transparent)]
    Dax(#[from] hebe_sys::dax::DaxError),
}

impl StoreError {
    /// For `map_err` on media operations.
    pub(crate) fn media(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Media { what, source }
    }
}
