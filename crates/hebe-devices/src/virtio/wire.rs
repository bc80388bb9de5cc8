//! What a NIC is connected to: a tap, or a stream of frames to a process that
//! is a network (`passt`), or nothing.
//!
//! On the stream each frame has its length before it, four bytes, most
//! significant first. Both directions keep what is half done beside the socket
//! itself, because a reset of the guest goes on with the same one.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::{Arc, Mutex};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, recv, send};

use super::shared::lock;

/// `struct virtio_net_hdr_v1` (virtio 1.2, 5.1.6), before each frame of a tap.
pub(crate) const HEADER_LEN: usize = 12;
/// Longest frame without its header: an IP packet of 64 KiB, and its Ethernet
/// header with a VLAN's tag.
pub(crate) const FRAME_MAX: usize = 65536 + 18;
/// Bytes of a frame's length on a stream.
const LEN_LEN: usize = 4;
/// How long a frame that went out by half may take.
const REST_WAIT: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 50_000_000,
};

/// What a NIC is connected to.
#[derive(Clone, Debug)]
pub enum NetBackend {
    /// A tap whose frames have a virtio-net header; or anything that carries one
    /// such frame per read and write.
    Tap(Arc<OwnedFd>),
    /// A stream of frames.
    Stream(Arc<FrameStream>),
    /// Nothing: what is sent is lost.
    Nothing,
}

impl NetBackend {
    /// A tap.
    pub fn tap(tap: impl Into<OwnedFd>) -> Self {
        let tap = tap.into();
        // A tap that cannot be made non-blocking shows at the first read.
        let _ = rustix::io::ioctl_fionbio(&tap, true);
        Self::Tap(Arc::new(tap))
    }

    /// One end of a pair of sockets.
    pub fn stream(socket: impl Into<OwnedFd>) -> Self {
        Self::Stream(Arc::new(FrameStream {
            socket: socket.into(),
            halves: Mutex::default(),
        }))
    }

    pub(crate) fn raw_fd(&self) -> Option<RawFd> {
        match self {
            Self::Tap(tap) => Some(tap.as_raw_fd()),
            Self::Stream(stream) => Some(stream.socket.as_raw_fd()),
            Self::Nothing => None,
        }
    }

    /// Frames that have a virtio-net header, and so may be offloaded.
    pub(crate) fn tap_fd(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Self::Tap(tap) => Some(tap.as_fd()),
            _ => None,
        }
    }

    /// Sends a frame with its header before it. An error is a frame dropped.
    pub(crate) fn send(&self, frame: &[u8]) -> io::Result<()> {
        match self {
            Self::Tap(tap) => Ok(rustix::io::write(tap, frame).map(drop)?),
            Self::Stream(stream) => stream.send(&frame[HEADER_LEN..]),
            Self::Nothing => Err(io::ErrorKind::NotConnected.into()),
        }
    }

    /// Receives a frame, its header before it; gives the length of both.
    pub(crate) fn receive(&self, into: &mut [u8]) -> Received {
        match self {
            Self::Tap(tap) => match rustix::io::read(tap, into) {
                Ok(0) => Received::Gone,
                Ok(len) if len < HEADER_LEN => Received::Unusable,
                Ok(len) => Received::Frame(len),
                Err(Errno::WOULDBLOCK) => Received::Nothing,
                Err(Errno::INTR) => Received::Unusable,
                Err(_) => Received::Gone,
            },
            Self::Stream(stream) => {
                into[..HEADER_LEN].fill(0);
                stream.receive(&mut into[HEADER_LEN..])
            }
            Self::Nothing => Received::Gone,
        }
    }
}

/// What came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Received {
    /// A frame; its length with the header.
    Frame(usize),
    /// Nothing now.
    Nothing,
    /// Something that is no frame: try again.
    Unusable,
    /// The other side is gone for good.
    Gone,
}

/// A socket that carries frames.
#[derive(Debug)]
pub struct FrameStream {
    socket: OwnedFd,
    halves: Mutex<Halves>,
}

#[derive(Debug, Default)]
struct Halves {
    /// The rest of a frame that went out by half.
    out: Vec<u8>,
    /// What came, from the beginning of a frame on.
    come: Vec<u8>,
}

impl FrameStream {
    fn send(&self, frame: &[u8]) -> io::Result<()> {
        let mut halves = lock(&self.halves);
        if !self.send_rest(&mut halves.out)? {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let len = (frame.len() as u32).to_be_bytes();
        let mut whole = len.to_vec();
        whole.extend_from_slice(frame);
        match send(
            &self.socket,
            &whole,
            SendFlags::DONTWAIT | SendFlags::NOSIGNAL,
        ) {
            Ok(sent) => {
                halves.out = whole.split_off(sent);
                // The rest belongs to this frame, and the next one waits for it.
                if !halves.out.is_empty() {
                    let mut fds = [PollFd::new(&self.socket, PollFlags::OUT)];
                    let _ = poll(&mut fds, Some(&REST_WAIT));
                    self.send_rest(&mut halves.out)?;
                }
                Ok(())
            }
            Err(e) => Err(e.into()),
        }
    }

    /// Whether all of it went.
    fn send_rest(&self, rest: &mut Vec<u8>) -> io::Result<bool> {
        while !rest.is_empty() {
            match send(
                &self.socket,
                rest,
                SendFlags::DONTWAIT | SendFlags::NOSIGNAL,
            ) {
                Ok(sent) => drop(rest.drain(..sent)),
                Err(Errno::WOULDBLOCK) => return Ok(false),
                Err(e) => return Err(e.into()),
            }
        }
        Ok(true)
    }

    fn receive(&self, into: &mut [u8]) -> Received {
        let come = &mut lock(&self.halves).come;
        loop {
            if let Some((head, rest)) = come.split_at_checked(LEN_LEN) {
                let len = head.iter().fold(0, |len, b| len << 8 | usize::from(*b));
                if len > into.len() {
                    // There is no finding the next frame.
                    return Received::Gone;
                }
                if let Some(frame) = rest.get(..len) {
                    into[..len].copy_from_slice(frame);
                    come.drain(..LEN_LEN + len);
                    return Received::Frame(HEADER_LEN + len);
                }
            }
            let had = come.len();
            come.resize(had + FRAME_MAX, 0);
            let got = recv(&self.socket, &mut come[had..], RecvFlags::DONTWAIT);
            come.truncate(had + got.map_or(0, |(len, _)| len));
            match got {
                Ok((0, _)) => return Received::Gone,
                Ok(_) | Err(Errno::INTR) => {}
                Err(Errno::WOULDBLOCK) => return Received::Nothing,
                Err(_) => return Received::Gone,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use super::*;

    fn pair() -> (NetBackend, UnixStream) {
        let (ours, theirs) = UnixStream::pair().expect("pair");
        (NetBackend::stream(ours), theirs)
    }

    fn frame(n: u8, len: usize) -> Vec<u8> {
        let mut frame = vec![n; HEADER_LEN + len];
        frame[..HEADER_LEN].fill(0);
        frame
    }

    #[test]
    fn frames_come_whole_however_they_are_cut() {
        let (wire, mut theirs) = pair();
        let mut bytes = Vec::new();
        for (n, len) in [(1, 60), (2, 1514), (3, 0), (4, FRAME_MAX)] {
            bytes.extend((len as u32).to_be_bytes());
            bytes.extend(vec![n; len]);
        }
        let mut room = vec![0; HEADER_LEN + FRAME_MAX];
        assert_eq!(wire.receive(&mut room), Received::Nothing);
        let mut lens = Vec::new();
        for piece in bytes.chunks(997) {
            theirs.write_all(piece).expect("write");
            // As after a reset of the guest.
            let again = wire.clone();
            while let Received::Frame(len) = again.receive(&mut room) {
                let n = lens.len() as u8 + 1;
                assert!(room[HEADER_LEN..len].iter().all(|b| *b == n), "frame {n}");
                lens.push(len - HEADER_LEN);
            }
        }
        assert_eq!(lens, [60, 1514, 0, FRAME_MAX]);
        drop(theirs);
        assert_eq!(wire.receive(&mut room), Received::Gone);
    }

    #[test]
    fn a_frame_is_sent_whole_or_not_at_all() {
        let (wire, mut theirs) = pair();
        let mut sent = 0_u32;
        // Until there is no room.
        while wire.send(&frame(sent as u8, 9000)).is_ok() {
            sent += 1;
            assert!(sent < 10_000, "there is always room");
        }
        assert!(wire.send(&frame(0, 60)).is_err());
        let reader = std::thread::spawn(move || {
            let mut seen = 0;
            let mut len = [0; 4];
            while theirs.read_exact(&mut len).is_ok() {
                let mut body = vec![0; u32::from_be_bytes(len) as usize];
                theirs.read_exact(&mut body).expect("a whole frame");
                seen += 1;
                if body.len() == 60 {
                    return seen;
                }
                assert!(body.iter().all(|b| *b == (seen - 1) as u8));
            }
            seen
        });
        while wire.send(&frame(0, 60)).is_err() {
            std::thread::yield_now();
        }
        assert_eq!(reader.join().expect("reader"), sent + 1);
    }

    #[test]
    fn a_length_that_is_none_ends_the_stream() {
        let (wire, mut theirs) = pair();
        theirs.write_all(&[0xff; 8]).expect("write");
        let mut room = vec![0; HEADER_LEN + FRAME_MAX];
        assert_eq!(wire.receive(&mut room), Received::Gone);
        assert_eq!(NetBackend::Nothing.receive(&mut room), Received::Gone);
        assert!(NetBackend::Nothing.send(&frame(1, 60)).is_err());
    }
}
