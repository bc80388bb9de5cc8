//! Frames over a unix socket, and a blocking client.

use std::io::{self, Read, Write};
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use hebe_sys::fdpass;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::{Deadline, Order, Request, Response};

/// Longest frame, in bytes.
pub const FRAME_LEN_MAX: usize = 1 << 20;

/// Reads one frame. `Ok(None)` when the peer closed between frames.
pub fn read_frame<T: DeserializeOwned>(stream: &mut impl Read) -> io::Result<Option<T>> {
    let mut header = [0u8; 4];
    let mut filled = 0;
    while filled < header.len() {
        match stream.read(&mut header[filled..]) {
            Ok(0) if filled == 0 => return Ok(None),
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(n) => filled += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    let len = u32::from_le_bytes(header) as usize;
    if len > FRAME_LEN_MAX {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "frame too long"));
    }
    let mut body = vec![0; len];
    stream.read_exact(&mut body)?;
    serde_json::from_slice(&body)
        .map(Some)
        .map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))
}

/// Writes one frame.
pub fn write_frame<T: Serialize>(stream: &mut impl Write, message: &T) -> io::Result<()> {
    let body = serde_json::to_vec(message)?;
    let len = u32::try_from(body.len())
        .ok()
        .filter(|&n| n as usize <= FRAME_LEN_MAX)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "frame too long"))?;
    let mut frame = Vec::with_capacity(4 + body.len());
    frame.extend_from_slice(&len.to_le_bytes());
    frame.extend_from_slice(&body);
    stream.write_all(&frame)
}

/// Whether a message is short enough for a frame, as [`write_frame`] writes it.
pub fn fits_a_frame<T: Serialize>(message: &T) -> bool {
    struct Room(usize);
    impl Write for Room {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let left = self.0.checked_sub(bytes.len());
            self.0 = left.ok_or(io::ErrorKind::StorageFull)?;
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    serde_json::to_writer(Room(FRAME_LEN_MAX), message).is_ok()
}

/// Why a request got no good answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens on the socket.
    #[error("the VMM does not answer on its control socket")]
    Connect(#[source] io::Error),
    /// The connection broke.
    #[error("the VMM closed the connection before it answered")]
    Broken(#[source] io::Error),
    /// The VMM refused or failed.
    #[error("{0}")]
    Refused(String),
    /// What it says of itself is not what it was started as.
    #[error(
        "the VMM says that it is another VM's: its guest may have broken into it; nothing that it says counts, and `hebe stop --force` ends it"
    )]
    OtherVm,
    /// An answer of another kind than asked for.
    #[error("the VMM gave an answer of the wrong kind: it may be of another release")]
    Unexpected,
}

/// A connection to one VMM. What it says is untrusted, because its guest may
/// have taken it over: frames are bounded, texts made plain, the whole answer
/// has one time limit, and its process id is the kernel's word.
#[derive(Debug)]
pub struct Client {
    stream: UnixStream,
    timeout: Option<Duration>,
}

/// A stream that is read up to an instant, however little comes at a time.
struct Limited<'a> {
    stream: &'a UnixStream,
    until: Option<Instant>,
}

impl Read for Limited<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        if let Some(until) = self.until {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            self.stream.set_read_timeout(Some(left))?;
        }
        self.stream.read(into)
    }
}

impl Client {
    /// Connects to the control socket at `path`, without waiting: a VMM that hangs
    /// takes no connections, and whoever gave up stays in its queue, until that is
    /// full and would hold everybody else up for ever.
    ///
    /// # Errors
    /// [`ClientError::Connect`].
    pub fn connect(path: &Path) -> Result<Self, ClientError> {
        let connected = connect_at_once(path);
        Ok(Self::on(connected.map_err(ClientError::Connect)?))
    }

    fn on(stream: UnixStream) -> Self {
        let timeout = None;
        Self { stream, timeout }
    }

    /// Bounds how long [`Client::call`] waits for an answer. A VMM that comes
    /// to a request later than that does not begin with it any more, if it
    /// changes the VM's state.
    pub fn set_timeout(&mut self, timeout: Option<Duration>) -> Result<(), ClientError> {
        let set = self.stream.set_write_timeout(timeout);
        set.map_err(ClientError::Broken)?;
        self.timeout = timeout;
        Ok(())
    }

    /// Sends a request and waits for its answer. [`Response::Failed`] becomes
    /// [`ClientError::Refused`].
    pub fn call(&mut self, request: &Request) -> Result<Response, ClientError> {
        self.call_with(request, &[])
    }

    /// [`Client::call`], with the descriptors that the request takes.
    pub fn call_with(
        &mut self,
        request: &Request,
        fds: &[BorrowedFd<'_>],
    ) -> Result<Response, ClientError> {
        let order = Order {
            until: self
                .timeout
                .filter(|_| request.changes_state())
                .map(Deadline::after),
            request: request.clone(),
        };
        let until = self
            .timeout
            .and_then(|wait| Instant::now().checked_add(wait));
        write_frame(&mut self.stream, &order).map_err(ClientError::Broken)?;
        if !fds.is_empty() {
            fdpass::send(&self.stream, fds).map_err(ClientError::Broken)?;
        }
        let mut limited = Limited {
            stream: &self.stream,
            until,
        };
        let answer = read_frame::<Response>(&mut limited).map_err(ClientError::Broken)?;
        // Whoever uses the stream from now on has a limit of their own.
        let whole = self.stream.set_read_timeout(self.timeout);
        whole.map_err(ClientError::Broken)?;
        match answer.map(Response::made_plain) {
            Some(Response::Failed { message }) => Err(ClientError::Refused(message)),
            Some(Response::Status(mut status)) => {
                status.pid = self.peer().unwrap_or(status.pid);
                Ok(Response::Status(status))
            }
            Some(response) => Ok(response),
            None => Err(ClientError::Broken(io::ErrorKind::UnexpectedEof.into())),
        }
    }

    /// The process that listens on the other side: whom an order to kill
    /// reaches, so the VMM's own word does not count.
    pub fn peer(&self) -> Option<u32> {
        let peer = rustix::net::sockopt::socket_peercred(&self.stream).ok()?;
        u32::try_from(peer.pid.as_raw_nonzero().get()).ok()
    }

    /// The stream itself, after [`Request::Console`].
    pub fn into_stream(self) -> UnixStream {
        self.stream
    }
}

fn connect_at_once(path: &Path) -> io::Result<UnixStream> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    connect(&socket, &SocketAddrUnix::new(path)?)?;
    let stream = UnixStream::from(socket);
    stream.set_nonblocking(false)?;
    Ok(stream)
}

#[cfg(test)]
mod tests {
    use hebe_types::VmId;

    use super::*;
    use crate::{RamMeter, VmStatus, VmmState};

    #[test]
    fn a_vmm_that_takes_no_connections_keeps_nobody_waiting() {
        let dir = tempfile::tempdir().expect("dir");
        let path = dir.path().join("vmm.sock");
        let socket = rustix::net::socket(AddressFamily::UNIX, SocketType::STREAM, None);
        let socket = socket.expect("a socket");
        let address = SocketAddrUnix::new(&path).expect("an address");
        rustix::net::bind(&socket, &address).expect("bind");
        rustix::net::listen(&socket, 1).expect("listen");
        let mut taken = 0;
        while Client::connect(&path).is_ok() {
            taken += 1;
            assert!(taken < 100, "without end");
        }
        assert!(matches!(
            Client::connect(&path),
            Err(ClientError::Connect(_))
        ));
        // And one that goes on is asked as ever.
        rustix::net::accept(&socket).expect("one that gave up");
        assert!(Client::connect(&path).is_ok());
    }

    #[test]
    fn what_changes_a_state_is_sent_with_the_time_that_the_client_waits() {
        // The answer is there already, and read in time on a busy computer, too.
        let wait = Duration::from_secs(1);
        for (request, timeout, bounded) in [
            (Request::Freeze, Some(wait), true),
            (Request::Freeze, None, false),
            (Request::Status, Some(wait), false),
        ] {
            let (stream, mut peer) = UnixStream::pair().expect("pair");
            let mut client = Client::on(stream);
            client.set_timeout(timeout).expect("timeout");
            write_frame(&mut peer, &Response::Done).expect("answer");
            client.call(&request).expect("call");
            let order: Order = read_frame(&mut peer).expect("read").expect("a frame");
            assert_eq!(order.request, request);
            assert_eq!(order.until.is_some(), bounded, "{order:?}");
            if bounded {
                std::thread::sleep(wait);
            }
            assert_eq!(order.is_expired(), bounded);
        }
    }

    fn status(pid: u32) -> Response {
        Response::Status(VmStatus {
            name: "web".parse().expect("name"),
            id: VmId([7; 16]),
            state: VmmState::Running,
            pid,
            version: "\x1b[2J".into(),
            resumes: 0,
            failed: Some("\x1b[31m".into()),
            guest_panicked: false,
            stopped_devices: vec!["\x07".into(); 10_000],
            ram_meter: RamMeter::default(),
            disk_request_ns: None,
            disk_rings: vec![true; 10_000],
            first_tx: None,
            resume: None,
            cage: None,
            balloon: None,
        })
    }

    #[test]
    fn a_vmm_that_lies_about_its_process_is_not_believed_and_its_words_are_plain() {
        let (stream, mut peer) = UnixStream::pair().expect("pair");
        let mut client = Client::on(stream);
        write_frame(&mut peer, &status(1)).expect("answer");
        let answer = client.call(&Request::Status).expect("call");
        let Response::Status(status) = answer else {
            panic!("{answer:?}")
        };
        assert_eq!(status.pid, std::process::id());
        let words = format!("{}{:?}", status.version, status.failed);
        assert!(!words.contains(char::is_control), "{words:?}");
        assert!(status.stopped_devices.len() < 1000);
        assert!(status.disk_rings.len() < 1000);
        let message = "\x1b[2Jno".into();
        write_frame(&mut peer, &Response::Failed { message }).expect("answer");
        let refused = client.call(&Request::Freeze).expect_err("refused");
        assert_eq!(refused.to_string(), "\u{fffd}[2Jno");
    }

    #[test]
    fn an_answer_that_comes_byte_by_byte_has_one_time_limit() {
        let (stream, mut peer) = UnixStream::pair().expect("pair");
        let mut client = Client::on(stream);
        let wait = Duration::from_millis(300);
        client.set_timeout(Some(wait)).expect("timeout");
        let drip = std::thread::spawn(move || {
            // A length of 1 MiB, and then a byte now and then.
            let _ = peer.write_all(&(1u32 << 20).to_le_bytes());
            while peer.write_all(b" ").is_ok() {
                std::thread::sleep(Duration::from_millis(20));
            }
        });
        let began = Instant::now();
        let late = client.call(&Request::Status).expect_err("too slow");
        assert!(matches!(late, ClientError::Broken(_)), "{late}");
        assert!(began.elapsed() < 400 * wait, "{:?}", began.elapsed());
        drop(client);
        drip.join().expect("join");
    }

    #[test]
    fn frames_round_trip_and_long_ones_are_refused() {
        let mut wire = Vec::new();
        write_frame(&mut wire, &Request::Freeze).expect("write");
        let back: Option<Request> = read_frame(&mut wire.as_slice()).expect("read");
        assert_eq!(back, Some(Request::Freeze));
        let none: Option<Request> = read_frame(&mut [].as_slice()).expect("empty");
        assert_eq!(none, None);
        let long = u32::MAX.to_le_bytes();
        assert!(read_frame::<Request>(&mut long.as_slice()).is_err());
        assert!(read_frame::<Request>(&mut [3u8, 0, 0, 0, b'{'].as_slice()).is_err());
    }
}
