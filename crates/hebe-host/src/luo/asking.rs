//! Starting the keeper, and what is asked of it.

use std::fs;
use std::io::{self, BufRead, BufReader};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};

use hebe_api::{read_frame, write_frame};
use hebe_store::luo::SegmentFiles;
use hebe_sys::fdstore::Given;
use hebe_sys::{fdpass, luo, proc};
use hebe_types::SegmentId;

use super::keeper::{Answer, Ask, Listing, TAKE_WAIT, WAIT, WORD};
use super::store::is_ours;
use crate::host::{Host, Layout};
use crate::listing::with_cause;
use crate::notes;

/// Takes what PID 1 handed over to this process, if it did, before anybody asks
/// for it: from then on the keeper holds it, until each VM has its VMM.
///
/// # Errors
/// Why it could not be taken; PID 1 goes on holding it.
pub fn take_handed(host: &Host) -> Result<(), String> {
    if !host.system.was_handed_sessions() {
        return Ok(());
    }
    ensure(host).map_or(Ok(()), Err)
}

/// The sessions of Hebe's own among what PID 1 handed over, each with its name in
/// PID 1's store. What they are called there is PID 1's word; the kernel's counts.
fn sessions(given: &Given) -> Vec<(&str, OwnedFd)> {
    let ours = given.fds.iter().filter_map(|(name, fd)| {
        let (session, _) = luo::adopt(fd.try_clone().ok()?).ok()?;
        let fd = is_ours(&session.to_string()).then(|| fd.try_clone())?;
        Some((name.as_str(), fd.ok()?))
    });
    ours.collect()
}

/// Starts the keeper's process and waits for what it says.
pub(crate) fn start(layout: &Layout, given: &Given) -> Result<usize, String> {
    let started = |e: io::Error| format!("the keeper cannot be started: {e}");
    let dir = layout.run.join("host");
    fs::create_dir_all(&dir).map_err(started)?;
    let log = fs::File::create(dir.join("keeper.log")).map_err(started)?;
    let program = std::env::current_exe().map_err(started)?;
    let mut command = Command::new(program);
    command.arg(WORD);
    let mut handed = Vec::new();
    for (name, fd) in sessions(given) {
        command.arg("--session");
        command.arg(format!("{}={name}", fd.as_raw_fd()));
        handed.push(fd);
    }
    if let Some(address) = given.notify.as_ref().filter(|_| !handed.is_empty()) {
        command.arg("--notify").arg(address);
    }
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    command.stderr(Stdio::from(log));
    let mut child = proc::spawn_detached(command, handed).map_err(started)?;
    let mut word = String::new();
    if let Some(stdout) = child.stdout.take() {
        // Ends when the keeper said it, or ended.
        BufReader::new(stdout)
            .read_line(&mut word)
            .map_err(started)?;
    }
    let word = word.trim();
    match word.parse() {
        Ok(count) => Ok(count),
        Err(_) => Err(match word.strip_prefix("error ") {
            Some(why) => why.to_owned(),
            None => {
                let log = crate::files::tail(&dir.join("keeper.log"), 3).join(" | ");
                format!("the keeper ended without a word: {log}")
            }
        }),
    }
}

/// Has everything that the kernel before handed over retrieved, if that was not
/// done. Gives the reason why it could not be, where some VM is missed.
pub(crate) fn ensure(host: &Host) -> Option<String> {
    let missed = || {
        let notes = notes::all(&host.layout);
        notes.iter().any(|n| n.is_carried() && !n.given_up)
    };
    if UnixStream::connect(host.layout.keeper_socket()).is_ok() {
        return None;
    }
    let started = match host.system.live_update() {
        Ok(()) => host.system.start_keeper(host).map(drop),
        Err(why) => Err(with_cause(&why)),
    };
    started.err().filter(|_| missed())
}

fn ask(socket: &Path, ask: Ask) -> io::Result<Option<UnixStream>> {
    let mut stream = match UnixStream::connect(socket) {
        Ok(stream) => stream,
        // There is none, or it ended, or none can be: the name is too long for a
        // socket. Nothing is held.
        Err(e)
            if matches!(
                e.kind(),
                io::ErrorKind::NotFound
                    | io::ErrorKind::ConnectionRefused
                    | io::ErrorKind::InvalidInput
            ) =>
        {
            return Ok(None);
        }
        Err(e) => return Err(e),
    };
    stream.set_read_timeout(Some(WAIT))?;
    stream.set_write_timeout(Some(WAIT))?;
    match write_frame(&mut stream, &ask) {
        // It ended this instant.
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => Ok(None),
        other => other.map(|()| Some(stream)),
    }
}

/// What the keeper on `socket` holds; `None` where there is none.
pub fn list(socket: &Path) -> io::Result<Option<Listing>> {
    let Some(mut stream) = ask(socket, Ask::List)? else {
        return Ok(None);
    };
    // Closed without an answer: it ended, because it holds nothing more.
    match read_frame(&mut stream) {
        Err(e) if e.kind() == io::ErrorKind::ConnectionReset => Ok(None),
        other => other,
    }
}

fn answer(stream: Option<&mut UnixStream>) -> io::Result<Answer> {
    let gone = || io::Error::other("the keeper is gone, and what it held with it");
    let stream = stream.ok_or_else(gone)?;
    let answer: Answer = read_frame(stream)?.ok_or_else(gone)?;
    match answer.error {
        Some(why) => Err(io::Error::other(why)),
        None => Ok(answer),
    }
}

/// The files of a VM, as soon as they have arrived.
pub fn take(socket: &Path, segment: SegmentId) -> io::Result<SegmentFiles> {
    let mut stream = ask(socket, Ask::Take { segment })?;
    if let Some(stream) = &stream {
        stream.set_read_timeout(Some(TAKE_WAIT))?;
    }
    let Answer { files, .. } = answer(stream.as_mut())?;
    let (Some((spec, count)), Some(stream)) = (files, stream) else {
        return Err(io::ErrorKind::InvalidData.into());
    };
    let fds = fdpass::receive(&stream, count)?;
    let spec = serde_json::from_str(&spec)?;
    SegmentFiles::from_fds(spec, fds).map_err(io::Error::other)
}

/// The keeper lets go of a VM; unless a VMM holds its memory, that is freed.
pub fn release(socket: &Path, segment: SegmentId) -> io::Result<()> {
    let mut stream = ask(socket, Ask::Release { segment })?;
    answer(stream.as_mut()).map(drop)
}
