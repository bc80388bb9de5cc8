//! Small files that must be whole or absent, whenever the machine stops.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use hebe_api::plain;
use rustix::fs::{FlockOperation, flock};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Longest file that [`read_json`] takes, in bytes.
const JSON_LEN_MAX: u64 = 16 << 20;
/// How much of a file's end [`tail`] looks at, in bytes.
const TAIL_LEN_MAX: u64 = 16 << 10;

/// Writes `bytes` to `path`: first a new file beside it, then, when that is on
/// disk, the name. After a stop at any instant the old content or the new one
/// is there.
pub fn write_durably(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let parent = path.parent().unwrap_or(Path::new("/"));
    fs::create_dir_all(parent)?;
    let mut fresh = path.as_os_str().to_owned();
    fresh.push(".new");
    let written = File::create(&fresh)
        .and_then(|mut file| {
            file.write_all(bytes)?;
            file.sync_all()
        })
        .and_then(|()| fs::rename(&fresh, path));
    // On a full disk, what is left of it would only take room.
    written.inspect_err(|_| drop(fs::remove_file(&fresh)))?;
    sync_dir(parent)
}

/// Removes what [`write_durably`] left beside files of `dir` where its process was
/// killed. Only for one who knows that nobody writes there now: what is being
/// written looks the same.
pub(crate) fn remove_unfinished(dir: &Path) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let unfinished = Path::new(&entry.file_name())
            .extension()
            .is_some_and(|ending| ending == "new");
        if unfinished {
            let _ = fs::remove_file(entry.path());
        }
    }
}

/// [`write_durably`], as JSON.
pub fn write_json(path: &Path, value: &impl Serialize) -> io::Result<()> {
    let mut bytes = serde_json::to_vec_pretty(value)?;
    bytes.push(b'\n');
    write_durably(path, &bytes)
}

/// Reads JSON; `None` when there is no such file.
pub fn read_json<T: DeserializeOwned>(path: &Path) -> io::Result<Option<T>> {
    read_json_within(path, JSON_LEN_MAX)
}

/// [`read_json`], of a file that somebody untrusted may be writing: not more
/// than `len_max` bytes of it are read, whatever its size is said to be.
pub fn read_json_within<T: DeserializeOwned>(path: &Path, len_max: u64) -> io::Result<Option<T>> {
    let mut options = File::options();
    // Neither waits for a FIFO's writer nor goes where a link leads.
    options.custom_flags(libc::O_NONBLOCK | libc::O_NOFOLLOW);
    let file = match options.read(true).open(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        opened => opened?,
    };
    let mut bytes = Vec::new();
    file.take(len_max + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > len_max {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "file too long"));
    }
    let value = serde_json::from_slice(&bytes)?;
    Ok(Some(value))
}

/// Renames durably; both names lie in the same directory.
pub fn rename_durably(from: &Path, to: &Path) -> io::Result<()> {
    fs::rename(from, to)?;
    sync_dir(to.parent().unwrap_or(Path::new("/")))
}

/// Removes durably; an absent file is fine.
pub fn remove_durably(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Ok(()) => sync_dir(path.parent().unwrap_or(Path::new("/"))),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(e),
    }
}

/// Has a directory to itself among those who do the same, until what this gives is
/// dropped.
pub(crate) fn lock_dir(dir: &Path) -> io::Result<File> {
    let dir = File::open(dir)?;
    flock(&dir, FlockOperation::LockExclusive)?;
    Ok(dir)
}

/// Makes the names in a directory durable.
pub fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

/// The last lines of a text file, at most `lines` of them, made plain. Only
/// its end is read: who writes it may be untrusted.
pub fn tail(path: &Path, lines: usize) -> Vec<String> {
    let bytes = end_of(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let all: Vec<&str> = text.lines().filter(|l| !l.trim().is_empty()).collect();
    let skip = all.len().saturating_sub(lines);
    all[skip..].iter().map(|l| plain(l)).collect()
}

fn end_of(path: &Path) -> io::Result<Vec<u8>> {
    let mut file = File::open(path)?;
    let from = file.metadata()?.len().saturating_sub(TAIL_LEN_MAX);
    file.seek(SeekFrom::Start(from))?;
    let mut bytes = Vec::new();
    file.take(TAIL_LEN_MAX).read_to_end(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_durable_file_is_replaced_as_a_whole() {
        let dir = tempfile::tempdir().expect("dir");
        let path = dir.path().join("sub/pending.json");
        write_json(&path, &vec!["a"]).expect("first");
        write_json(&path, &vec!["b", "c"]).expect("second");
        let back: Option<Vec<String>> = read_json(&path).expect("read");
        assert_eq!(back, Some(vec!["b".into(), "c".into()]));
        remove_durably(&path).expect("remove");
        remove_durably(&path).expect("already gone");
        let none: Option<Vec<String>> = read_json(&path).expect("absent");
        assert_eq!(none, None);
    }

    #[test]
    fn a_write_that_fails_leaves_nothing_beside() {
        let dir = tempfile::tempdir().expect("dir");
        let path = dir.path().join("a");
        fs::create_dir(&path).expect("mkdir");
        write_durably(&path, b"x").expect_err("a directory is there");
        assert_eq!(fs::read_dir(dir.path()).expect("dir").count(), 1);
    }

    #[test]
    fn the_tail_is_the_end() {
        let dir = tempfile::tempdir().expect("dir");
        let path = dir.path().join("log");
        fs::write(&path, "1\n2\n\n3\n").expect("write");
        assert_eq!(tail(&path, 2), ["2", "3"]);
        assert!(tail(&dir.path().join("none"), 2).is_empty());
    }
}
