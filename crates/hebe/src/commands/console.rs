//! `console`: this terminal becomes the VM's.
//!
//! One thread copies what the guest writes to stdout, this one copies stdin to
//! the guest. A terminal is put into raw mode, so that every key reaches the
//! guest; Ctrl-] leaves. Where stdin is no terminal, its end ends the input,
//! and the console stays open until the guest has been silent for a moment.

use std::io::{self, IsTerminal, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use hebe_api::{Client, Request, Response};
use hebe_host::{Host, HostError, listing};
use hebe_types::VmName;
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};

use crate::output::{Exit, Failure, Outcome, Output};

/// Ctrl-].
const ESCAPE: u8 = 0x1d;
/// How long the guest must be silent after the end of a piped input.
const SILENCE: Duration = Duration::from_millis(1000);

/// `hebe console`.
pub fn console(host: &Host, name: &VmName, out: &Output) -> Outcome {
    let survey = listing::survey(host);
    let row = survey.row(host, name)?;
    if !row.life.has_vmm() {
        return Err(Failure(format!(
            "VM '{name}' is {}: its last output may be in {}",
            row.state.as_str(),
            host.layout.vm_dir(name).join("console.log").display()
        )));
    }
    let stream = connect(host, name)?;
    let terminal = io::stdin().is_terminal();
    if terminal {
        out.progress(&format!("console of '{name}'; Ctrl-] leaves"));
    }
    let raw = if terminal { RawMode::enter() } else { None };
    let result = converse(stream, terminal);
    drop(raw);
    if terminal {
        out.progress("left");
    }
    result.map_err(|e| Failure(format!("the console of '{name}' broke ({e})")))?;
    Ok(Exit::Done)
}

fn connect(host: &Host, name: &VmName) -> Result<UnixStream, Failure> {
    let vmm = |source| {
        Failure::from(HostError::Vmm {
            name: name.clone(),
            source,
        })
    };
    let mut client = Client::connect(&host.layout.socket(name)).map_err(vmm)?;
    match client.call(&Request::Console).map_err(vmm)? {
        Response::Done => Ok(client.into_stream()),
        _ => Err(vmm(hebe_api::ClientError::Unexpected)),
    }
}

/// The terminal in raw mode, until dropped.
struct RawMode(Termios);

impl RawMode {
    fn enter() -> Option<Self> {
        let stdin = io::stdin();
        let before = tcgetattr(&stdin).ok()?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(&stdin, OptionalActions::Now, &raw).ok()?;
        Some(Self(before))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        let _ = tcsetattr(io::stdin(), OptionalActions::Now, &self.0);
    }
}

fn converse(stream: UnixStream, terminal: bool) -> io::Result<()> {
    let reader = stream.try_clone()?;
    let began = Instant::now();
    let heard_ms = Arc::new(AtomicU64::new(0));
    let heard = Arc::clone(&heard_ms);
    let printer = thread::spawn(move || print(reader, &heard, began));
    let left = send(&stream, terminal)?;
    if !left {
        let silent = || {
            let last = Duration::from_millis(heard_ms.load(Ordering::Relaxed));
            began.elapsed().saturating_sub(last)
        };
        while !printer.is_finished() && silent() < SILENCE {
            thread::sleep(Duration::from_millis(20));
        }
    }
    let _ = stream.shutdown(std::net::Shutdown::Both);
    let _ = printer.join();
    Ok(())
}

fn print(mut reader: UnixStream, heard_ms: &AtomicU64, began: Instant) {
    let mut buffer = [0u8; 4096];
    let mut stdout = io::stdout();
    loop {
        match reader.read(&mut buffer) {
            Ok(0) => return,
            Ok(n) => {
                let now_ms = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
                heard_ms.store(now_ms, Ordering::Relaxed);
                let written = stdout.write_all(&buffer[..n]).and_then(|()| stdout.flush());
                if written.is_err() {
                    return;
                }
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return,
        }
    }
}

/// Copies stdin to the guest; true when the escape key was pressed.
fn send(mut stream: &UnixStream, terminal: bool) -> io::Result<bool> {
    let mut buffer = [0u8; 1024];
    let mut stdin = io::stdin();
    loop {
        // While a person types nothing, the guest may power off.
        if terminal && !wait_for_input(stream)? {
            return Ok(true);
        }
        let n = match stdin.read(&mut buffer) {
            Ok(0) => return Ok(false),
            Ok(n) => n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(e),
        };
        let typed = &buffer[..n];
        let escape = typed.iter().position(|&b| terminal && b == ESCAPE);
        match stream.write_all(&typed[..escape.unwrap_or(n)]) {
            Err(e) if e.kind() == io::ErrorKind::BrokenPipe => return Ok(true),
            other => other?,
        }
        if escape.is_some() {
            return Ok(true);
        }
    }
}

/// Waits for a key; false when the VMM closed the console.
fn wait_for_input(stream: &UnixStream) -> io::Result<bool> {
    use rustix::event::{PollFd, PollFlags, poll};
    let stdin = io::stdin();
    loop {
        let mut fds = [
            PollFd::new(&stdin, PollFlags::IN),
            PollFd::new(stream, PollFlags::RDHUP),
        ];
        match poll(&mut fds, None) {
            Err(rustix::io::Errno::INTR) => continue,
            other => other?,
        };
        if fds[1]
            .revents()
            .intersects(PollFlags::RDHUP | PollFlags::HUP)
        {
            return Ok(false);
        }
        if !fds[0].revents().is_empty() {
            return Ok(true);
        }
    }
}
