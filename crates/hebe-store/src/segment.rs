//! One VM's RAM and execution-state area, mapped.
//!
//! Mapping neither reads nor writes RAM: nothing is populated, locked
//! or advised that would touch a page.
//!
//! Whoever maps a segment of a store is its one holder: the mapping carries
//! the lock of the [`crate::hold`] module, and nobody else can map the segment,
//! drop it or format the store as long as it lasts.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::ptr::NonNull;

use hebe_types::{ByteSize, Extent, GRANULE, Gpa, SegmentId, VmId, VmName, ram_ranges};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use rustix::mm::Advice;

use crate::StoreError;
use crate::exec::ExecArea;
use crate::hold;
use crate::layout::HEAD_LEN;
use crate::mapping::Mapping;
use crate::spec::{Placement, SegmentSpec};
use crate::store::backing;
use crate::table;

/// Stands for the store of a segment that is a memfd of its own.
const NO_STORE: [u8; 16] = [0; 16];

/// One contiguous range of guest RAM in this process's address space.
#[derive(Debug)]
pub struct MappedRam {
    /// First guest-physical address.
    pub gpa: Gpa,
    /// Where it is mapped; aligned to 2 MiB. Valid as long as the [`Segment`].
    pub host: NonNull<u8>,
    /// Length in bytes, a multiple of 2 MiB.
    pub len: u64,
}

// SAFETY: an address and a length; using the address is the user's unsafe
// code, with its own argument.
unsafe impl Send for MappedRam {}
// SAFETY: as above.
unsafe impl Sync for MappedRam {}

/// A mapped segment. Unmapped when dropped: whoever uses the addresses of
/// [`Segment::ram`] keeps it alive as long.
#[derive(Debug)]
pub struct Segment {
    spec: SegmentSpec,
    ram: Vec<MappedRam>,
    exec: ExecArea,
    memfd: Option<OwnedFd>,
    /// Those of a segment in files of its own; none for one in a store.
    files: Vec<OwnedFd>,
    /// Of its own, be they `files` or `memfd`: their lengths.
    own_lens: Vec<u64>,
    /// It is made of huge pages.
    huge: bool,
    _mappings: Vec<Mapping>,
}

impl Segment {
    /// Maps a segment of a store, and closes the store's descriptor before
    /// returning (invariant 9). Extents that follow each other in
    /// guest-physical space are contiguous in the mapping.
    ///
    /// # Errors
    /// [`StoreError::BadSpec`] for a table that is not safe to map,
    /// [`StoreError::BeyondEnd`] when the device or file is too short (a later
    /// access would be SIGBUS), [`StoreError::Held`] while another process has
    /// it mapped, [`StoreError::Reused`] where the store has no such segment any
    /// more.
    pub fn map(fd: OwnedFd, spec: &SegmentSpec) -> Result<Self, StoreError> {
        let file = File::from(fd);
        let size = backing(&file, Path::new("the store's descriptor"))?.size;
        spec.check()?;
        // Lasts as long as the mapping, though the descriptor is closed here.
        hold::take(file.as_fd(), spec.id, &[spec.exec])?;
        let segment = Self::map_from(&[(file.as_fd(), size)], spec)?;
        // Whoever drops a segment takes that lock before its record changes: one
        // that is there now stays as long as it is held here. One that is being
        // dropped, and whose dropper was killed, is zeroed by the next manager,
        // though its state may still look whole.
        if spec.store_uuid != NO_STORE {
            table::check_live(&head_of(&file)?, size, spec)?;
        }
        drop(file);
        Ok(segment)
    }

    /// Maps a segment that lies in files of its own, one behind the other with
    /// the execution-state area first ([`crate::luo`]), and keeps them for
    /// [`Segment::files`]. Huge pages are asked for.
    ///
    /// # Errors
    /// As for [`Segment::map`]; [`StoreError::BadSpec`] for a file that is not
    /// whole granules long.
    pub fn map_files(fds: Vec<OwnedFd>, spec: &SegmentSpec) -> Result<Self, StoreError> {
        let whole = Extent {
            offset: 0,
            len: GRANULE,
        };
        let first = match fds.first() {
            Some(first) if spec.exec == whole => first,
            _ => return Err(StoreError::BadSpec("its files are not a segment's".into())),
        };
        // An open file of this process's own: whoever handed the descriptors
        // over shares theirs, and a lock on it would be shared, too. It lasts
        // as long as the mapping of the execution-state area.
        let own = format!("/proc/self/fd/{}", first.as_raw_fd());
        let opened = File::options().read(true).write(true).open(own);
        let own = opened.map_err(StoreError::media("open"))?;
        hold::take(own.as_fd(), spec.id, &[whole])?;
        let mut files = Vec::with_capacity(fds.len());
        for fd in std::iter::once(own.as_fd()).chain(fds[1..].iter().map(AsFd::as_fd)) {
            files.push((fd, file_len(fd)?));
        }
        let mut segment = Self::map_from(&files, spec)?;
        segment.own_lens = files.iter().map(|(_, len)| *len).collect();
        segment.advise_hugepages();
        segment.files = fds;
        Ok(segment)
    }

    /// A segment in anonymous memory, which outlives nothing but this process
    /// and whoever gets [`Segment::memfd`]. Its length is sealed.
    ///
    /// # Errors
    /// [`StoreError::Memory`]; [`StoreError::HugePages`] when huge pages were
    /// asked for and there are too few.
    pub fn new_memfd(
        vm: VmId,
        name: &VmName,
        memory: ByteSize,
        hugepages: bool,
    ) -> Result<Self, StoreError> {
        if memory.bytes() == 0 || !memory.bytes().is_multiple_of(GRANULE) {
            return Err(StoreError::Memory(memory));
        }
        let spec = memfd_spec(vm, name, memory);
        spec.check()?;
        let media = |e: rustix::io::Errno| StoreError::media("make")(e.into());
        let mut flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        if hugepages {
            flags |= MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
        }
        let fd = memfd_create(format!("hebe-{name}"), flags).map_err(media)?;
        ftruncate(&fd, spec.end()).map_err(media)?;
        let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
        fcntl_add_seals(&fd, seals).map_err(media)?;
        let mapped = Self::map_from(&[(fd.as_fd(), spec.end())], &spec);
        let mut segment = match mapped {
            // Shared huge pages are reserved when they are mapped.
            Err(StoreError::Media { source, .. }) if hugepages => {
                return Err(StoreError::HugePages {
                    pages: spec.end() / GRANULE,
                    source,
                });
            }
            other => other?,
        };
        if !hugepages {
            segment.advise_hugepages();
        }
        segment.exec.prepare().map_err(StoreError::media("write"))?;
        segment.memfd = Some(fd);
        segment.own_lens = vec![spec.end()];
        segment.huge = hugepages;
        Ok(segment)
    }

    /// Maps from files that follow each other in the segment's address space.
    fn map_from(files: &[(BorrowedFd<'_>, u64)], spec: &SegmentSpec) -> Result<Self, StoreError> {
        spec.check()?;
        let size = files.iter().map(|(_, len)| len).sum();
        if spec.end() > size {
            return Err(StoreError::BeyondEnd {
                needed: spec.end(),
                size,
            });
        }
        let map = StoreError::media;
        let mut mappings = Vec::new();
        let mut ram = Vec::new();
        for range in ram_ranges(spec.memory()) {
            let mapping = Mapping::reserve(range.len).map_err(map("map"))?;
            let end = range.gpa.0 + range.len;
            for p in &spec.ram {
                if (range.gpa.0..end).contains(&p.gpa.0) {
                    let at = p.gpa.0 - range.gpa.0;
                    for (fd, done, piece) in pieces(files, p.place) {
                        mapping
                            .place(at + done, fd, piece, true)
                            .map_err(map("map"))?;
                    }
                }
            }
            for advice in [Advice::LinuxDontFork, Advice::LinuxDontDump] {
                mapping.advise(advice).map_err(map("map"))?;
            }
            ram.push(MappedRam {
                gpa: range.gpa,
                host: mapping.start(),
                len: mapping.len(),
            });
            mappings.push(mapping);
        }
        // One granule, and files are whole granules: it lies in one of them.
        let exec = pieces(files, spec.exec).next();
        let (fd, _, place) = exec.ok_or_else(|| StoreError::BadSpec("it has no files".into()))?;
        let exec = Mapping::of(fd, place, true).map_err(map("map"))?;
        Ok(Self {
            exec: ExecArea::new(exec, spec),
            spec: spec.clone(),
            ram,
            memfd: None,
            files: Vec::new(),
            own_lens: Vec::new(),
            huge: false,
            _mappings: mappings,
        })
    }

    /// Whose it is and where it lies.
    pub fn spec(&self) -> &SegmentSpec {
        &self.spec
    }

    /// Guest RAM in ascending guest-physical order: one range, or two around
    /// the MMIO hole.
    pub fn ram(&self) -> &[MappedRam] {
        &self.ram
    }

    /// The execution-state area.
    pub fn exec(&self) -> &ExecArea {
        &self.exec
    }

    /// The files that are its alone, with their lengths, in the order of its
    /// address space; none for one in a store.
    pub(crate) fn own_files(&self) -> Vec<(BorrowedFd<'_>, u64)> {
        let fds = self.memfd.iter().chain(&self.files).map(AsFd::as_fd);
        fds.zip(self.own_lens.iter().copied()).collect()
    }

    /// It is made of huge pages.
    pub(crate) fn is_huge(&self) -> bool {
        self.huge
    }

    fn advise_hugepages(&self) {
        for mapping in &self._mappings {
            // Advice only: not every kernel has huge pages for shared memory.
            let _ = mapping.advise(Advice::LinuxHugepage);
        }
    }

    /// The files of a segment that has its own, in their order; none for one in
    /// a store. Whoever gets them keeps the VM's memory, should this process end.
    pub fn files(&self) -> &[OwnedFd] {
        &self.files
    }

    /// The memory behind a `memfd` segment; none for one in a store.
    pub fn memfd(&self) -> Option<BorrowedFd<'_>> {
        self.memfd.as_ref().map(AsFd::as_fd)
    }
}

/// The head of the store, to be read.
fn head_of(file: &File) -> Result<Mapping, StoreError> {
    let head = Extent {
        offset: 0,
        len: HEAD_LEN,
    };
    Mapping::of(file.as_fd(), head, false).map_err(StoreError::media("map"))
}

/// Length of a file that holds a part of a segment.
pub(crate) fn file_len(fd: BorrowedFd<'_>) -> Result<u64, StoreError> {
    let stat = rustix::fs::fstat(fd).map_err(|e| StoreError::media("look at")(e.into()))?;
    let regular = rustix::fs::FileType::from_raw_mode(stat.st_mode).is_file();
    match u64::try_from(stat.st_size) {
        Ok(len) if regular && len > 0 && len.is_multiple_of(GRANULE) => Ok(len),
        _ => Err(StoreError::BadSpec(
            "one of its files is not made of 2MiB granules".into(),
        )),
    }
}

/// The parts of an extent, each in one file: the file, how far into the extent
/// it begins, and its place in the file.
pub(crate) fn pieces<'a>(
    files: &'a [(BorrowedFd<'a>, u64)],
    extent: Extent,
) -> impl Iterator<Item = (BorrowedFd<'a>, u64, Extent)> {
    let end = extent.offset + extent.len;
    let mut base = 0;
    files.iter().filter_map(move |(fd, len)| {
        let file = base..base + len;
        base = file.end;
        let from = extent.offset.max(file.start);
        let to = end.min(file.end);
        let place = Extent {
            offset: from.checked_sub(file.start)?,
            len: to.checked_sub(from).filter(|len| *len > 0)?,
        };
        Some((*fd, from - extent.offset, place))
    })
}

/// Execution-state area first, then RAM in order.
pub(crate) fn memfd_spec(vm: VmId, name: &VmName, memory: ByteSize) -> SegmentSpec {
    let mut offset = GRANULE;
    let ram = ram_ranges(memory).into_iter().map(|range| {
        let place = Extent {
            offset,
            len: range.len,
        };
        offset += range.len;
        Placement {
            gpa: range.gpa,
            place,
        }
    });
    SegmentSpec {
        id: SegmentId(0),
        vm,
        name: name.clone(),
        store_uuid: NO_STORE,
        ram: ram.collect(),
        exec: Extent {
            offset: 0,
            len: GRANULE,
        },
    }
}
