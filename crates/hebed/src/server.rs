//! Sockets and connections.
//!
//! Bounds, so that no client costs the host more than a little: so many
//! connections at a time ([`CONNECTIONS_MAX`]; more wait in the kernel), so
//! much buffer each ([`BUFFER_MAX`]), so long for a request's head or an idle
//! connection ([`HEAD_WAIT`]), and so long for a client to take a part of its
//! answer ([`TAKE_WAIT`]).

use std::convert::Infallible;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net as std_unix;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::Request;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::UnixListener;
use tokio::sync::Semaphore;
use tower::ServiceExt;

use crate::limits::Peer;
use crate::log;
use crate::stall::Stall;

/// Connections at a time.
pub const CONNECTIONS_MAX: usize = 512;
/// Buffer of a connection, in bytes; a request's head has to fit.
pub const BUFFER_MAX: usize = 16 << 10;
/// How long a request's head may take, and how long a connection may be idle.
pub const HEAD_WAIT: Duration = Duration::from_secs(10);
/// How long a client may take nothing of what it is sent.
pub const TAKE_WAIT: Duration = Duration::from_secs(30);

/// Why there is no socket.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// Another daemon listens there.
    #[error("another hebed listens on {0}: stop it first")]
    Taken(std::path::PathBuf),
    /// There is something that is no socket.
    #[error("{0} is no socket, and is left as it is: name another place with --socket")]
    NoSocket(std::path::PathBuf),
    /// There is no such group.
    #[error(
        "there is no group '{0}': make it with `groupadd --system {0}`, or name another with --group"
    )]
    NoGroup(String),
    /// The system's own reason.
    #[error("cannot listen on {path}: check that the directory may be written")]
    Io {
        /// Where.
        path: std::path::PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Listens at `path`, for its owner and for `group`. What a killed daemon left
/// there goes.
pub fn listen(path: &Path, group: Option<&str>) -> Result<std_unix::UnixListener, SocketError> {
    let failed = |source| SocketError::Io {
        path: path.to_owned(),
        source,
    };
    let gid = group.map(group_id).transpose()?;
    if let Some(dir) = path.parent() {
        fs::create_dir_all(dir).map_err(failed)?;
    }
    match fs::symlink_metadata(path) {
        Ok(found) if !found.file_type().is_socket() => {
            return Err(SocketError::NoSocket(path.to_owned()));
        }
        Ok(_) if std_unix::UnixStream::connect(path).is_ok() => {
            return Err(SocketError::Taken(path.to_owned()));
        }
        Ok(_) => fs::remove_file(path).map_err(failed)?,
        Err(_) => {}
    }
    let listener = std_unix::UnixListener::bind(path).map_err(failed)?;
    // Until here nobody but the owner may write to it, which a connection takes.
    std::os::unix::fs::chown(path, None, gid).map_err(failed)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o660)).map_err(failed)?;
    if let (Some(_), Some(dir)) = (gid, path.parent()) {
        let mode = fs::metadata(dir).map_err(failed)?.permissions().mode();
        fs::set_permissions(dir, fs::Permissions::from_mode(mode | 0o011)).map_err(failed)?;
    }
    Ok(listener)
}

/// The number of a group, as /etc/group has it.
fn group_id(group: &str) -> Result<u32, SocketError> {
    if let Ok(number) = group.parse() {
        return Ok(number);
    }
    let groups = fs::read_to_string("/etc/group").unwrap_or_default();
    find_group(&groups, group).ok_or_else(|| SocketError::NoGroup(group.to_owned()))
}

fn find_group(groups: &str, wanted: &str) -> Option<u32> {
    groups.lines().find_map(|line| {
        let mut words = line.split(':');
        let name = words.next()?;
        (name == wanted).then(|| words.nth(1)?.parse().ok())?
    })
}

/// A socket that systemd listens on.
pub fn adopt(socket: OwnedFd) -> io::Result<std_unix::UnixListener> {
    use rustix::net::{AddressFamily, getsockname};
    let address = getsockname(&socket)?;
    if address.address_family() != AddressFamily::UNIX {
        let text = "the socket that systemd hands over is no unix socket: see hebed.socket";
        return Err(io::Error::other(text));
    }
    Ok(socket.into())
}

/// Serves one listener until the process ends. `turns` are shared by all.
pub async fn serve(
    listener: std_unix::UnixListener,
    router: Router,
    turns: Arc<Semaphore>,
) -> io::Error {
    let listener = match listener
        .set_nonblocking(true)
        .and_then(|()| UnixListener::from_std(listener))
    {
        Ok(listener) => listener,
        Err(error) => return error,
    };
    loop {
        let Ok(turn) = Arc::clone(&turns).acquire_owned().await else {
            return io::Error::other("no more turns");
        };
        let Some((stream, _)) = taken(listener.accept().await).await else {
            continue;
        };
        let Ok(credentials) = stream.peer_cred() else {
            continue;
        };
        let peer = Peer::Local {
            uid: credentials.uid(),
        };
        let router = router.clone();
        tokio::spawn(async move {
            let _turn = turn;
            converse(stream, peer, router).await;
        });
    }
}

/// A connection; `None`, after a while, where none could be taken.
pub(crate) async fn taken<T>(accepted: io::Result<T>) -> Option<T> {
    match accepted {
        Ok(connection) => Some(connection),
        Err(error) => {
            // Out of descriptors, most likely: others end meanwhile.
            log::warning(format!("a connection could not be taken: {error}"));
            tokio::time::sleep(Duration::from_millis(100)).await;
            None
        }
    }
}

/// One connection; ends with it.
pub async fn converse<S>(stream: S, peer: Peer, router: Router)
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
{
    let service = service_fn(move |mut request: Request<Incoming>| {
        request.extensions_mut().insert(peer);
        let router = router.clone();
        async move {
            let answer: Result<_, Infallible> = router.oneshot(request).await;
            answer
        }
    });
    let stream = TokioIo::new(Stall::new(stream, TAKE_WAIT));
    // How it ended is the client's affair.
    let _ = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_WAIT)
        .max_buf_size(BUFFER_MAX)
        .serve_connection(stream, service)
        .await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_are_found_by_name_and_by_number() {
        let groups = "root:x:0:\nhebe:x:977:ada,bob\nhebe-too:x:978:\n";
        assert_eq!(find_group(groups, "hebe"), Some(977));
        assert_eq!(find_group(groups, "heb"), None);
        assert_eq!(group_id("977").expect("a number"), 977);
        let error = group_id("no-such-group").expect_err("none").to_string();
        assert!(error.contains("groupadd"), "{error}");
    }

    #[test]
    fn what_a_killed_daemon_left_goes_and_nothing_else() {
        let dir = tempfile::tempdir().expect("dir");
        let path = dir.path().join("run/hebed.sock");
        let first = listen(&path, None).expect("new");
        let error = listen(&path, None).expect_err("taken").to_string();
        assert!(error.contains("another hebed"), "{error}");
        drop(first);
        // A process that another test starts has a copy until it is a program.
        let end = std::time::Instant::now() + std::time::Duration::from_secs(120);
        let _second = loop {
            match listen(&path, None) {
                Err(SocketError::Taken(_)) if std::time::Instant::now() < end => {
                    std::thread::yield_now();
                }
                other => break other.expect("left behind"),
            }
        };
        let mode = fs::metadata(&path).expect("there").permissions().mode();
        assert_eq!(mode & 0o777, 0o660);
        let file = dir.path().join("file");
        fs::write(&file, "mine").expect("write");
        assert!(matches!(listen(&file, None), Err(SocketError::NoSocket(_))));
        assert_eq!(fs::read(&file).expect("untouched"), b"mine");
    }
}
