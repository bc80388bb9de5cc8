//! The host's side.

use std::io;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::net::sockopt::{self, Timeout};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use crate::lines::{LineError, Lines, Wire};
use crate::protocol::{Done, Facts, Order, REQUEST_LEN_MAX, Request, SAID_LEN_MAX, Said};
use crate::{PORT, PROTOCOL};

/// Most lines that are read for one answer: beats may come between.
const LINES_MAX: usize = 16;

/// Why the agent did not do what it was told.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The VM has no sockets, or is not up.
    #[error(
        "the VM's socket cannot be reached: it needs [vsock] in its definition, or `hebe run --vsock`, and must be up"
    )]
    NoSocket(#[source] io::Error),
    /// Nobody serves the agent's port.
    #[error("no agent answers in the guest: install hebe-agent there and start it")]
    NoAgent,
    /// It speaks, and not so that it could be understood.
    #[error("what answers in the guest is no agent that this release understands: {0}")]
    Senseless(String),
    /// No agent would do it: nothing was asked.
    #[error("no agent does that: {0}")]
    Impossible(String),
    /// It says no.
    #[error("the agent in the guest says: {0}")]
    Refused(String),
    /// A line did not come, or was none.
    #[error(transparent)]
    Line(#[from] LineError),
}

/// Connects, and does not wait for ever where nobody accepts: a guest whose
/// driver is away leaves all comers waiting, and their number is bounded.
fn reach(socket: &Path, limit: Duration) -> io::Result<UnixStream> {
    let address = SocketAddrUnix::new(socket)?;
    let (family, kind) = (AddressFamily::UNIX, SocketType::STREAM);
    let stream = rustix::net::socket_with(family, kind, SocketFlags::CLOEXEC, None)?;
    sockopt::set_socket_timeout(&stream, Timeout::Send, Some(limit))?;
    rustix::net::connect(&stream, &address)?;
    Ok(UnixStream::from(stream))
}

/// A connection to an agent. Everything that it does ends in time.
#[derive(Debug)]
pub struct Client<W> {
    lines: Lines<W>,
    until: Instant,
    hello: Facts,
    last_id: u64,
}

impl Client<UnixStream> {
    /// Reaches the agent through a VM's `vsock.sock`, for all of whose answers
    /// there is `limit`.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn connect(socket: &Path, limit: Duration) -> Result<Self, ClientError> {
        let until = Instant::now() + limit;
        let stream = reach(socket, limit).map_err(ClientError::NoSocket)?;
        let mut lines = Lines::new(stream, SAID_LEN_MAX);
        lines.say(&format!("CONNECT {PORT}"), limit)?;
        // The VMM hangs up where nobody listens.
        match lines.next(until) {
            Ok(Some(line)) if line.starts_with("OK ") => Self::greet(lines, until),
            Ok(Some(_)) => Err(ClientError::Senseless("the VMM's answer".into())),
            Ok(None) | Err(LineError::Late | LineError::Io(_)) => Err(ClientError::NoAgent),
            Err(error) => Err(error.into()),
        }
    }
}

impl<W: Wire> Client<W> {
    /// Speaks with an agent on a stream that leads to it.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn new(wire: W, limit: Duration) -> Result<Self, ClientError> {
        Self::greet(Lines::new(wire, SAID_LEN_MAX), Instant::now() + limit)
    }

    fn greet(lines: Lines<W>, until: Instant) -> Result<Self, ClientError> {
        let mut this = Self {
            lines,
            until,
            hello: Facts::default(),
            last_id: 0,
        };
        match this.hear()? {
            Said::Hello(facts) if facts.protocol == PROTOCOL => this.hello = facts,
            Said::Hello(facts) => {
                let protocol = facts.protocol;
                let why = format!("it speaks protocol {protocol}, and this release {PROTOCOL}");
                return Err(ClientError::Senseless(why));
            }
            _ => return Err(ClientError::Senseless("it does not say hello".into())),
        }
        Ok(this)
    }

    /// What the agent said first. Text in it is the guest's: not to be shown
    /// as it is.
    pub fn hello(&self) -> &Facts {
        &self.hello
    }

    /// From now on there is `limit` for all that is said.
    pub fn give(&mut self, limit: Duration) {
        self.until = Instant::now() + limit;
    }

    /// Orders something, and waits for the answer.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn order(&mut self, order: Order) -> Result<Done, ClientError> {
        order.check().map_err(ClientError::Impossible)?;
        self.last_id += 1;
        let request = Request {
            id: self.last_id,
            order,
        };
        let text = serde_json::to_string(&request).map_err(io::Error::other);
        let text = text.map_err(LineError::Io)?;
        if text.len() > REQUEST_LEN_MAX {
            let len = text.len();
            let why = format!("the order has {len} bytes, and at most {REQUEST_LEN_MAX} are taken");
            return Err(ClientError::Impossible(why));
        }
        let left = self.until.saturating_duration_since(Instant::now());
        self.lines.say(&text, left)?;
        for _ in 0..LINES_MAX {
            match self.hear()? {
                Said::Done { id, result } if id == request.id => return Ok(result),
                Said::Failed { id, why } if id == request.id || id == 0 => {
                    return Err(ClientError::Refused(why));
                }
                Said::Beat(_) => {}
                _ => break,
            }
        }
        Err(ClientError::Senseless(
            "it answers what was not asked".into(),
        ))
    }

    /// The agent's next line.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn hear(&mut self) -> Result<Said, ClientError> {
        let Some(line) = self.lines.next(self.until)? else {
            return Err(ClientError::NoAgent);
        };
        serde_json::from_str(&line).map_err(|e| ClientError::Senseless(e.to_string()))
    }
}
