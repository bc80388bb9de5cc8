//! `dashboard`: the daemon's page, for a browser of this machine.
//!
//! hebed listens on a unix socket, which no browser opens. This is a proxy from
//! a port of 127.0.0.1 to it, as small as it can be: one request a connection,
//! on a thread of its own, and the answer's bytes as they come, so that events
//! pass through. [`door`] says who is let in.
//!
//! Bounds: [`CONNECTIONS_MAX`] at a time, a head and a body of the daemon's
//! own limits, [`REQUEST_WAIT`] for both together, [`TAKE_WAIT`] for a browser
//! that takes nothing of its answer.

mod door;
mod head;

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use hebe_host::Host;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::rand::{GetRandomFlags, getrandom};
use serde::Serialize;

use crate::cli::DashboardArgs;
use crate::output::{Failure, Outcome, Output};
use door::{Door, Verdict};
use head::{HEAD_LEN_MAX, Head, end_of_head};

/// Connections at a time.
const CONNECTIONS_MAX: usize = 64;
/// How long a request may take to come.
const REQUEST_WAIT: Duration = Duration::from_secs(10);
/// How long a browser may take nothing of what it is sent.
const TAKE_WAIT: Duration = Duration::from_secs(30);

#[derive(Serialize)]
struct Opened<'a> {
    address: &'a str,
}

/// `hebe dashboard`.
pub fn dashboard(host: &Host, args: &DashboardArgs, out: &Output) -> Outcome {
    let default = || host.layout.run.join("hebed.sock");
    let socket = args.socket.clone().unwrap_or_else(default);
    UnixStream::connect(&socket).map_err(|e| {
        Failure(format!(
            "no hebed can be reached at {}: start it, or become a member of its socket's group ({e})",
            socket.display()
        ))
    })?;
    let bound = TcpListener::bind((Ipv4Addr::LOCALHOST, args.port));
    let listener = bound.map_err(|e| {
        Failure(format!(
            "port {} of 127.0.0.1 cannot be had: leave --port out for any that is free ({e})",
            args.port
        ))
    })?;
    let failed = |e: io::Error| Failure(format!("the dashboard cannot be served ({e})"));
    let port = listener.local_addr().map_err(failed)?.port();
    let words = [word(), word(), word()];
    let [Ok(place), Ok(token), Ok(secret)] = words else {
        return Err(Failure("this kernel has no random numbers".to_owned()));
    };
    let door = Door::new(port, [place, token, secret]);
    let address = door.address();
    out.answer(&Opened { address: &address }, || address.clone());
    out.progress("the address lets one browser in, once; Ctrl-C ends the dashboard");
    let served = serve(&listener, door, socket);
    Err(failed(served))
}

/// 128 random bits.
fn word() -> io::Result<String> {
    let mut bytes = [0; 16];
    let count = getrandom(&mut bytes, GetRandomFlags::empty())?;
    match count == bytes.len() {
        true => Ok(bytes.iter().map(|b| format!("{b:02x}")).collect()),
        false => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

/// Serves until the listener fails.
fn serve(listener: &TcpListener, door: Door, socket: PathBuf) -> io::Error {
    let shared = Arc::new((Mutex::new(door), socket));
    let open = Arc::new(AtomicUsize::new(0));
    loop {
        let stream = match listener.accept() {
            Ok((stream, _)) => stream,
            Err(e) if is_passing(&e) => {
                thread::sleep(Duration::from_millis(100));
                continue;
            }
            Err(e) => return e,
        };
        let turn = Turn::new(&open);
        if open.load(Ordering::Relaxed) > CONNECTIONS_MAX {
            continue;
        }
        let shared = Arc::clone(&shared);
        // Without a thread the connection ends, and the browser tries again.
        let _ = thread::Builder::new().spawn(move || {
            let _turn = turn;
            // How it ended is the browser's affair.
            let _ = converse(stream, &shared.0, &shared.1);
        });
    }
}

/// Out of descriptors, or a client that left before it was greeted.
fn is_passing(error: &io::Error) -> bool {
    use rustix::io::Errno;
    let passing = [Errno::MFILE, Errno::NFILE, Errno::NOBUFS, Errno::NOMEM];
    let system = Errno::from_io_error(error);
    matches!(
        error.kind(),
        io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted
    ) || system.is_some_and(|errno| passing.contains(&errno))
}

/// A connection that counts.
struct Turn(Arc<AtomicUsize>);

impl Turn {
    fn new(open: &Arc<AtomicUsize>) -> Self {
        open.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(open))
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// One request and its answer.
fn converse(mut stream: TcpStream, door: &Mutex<Door>, socket: &Path) -> io::Result<()> {
    stream.set_write_timeout(Some(TAKE_WAIT))?;
    stream.set_nodelay(true)?;
    let deadline = Instant::now() + REQUEST_WAIT;
    let mut bytes = Vec::new();
    let end = loop {
        if let Some(end) = end_of_head(&bytes) {
            break end;
        }
        if bytes.len() >= HEAD_LEN_MAX {
            return refuse(&mut stream, 431, "the head is too long");
        }
        if !more(&mut stream, &mut bytes, deadline)? {
            return Ok(());
        }
    };
    let verdict = match Head::parse(&bytes[..end]) {
        Err(bad) => Err(Verdict::from(bad)),
        Ok(head) => {
            let mut door = door.lock().unwrap_or_else(PoisonError::into_inner);
            Ok((door.judge(&head), head))
        }
    };
    let (path, head) = match verdict {
        Ok((Verdict::Pass(path), head)) => (path, head),
        Ok((verdict, _)) | Err(verdict) => return answer(&mut stream, &verdict),
    };
    let len = match head.body_len() {
        Ok(len) => len,
        Err(bad) => return refuse(&mut stream, 400, bad.text()),
    };
    while bytes.len() < end + len {
        if !more(&mut stream, &mut bytes, deadline)? {
            return Ok(());
        }
    }
    let mut request = match head.onward(&path, len) {
        Ok(request) => request,
        Err(bad) => return refuse(&mut stream, 400, bad.text()),
    };
    request.extend_from_slice(&bytes[end..end + len]);
    let daemon = UnixStream::connect(socket).and_then(|mut daemon| {
        daemon.write_all(&request)?;
        Ok(daemon)
    });
    match daemon {
        Ok(daemon) => pass_on(daemon, stream),
        Err(_) => refuse(&mut stream, 502, "hebed does not answer: is it running?"),
    }
}

/// Reads more of a request; false when the client ended it or is too slow.
fn more(stream: &mut TcpStream, bytes: &mut Vec<u8>, deadline: Instant) -> io::Result<bool> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() {
        refuse(stream, 408, "the request did not come in time")?;
        return Ok(false);
    }
    stream.set_read_timeout(Some(left))?;
    let mut chunk = [0; 4096];
    match stream.read(&mut chunk) {
        Ok(0) => Ok(false),
        Ok(count) => {
            bytes.extend_from_slice(&chunk[..count]);
            Ok(true)
        }
        // The deadline is looked at when this is called again.
        Err(e) => match e.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(true),
            _ => Err(e),
        },
    }
}

/// Copies the answer until the daemon has said all, or the browser left.
fn pass_on(mut daemon: UnixStream, mut stream: TcpStream) -> io::Result<()> {
    let mut chunk = [0; 16 << 10];
    loop {
        let mut fds = [
            PollFd::new(&daemon, PollFlags::IN),
            PollFd::new(&stream, PollFlags::RDHUP),
        ];
        match poll(&mut fds, None) {
            Err(rustix::io::Errno::INTR) => continue,
            other => other?,
        };
        let gone = PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR;
        if fds[1].revents().intersects(gone) {
            return Ok(());
        }
        match daemon.read(&mut chunk) {
            Ok(0) => return farewell(&mut stream),
            Ok(count) => stream.write_all(&chunk[..count])?,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
}

fn refuse(stream: &mut TcpStream, status: u16, text: &'static str) -> io::Result<()> {
    answer(stream, &Verdict::Refuse(status, text))
}

/// The proxy's own answers.
fn answer(stream: &mut TcpStream, verdict: &Verdict) -> io::Result<()> {
    let (status, more, body) = match verdict {
        Verdict::Refuse(status, text) => (*status, String::new(), *text),
        Verdict::Enter { to, cookie } => {
            let cookie = cookie.as_ref().map(|c| format!("Set-Cookie: {c}\r\n"));
            let cookie = cookie.unwrap_or_default();
            (303, format!("Location: {to}\r\n{cookie}"), "")
        }
        Verdict::Pass(_) => return Ok(()),
    };
    let reason = match status {
        303 => "See Other",
        400 => "Bad Request",
        403 => "Forbidden",
        405 => "Method Not Allowed",
        408 => "Request Timeout",
        421 => "Misdirected Request",
        431 => "Request Header Fields Too Large",
        _ => "Bad Gateway",
    };
    let text = format!(
        "HTTP/1.1 {status} {reason}\r\n{more}Content-Type: text/plain; charset=utf-8\r\n\
         Content-Length: {}\r\nContent-Security-Policy: default-src 'none'\r\n\
         Cache-Control: no-store\r\nReferrer-Policy: no-referrer\r\n\
         X-Content-Type-Options: nosniff\r\nConnection: close\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(text.as_bytes())?;
    farewell(stream)
}

/// Ends a connection so that what was sent arrives: one that is closed over
/// bytes that nobody read is reset.
fn farewell(stream: &mut TcpStream) -> io::Result<()> {
    stream.shutdown(Shutdown::Write)?;
    stream.set_read_timeout(Some(Duration::from_secs(1)))?;
    let mut rest = [0; 4096];
    for _ in 0..32 {
        match stream.read(&mut rest) {
            Ok(count) if count > 0 => {}
            _ => break,
        }
    }
    Ok(())
}
