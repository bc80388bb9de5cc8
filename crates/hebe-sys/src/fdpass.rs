//! Open descriptors over a unix socket (`SCM_RIGHTS`, unix(7)).
//!
//! How memory that has no name goes from one process to another: a VMM hands
//! its memfds to the host's job, and a holder gives them to the next VMM.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

/// Most descriptors in one message (`SCM_MAX_FD`).
pub const FDS_MAX: usize = 253;

/// Sends `fds` with one byte that carries them. The receiver asks for them by
/// [`receive`], at the same place in the stream.
///
/// # Errors
/// `InvalidInput` for none or for more than [`FDS_MAX`]; else the system's.
pub fn send(stream: &UnixStream, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    if fds.is_empty() || fds.len() > FDS_MAX {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    loop {
        let byte = [io::IoSlice::new(b"F")];
        match sendmsg(stream, &byte, &mut control, SendFlags::NOSIGNAL) {
            Ok(_) => return Ok(()),
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
}

/// Receives exactly `count` descriptors, close-on-exec. Whoever sends another
/// number, or something else, is refused, and what came is closed.
///
/// # Errors
/// `UnexpectedEof` when the peer is gone, `InvalidData` for anything but the
/// descriptors; else the system's.
pub fn receive(stream: &UnixStream, count: usize) -> io::Result<Vec<OwnedFd>> {
    let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0u8; 1];
    let received = loop {
        let mut into = [io::IoSliceMut::new(&mut byte)];
        match recvmsg(stream, &mut into, &mut control, RecvFlags::CMSG_CLOEXEC) {
            Ok(received) => break received,
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    };
    let mut fds = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fds.extend(rights);
        }
    }
    if received.bytes == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let whole = !received.flags.contains(ReturnFlags::CTRUNC);
    if byte != *b"F" || fds.len() != count || !whole {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "the peer sent other descriptors than were agreed",
        ));
    }
    Ok(fds)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::{Read, Seek, Write};
    use std::os::fd::AsFd;

    #[test]
    fn descriptors_arrive_in_order_between_bytes_of_the_stream() {
        let (mut a, mut b) = UnixStream::pair().expect("pair");
        let files: Vec<File> = (0u8..3)
            .map(|i| {
                let mut file = tempfile::tempfile().expect("file");
                file.write_all(&[i]).expect("write");
                file
            })
            .collect();
        let fds: Vec<BorrowedFd> = files.iter().map(AsFd::as_fd).collect();
        a.write_all(b"before").expect("write");
        send(&a, &fds).expect("send");
        a.write_all(b"after").expect("write");
        drop(files);
        let mut text = [0; 6];
        b.read_exact(&mut text).expect("read");
        let back = receive(&b, 3).expect("receive");
        for (i, fd) in (0u8..).zip(back) {
            assert!(
                rustix::io::fcntl_getfd(&fd)
                    .expect("flags")
                    .contains(rustix::io::FdFlags::CLOEXEC)
            );
            let mut file = File::from(fd);
            file.rewind().expect("rewind");
            let mut byte = [9];
            file.read_exact(&mut byte).expect("read");
            assert_eq!(byte, [i]);
        }
        let mut text = [0; 5];
        b.read_exact(&mut text).expect("read");
        assert_eq!(&text, b"after");
    }

    #[test]
    fn another_number_and_plain_bytes_are_refused() {
        let (mut a, b) = UnixStream::pair().expect("pair");
        let null = File::open("/dev/null").expect("null");
        assert!(send(&a, &[]).is_err());
        assert!(send(&a, &vec![null.as_fd(); FDS_MAX + 1]).is_err());
        send(&a, &[null.as_fd(); 2]).expect("send");
        let refused = receive(&b, 1).expect_err("two");
        assert_eq!(refused.kind(), io::ErrorKind::InvalidData);
        a.write_all(b"F").expect("write");
        assert!(receive(&b, 1).is_err(), "no descriptor with it");
        drop(a);
        let gone = receive(&b, 1).expect_err("closed");
        assert_eq!(gone.kind(), io::ErrorKind::UnexpectedEof);
    }
}
