//! The programs that do the work, each run to its end.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Command, Stdio};

use super::{BuildError, Format, Order};

/// Lines of a failed program that are shown.
const TAIL: usize = 6;
/// Longest line of a program that is kept.
const LINE_MAX: usize = 400;

/// As whom files are made that root owns in the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rights {
    /// This process is root.
    Root,
    /// A user's subordinate ids, in a user namespace.
    Mapped,
}

impl Rights {
    pub(super) fn of_this_process() -> Self {
        let own = fs::metadata("/proc/self").map(|m| m.uid());
        match own {
            Ok(0) => Self::Root,
            _ => Self::Mapped,
        }
    }

    /// A command with these rights.
    pub(super) fn command(self, program: &str) -> Command {
        let mut command = match self {
            Self::Root => Command::new(program),
            Self::Mapped => {
                let mut command = Command::new("unshare");
                command.args(["--map-root-user", "--map-auto", "--", program]);
                command
            }
        };
        let path = std::env::var_os("PATH").unwrap_or_default();
        let more = ["/usr/sbin".into(), "/sbin".into()];
        if let Ok(path) = std::env::join_paths(std::env::split_paths(&path).chain(more)) {
            command.env("PATH", path);
        }
        command.env("LC_ALL", "C.UTF-8").stdin(Stdio::null());
        command
    }
}

/// Fails with the first program that is missing.
pub(super) fn need_all(order: &Order, rights: Rights) -> Result<(), BuildError> {
    let mut needed = vec![
        ("mmdebstrap", "mmdebstrap"),
        ("mke2fs", "e2fsprogs"),
        ("tar", "tar"),
    ];
    if rights == Rights::Mapped {
        needed.extend([("unshare", "util-linux"), ("newuidmap", "uidmap")]);
    }
    if order.format == Format::Qcow2 {
        needed.push(("qemu-img", "qemu-utils"));
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let dirs: Vec<_> = std::env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .collect();
    let missing = |program: &str| !dirs.iter().any(|dir| dir.join(program).is_file());
    match needed.into_iter().find(|(program, _)| missing(program)) {
        Some((program, package)) => Err(BuildError::MissingTool { program, package }),
        None => Ok(()),
    }
}

/// Runs a program; `say` is told each of its lines that it writes to its
/// standard error.
pub(super) fn run(
    name: &'static str,
    command: &mut Command,
    say: &dyn Fn(&str),
) -> Result<(), BuildError> {
    let failed = |why: String| BuildError::Tool { program: name, why };
    let child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn();
    let mut child = child.map_err(|e| failed(e.to_string()))?;
    let mut tail: Vec<String> = Vec::new();
    if let Some(stderr) = child.stderr.take() {
        let mut reader = BufReader::new(stderr);
        let mut line = Vec::new();
        while matches!(reader.read_until(b'\n', &mut line), Ok(n) if n > 0) {
            let text = String::from_utf8_lossy(&line[..line.len().min(LINE_MAX)]);
            let text = crate::error::shown(text.trim());
            line.clear();
            if text.is_empty() {
                continue;
            }
            say(&text);
            tail.push(text);
            if tail.len() > TAIL {
                tail.remove(0);
            }
        }
    }
    let status = child.wait().map_err(|e| failed(e.to_string()))?;
    match status.success() {
        true => Ok(()),
        false if tail.is_empty() => Err(failed(status.to_string())),
        false => Err(failed(tail.join("; "))),
    }
}

/// Makes an ext4 out of a directory, at `start` of a file.
pub(super) fn mke2fs(
    rights: Rights,
    from: &Path,
    image: &Path,
    uuid: &str,
    start: u64,
    len: u64,
) -> Result<(), BuildError> {
    const BLOCK: u64 = 4096;
    let mut command = rights.command("mke2fs");
    command.args([
        "-q", "-F", "-t", "ext4", "-b", "4096", "-m", "1", "-L", "root",
    ]);
    // Features that Debian 12's own programs and every reader here know.
    command.args(["-O", "^orphan_file,^metadata_csum_seed"]);
    // Nothing is left for the guest's kernel to initialise.
    let extended = format!("offset={start},lazy_itable_init=0,lazy_journal_init=0,nodiscard");
    command.args(["-E", &extended, "-U", uuid, "-d"]);
    command.arg(from).arg(image).arg((len / BLOCK).to_string());
    run("mke2fs", &mut command, &|_| {})
}

/// Converts a raw image.
pub(super) fn qcow2(from: &Path, to: &Path) -> Result<(), BuildError> {
    let mut command = Command::new("qemu-img");
    command
        .args(["convert", "-f", "raw", "-O", "qcow2"])
        .arg(from)
        .arg(to);
    run("qemu-img", command.stdin(Stdio::null()), &|_| {})
}

/// Bytes that a file takes on its disk.
pub(super) fn allocated(file: &File) -> io::Result<u64> {
    file.metadata().map(|m| m.blocks() * 512)
}

/// Removes a folder, files of subordinate ids in it, too.
pub(super) fn remove(rights: Rights, path: &Path) {
    if rights == Rights::Root {
        let _ = fs::remove_dir_all(path);
        return;
    }
    let mut command = rights.command("rm");
    let _ = command
        .args(["-rf", "--one-file-system", "--"])
        .arg(path)
        .status();
}

/// A random version 4 UUID as a number.
pub(super) fn random_id() -> Result<u128, BuildError> {
    let source = Path::new("/dev/urandom");
    let mut bytes = [0; 16];
    let read = File::open(source).and_then(|mut file| file.read_exact(&mut bytes));
    read.map_err(|e| BuildError::io("cannot read", source, e))?;
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    Ok(u128::from_be_bytes(bytes))
}

/// As a UUID is written.
pub(super) fn uuid(id: u128) -> String {
    let hex = format!("{id:032x}");
    [
        &hex[..8],
        &hex[8..12],
        &hex[12..16],
        &hex[16..20],
        &hex[20..],
    ]
    .join("-")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_random_id_is_written_as_a_version_4_uuid() {
        let text = uuid(random_id().expect("random"));
        assert_eq!(text.len(), 36);
        assert_eq!(&text[14..15], "4", "{text}");
        assert_eq!(
            uuid(0x0123_4567_89ab_cdef_0123_4567_89ab_cdef),
            "01234567-89ab-cdef-0123-456789abcdef"
        );
    }

    #[test]
    fn a_program_that_fails_is_quoted_by_its_last_lines() {
        let script =
            "for i in 1 2 3 4 5 6 7 8; do echo line $i >&2; done; printf 'a\\033[1m' >&2; exit 3";
        let failed = run("sh", Command::new("sh").args(["-c", script]), &|_| {});
        let text = failed.expect_err("it fails").to_string();
        assert!(
            text.starts_with("sh failed: line 4; ") && text.ends_with("; a?[1m"),
            "{text}"
        );
        let silent = run("sh", Command::new("sh").args(["-c", "exit 3"]), &|_| {});
        assert!(
            silent
                .expect_err("it fails")
                .to_string()
                .contains("exit status: 3")
        );
    }
}
