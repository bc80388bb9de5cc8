//! What systemd hands over and wants to be told (sd_notify(3),
//! sd_listen_fds(3)): a few lines, so that no library is needed.

use std::env;
use std::ffi::OsString;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

/// The first descriptor that is handed over.
const LISTEN_FDS_START: i32 = 3;
/// Most sockets that are taken.
const LISTEN_FDS_MAX: i32 = 16;
/// What would be passed on to every VMM.
const VARIABLES: [&str; 6] = [
    "NOTIFY_SOCKET",
    "WATCHDOG_USEC",
    "WATCHDOG_PID",
    "LISTEN_PID",
    "LISTEN_FDS",
    "LISTEN_FDNAMES",
];

/// What was found in the environment.
#[derive(Debug, Default)]
pub struct Systemd {
    notify: Option<OsString>,
    watchdog: Option<Duration>,
    listen: i32,
}

impl Systemd {
    /// Takes everything out of the environment, which VMMs inherit.
    ///
    /// # Safety
    /// The process has no other thread yet.
    pub unsafe fn take() -> Self {
        let number = |key: &str| env::var(key).ok()?.parse::<u64>().ok();
        let ours = |key: &str| number(key).is_none_or(|pid| pid == u64::from(std::process::id()));
        let listens = number("LISTEN_PID") == Some(u64::from(std::process::id()));
        let found = Self {
            notify: env::var_os("NOTIFY_SOCKET").filter(|path| !path.is_empty()),
            watchdog: number("WATCHDOG_USEC")
                .filter(|usec| *usec > 0 && ours("WATCHDOG_PID"))
                .map(Duration::from_micros),
            listen: number("LISTEN_FDS")
                .filter(|_| listens)
                .and_then(|count| i32::try_from(count).ok())
                .unwrap_or(0)
                .clamp(0, LISTEN_FDS_MAX),
        };
        for key in VARIABLES {
            // SAFETY: the caller says that no other thread reads the environment.
            unsafe { env::remove_var(key) };
        }
        found
    }

    /// The sockets that were handed over, close-on-exec from now on.
    ///
    /// # Safety
    /// Called once; nothing was opened at these numbers since the process began.
    pub unsafe fn sockets(&mut self) -> io::Result<Vec<OwnedFd>> {
        let count = std::mem::take(&mut self.listen);
        (LISTEN_FDS_START..LISTEN_FDS_START + count)
            .map(|number| {
                // SAFETY: systemd opened it for this process, and it is taken once.
                let fd = unsafe { OwnedFd::from_raw_fd(number) };
                rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::CLOEXEC)?;
                Ok(fd)
            })
            .collect()
    }

    /// How often systemd wants to hear that all is well: half of its patience.
    pub fn watchdog(&self) -> Option<Duration> {
        self.watchdog.map(|patience| patience / 2)
    }

    /// Says something; nobody waits for an answer.
    pub fn say(&self, words: &str) {
        if let Some(socket) = &self.notify {
            let _ = send(socket, words);
        }
    }
}

fn send(socket: &OsString, words: &str) -> io::Result<()> {
    let bytes = socket.as_bytes();
    let address = match bytes.strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name)?,
        None => SocketAddr::from_pathname(socket)?,
    };
    let sender = UnixDatagram::unbound()?;
    // A systemd that does not listen must hold nobody up.
    sender.set_nonblocking(true)?;
    sender.send_to_addr(words.as_bytes(), &address)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_reach_a_socket_in_the_file_system_and_one_without_a_name() {
        let dir = tempfile::tempdir().expect("dir");
        let path = dir.path().join("notify");
        let name = format!("hebed-test-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(&name).expect("address");
        let sockets = [
            (UnixDatagram::bind(&path).expect("bind"), path.into()),
            (
                UnixDatagram::bind_addr(&address).expect("bind"),
                OsString::from(format!("@{name}")),
            ),
        ];
        for (receiver, notify) in sockets {
            let systemd = Systemd {
                notify: Some(notify),
                ..Systemd::default()
            };
            systemd.say("READY=1");
            let mut words = [0; 16];
            let length = receiver.recv(&mut words).expect("said");
            assert_eq!(&words[..length], b"READY=1");
        }
        // Nobody there: nothing happens.
        Systemd::default().say("READY=1");
    }

    #[test]
    fn systemd_hears_twice_within_its_patience() {
        let systemd = Systemd {
            watchdog: Some(Duration::from_secs(30)),
            ..Systemd::default()
        };
        assert_eq!(systemd.watchdog(), Some(Duration::from_secs(15)));
    }
}
