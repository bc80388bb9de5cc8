//! Ports of the host's loopback address that lead to guests. Rules of the
//! kernel could do it only by letting guests send to that address; so the helper
//! listens there and passes bytes on.

use std::io;
use std::net::{Ipv4Addr, Shutdown, SocketAddrV4, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use hebe_types::Forward;

use crate::Port;

/// Most connections that are passed on at once; more are hung up on.
const CONNECTIONS_MAX: usize = 128;
/// How long a guest has to answer.
const CONNECT_WAIT: Duration = Duration::from_secs(10);

/// A port that is listened on.
pub(crate) struct Door {
    /// Where it is, and where it leads.
    pub(crate) from: SocketAddrV4,
    to: SocketAddrV4,
    pub(crate) listener: TcpListener,
    open: Arc<AtomicUsize>,
}

/// The doors that these ports need: (from, to).
pub(crate) fn doors(ports: &[Port]) -> Vec<(SocketAddrV4, SocketAddrV4)> {
    let of = |port: &Port, forward: &Forward| {
        let here = match forward.address {
            None => Some(Ipv4Addr::LOCALHOST),
            Some(address) => Some(address).filter(Ipv4Addr::is_loopback),
        }?;
        (!forward.udp).then(|| {
            (
                SocketAddrV4::new(here, forward.host),
                SocketAddrV4::new(port.address, forward.guest),
            )
        })
    };
    ports
        .iter()
        .flat_map(|port| port.forward.iter().filter_map(move |f| of(port, f)))
        .collect()
}

impl Door {
    pub(crate) fn open(from: SocketAddrV4, to: SocketAddrV4) -> io::Result<Self> {
        let listener = TcpListener::bind(from)?;
        listener.set_nonblocking(true)?;
        Ok(Self {
            from,
            to,
            listener,
            open: Arc::default(),
        })
    }

    pub(crate) fn leads(&self) -> (SocketAddrV4, SocketAddrV4) {
        (self.from, self.to)
    }

    /// Takes one connection, if one waits.
    pub(crate) fn serve(&self) {
        let Ok((stream, _)) = self.listener.accept() else {
            return;
        };
        if self.open.fetch_add(1, Ordering::Relaxed) >= CONNECTIONS_MAX {
            self.open.fetch_sub(1, Ordering::Relaxed);
            return;
        }
        let (to, open) = (self.to, Arc::clone(&self.open));
        let started = thread::Builder::new()
            .name("forward".into())
            .spawn(move || {
                // Either side may end it at any time.
                let _ = pass(stream, to);
                open.fetch_sub(1, Ordering::Relaxed);
            });
        if started.is_err() {
            self.open.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

fn pass(near: TcpStream, to: SocketAddrV4) -> io::Result<()> {
    near.set_nonblocking(false)?;
    let far = TcpStream::connect_timeout(&to.into(), CONNECT_WAIT)?;
    let (near_again, far_again) = (near.try_clone()?, far.try_clone()?);
    thread::scope(|scope| {
        scope.spawn(|| one_way(&near, &far));
        one_way(&far_again, &near_again);
    });
    Ok(())
}

/// Until one side ends; then the other is told.
fn one_way(mut from: &TcpStream, mut to: &TcpStream) {
    if io::copy(&mut from, &mut to).is_err() {
        let _ = from.shutdown(Shutdown::Read);
    }
    let _ = to.shutdown(Shutdown::Write);
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    #[test]
    fn bytes_go_through_both_ways_and_an_end_is_passed_on() {
        let guest = TcpListener::bind("127.0.0.1:0").expect("guest");
        let to = match guest.local_addr().expect("address") {
            std::net::SocketAddr::V4(to) => to,
            other => panic!("{other}"),
        };
        let door = Door::open(SocketAddrV4::new(Ipv4Addr::LOCALHOST, 0), to).expect("door");
        let at = door.listener.local_addr().expect("address");
        let server = thread::spawn(move || {
            let (mut stream, _) = guest.accept().expect("accept");
            let mut text = String::new();
            stream.read_to_string(&mut text).expect("read to the end");
            stream
                .write_all(text.to_uppercase().as_bytes())
                .expect("answer");
        });
        let mut client = TcpStream::connect(at).expect("connect");
        client.write_all(b"word").expect("write");
        client.shutdown(Shutdown::Write).expect("end");
        while !server.is_finished() {
            door.serve();
            thread::yield_now();
        }
        let mut text = String::new();
        client.read_to_string(&mut text).expect("read");
        assert_eq!(text, "WORD");
        server.join().expect("server");
    }

    #[test]
    fn only_tcp_from_the_host_itself_needs_a_door() {
        let port = Port {
            vm: "web".parse().expect("name"),
            tap: "t".into(),
            mac: "52:54:00:00:00:01".parse().expect("mac"),
            address: Ipv4Addr::new(10, 86, 0, 9),
            forward: ["8080:80", "udp:53:53", "192.0.2.1:81:81", "127.0.0.2:82:83"]
                .map(|f| f.parse().expect("forward"))
                .to_vec(),
            expected_until_ns: None,
        };
        let ways: Vec<String> = doors(&[port])
            .iter()
            .map(|(from, to)| format!("{from}>{to}"))
            .collect();
        assert_eq!(
            ways,
            ["127.0.0.1:8080>10.86.0.9:80", "127.0.0.2:82>10.86.0.9:83"]
        );
    }
}
