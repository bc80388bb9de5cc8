//! Writing a saved VM.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use hebe_types::{ByteSize, RamRange};
use rustix::fs::{Advice, fadvise};
use zerocopy::IntoBytes;
use zerocopy::little_endian::{U32, U64};

use crate::format::{
    CHUNK, HEADER_CRC_AT, HeaderV1, MAGIC, PAGE, Plan, RangeV1, STATE_LEN_MAX, VERSION, ZERO_PAGE,
    check_ranges, zero_chunk_crc,
};
use crate::{RamView, SnapshotError};

/// What a save wrote.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SaveStats {
    /// Bytes of guest RAM.
    pub ram_bytes: u64,
    /// Bytes of guest RAM that were not pages of zeros, and were written.
    pub ram_bytes_written: u64,
    /// All bytes written.
    pub bytes_written: u64,
}

/// Where a save goes: a file, or a test's idea of one.
pub(crate) trait Sink {
    fn set_len(&mut self, len: u64) -> io::Result<()>;
    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()>;
    /// Everything written so far is on disk.
    fn sync(&mut self) -> io::Result<()>;
}

impl Sink for File {
    fn set_len(&mut self, len: u64) -> io::Result<()> {
        File::set_len(self, len)
    }

    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.write_all_at(bytes, offset)
    }

    fn sync(&mut self) -> io::Result<()> {
        self.sync_all()
    }
}

/// Saves a VM that stands still into `path`, replacing what is there only when
/// the new file is complete and on disk.
///
/// # Errors
/// [`SnapshotError::NoSpace`] and [`SnapshotError::Io`]; nothing is left
/// behind, and an older file at `path` is untouched.
pub fn save(path: &Path, state: &[u8], ram: &[RamView<'_>]) -> Result<SaveStats, SnapshotError> {
    save_with(path, state, ram, |file| file)
}

/// Saves a VM that stands still into `file`, which somebody else opened, and
/// names and commits once this returns: a VMM in its cage opens none. `name`
/// is what messages call it. Until everything is on disk its header is zero.
///
/// # Errors
/// [`SnapshotError::NoSpace`] and [`SnapshotError::Io`]; the file then has no
/// contents, and counts for nothing.
pub fn save_into(
    file: &File,
    name: &Path,
    state: &[u8],
    ram: &[RamView<'_>],
) -> Result<SaveStats, SnapshotError> {
    let fail = |source| failure("write", name, file_len(state, ram), source);
    let copy = file.try_clone().map_err(fail)?;
    save_into_with(file, name, state, ram, copy)
}

/// As [`save_into`], with the file behind another sink.
pub(crate) fn save_into_with(
    file: &File,
    name: &Path,
    state: &[u8],
    ram: &[RamView<'_>],
    mut sink: impl Sink,
) -> Result<SaveStats, SnapshotError> {
    let (ranges, plan) = plan(state, ram)?;
    // What an earlier attempt may have left is none of this one's.
    let written = file
        .set_len(0)
        .and_then(|()| write_all(&mut sink, &plan, &ranges, state, ram));
    match written {
        Ok(stats) => {
            // A restore must read the disk, as it would after a reboot.
            let _ = fadvise(file, 0, None, Advice::DontNeed);
            Ok(stats)
        }
        Err(source) => {
            let _ = file.set_len(0);
            Err(failure("write", name, plan.file_len, source))
        }
    }
}

fn file_len(state: &[u8], ram: &[RamView<'_>]) -> u64 {
    plan(state, ram).map_or(0, |(_, plan)| plan.file_len)
}

/// Where everything goes, if the format has room for it.
fn plan(state: &[u8], ram: &[RamView<'_>]) -> Result<(Vec<RamRange>, Plan), SnapshotError> {
    let ranges: Vec<RamRange> = ram.iter().map(range_of).collect();
    let ram_len = check_ranges(&ranges).map_err(SnapshotError::Unsupported)?;
    if state.len() as u64 > STATE_LEN_MAX {
        return Err(SnapshotError::Unsupported(
            "its execution state is too long".into(),
        ));
    }
    let plan = Plan::new(ranges.len(), state.len() as u64, ram_len);
    Ok((ranges, plan))
}

/// As [`save`], with the file behind another sink.
pub(crate) fn save_with<S: Sink>(
    path: &Path,
    state: &[u8],
    ram: &[RamView<'_>],
    sink: impl FnOnce(File) -> S,
) -> Result<SaveStats, SnapshotError> {
    let (ranges, plan) = plan(state, ram)?;
    let partial = partial_name(path);
    let fail = |what| {
        let partial = partial.clone();
        move |source: io::Error| failure(what, &partial, plan.file_len, source)
    };
    let written = create(&partial).map_err(fail("create")).and_then(|file| {
        let copy = file.try_clone().map_err(fail("create"))?;
        let stats =
            write_all(&mut sink(file), &plan, &ranges, state, ram).map_err(fail("write"))?;
        fs::rename(&partial, path).map_err(fail("rename"))?;
        Ok((stats, copy))
    });
    match written {
        Ok((stats, file)) => {
            sync_directory(path)?;
            // A restore must read the disk, as it would after a reboot.
            let _ = fadvise(&file, 0, None, Advice::DontNeed);
            Ok(stats)
        }
        Err(e) => {
            let _ = fs::remove_file(&partial);
            Err(e)
        }
    }
}

fn range_of(view: &RamView<'_>) -> RamRange {
    RamRange {
        gpa: view.gpa,
        len: view.bytes.len() as u64,
    }
}

/// `NAME.partial`, beside `NAME`.
pub(crate) fn partial_name(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".partial");
    name.into()
}

fn create(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(true);
    options.open(path)
}

fn failure(what: &'static str, path: &Path, needed: u64, source: io::Error) -> SnapshotError {
    match source.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => SnapshotError::NoSpace {
            path: path.to_owned(),
            needed: ByteSize(needed),
        },
        _ => SnapshotError::Io {
            what,
            path: path.to_owned(),
            source,
        },
    }
}

fn sync_directory(path: &Path) -> Result<(), SnapshotError> {
    let parent = match path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir,
        _ => Path::new("."),
    };
    let synced = File::open(parent).and_then(|dir| dir.sync_all());
    synced.map_err(|source| SnapshotError::Io {
        what: "sync the directory of",
        path: path.to_owned(),
        source,
    })
}

/// Everything but the header, sync, header, sync.
pub(crate) fn write_all(
    sink: &mut impl Sink,
    plan: &Plan,
    ranges: &[RamRange],
    state: &[u8],
    ram: &[RamView<'_>],
) -> io::Result<SaveStats> {
    sink.set_len(plan.file_len)?;
    let mut stats = SaveStats::default();
    let mut tables = Vec::new();
    for range in ranges {
        tables.extend_from_slice(RangeV1::from(range).as_bytes());
    }
    let mut at = plan.ram_at;
    let zero_crc = zero_chunk_crc();
    for view in ram {
        for (index, chunk) in view.bytes.chunks(CHUNK as usize).enumerate() {
            let before = stats.ram_bytes_written;
            let start = index * CHUNK as usize;
            let runs = view.runs(start..start + chunk.len());
            for run in &runs {
                let at = at + run.start as u64;
                write_pages(sink, at, &chunk[run.clone()], &mut stats)?;
            }
            let crc = if stats.ram_bytes_written == before {
                zero_crc
            } else {
                hash(chunk, &runs)
            };
            tables.extend_from_slice(&crc.to_le_bytes());
            at += chunk.len() as u64;
        }
        stats.ram_bytes += view.bytes.len() as u64;
    }
    sink.write_at(plan.tables_at, &tables)?;
    sink.write_at(plan.state_at, state)?;
    sink.sync()?;
    let mut header = HeaderV1 {
        magic: MAGIC,
        version: U32::new(VERSION),
        complete: U32::new(1),
        file_len: U64::new(plan.file_len),
        saved_ns: U64::new(now_ns()),
        state_len: U64::new(state.len() as u64),
        ram_len: U64::new(stats.ram_bytes),
        ranges: U32::new(ranges.len() as u32),
        tables_crc: U32::new(crc32fast::hash(&tables)),
        state_crc: U32::new(crc32fast::hash(state)),
        header_crc: U32::ZERO,
    };
    header.header_crc = U32::new(crc32fast::hash(&header.as_bytes()[..HEADER_CRC_AT]));
    sink.write_at(0, header.as_bytes())?;
    sink.sync()?;
    let rest = tables.len() + state.len() + header.as_bytes().len();
    stats.bytes_written = stats.ram_bytes_written + rest as u64;
    Ok(stats)
}

fn now_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |d| d.as_nanos() as u64)
}

/// The checksum of a chunk that is zeros but for these runs.
fn hash(chunk: &[u8], runs: &[Range<usize>]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    let mut done = 0;
    let zeros = |hasher: &mut crc32fast::Hasher, len: usize| {
        (0..len / ZERO_PAGE.len()).for_each(|_| hasher.update(&ZERO_PAGE));
    };
    for run in runs {
        zeros(&mut hasher, run.start - done);
        hasher.update(&chunk[run.clone()]);
        done = run.end;
    }
    zeros(&mut hasher, chunk.len() - done);
    hasher.finalize()
}

/// Writes the pages of a chunk that are not all zeros, run by run.
fn write_pages(
    sink: &mut impl Sink,
    at: u64,
    chunk: &[u8],
    stats: &mut SaveStats,
) -> io::Result<()> {
    let page = PAGE as usize;
    let mut run = None;
    for offset in (0..=chunk.len()).step_by(page) {
        let used = offset < chunk.len() && chunk[offset..offset + page] != ZERO_PAGE;
        match (used, run) {
            (true, None) => run = Some(offset),
            (false, Some(start)) => {
                sink.write_at(at + start as u64, &chunk[start..offset])?;
                stats.ram_bytes_written += (offset - start) as u64;
                run = None;
            }
            _ => {}
        }
    }
    Ok(())
}
