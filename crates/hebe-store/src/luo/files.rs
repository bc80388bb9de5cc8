//! The files of one segment.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use hebe_types::{ByteSize, Extent, GRANULE, VmId, VmName};
use rustix::fs::fstat;
use rustix::rand::{GetRandomFlags, getrandom};

use super::file;
use super::plan::{PartUse, part_len, part_lens};
use crate::StoreError;
use crate::exec::{ExecArea, ExecStatus};
use crate::mapping::Mapping;
use crate::segment::{file_len, memfd_spec};
use crate::spec::SegmentSpec;

/// A segment in files of its own: the execution-state area, then RAM in parts.
/// Whoever has one keeps the memory; [`crate::Segment::map_files`] maps it.
#[derive(Debug)]
pub struct SegmentFiles {
    spec: SegmentSpec,
    exec: OwnedFd,
    parts: Vec<OwnedFd>,
    part_len: u64,
}

impl SegmentFiles {
    /// Makes a segment of zeros. Nothing is allocated but the execution-state
    /// area's guard.
    ///
    /// # Errors
    /// [`StoreError::Memory`] for RAM of zero or not a multiple of 2 MiB.
    pub fn create(vm: VmId, name: &VmName, memory: ByteSize) -> Result<Self, StoreError> {
        if memory.bytes() == 0 || !memory.bytes().is_multiple_of(GRANULE) {
            return Err(StoreError::Memory(memory));
        }
        let mut spec = memfd_spec(vm, name, memory);
        getrandom(&mut spec.store_uuid, GetRandomFlags::empty())
            .map_err(|e| StoreError::media("draw an id for")(e.into()))?;
        spec.check()?;
        let exec = file::make(&format!("hebe-{name}-exec"), GRANULE)?;
        let len = part_len(memory);
        let parts = part_lens(memory, len)
            .enumerate()
            .map(|(index, len)| make_part(name, index, len))
            .collect::<Result<_, _>>()?;
        let files = Self {
            spec,
            exec,
            parts,
            part_len: len,
        };
        let area = files.area()?;
        area.prepare().map_err(StoreError::media("write"))?;
        Ok(files)
    }

    /// The files as another process handed them over, in the order of
    /// [`SegmentFiles::fds`].
    ///
    /// # Errors
    /// [`StoreError::BadSpec`] when they are not those of such a segment.
    pub fn from_fds(spec: SegmentSpec, mut fds: Vec<OwnedFd>) -> Result<Self, StoreError> {
        let refuse = |why: &str| Err(StoreError::BadSpec(why.to_owned()));
        if fds.len() < 2 {
            return refuse("it has too few files");
        }
        let parts = fds.split_off(1);
        let Some(exec) = fds.pop() else {
            return refuse("it has too few files");
        };
        let part_len = file_len(parts[0].as_fd())?;
        let files = Self {
            spec,
            exec,
            parts,
            part_len,
        };
        files.check()?;
        Ok(files)
    }

    /// Puts together what arrived from the kernel before. `parts` are as long as
    /// `part_len`, the last may be shorter.
    pub(super) fn arrived(
        spec: SegmentSpec,
        exec: OwnedFd,
        parts: Vec<OwnedFd>,
        part_len: u64,
    ) -> Result<Self, StoreError> {
        let files = Self {
            spec,
            exec,
            parts,
            part_len,
        };
        files.check()?;
        Ok(files)
    }

    /// Whether spec and files fit: RAM behind the execution-state area, without
    /// gaps, and every file as long as it must be.
    fn check(&self) -> Result<(), StoreError> {
        self.spec.check()?;
        check_places(&self.spec)?;
        let refuse = |why: &str| Err(StoreError::BadSpec(why.to_owned()));
        if file_len(self.exec.as_fd())? != GRANULE {
            return refuse("its execution-state area has another length");
        }
        if !self.part_len.is_multiple_of(GRANULE) || self.part_len == 0 {
            return refuse("its parts are not made of 2MiB granules");
        }
        let mut parts = self.parts.iter();
        for len in part_lens(self.spec.memory(), self.part_len) {
            match parts.next() {
                Some(fd) if file_len(fd.as_fd())? == len => {}
                Some(_) => return refuse("a part of its RAM has another length"),
                None => return refuse("parts of its RAM are missing"),
            }
        }
        match parts.next() {
            Some(_) => refuse("it has more files than RAM"),
            None => Ok(()),
        }
    }

    /// Whose it is, and where guest RAM lies in the files taken together.
    pub fn spec(&self) -> &SegmentSpec {
        &self.spec
    }

    /// Length of each part but the last, in bytes.
    pub fn part_len(&self) -> u64 {
        self.part_len
    }

    /// The execution-state area's file.
    pub(super) fn exec(&self) -> BorrowedFd<'_> {
        self.exec.as_fd()
    }

    /// The parts of RAM.
    pub(super) fn parts(&self) -> &[OwnedFd] {
        &self.parts
    }

    /// All files, the execution-state area first.
    pub fn fds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        std::iter::once(&self.exec)
            .chain(&self.parts)
            .map(AsFd::as_fd)
    }

    /// The files themselves, for [`crate::Segment::map_files`] or a VMM.
    pub fn into_fds(self) -> Vec<OwnedFd> {
        let mut fds = vec![self.exec];
        fds.extend(self.parts);
        fds
    }

    /// How much of each part has memory. Looks at no byte of it, and may be
    /// asked while the VM runs.
    ///
    /// # Errors
    /// [`StoreError::Media`].
    pub fn measure(&self) -> Result<Vec<PartUse>, StoreError> {
        let lens = part_lens(self.spec.memory(), self.part_len);
        let parts = lens.zip(&self.parts);
        parts
            .map(|(len, fd)| {
                let allocated = allocated(fd.as_fd())?.min(len);
                Ok(PartUse { len, allocated })
            })
            .collect()
    }

    /// What the execution-state area says.
    ///
    /// # Errors
    /// [`StoreError::Media`] when it cannot be mapped.
    pub fn status(&self) -> Result<ExecStatus, StoreError> {
        Ok(self.area()?.status())
    }

    /// Whether somebody has it mapped: a VMM that runs its VM, or holds it frozen.
    ///
    /// # Errors
    /// [`StoreError::Media`].
    pub fn is_held(&self) -> Result<bool, StoreError> {
        let whole = Extent {
            offset: 0,
            len: GRANULE,
        };
        crate::hold::is_held(self.exec(), &[whole])
    }

    fn area(&self) -> Result<ExecArea, StoreError> {
        let whole = Extent {
            offset: 0,
            len: GRANULE,
        };
        let mapping = Mapping::of(self.exec(), whole, true).map_err(StoreError::media("map"))?;
        Ok(ExecArea::new(mapping, &self.spec))
    }
}

/// An empty part of RAM.
pub(super) fn make_part(name: &VmName, index: usize, len: u64) -> Result<OwnedFd, StoreError> {
    file::make(&format!("hebe-{name}-ram{index}"), len)
}

/// Bytes of a file that have memory, swapped-out ones counted.
pub(crate) fn allocated(fd: BorrowedFd<'_>) -> Result<u64, StoreError> {
    const BLOCK: u64 = 512;
    let stat = fstat(fd).map_err(|e| StoreError::media("look at")(e.into()))?;
    Ok(u64::try_from(stat.st_blocks).unwrap_or(0) * BLOCK)
}

/// Whether the execution-state area comes first and RAM right behind it.
pub(super) fn check_places(spec: &SegmentSpec) -> Result<(), StoreError> {
    let canonical = memfd_spec(spec.vm, &spec.name, spec.memory());
    if spec.exec == canonical.exec && spec.ram == canonical.ram {
        return Ok(());
    }
    Err(StoreError::BadSpec(
        "its RAM does not lie in its files one part behind the other".into(),
    ))
}
