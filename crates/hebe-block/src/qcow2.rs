//! qcow2 images, by the crate `imago`; all that knows its interface is here.
//!
//! An image is untrusted, and so is what it says of other files: nothing that
//! it names is ever opened. A backing file is one that the definition names,
//! and it is opened here, before the VMM's cage is entered; an external data
//! file is refused.
//!
//! What the image's tables claim is checked before `imago` takes memory for
//! them, with the bounds that QEMU has.

use std::collections::BTreeSet;
use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;

use imago::io_buffers::{IoVector, IoVectorMut};
use imago::qcow2::Qcow2;
use imago::raw::Raw;
use imago::storage::drivers::CommonStorageHelper;
use imago::{
    DenyImplicitOpenGate, FormatAccess, FormatCreateBuilder, FormatDriverBuilder, Storage,
};

const MAGIC: &[u8; 4] = b"QFI\xfb";
/// Largest tables, in bytes: QEMU's `QCOW_MAX_L1_SIZE` and
/// `QCOW_MAX_REFTABLE_SIZE`.
const L1_MAX: u64 = 32 << 20;
const REFTABLE_MAX: u64 = 8 << 20;

const COUNTS: &str = "what it counts its clusters by does not lie in it, each in its place; `qemu-img check -r all` may mend it";

/// Why an image cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ImageTrouble {
    /// Not qcow2.
    #[error("it is no qcow2 image: say format = \"raw\" if it is a raw disk")]
    NotQcow2,
    /// Its header makes no sense.
    #[error("it is damaged: {0}")]
    Damaged(&'static str),
    /// It needs a file that the definition does not name.
    #[error(
        "it wants a backing file that it calls '{0}'; what an image names is never opened: name the file with backing = [\"PATH\"] if it may be read"
    )]
    BackingUnnamed(String),
    /// The definition names a file that it does not need.
    #[error("it has no backing file: leave backing = out")]
    NoBacking,
    /// It does not say what its backing file is.
    #[error(
        "it does not say whether its backing file is raw or qcow2: write that into it with `qemu-img rebase -u -F FORMAT -b FILE`"
    )]
    BackingFormat,
    /// Its data lie in another file.
    #[error(
        "its data lie in an external file, which Hebe does not read: convert it with `qemu-img convert`"
    )]
    DataFile,
    /// `imago` refuses.
    #[error("it cannot be used ({0})")]
    Refused(io::Error),
}

/// What an image needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Needs {
    /// What it calls its backing file, and that file's format.
    pub(crate) backing: Option<(String, Option<String>)>,
    /// Bytes of the disk in it.
    pub(crate) size: u64,
}

/// Reads an image's header, which is all of it that is looked at before its
/// tables are.
pub(crate) fn needs(file: &File) -> Result<Needs, ImageTrouble> {
    use ImageTrouble::{Damaged, NotQcow2};
    let mut head = [0; 112];
    let len = file.metadata().map_err(ImageTrouble::Refused)?.len();
    let have = head.len().min(usize::try_from(len).unwrap_or(usize::MAX));
    file.read_exact_at(&mut head[..have], 0)
        .map_err(ImageTrouble::Refused)?;
    if have < 72 || &head[..4] != MAGIC {
        return Err(NotQcow2);
    }
    let be32 = |at: usize| u32::from_be_bytes([0, 1, 2, 3].map(|i| head[at + i]));
    let be64 = |at: usize| u64::from(be32(at)) << 32 | u64::from(be32(at + 4));
    let (version, cluster_bits, size) = (be32(4), be32(20), be64(24));
    if !(9..=21).contains(&cluster_bits) || !matches!(version, 2 | 3) {
        return Err(Damaged("its version or its clusters are none that exist"));
    }
    let cluster = 1u64 << cluster_bits;
    let within = |at: u64, len: u64| at.checked_add(len).is_some_and(|end| end <= file_end(file));
    let l1 = u64::from(be32(36)) * 8;
    if l1 > L1_MAX || !within(be64(40), l1) {
        return Err(Damaged("its first table does not lie in it"));
    }
    let reftable = u64::from(be32(56)).saturating_mul(cluster);
    if reftable > REFTABLE_MAX || !within(be64(48), reftable) {
        return Err(Damaged("its table of counts does not lie in it"));
    }
    let clusters = size.div_ceil(cluster);
    if clusters.div_ceil(cluster / 8) > l1 / 8 {
        return Err(Damaged("its first table is too short for its size"));
    }
    if size == 0 || !size.is_multiple_of(512) {
        return Err(Damaged("its size is no number of sectors"));
    }
    if be32(32) != 0 {
        return Err(Damaged("it is encrypted, which is not supported"));
    }
    if version == 3 && be64(72) & 4 != 0 {
        return Err(ImageTrouble::DataFile);
    }
    let backing = name(file, be64(8), u64::from(be32(16)), cluster)?;
    let format = match backing {
        Some(_) if version == 3 => extension(file, u64::from(be32(100)), cluster)?,
        _ => None,
    };
    Ok(Needs {
        backing: backing.map(|name| (name, format)),
        size,
    })
}

/// Checks what an image that is written to counts its clusters by. Where the
/// first block of counts is missing, `imago` puts a new one over the header; and
/// where blocks lie on each other, it takes clusters that are in use for free.
fn check_counts(file: &File) -> Result<(), ImageTrouble> {
    let damaged = |()| ImageTrouble::Damaged(COUNTS);
    let read = |data: &mut [u8], at| file.read_exact_at(data, at).map_err(|_| damaged(()));
    let mut head = [0; 104];
    read(&mut head[..72], 0)?;
    let be32 = |head: &[u8], at: usize| u32::from_be_bytes([0, 1, 2, 3].map(|i| head[at + i]));
    let order = match be32(&head, 4) {
        2 => 4,
        _ => {
            read(&mut head, 0)?;
            be32(&head, 96)
        }
    };
    let cluster_bits = be32(&head, 20);
    // `needs` knows that the clusters and where the table lies are possible.
    let cluster = 1u64 << cluster_bits;
    let table_at = u64::from(be32(&head, 48)) << 32 | u64::from(be32(&head, 52));
    let table_len = u64::from(be32(&head, 56)) << cluster_bits;
    if order > 6 || !table_at.is_multiple_of(cluster) || table_at == 0 || table_len == 0 {
        return Err(damaged(()));
    }
    let end = file_end(file);
    // A block has `cluster * 8 >> order` counts.
    let blocks = end.div_ceil(cluster).div_ceil((cluster * 8) >> order);
    let mut entries = vec![0; usize::try_from((blocks * 8).min(table_len)).unwrap_or(0)];
    read(&mut entries, table_at)?;
    let mut seen = BTreeSet::new();
    for (index, entry) in entries.as_chunks::<8>().0.iter().enumerate() {
        let at = u64::from_be_bytes(*entry) & !0x1ff;
        if at == 0 && index > 0 {
            continue;
        }
        let in_table = (table_at..table_at + table_len).contains(&at);
        let fits = at.checked_add(cluster).is_some_and(|last| last <= end);
        if at == 0 || !at.is_multiple_of(cluster) || !fits || in_table || !seen.insert(at) {
            return Err(damaged(()));
        }
    }
    Ok(())
}

fn file_end(file: &File) -> u64 {
    file.metadata().map_or(0, |m| m.len())
}

fn name(file: &File, at: u64, len: u64, cluster: u64) -> Result<Option<String>, ImageTrouble> {
    if at == 0 {
        return Ok(None);
    }
    let damaged = ImageTrouble::Damaged("the name of its backing file does not lie in its header");
    let end = at.checked_add(len).filter(|end| *end < cluster);
    if len == 0 || len > 1023 || end.is_none() {
        return Err(damaged);
    }
    let mut name = vec![0; len as usize];
    file.read_exact_at(&mut name, at).map_err(|_| damaged)?;
    Ok(Some(printable(&name)))
}

/// The format of the backing file, an extension of the header (type
/// `0xe2792aca`).
fn extension(file: &File, from: u64, cluster: u64) -> Result<Option<String>, ImageTrouble> {
    let mut at = from;
    while at + 8 <= cluster {
        let mut head = [0; 8];
        if file.read_exact_at(&mut head, at).is_err() {
            break;
        }
        let [a, b, c, d, e, f, g, h] = head;
        let (kind, len) = (
            u32::from_be_bytes([a, b, c, d]),
            u64::from(u32::from_be_bytes([e, f, g, h])),
        );
        match kind {
            0 => break,
            0xe279_2aca if len <= 16 => {
                let mut format = vec![0; len as usize];
                let read = file.read_exact_at(&mut format, at + 8);
                read.map_err(ImageTrouble::Refused)?;
                return Ok(Some(printable(&format)));
            }
            _ => at += 8 + len.next_multiple_of(8),
        }
    }
    Ok(None)
}

fn printable(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let shown = text.chars().take(200);
    shown
        .map(|c| if c.is_control() { '?' } else { c })
        .collect()
}

/// Makes an empty image in `file`, with a file of that name and format behind
/// it.
pub(crate) fn create(
    file: File,
    path: PathBuf,
    size: u64,
    name: &str,
    format: &str,
) -> io::Result<()> {
    guarded(|| {
        Qcow2::<Part>::create_builder(Part::new(file, path, true))
            .size(size)
            .backing(name.to_owned(), format.to_owned())
            .create()
    })
}

/// A disk inside an image, and what is behind it.
pub(crate) struct Image {
    access: FormatAccess<Part>,
}

impl fmt::Debug for Image {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Image").finish_non_exhaustive()
    }
}

/// A file of the chain.
pub(crate) struct Link {
    pub(crate) file: File,
    pub(crate) path: PathBuf,
    /// A raw disk, and not an image.
    pub(crate) raw: bool,
}

impl Image {
    /// Puts a chain together, the disk itself first, then what is behind it.
    /// Every file is open and locked; all but the first are read alone.
    pub(crate) fn open(links: Vec<Link>, readonly: bool) -> Result<Self, ImageTrouble> {
        if let Some(top) = links.first().filter(|top| !readonly && !top.raw) {
            check_counts(&top.file)?;
        }
        guarded(|| {
            let mut below: Option<FormatAccess<Part>> = None;
            let last = links.len();
            for (depth, link) in (1..=last).rev().zip(links.into_iter().rev()) {
                let write = depth == 1 && !readonly;
                let part = Part::new(link.file, link.path, write);
                let layer = if link.raw {
                    FormatAccess::new(
                        Raw::builder(part)
                            .write(write)
                            .open(DenyImplicitOpenGate::default())?,
                    )
                } else {
                    let builder = Qcow2::<Part>::builder(part)
                        .write(write)
                        .data_file(None)
                        .backing(below.take());
                    FormatAccess::new(builder.open(DenyImplicitOpenGate::default())?)
                };
                below = Some(layer);
            }
            below.ok_or_else(|| io::ErrorKind::InvalidInput.into())
        })
        .map(|access| Self { access })
        .map_err(ImageTrouble::Refused)
    }

    pub(crate) fn read_at(&self, data: &mut [u8], offset: u64) -> io::Result<()> {
        guarded(|| self.access.read(data, offset))
    }

    pub(crate) fn write_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
        guarded(|| self.access.write(data, offset))
    }

    /// What is zero from now on costs no room of its own where a whole cluster
    /// is.
    pub(crate) fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        guarded(|| self.access.write_zeroes(offset, len))
    }

    /// Writes the tables that are held back; the file's own flush is next.
    pub(crate) fn flush(&self) -> io::Result<()> {
        guarded(|| self.access.flush())
    }
}

/// A damaged image may lead the crate where its author did not look.
fn guarded<T>(work: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    let result = catch_unwind(AssertUnwindSafe(work));
    result.unwrap_or_else(|_| Err(io::Error::other("the image cannot be followed")))
}

/// A file as `imago` wants it, with no system call but those that raw disks
/// need.
#[derive(Debug)]
pub(crate) struct Part {
    file: File,
    path: PathBuf,
    writable: bool,
    helper: CommonStorageHelper,
}

impl Part {
    fn new(file: File, path: PathBuf, writable: bool) -> Self {
        Self {
            file,
            path,
            writable,
            helper: CommonStorageHelper::default(),
        }
    }
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.path.display())
    }
}

impl Storage for Part {
    fn size(&self) -> io::Result<u64> {
        use std::io::{Seek, SeekFrom};
        (&self.file).seek(SeekFrom::End(0))
    }

    unsafe fn pure_readv(&self, mut bufv: IoVectorMut<'_>, offset: u64) -> io::Result<()> {
        let mut data = vec![0; usize::try_from(bufv.len()).unwrap_or(usize::MAX)];
        let mut done = 0;
        while done < data.len() {
            match self.file.read_at(&mut data[done..], offset + done as u64) {
                // Behind the end is nothing but zeros.
                Ok(0) => break,
                Ok(len) => done += len,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        bufv.copy_from_slice(&data);
        Ok(())
    }

    unsafe fn pure_writev(&self, bufv: IoVector<'_>, offset: u64) -> io::Result<()> {
        if !self.writable {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        let mut data = vec![0; usize::try_from(bufv.len()).unwrap_or(usize::MAX)];
        bufv.copy_into_slice(&mut data);
        self.file.write_all_at(&data, offset)
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    unsafe fn invalidate_cache(&self) -> io::Result<()> {
        Ok(())
    }

    fn get_storage_helper(&self) -> &CommonStorageHelper {
        &self.helper
    }

    fn resize(&self, new_size: u64, _: imago::storage::PreallocateMode) -> io::Result<()> {
        self.file.set_len(new_size)
    }
}
