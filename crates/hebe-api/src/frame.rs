//! Frames over a unix socket, and a blocking client.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

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
    /// An answer of another kind than asked for.
    #[error("the VMM gave an answer of the wrong kind: it may be of another release")]
    Unexpected,
}

/// A connection to one VMM.
#[derive(Debug)]
pub struct Client {
    stream: UnixStream,
}

impl Client {
    /// Connects to the control socket at `path`.
    pub fn connect(path: &Path) -> Result<Self, ClientError> {
        let stream = UnixStream::connect(path).map_err(ClientError::Connect)?;
        Ok(Self { stream })
    }

    /// Bounds how long [`Client::call`] waits for an answer. A VMM that comes
    /// to a request later than that does not begin with it any more, if it
    /// changes the VM's state.
    pub fn set_timeout(&self, timeout: Option<Duration>) -> Result<(), ClientError> {
        self.stream
            .set_read_timeout(timeout)
            .map_err(ClientError::Broken)
    }

    /// Sends a request and waits for its answer. [`Response::Failed`] becomes
    /// [`ClientError::Refused`].
    pub fn call(&mut self, request: &Request) -> Result<Response, ClientError> {
        let wait = self.stream.read_timeout().map_err(ClientError::Broken)?;
        let order = Order {
            until: wait
                .filter(|_| request.changes_state())
                .map(Deadline::after),
            request: request.clone(),
        };
        write_frame(&mut self.stream, &order).map_err(ClientError::Broken)?;
        match read_frame(&mut self.stream).map_err(ClientError::Broken)? {
            Some(Response::Failed { message }) => Err(ClientError::Refused(message)),
            Some(response) => Ok(response),
            None => Err(ClientError::Broken(io::ErrorKind::UnexpectedEof.into())),
        }
    }

    /// The stream itself, after [`Request::Console`].
    pub fn into_stream(self) -> UnixStream {
        self.stream
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_changes_a_state_is_sent_with_the_time_that_the_client_waits() {
        let wait = Duration::from_millis(20);
        for (request, timeout, bounded) in [
            (Request::Freeze, Some(wait), true),
            (Request::Freeze, None, false),
            (Request::Status, Some(wait), false),
        ] {
            let (stream, mut peer) = UnixStream::pair().expect("pair");
            let mut client = Client { stream };
            client.set_timeout(timeout).expect("timeout");
            // The answer is there already.
            write_frame(&mut peer, &Response::Done).expect("answer");
            client.call(&request).expect("call");
            let order: Order = read_frame(&mut peer).expect("read").expect("a frame");
            assert_eq!(order.request, request);
            assert_eq!(order.until.is_some(), bounded, "{order:?}");
            std::thread::sleep(wait);
            assert_eq!(order.is_expired(), bounded);
        }
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
