//! The programs that do the work, each run to its end.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::Ordering;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::Duration;

use super::{BuildError, Format, Order, Watch};

/// Lines of a failed program that are shown.
const TAIL: usize = 6;
/// How often it is asked whether the work is to end.
const LOOK: Duration = Duration::from_millis(100);
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
        match rustix::process::geteuid().is_root() {
            true => Self::Root,
            false => Self::Mapped,
        }
    }

    /// How mmdebstrap is to work: a user's own namespace ends with it, so what it
    /// made comes as an archive.
    pub(super) fn mmdebstrap(self) -> [&'static str; 2] {
        match self {
            Self::Root => ["--mode=root", "--format=directory"],
            Self::Mapped => ["--mode=unshare", "--format=tar"],
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
        None if rights == Rights::Mapped => has_subordinate_ids(),
        None => Ok(()),
    }
}

/// subuid(5), subgid(5): `NAME:FIRST:COUNT`, or the user's number for the name.
fn has_subordinate_ids() -> Result<(), BuildError> {
    let uid = rustix::process::geteuid().as_raw().to_string();
    let users = fs::read_to_string("/etc/passwd").unwrap_or_default();
    let of_uid = |line: &str| {
        let mut fields = line.split(':');
        let (name, number) = (fields.next()?, fields.nth(1)?);
        (number == uid).then(|| name.to_owned())
    };
    let user = users
        .lines()
        .find_map(of_uid)
        .unwrap_or_else(|| uid.clone());
    for file in ["/etc/subuid", "/etc/subgid"] {
        let ids = fs::read_to_string(file).unwrap_or_default();
        let own = |line: &str| {
            line.split(':')
                .next()
                .is_some_and(|who| who == user || who == uid)
        };
        if !ids.lines().any(own) {
            return Err(BuildError::NoSubordinateIds { user, file });
        }
    }
    Ok(())
}

/// Runs a program to its end, or to the end of the work; each line that it
/// writes to its standard error is told.
pub(super) fn run(
    name: &'static str,
    command: &mut Command,
    watch: Watch,
) -> Result<(), BuildError> {
    let failed = |why: String| BuildError::Tool { program: name, why };
    let child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn();
    let mut child = child.map_err(|e| failed(e.to_string()))?;
    let lines = child.stderr.take().map(lines_of);
    let mut tail: Vec<String> = Vec::new();
    let mut stopped = false;
    while let Some(lines) = &lines {
        match lines.recv_timeout(LOOK) {
            Ok(line) => {
                (watch.say)(&line);
                tail.push(line);
                if tail.len() > TAIL {
                    tail.remove(0);
                }
            }
            Err(RecvTimeoutError::Disconnected) => break,
            Err(RecvTimeoutError::Timeout) => {}
        }
        if !stopped && watch.stop.load(Ordering::Relaxed) {
            stopped = true;
            // It ends what it started itself, and cleans up.
            if let Some(pid) = rustix::process::Pid::from_raw(child.id() as i32) {
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
            }
        }
    }
    let status = child.wait().map_err(|e| failed(e.to_string()))?;
    if stopped || watch.stop.load(Ordering::Relaxed) {
        return Err(BuildError::Stopped);
    }
    match status.success() {
        true => Ok(()),
        false if tail.is_empty() => Err(failed(status.to_string())),
        false => Err(failed(tail.join("; "))),
    }
}

/// The lines of a program's output, as they come.
fn lines_of(from: impl Read + Send + 'static) -> Receiver<String> {
    let (to, lines) = mpsc::channel();
    std::thread::spawn(move || {
        let mut reader = BufReader::new(from);
        let mut line = Vec::new();
        while matches!(reader.read_until(b'\n', &mut line), Ok(n) if n > 0) {
            let text = String::from_utf8_lossy(&line[..line.len().min(LINE_MAX)]);
            let text = crate::error::shown(text.trim());
            line.clear();
            if !text.is_empty() && to.send(text).is_err() {
                break;
            }
        }
    });
    lines
}

/// Makes an ext4 out of a directory, at `start` of a file.
pub(super) fn mke2fs(
    rights: Rights,
    from: &Path,
    image: &Path,
    uuid: &str,
    start: u64,
    len: u64,
    watch: Watch,
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
    run("mke2fs", &mut command, watch.silently())
}

/// Unpacks an archive with everybody's files in it, and removes it.
pub(super) fn extract(
    rights: Rights,
    archive: &Path,
    to: &Path,
    watch: Watch,
) -> Result<(), BuildError> {
    fs::create_dir(to).map_err(|e| BuildError::io("cannot create", to, e))?;
    let mut command = rights.command("tar");
    command.args([
        "--extract",
        "--numeric-owner",
        "--same-owner",
        "--same-permissions",
    ]);
    // Nobody but root makes devices, and the kernel makes them by itself.
    command.args(["--exclude=./dev/*", "--xattrs", "--xattrs-include=*"]);
    command
        .arg("--file")
        .arg(archive)
        .arg("--directory")
        .arg(to);
    run("tar", &mut command, watch)?;
    fs::remove_file(archive).map_err(|e| BuildError::io("cannot remove", archive, e))
}

/// Converts a raw image.
pub(super) fn qcow2(from: &Path, to: &Path, watch: Watch) -> Result<(), BuildError> {
    let mut command = Command::new("qemu-img");
    command
        .args(["convert", "-f", "raw", "-O", "qcow2"])
        .arg(from)
        .arg(to);
    run("qemu-img", command.stdin(Stdio::null()), watch.silently())
}

/// Bytes that a file takes on its disk.
pub(super) fn allocated(file: &File) -> io::Result<u64> {
    file.metadata().map(|m| m.blocks() * 512)
}

/// Removes a folder, files of subordinate ids in it, too; never what is mounted
/// below it.
pub(super) fn remove(rights: Rights, path: &Path) {
    let mut command = rights.command("rm");
    let _ = command
        .args(["-rf", "--one-file-system", "--"])
        .arg(path)
        .stderr(Stdio::null())
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
    use std::sync::atomic::AtomicBool;

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
        let stop = AtomicBool::new(false);
        let watch = Watch {
            say: &|_| {},
            stop: &stop,
        };
        let failed = run("sh", Command::new("sh").args(["-c", script]), watch);
        let text = failed.expect_err("it fails").to_string();
        assert!(
            text.starts_with("sh failed: line 4; ") && text.ends_with("; a?[1m"),
            "{text}"
        );
        let silent = run("sh", Command::new("sh").args(["-c", "exit 3"]), watch);
        assert!(
            silent
                .expect_err("it fails")
                .to_string()
                .contains("exit status: 3")
        );
    }

    #[test]
    fn a_program_is_ended_with_the_work() {
        let stop = AtomicBool::new(true);
        let watch = Watch {
            say: &|_| {},
            stop: &stop,
        };
        let ended = run("sleep", Command::new("sleep").arg("1000"), watch);
        assert!(matches!(ended, Err(BuildError::Stopped)), "{ended:?}");
    }
}
