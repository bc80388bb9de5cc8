//! Reading a saved VM. The file is untrusted.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use hebe_types::RamRange;
use rustix::fs::{SeekFrom, seek};
use zerocopy::FromBytes;

use crate::format::{
    CHUNK, HEADER_CRC_AT, HeaderV1, MAGIC, PAGE, Plan, RAM_LEN_MAX, RANGES_MAX, RangeV1,
    STATE_LEN_MAX, VERSION, ZERO_PAGE, check_ranges,
};
use crate::{RamViewMut, SnapshotError};

/// What a load read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LoadStats {
    /// Bytes of guest RAM.
    pub ram_bytes: u64,
    /// Bytes of guest RAM that were read; the rest were holes.
    pub ram_bytes_read: u64,
}

/// A saved VM whose header, tables and execution state were checked.
#[derive(Debug)]
pub struct SavedFile {
    path: PathBuf,
    file: File,
    plan: Plan,
    saved_ns: u64,
    state: Vec<u8>,
    ranges: Vec<RamRange>,
    chunk_crcs: Vec<u32>,
}

impl SavedFile {
    /// Opens a saved VM and checks everything but RAM, which is checked while
    /// it is loaded.
    ///
    /// # Errors
    /// One variant of [`SnapshotError`] for each way in which a file can be
    /// unfit.
    pub fn open(path: &Path) -> Result<Self, SnapshotError> {
        let io = |source| SnapshotError::Io {
            what: "read",
            path: path.to_owned(),
            source,
        };
        let damaged = |what: &str| SnapshotError::Damaged {
            path: path.to_owned(),
            what: what.into(),
        };
        let file = File::open(path).map_err(io)?;
        let len = file.metadata().map_err(io)?.len();
        let header = read_header(&file, path, len)?;
        let (state_len, ram_len) = (header.state_len.get(), header.ram_len.get());
        let ranges_len = header.ranges.get() as usize;
        if state_len > STATE_LEN_MAX || ram_len > RAM_LEN_MAX || ranges_len > RANGES_MAX {
            return Err(damaged("impossible lengths in its header"));
        }
        let plan = Plan::new(ranges_len, state_len, ram_len);
        let expected = header.file_len.get();
        if plan.file_len != expected {
            return Err(damaged("contradicting lengths in its header"));
        }
        if len != expected {
            return Err(SnapshotError::Length {
                path: path.to_owned(),
                len,
                expected,
            });
        }
        let mut tables = vec![0; plan.tables_len as usize];
        file.read_exact_at(&mut tables, plan.tables_at)
            .map_err(io)?;
        if crc32fast::hash(&tables) != header.tables_crc.get() {
            return Err(damaged("its tables"));
        }
        let (ranges, chunk_crcs) = split_tables(&tables, ranges_len);
        match check_ranges(&ranges) {
            Ok(total) if total == ram_len => {}
            Ok(_) => return Err(damaged("its ranges of RAM")),
            Err(why) => return Err(damaged(&why)),
        }
        let mut state = vec![0; state_len as usize];
        file.read_exact_at(&mut state, plan.state_at).map_err(io)?;
        if crc32fast::hash(&state) != header.state_crc.get() {
            return Err(damaged("its execution state"));
        }
        Ok(Self {
            path: path.to_owned(),
            file,
            plan,
            saved_ns: header.saved_ns.get(),
            state,
            ranges,
            chunk_crcs,
        })
    }

    /// The execution state, checksum verified. What is in it is the reader's
    /// to check.
    pub fn state(&self) -> &[u8] {
        &self.state
    }

    /// Guest RAM in the file, in ascending guest-physical order.
    pub fn ram_ranges(&self) -> &[RamRange] {
        &self.ranges
    }

    /// When it was saved: nanoseconds since 1970.
    pub fn saved_ns(&self) -> u64 {
        self.saved_ns
    }

    /// Reads RAM into `ram`, which must be the same ranges and read as zero,
    /// and verifies every checksum.
    ///
    /// # Errors
    /// [`SnapshotError::OtherRam`], with nothing written;
    /// [`SnapshotError::Damaged`] and [`SnapshotError::Io`], after which `ram`
    /// holds nothing of use.
    pub fn load_into(&self, ram: &mut [RamViewMut<'_>]) -> Result<LoadStats, SnapshotError> {
        self.check_target(ram)?;
        let mut stats = LoadStats::default();
        let mut at = self.plan.ram_at;
        let mut crcs = self.chunk_crcs.iter();
        let mut extents = Extents::new(&self.file, self.plan.file_len);
        for view in ram {
            let mut gpa = view.gpa.0;
            for chunk in view.bytes.chunks_mut(CHUNK as usize) {
                let read = self.check_chunk(&mut extents, at, chunk, gpa, crcs.next())?;
                stats.ram_bytes_read += read;
                stats.ram_bytes += chunk.len() as u64;
                at += chunk.len() as u64;
                gpa += chunk.len() as u64;
            }
        }
        Ok(stats)
    }

    /// Reads all of RAM and verifies every checksum, and keeps nothing: before
    /// something that the file is to replace is given up. The rest was checked
    /// when the file was opened.
    ///
    /// # Errors
    /// [`SnapshotError::Damaged`] and [`SnapshotError::Io`].
    pub fn verify(&self) -> Result<(), SnapshotError> {
        let mut buffer = vec![0u8; CHUNK as usize];
        let mut at = self.plan.ram_at;
        let mut crcs = self.chunk_crcs.iter();
        let mut extents = Extents::new(&self.file, self.plan.file_len);
        for range in &self.ranges {
            let mut done = 0;
            while done < range.len {
                let len = CHUNK.min(range.len - done);
                let chunk = &mut buffer[..len as usize];
                let gpa = range.gpa.0 + done;
                self.check_chunk(&mut extents, at, chunk, gpa, crcs.next())?;
                at += len;
                done += len;
            }
        }
        Ok(())
    }

    /// Reads one chunk, checks it, and says how much of it was no hole.
    fn check_chunk(
        &self,
        extents: &mut Extents<'_>,
        at: u64,
        chunk: &mut [u8],
        gpa: u64,
        expected: Option<&u32>,
    ) -> Result<u64, SnapshotError> {
        let (crc, read) =
            read_chunk(&self.file, extents, at, chunk).map_err(|source| SnapshotError::Io {
                what: "read",
                path: self.path.clone(),
                source,
            })?;
        if expected != Some(&crc) {
            return Err(SnapshotError::Damaged {
                path: self.path.clone(),
                what: format!("RAM at guest address {gpa:#x}"),
            });
        }
        Ok(read)
    }

    fn check_target(&self, ram: &[RamViewMut<'_>]) -> Result<(), SnapshotError> {
        let other = |gpa| {
            Err(SnapshotError::OtherRam {
                path: self.path.clone(),
                gpa,
            })
        };
        for (range, view) in self.ranges.iter().zip(ram) {
            if range.gpa != view.gpa || range.len != view.bytes.len() as u64 {
                return other(range.gpa);
            }
        }
        match (self.ranges.get(ram.len()), ram.get(self.ranges.len())) {
            (Some(range), _) => other(range.gpa),
            (_, Some(view)) => other(view.gpa),
            _ => Ok(()),
        }
    }
}

fn read_header(file: &File, path: &Path, len: u64) -> Result<HeaderV1, SnapshotError> {
    let mut bytes = [0u8; size_of::<HeaderV1>()];
    if len < PAGE {
        return Err(SnapshotError::Foreign(path.to_owned()));
    }
    file.read_exact_at(&mut bytes, 0)
        .map_err(|source| SnapshotError::Io {
            what: "read",
            path: path.to_owned(),
            source,
        })?;
    if bytes == [0; size_of::<HeaderV1>()] {
        return Err(SnapshotError::Incomplete(path.to_owned()));
    }
    let damaged = || SnapshotError::Damaged {
        path: path.to_owned(),
        what: "its header".into(),
    };
    let header = HeaderV1::read_from_bytes(&bytes).map_err(|_| damaged())?;
    if header.magic != MAGIC {
        return Err(SnapshotError::Foreign(path.to_owned()));
    }
    // A newer header may be longer, so its version comes before its checksum.
    if header.version.get() > VERSION {
        return Err(SnapshotError::Newer {
            path: path.to_owned(),
            found: header.version.get(),
            known: VERSION,
        });
    }
    if crc32fast::hash(&bytes[..HEADER_CRC_AT]) != header.header_crc.get() {
        return Err(damaged());
    }
    if header.version.get() != VERSION || header.complete.get() != 1 {
        return Err(SnapshotError::Incomplete(path.to_owned()));
    }
    Ok(header)
}

/// The tables' two parts; the caller sized the bytes.
fn split_tables(tables: &[u8], ranges_len: usize) -> (Vec<RamRange>, Vec<u32>) {
    let (ranges, crcs) = tables.split_at(ranges_len * size_of::<RangeV1>());
    let ranges = ranges
        .chunks_exact(size_of::<RangeV1>())
        .filter_map(|bytes| RangeV1::read_from_bytes(bytes).ok())
        .map(|range| RamRange::from(&range))
        .collect();
    let crcs = crcs.as_chunks::<4>().0;
    (
        ranges,
        crcs.iter().map(|b| u32::from_le_bytes(*b)).collect(),
    )
}

/// Reads what of a chunk is data, and checksums all of it. Holes are not
/// touched in memory: they would take up pages.
fn read_chunk(
    file: &File,
    extents: &mut Extents<'_>,
    at: u64,
    chunk: &mut [u8],
) -> io::Result<(u32, u64)> {
    let mut hasher = crc32fast::Hasher::new();
    let mut done = 0;
    let mut read = 0;
    while done < chunk.len() {
        let data = extents.next_data(at + done as u64)?;
        let left = (chunk.len() - done) as u64;
        let start = data.start.saturating_sub(at + done as u64).min(left) as usize;
        for hole in chunk[done..done + start].chunks(PAGE as usize) {
            hasher.update(&ZERO_PAGE[..hole.len()]);
        }
        done += start;
        let end = data.end.saturating_sub(at).min(chunk.len() as u64) as usize;
        if end > done {
            let piece = &mut chunk[done..end];
            file.read_exact_at(piece, at + done as u64)?;
            hasher.update(piece);
            read += piece.len() as u64;
            done = end;
        }
    }
    Ok((hasher.finalize(), read))
}

/// The parts of a file that are not holes, in ascending order.
struct Extents<'a> {
    file: &'a File,
    len: u64,
    current: Range<u64>,
}

impl<'a> Extents<'a> {
    fn new(file: &'a File, len: u64) -> Self {
        Self {
            file,
            len,
            current: 0..0,
        }
    }

    /// The first stretch of data that ends behind `at`; empty, at the end of
    /// the file, if there is none.
    fn next_data(&mut self, at: u64) -> io::Result<Range<u64>> {
        if self.current.end > at {
            return Ok(self.current.clone());
        }
        let end_of_file = self.len..self.len;
        let start = match seek(self.file, SeekFrom::Data(at)) {
            Ok(start) => start,
            Err(rustix::io::Errno::NXIO) => {
                self.current = end_of_file;
                return Ok(self.current.clone());
            }
            // No holes on this file system.
            Err(rustix::io::Errno::INVAL) => {
                self.current = 0..self.len;
                return Ok(self.current.clone());
            }
            Err(e) => return Err(e.into()),
        };
        let end = seek(self.file, SeekFrom::Hole(start))?;
        if end <= at {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.current = start..end.min(self.len);
        Ok(self.current.clone())
    }
}
