//! The agent in the guest.

use std::io;
use std::mem;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use hebe_agent::guest::{Linux, PHASE_FILE, set_phase};
use hebe_agent::{Limits, PORT, converse, thaw_left};

/// Most connections at a time; one more is closed at once.
const CONNECTIONS_MAX: usize = 8;
/// The context id of whoever is not in a VM (virtio 1.2, 5.10.4).
const CID_HOST: u32 = 2;

const HELP: &str = "\
The agent in a VM of Hebe: serves the host over AF_VSOCK.

Usage:
  hebe-agent [--allow-exec]    serve
  hebe-agent phase NAME        tell the host how far this guest came: `ready`
  hebe-agent thaw              thaw the file systems that an agent left frozen

  --allow-exec   run programs for the host
  --help, --version
";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let result = match words[..] {
        [] => serve(false),
        ["--allow-exec"] => serve(true),
        ["phase", name] => set_phase(Path::new(PHASE_FILE), name),
        ["thaw"] => thaw_left().map(|_| ()).map_err(io::Error::other),
        ["--help" | "-h"] => {
            print!("{HELP}");
            Ok(())
        }
        ["--version"] => {
            println!("hebe-agent {}", env!("CARGO_PKG_VERSION"));
            Ok(())
        }
        _ => {
            eprint!("{HELP}");
            return ExitCode::from(2);
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("hebe-agent: {error}");
            ExitCode::FAILURE
        }
    }
}

fn serve(exec: bool) -> io::Result<()> {
    // By an agent that ended: nobody else would end its freeze.
    match thaw_left() {
        Ok(0) => {}
        Ok(count) => eprintln!("hebe-agent: file systems were frozen, and are thawed: {count}"),
        Err(error) => eprintln!("hebe-agent: {error}"),
    }
    let listener = listen(PORT).map_err(|e| {
        let way_out = "the guest needs a kernel with AF_VSOCK and [vsock] in its definition";
        io::Error::other(format!("port {PORT} cannot be listened on: {e}: {way_out}"))
    })?;
    let guest = Arc::new(Linux::default());
    let limits = Limits {
        exec,
        ..Limits::default()
    };
    let connections = Arc::new(AtomicUsize::new(0));
    loop {
        let stream = match accept(&listener) {
            Ok(Some(stream)) => stream,
            Ok(None) => continue,
            Err(error) => {
                // Such as too many open files; not to be tried in a hurry.
                eprintln!("hebe-agent: a connection cannot be taken: {error}");
                thread::sleep(Duration::from_secs(1));
                continue;
            }
        };
        let Some(place) = Place::take(&connections) else {
            continue;
        };
        let guest = Arc::clone(&guest);
        // Where no thread can be had, the connection is closed.
        let _ = thread::Builder::new().spawn(move || {
            let _place = place;
            // A connection that breaks is the host's business.
            let _ = converse(stream, &*guest, limits);
        });
    }
}

/// One of [`CONNECTIONS_MAX`] places, as long as it lives.
struct Place(Arc<AtomicUsize>);

impl Place {
    fn take(taken: &Arc<AtomicUsize>) -> Option<Self> {
        // Gives itself back where there was none.
        let place = Self(Arc::clone(taken));
        (taken.fetch_add(1, Ordering::SeqCst) < CONNECTIONS_MAX).then_some(place)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

fn address(port: u32) -> libc::sockaddr_vm {
    // SAFETY: all-zero is a valid address.
    let mut address: libc::sockaddr_vm = unsafe { mem::zeroed() };
    address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
    address.svm_cid = libc::VMADDR_CID_ANY;
    address.svm_port = port;
    address
}

const ADDRESS_LEN: libc::socklen_t = size_of::<libc::sockaddr_vm>() as libc::socklen_t;

fn listen(port: u32) -> io::Result<OwnedFd> {
    let kind = libc::SOCK_STREAM | libc::SOCK_CLOEXEC;
    // SAFETY: no pointer is passed.
    let fd = unsafe { libc::socket(libc::AF_VSOCK, kind, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a new descriptor that nothing else owns.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    let address = address(port);
    // SAFETY: the address is live and of the length that is said.
    let bound = unsafe { libc::bind(fd, (&raw const address).cast(), ADDRESS_LEN) };
    // SAFETY: no pointer is passed.
    if bound != 0 || unsafe { libc::listen(fd, CONNECTIONS_MAX as libc::c_int) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(socket)
}

/// The next connection; `None` if it was not the host's.
fn accept(listener: &OwnedFd) -> io::Result<Option<UnixStream>> {
    let mut peer = address(0);
    let mut len = ADDRESS_LEN;
    // SAFETY: address and length are live, and the length is the address's.
    let fd = unsafe {
        libc::accept4(
            listener.as_raw_fd(),
            (&raw mut peer).cast(),
            &raw mut len,
            libc::SOCK_CLOEXEC,
        )
    };
    if fd < 0 {
        let error = io::Error::last_os_error();
        return match error.kind() {
            io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted => Ok(None),
            _ => Err(error),
        };
    }
    // SAFETY: a new descriptor that nothing else owns.
    let stream = unsafe { OwnedFd::from_raw_fd(fd) };
    // Programs of this guest could reach the port too, where the kernel has
    // loopback; nested guests have other context ids.
    if peer.svm_cid != CID_HOST {
        return Ok(None);
    }
    // Reading, writing and time limits are the same for all stream sockets;
    // addresses are what differs, and none is asked for.
    Ok(Some(UnixStream::from(stream)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_free_again_however_its_connection_ended() {
        let taken = Arc::default();
        let mut places: Vec<_> = (0..CONNECTIONS_MAX)
            .map(|_| Place::take(&taken).expect("free"))
            .collect();
        assert!(Place::take(&taken).is_none());
        assert_eq!(taken.load(Ordering::SeqCst), CONNECTIONS_MAX);
        let place = places.pop().expect("a place");
        let panics = thread::spawn(move || {
            let _place = place;
            std::panic::resume_unwind(Box::new("a connection's thread panics"));
        });
        panics.join().expect_err("panic");
        let place = places.pop().expect("a place");
        // No address space has room for such a stack.
        let builder = thread::Builder::new().stack_size(1 << 60);
        builder.spawn(move || drop(place)).expect_err("no thread");
        assert_eq!(taken.load(Ordering::SeqCst), CONNECTIONS_MAX - 2);
    }
}
