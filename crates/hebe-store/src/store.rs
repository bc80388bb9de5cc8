//! A store on a device or a file.
//!
//! The lock that makes a manager the only one sits on a file description of
//! its own. A mapping keeps the description it was made through open, and
//! with it its lock: were the lock on the description whose descriptor VMMs
//! get and map from, it would outlive the manager for as long as a VM runs.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use hebe_sys::dax;
use hebe_sys::lock::FileLock;
use hebe_types::{ByteSize, Extent, GRANULE, SegmentId, VmId, VmName};
use rustix::fs::{FallocateFlags, fallocate};
use rustix::rand::{GetRandomFlags, getrandom};
use serde::Serialize;

use crate::exec::now_ns;
use crate::hold;
use crate::layout::{
    HEAD_LEN, REPORT_LEN_MAX, SEGMENTS_MAX, STORE_GRANULES_MAX, STORE_LEN_MIN, SUPERBLOCK,
    SuperblockV2,
};
use crate::mapping::Mapping;
use crate::media::{Media, PAGE_LEN};
use crate::spec::SegmentSpec;
use crate::table::{self, Head, SegmentEntry, Table};
use crate::{StoreError, report};

/// What a store is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Looking: takes no lock and writes nothing.
    Read,
    /// Changing the table: takes the store's lock, and finishes what a stopped
    /// manager left.
    Manage,
}

/// How to format a store.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FormatOptions {
    /// Give up a store that is there, with every VM in it.
    pub force: bool,
}

/// What a store is and how full it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct StoreInfo {
    /// Drawn when it was formatted.
    pub uuid: [u8; 16],
    /// Bytes, head and guard included.
    pub capacity: u64,
    /// Bytes that a new segment can get; 0 while a record is damaged or
    /// [`Store::check`] fails.
    pub free: u64,
    /// Granules of 2 MiB, head and guard included.
    pub granules_total: u64,
    /// Grows with every change of the table.
    pub generation: u64,
    /// The device or file.
    pub path: PathBuf,
    /// Physical start and length, if known.
    pub phys_range: Option<(u64, u64)>,
}

/// A store, opened.
#[derive(Debug)]
pub struct Store {
    path: PathBuf,
    table: Table<Device>,
    /// Held by a manager; see the module's head.
    lock: Option<FileLock>,
}

/// The device or file as [`Media`]: the head stays mapped, the rest is mapped
/// while it is looked at.
#[derive(Debug)]
struct Device {
    file: File,
    head: Mapping,
    regular: bool,
    writable: bool,
    /// Bytes, whole granules.
    size: u64,
    phys: Option<(u64, u64)>,
}

/// Most bytes mapped at a time outside the head.
const WINDOW_LEN: u64 = 64 * GRANULE;

/// Size and physical start of what a store's file descriptor refers to.
pub(crate) struct Backing {
    pub regular: bool,
    pub size: u64,
    pub phys_start: Option<u64>,
}

/// Looks at a descriptor: a regular file or a devdax device, nothing else.
pub(crate) fn backing(file: &File, path: &Path) -> Result<Backing, StoreError> {
    let meta = file.metadata().map_err(StoreError::media("look at"))?;
    if meta.is_file() {
        return Ok(Backing {
            regular: true,
            size: meta.len(),
            phys_start: None,
        });
    }
    if !meta.file_type().is_char_device() {
        return Err(StoreError::NotUsable(path.to_owned()));
    }
    let rdev = meta.rdev();
    let device = dax::device_of(
        Path::new("/sys"),
        rustix::fs::major(rdev),
        rustix::fs::minor(rdev),
    )?
    .ok_or_else(|| StoreError::NotUsable(path.to_owned()))?;
    if device.align != GRANULE {
        return Err(StoreError::Align {
            path: path.to_owned(),
            align: device.align,
        });
    }
    Ok(Backing {
        regular: false,
        size: device.size,
        phys_start: device.resource,
    })
}

fn open_file(path: &Path, write: bool) -> Result<File, StoreError> {
    let open = OpenOptions::new().read(true).write(write).open(path);
    open.map_err(|source| StoreError::Open {
        path: path.to_owned(),
        source,
    })
}

fn take_lock(path: &Path) -> Result<FileLock, StoreError> {
    let taken = FileLock::take(open_file(path, true)?).map_err(StoreError::media("lock"))?;
    taken.ok_or_else(|| StoreError::Busy(path.to_owned()))
}

impl Device {
    fn open(path: &Path, writable: bool) -> Result<Self, StoreError> {
        let file = open_file(path, writable)?;
        let Backing {
            regular,
            size,
            phys_start,
        } = backing(&file, path)?;
        let whole = size;
        let size = size - size % GRANULE;
        if size < STORE_LEN_MIN {
            return Err(StoreError::TooSmall {
                path: path.to_owned(),
                size: ByteSize(whole),
                min: ByteSize(STORE_LEN_MIN),
            });
        }
        let head = Extent {
            offset: 0,
            len: HEAD_LEN,
        };
        let head = Mapping::of(file.as_fd(), head, writable).map_err(StoreError::media("map"))?;
        Ok(Self {
            file,
            head,
            regular,
            writable,
            size,
            phys: phys_start.map(|start| (start, size)),
        })
    }

    /// From the first byte to the last.
    fn whole(&self) -> Extent {
        Extent {
            offset: 0,
            len: self.size,
        }
    }

    /// Maps the granules around a range outside the head, and says where in
    /// the mapping the range begins.
    fn window(&self, offset: u64, len: u64) -> io::Result<(Mapping, u64)> {
        let start = offset - offset % GRANULE;
        let end = offset.checked_add(len).map(|e| e.next_multiple_of(GRANULE));
        match end {
            Some(end) if end <= self.size => {
                let extent = Extent {
                    offset: start,
                    len: end - start,
                };
                let mapping = Mapping::of(self.file.as_fd(), extent, self.writable)?;
                Ok((mapping, offset - start))
            }
            _ => Err(io::ErrorKind::InvalidInput.into()),
        }
    }

    fn zero_by_mapping(&self, extent: Extent) -> io::Result<()> {
        let mut done = 0;
        while done < extent.len {
            let len = WINDOW_LEN.min(extent.len - done);
            let (mapping, at) = self.window(extent.offset + done, len)?;
            mapping.scrub(Extent { offset: at, len })?;
            mapping.fence();
            done += len;
        }
        Ok(())
    }
}

impl Media for Device {
    fn load(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        if offset < HEAD_LEN {
            return self.head.load(offset, buf);
        }
        let (mapping, at) = self.window(offset, buf.len() as u64)?;
        mapping.load(at, buf)
    }

    fn store(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        if !self.writable {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        if offset < HEAD_LEN {
            return self.head.store(offset, bytes);
        }
        let (mapping, at) = self.window(offset, bytes.len() as u64)?;
        mapping.store(at, bytes)
    }

    fn scrub(&self, extent: Extent) -> io::Result<()> {
        let inside = extent.offset >= HEAD_LEN && extent.offset + extent.len <= self.size;
        if !self.writable || !inside {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        if self.regular {
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            // A file system without holes gets zeros.
            if fallocate(&self.file, flags, extent.offset, extent.len).is_ok() {
                return Ok(());
            }
        }
        self.zero_by_mapping(extent)
    }

    fn fence(&self) {
        self.head.fence();
    }

    fn pages(&self, extent: Extent, visit: &mut dyn FnMut(u64, &[u8; PAGE_LEN])) -> io::Result<()> {
        let (mapping, at) = self.window(extent.offset, extent.len)?;
        let inside = Extent {
            offset: at,
            len: extent.len,
        };
        mapping.pages(inside, &mut |offset, page| {
            visit(extent.offset + offset - at, page);
        })
    }
}

impl Store {
    /// Makes an empty store of a device or file.
    ///
    /// # Errors
    /// Without force, [`StoreError::Formatted`], [`StoreError::HeadDamaged`] or
    /// [`StoreError::OtherFormat`] where a store is or was, and
    /// [`StoreError::NotBlank`] for a file that is something else; nothing is
    /// written then.
    /// [`StoreError::Busy`] while a manager has the store open;
    /// [`StoreError::InUse`] while a VMM has a segment mapped, force or not.
    pub fn format(path: &Path, options: FormatOptions) -> Result<StoreInfo, StoreError> {
        let lock = take_lock(path)?;
        let device = Device::open(path, true)?;
        if !options.force {
            refuse_store(&device, path)?;
        }
        if hold::is_held(device.file.as_fd(), &[device.whole()])? {
            return Err(StoreError::InUse(path.to_owned()));
        }
        let mut uuid = [0; 16];
        getrandom(&mut uuid, GetRandomFlags::empty())
            .map_err(|e| StoreError::media("draw an id for")(e.into()))?;
        let capacity = device.size.min(STORE_GRANULES_MAX * GRANULE);
        let phys = device.phys.map(|(start, _)| (start, capacity));
        let superblock = SuperblockV2::new(uuid, capacity, SEGMENTS_MAX, phys, now_ns());
        table::format(&device, &superblock).map_err(StoreError::media("write"))?;
        Self {
            path: path.to_owned(),
            table: Table::new(device, superblock, 1),
            lock: Some(lock),
        }
        .info()
    }

    /// Opens a store and checks that the device still holds all of it.
    ///
    /// A store whose guard is overwritten opens, so that its VMs can be listed,
    /// every one as damaged; but it is not recovered, and refuses every change.
    /// [`Store::check`] says so.
    ///
    /// # Errors
    /// [`StoreError::NoStore`], [`StoreError::HeadDamaged`],
    /// [`StoreError::OtherFormat`], [`StoreError::Shrank`] and [`StoreError::Moved`]:
    /// nothing was written. [`StoreError::Busy`] for a second manager.
    pub fn open(path: &Path, access: Access) -> Result<Self, StoreError> {
        let manage = access == Access::Manage;
        let lock = if manage { Some(take_lock(path)?) } else { None };
        let device = Device::open(path, manage)?;
        let (head, generation) = table::inspect(&device).map_err(StoreError::media("read"))?;
        let superblock = match head {
            Head::Store(superblock) => *superblock,
            Head::Foreign => return Err(StoreError::NoStore(path.to_owned())),
            Head::Newer(found) => return Err(other_format(found)),
            Head::Damaged(reason) => {
                return Err(StoreError::HeadDamaged {
                    path: path.to_owned(),
                    reason,
                });
            }
        };
        check_place(&superblock, &device)?;
        let table = Table::load(device, superblock, generation)?;
        if manage && table.check().is_ok() {
            table.recover()?;
        }
        Ok(Self {
            path: path.to_owned(),
            table,
            lock,
        })
    }

    /// The first devdax device that holds a store, in the order of their
    /// names. A device whose store cannot be opened for another reason than
    /// that there is none is an answer too.
    ///
    /// # Errors
    /// [`StoreError::Dax`] when the system's devices cannot be listed.
    pub fn find() -> Result<Option<PathBuf>, StoreError> {
        for device in dax::list(Path::new("/sys"), Path::new("/dev"))? {
            match Self::open(&device.path, Access::Read) {
                Err(
                    StoreError::NoStore(_)
                    | StoreError::TooSmall { .. }
                    | StoreError::Align { .. }
                    | StoreError::Open { .. },
                ) => {}
                Ok(_) | Err(_) => return Ok(Some(device.path)),
            }
        }
        Ok(None)
    }

    /// What the store is and how full it is.
    ///
    /// # Errors
    /// [`StoreError::Media`] when it cannot be read.
    pub fn info(&self) -> Result<StoreInfo, StoreError> {
        let superblock = self.table.superblock();
        let (free, generation) = self.table.usage()?;
        let capacity = superblock.capacity.get();
        Ok(StoreInfo {
            uuid: superblock.uuid,
            capacity,
            free,
            granules_total: capacity / GRANULE,
            generation,
            path: self.path.clone(),
            phys_range: superblock.phys(),
        })
    }

    /// Whether anything else used the store's memory since it was made: if
    /// so, no VM in it may be resumed.
    ///
    /// # Errors
    /// [`StoreError::Overrun`], as found when the store was opened.
    pub fn check(&self) -> Result<(), StoreError> {
        self.table.check()
    }

    /// Every segment, and every damaged record, in the order of their slots.
    /// All are damaged where [`Store::check`] fails.
    ///
    /// # Errors
    /// [`StoreError::Media`] when the store cannot be read.
    pub fn segments(&self) -> Result<Vec<SegmentEntry>, StoreError> {
        self.table.segments()
    }

    /// Creates a segment whose every byte reads as zero: an execution-state
    /// area and `memory` of RAM.
    ///
    /// # Errors
    /// [`StoreError::OutOfSpace`], [`StoreError::Fragmented`],
    /// [`StoreError::TableFull`], [`StoreError::Exists`],
    /// [`StoreError::Memory`], [`StoreError::DamagedRecord`],
    /// [`StoreError::Overrun`]; nothing is left behind.
    pub fn create(
        &mut self,
        vm: VmId,
        name: &VmName,
        memory: ByteSize,
    ) -> Result<SegmentSpec, StoreError> {
        self.managing()?;
        self.table.create(vm, name, memory, now_ns())
    }

    /// Whether somebody has the segment mapped: a VMM that runs its VM, or
    /// holds it frozen.
    ///
    /// # Errors
    /// [`StoreError::Media`] when that cannot be told.
    pub fn is_held(&self, spec: &SegmentSpec) -> Result<bool, StoreError> {
        hold::is_held(self.table.media.file.as_fd(), &[spec.exec])
    }

    /// Destroys a segment, zeroes it and frees it; or gives a damaged slot up.
    /// Whoever calls this holds the VM's lock.
    ///
    /// `vm` is whose segment it was when it was listed, `None` for a damaged
    /// record: a slot that was used again since is left alone.
    ///
    /// # Errors
    /// [`StoreError::NoSuchSegment`], [`StoreError::Reused`],
    /// [`StoreError::Overrun`], [`StoreError::Held`] while a VMM has it mapped.
    pub fn drop_segment(&mut self, id: SegmentId, vm: Option<VmId>) -> Result<(), StoreError> {
        self.managing()?;
        self.table.check()?;
        let memory = self.table.memory_of(id, vm)?;
        // A file of its own: what is taken through it is given back with it.
        let file = open_file(&self.path, true)?;
        hold::take(file.as_fd(), id, &memory)?;
        self.table.drop_segment(id, vm)
    }

    /// A descriptor to map a segment from. It does not carry the manager's
    /// lock; but whoever maps through it and whoever else does so are one
    /// holder: a VMM's is opened anew.
    pub fn device_fd(&self) -> BorrowedFd<'_> {
        self.table.media.file.as_fd()
    }

    /// The newest report, if any: opaque text that survives the reload.
    ///
    /// # Errors
    /// [`StoreError::Media`] when the store cannot be read.
    pub fn read_report(&self) -> Result<Option<Vec<u8>>, StoreError> {
        report::read(&self.table.media).map_err(StoreError::media("read"))
    }

    /// Replaces the report, atomically.
    ///
    /// # Errors
    /// [`StoreError::ReportTooLong`], [`StoreError::Overrun`].
    pub fn write_report(&mut self, text: &[u8]) -> Result<(), StoreError> {
        self.managing()?;
        self.check()?;
        if text.len() > REPORT_LEN_MAX {
            return Err(StoreError::ReportTooLong { len: text.len() });
        }
        report::write(&self.table.media, text).map_err(StoreError::media("write"))
    }

    fn managing(&self) -> Result<(), StoreError> {
        self.lock.as_ref().map(|_| ()).ok_or(StoreError::ReadOnly)
    }
}

fn other_format(found: u32) -> StoreError {
    StoreError::OtherFormat {
        found,
        known: SUPERBLOCK.version,
    }
}

/// Refuses to format where a store is or was.
fn refuse_store(device: &Device, path: &Path) -> Result<(), StoreError> {
    let (head, generation) = table::inspect(device).map_err(StoreError::media("read"))?;
    match head {
        // What lies in reserved memory at first is left by whoever used it
        // before; a file was made by somebody.
        Head::Foreign if device.regular && !is_blank(device)? => {
            Err(StoreError::NotBlank(path.to_owned()))
        }
        Head::Foreign => Ok(()),
        Head::Newer(found) => Err(other_format(found)),
        Head::Damaged(reason) => Err(StoreError::HeadDamaged {
            path: path.to_owned(),
            reason,
        }),
        Head::Store(superblock) => {
            let segments = if check_place(&superblock, device).is_ok() {
                Table::new(device, *superblock, generation)
                    .segments()?
                    .len()
            } else {
                0
            };
            Err(StoreError::Formatted {
                path: path.to_owned(),
                segments,
            })
        }
    }
}

/// Whether nothing but zeros lies where the head would.
fn is_blank(device: &Device) -> Result<bool, StoreError> {
    let head = Extent {
        offset: 0,
        len: HEAD_LEN,
    };
    let mut blank = true;
    let read = device.pages(head, &mut |_, page| blank &= page.iter().all(|b| *b == 0));
    read.map_err(StoreError::media("read"))?;
    Ok(blank)
}

/// Whether the device is still the one the store was made on.
fn check_place(superblock: &SuperblockV2, device: &Device) -> Result<(), StoreError> {
    let capacity = superblock.capacity.get();
    if capacity > device.size {
        return Err(StoreError::Shrank {
            capacity: ByteSize(capacity),
            size: ByteSize(device.size),
        });
    }
    match (superblock.phys(), device.phys) {
        (Some((made, _)), Some((found, _))) if made != found => {
            Err(StoreError::Moved { made, found })
        }
        _ => Ok(()),
    }
}

impl<M: Media> Media for &M {
    fn load(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        (**self).load(offset, buf)
    }

    fn store(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        (**self).store(offset, bytes)
    }

    fn scrub(&self, extent: Extent) -> io::Result<()> {
        (**self).scrub(extent)
    }

    fn fence(&self) {
        (**self).fence();
    }

    fn pages(&self, extent: Extent, visit: &mut dyn FnMut(u64, &[u8; PAGE_LEN])) -> io::Result<()> {
        (**self).pages(extent, visit)
    }
}
