//! File systems of an image, to be read and nothing else.

use std::io::{self, Read, Seek, SeekFrom, Write};

use ext4_view::{Ext4, Ext4Error, Ext4Read};

use crate::source::Piece;

/// Longest path that is looked up.
const PATH_MAX: usize = 1024;
/// Most names of one directory that are looked at.
pub(crate) const NAMES_MAX: usize = 4096;
/// Most block groups: 128 TiB of the usual ones.
const GROUPS_MAX: u64 = 1 << 20;

/// Why a file cannot be had.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FileError {
    /// Nothing there, or no file.
    #[error("there is no such file")]
    Absent,
    /// Longer than it may be.
    #[error("it is larger than {0} bytes")]
    TooLarge(u64),
    /// What the reader says.
    #[error("{0}")]
    Broken(String),
    /// Where it is put does not take it.
    #[error("{0}")]
    Sink(io::Error),
}

/// A file system that is open.
pub(crate) enum FileSystem {
    Ext4(Ext4),
    Fat(Box<fatfs::FileSystem<Window>>),
}

/// What a volume holds.
pub(crate) enum Content {
    /// A file system that is read, and its UUID and label as GRUB writes them.
    Readable {
        fs: FileSystem,
        uuid: String,
        label: String,
    },
    /// Something else that is known by name.
    Other(&'static str),
    /// A file system that is not sound.
    Damaged(&'static str),
    /// Nothing that is known.
    Nothing,
}

/// Looks what lies in `piece`.
pub(crate) fn look(piece: &Piece) -> Content {
    if let Some(superblock) = piece.bytes::<1024>(1024)
        && superblock[0x38..0x3a] == [0x53, 0xef]
    {
        return ext4(piece, &superblock);
    }
    if let Some(name) = other(piece) {
        return Content::Other(name);
    }
    if let Some(sector) = piece.bytes::<512>(0)
        && (&sector[54..57] == b"FAT" || &sector[82..85] == b"FAT")
    {
        return fat(piece, &sector);
    }
    Content::Nothing
}

/// What is said of an image that is given as a raw disk.
const QCOW2: &str = "a qcow2 image, which takes a name that ends in .qcow2, or format = \"qcow2\"";

fn other(piece: &Piece) -> Option<&'static str> {
    let is = |at: u64, magic: &[u8]| {
        let mut found = vec![0; magic.len()];
        piece.read_at(&mut found, at).is_ok() && found == magic
    };
    let known: [(&str, u64, &[u8]); 8] = [
        (QCOW2, 0, b"QFI\xfb"),
        ("xfs", 0, b"XFSB"),
        ("btrfs", 0x1_0040, b"_BHRfS_M"),
        ("LUKS encryption", 0, b"LUKS\xba\xbe"),
        ("LVM", 512, b"LABELONE"),
        ("f2fs", 1024, b"\x10\x20\xf5\xf2"),
        ("squashfs", 0, b"hsqs"),
        ("swap", 4086, b"SWAPSPACE2"),
    ];
    let found = known.into_iter().find(|(_, at, magic)| is(*at, magic));
    found.map(|(name, _, _)| name)
}

fn ext4(piece: &Piece, superblock: &[u8; 1024]) -> Content {
    const DAMAGED: Content = Content::Damaged("ext4");
    let word = |at: usize| {
        let bytes = [0, 1, 2, 3].map(|i| superblock[at + i]);
        u64::from(u32::from_le_bytes(bytes))
    };
    // The reader takes memory for as many groups as the image says there are.
    let blocks = word(4) | (word(0x150) << 32);
    let blocks = if word(0x60) & 0x80 == 0 {
        word(4)
    } else {
        blocks
    };
    let block_size = 1024u64.checked_shl(word(0x18) as u32);
    let sane = block_size.is_some_and(|size| {
        let groups = blocks.checked_div(word(0x20)).unwrap_or(u64::MAX);
        let fits = blocks
            .checked_mul(size)
            .is_some_and(|len| len <= piece.len());
        (1024..=65536).contains(&size) && groups <= GROUPS_MAX && fits
    });
    if !sane {
        return DAMAGED;
    }
    match Ext4::load(Box::new(Window::new(piece.clone()))) {
        Ok(fs) => {
            let label = fs.label().to_str().unwrap_or_default().to_owned();
            let uuid = fs.uuid().to_string();
            Content::Readable {
                fs: FileSystem::Ext4(fs),
                uuid,
                label,
            }
        }
        Err(Ext4Error::Incompatible(_)) => Content::Other("ext4 with features that are not read"),
        Err(_) => DAMAGED,
    }
}

fn fat(piece: &Piece, sector: &[u8; 512]) -> Content {
    let id = if &sector[82..85] == b"FAT" { 67 } else { 39 };
    let word = |at: usize| u16::from_le_bytes([sector[at], sector[at + 1]]);
    let uuid = format!("{:04X}-{:04X}", word(id + 2), word(id));
    match fatfs::FileSystem::new(Window::new(piece.clone()), fatfs::FsOptions::new()) {
        Ok(fs) => {
            let label = fs.volume_label().trim().to_owned();
            Content::Readable {
                fs: FileSystem::Fat(Box::new(fs)),
                uuid,
                label,
            }
        }
        Err(_) => Content::Damaged("FAT"),
    }
}

impl FileSystem {
    /// Copies the regular file at `path` into `sink`; returns its length.
    pub(crate) fn copy(
        &self,
        path: &str,
        max: u64,
        sink: &mut dyn Write,
    ) -> Result<u64, FileError> {
        let path = clean(path)?;
        match self {
            Self::Ext4(fs) => {
                let file = fs.open(path.as_str()).map_err(of_ext4)?;
                if !file.metadata().file_type().is_regular_file() {
                    return Err(FileError::Absent);
                }
                copy(file, max, sink)
            }
            Self::Fat(fs) => {
                let root = fs.root_dir();
                let file = root.open_file(path.trim_start_matches('/'));
                copy(file.map_err(of_io)?, max, sink)
            }
        }
    }

    /// A text file; bytes that are not UTF-8 are replaced.
    pub(crate) fn text(&self, path: &str, max: u64) -> Result<String, FileError> {
        let mut bytes = Vec::new();
        self.copy(path, max, &mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// Whether a file of any kind but a directory is there.
    pub(crate) fn has_file(&self, path: &str) -> bool {
        let Ok(path) = clean(path) else { return false };
        match self {
            Self::Ext4(fs) => fs.metadata(path.as_str()).is_ok_and(|m| !m.is_dir()),
            Self::Fat(fs) => {
                let root = fs.root_dir();
                root.open_file(path.trim_start_matches('/')).is_ok()
            }
        }
    }

    /// Names in a directory; none where there is none.
    pub(crate) fn names(&self, dir: &str) -> Vec<String> {
        let Ok(dir) = clean(dir) else {
            return Vec::new();
        };
        match self {
            Self::Ext4(fs) => {
                let Ok(entries) = fs.read_dir(dir.as_str()) else {
                    return Vec::new();
                };
                let sound = entries.take(NAMES_MAX).map_while(Result::ok);
                let name = |e: ext4_view::DirEntry| e.file_name().as_str().ok().map(str::to_owned);
                sound.filter_map(name).collect()
            }
            Self::Fat(fs) => {
                let root = fs.root_dir();
                let dir = match dir.trim_start_matches('/') {
                    "" => Ok(root),
                    inside => root.open_dir(inside),
                };
                let Ok(dir) = dir else { return Vec::new() };
                let sound = dir.iter().take(NAMES_MAX).map_while(Result::ok);
                sound.map(|e| e.file_name()).collect()
            }
        }
    }
}

/// An absolute path without doubled separators.
fn clean(path: &str) -> Result<String, FileError> {
    if path.len() > PATH_MAX || path.contains('\0') {
        return Err(FileError::Absent);
    }
    let parts: Vec<&str> = path.split('/').filter(|p| !p.is_empty()).collect();
    Ok(format!("/{}", parts.join("/")))
}

fn copy(mut file: impl Read, max: u64, sink: &mut dyn Write) -> Result<u64, FileError> {
    let mut piece = vec![0; 64 << 10];
    let mut done = 0;
    loop {
        let len = match file.read(&mut piece) {
            Ok(0) => return Ok(done),
            Ok(len) => len,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(of_io(e)),
        };
        done += len as u64;
        if done > max {
            return Err(FileError::TooLarge(max));
        }
        sink.write_all(&piece[..len]).map_err(FileError::Sink)?;
    }
}

fn of_io(error: io::Error) -> FileError {
    match error.kind() {
        io::ErrorKind::NotFound => FileError::Absent,
        _ => FileError::Broken(error.to_string()),
    }
}

fn of_ext4(error: Ext4Error) -> FileError {
    match error {
        Ext4Error::NotFound | Ext4Error::NotADirectory | Ext4Error::IsADirectory => {
            FileError::Absent
        }
        other => FileError::Broken(other.to_string()),
    }
}

/// A volume as the readers want it.
pub(crate) struct Window {
    piece: Piece,
    at: u64,
}

impl Window {
    fn new(piece: Piece) -> Self {
        Self { piece, at: 0 }
    }
}

impl Ext4Read for Window {
    fn read(
        &mut self,
        start_byte: u64,
        dst: &mut [u8],
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync + 'static>> {
        Ok(self.piece.read_at(dst, start_byte)?)
    }
}

impl Read for Window {
    fn read(&mut self, data: &mut [u8]) -> io::Result<usize> {
        let left = self.piece.len().saturating_sub(self.at);
        let len = data.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        self.piece.read_at(&mut data[..len], self.at)?;
        self.at += len as u64;
        Ok(len)
    }
}

impl Seek for Window {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let at = match to {
            SeekFrom::Start(at) => Some(at),
            SeekFrom::End(by) => self.piece.len().checked_add_signed(by),
            SeekFrom::Current(by) => self.at.checked_add_signed(by),
        };
        self.at = at.ok_or(io::ErrorKind::InvalidInput)?;
        Ok(self.at)
    }
}

/// The reader of FAT wants to be able to write.
impl Write for Window {
    fn write(&mut self, _: &[u8]) -> io::Result<usize> {
        Err(io::ErrorKind::PermissionDenied.into())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
