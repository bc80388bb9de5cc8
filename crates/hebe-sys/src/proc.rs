//! Starting a process that outlives its parent, and what /proc says of one.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};
use std::sync::atomic::{AtomicBool, Ordering};

/// Starts `command` as the leader of a session of its own, with the
/// descriptors `keep` open in it under the same numbers. They stay
/// close-on-exec in this process, so that no other child started at the same
/// time inherits them.
pub fn spawn_detached(mut command: Command, keep: Vec<OwnedFd>) -> io::Result<Child> {
    let numbers: Vec<RawFd> = keep.iter().map(AsRawFd::as_raw_fd).collect();
    let prepare = move || {
        // SAFETY: setsid(2) and fcntl(2) are async-signal-safe and take no
        // memory; the descriptors are open, for `keep` outlives the spawn.
        unsafe {
            if libc::setsid() < 0 {
                return Err(io::Error::last_os_error());
            }
            for &number in &numbers {
                if libc::fcntl(number, libc::F_SETFD, 0) < 0 {
                    return Err(io::Error::last_os_error());
                }
            }
        }
        Ok(())
    };
    // SAFETY: the closure runs between fork and exec; it makes only the two
    // async-signal-safe calls above, allocates nothing and takes no lock.
    unsafe {
        command.pre_exec(prepare);
    }
    let child = command.spawn();
    drop(keep);
    child
}

/// Lets this process, and those it starts, have as many descriptors open as it
/// may allow itself: a VM in files of its own has up to 65.
pub fn raise_file_limit() -> io::Result<()> {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    Ok(setrlimit(Resource::Nofile, raised)?)
}

/// Whether process `pid` exists.
pub fn is_alive(pid: u32) -> bool {
    let Some(pid) = i32::try_from(pid)
        .ok()
        .and_then(rustix::process::Pid::from_raw)
    else {
        return false;
    };
    !matches!(
        rustix::process::test_kill_process(pid),
        Err(rustix::io::Errno::SRCH)
    )
}

/// The id of the running kernel's boot, 16 bytes.
pub fn boot_id() -> io::Result<[u8; 16]> {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    parse_uuid(text.trim())
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "boot_id is no UUID"))
}

/// Reads 32 hexadecimal digits with or without hyphens.
pub fn parse_uuid(text: &str) -> Option<[u8; 16]> {
    let digits: Vec<u8> = text
        .bytes()
        .filter(|&b| b != b'-')
        .map(|b| (b as char).to_digit(16).map(|d| d as u8))
        .collect::<Option<_>>()?;
    let mut bytes = [0; 16];
    if digits.len() != 32 {
        return None;
    }
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks(2)) {
        *byte = pair[0] << 4 | pair[1];
    }
    Some(bytes)
}

/// The running kernel's release, as `uname -r` prints it.
pub fn kernel_release() -> String {
    rustix::system::uname()
        .release()
        .to_string_lossy()
        .into_owned()
}

/// Nanoseconds since the running kernel set up its clocks, time in system
/// sleep counted (`CLOCK_BOOTTIME`).
pub fn since_boot_ns() -> u64 {
    timespec_ns(rustix::time::clock_gettime(rustix::time::ClockId::Boottime))
}

/// `CLOCK_MONOTONIC` in nanoseconds.
pub fn monotonic_ns() -> u64 {
    timespec_ns(rustix::time::clock_gettime(
        rustix::time::ClockId::Monotonic,
    ))
}

fn timespec_ns(time: rustix::time::Timespec) -> u64 {
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// Sets `CLOCK_REALTIME`.
pub fn set_realtime_ns(realtime_ns: u64) -> io::Result<()> {
    let time = rustix::time::Timespec {
        tv_sec: (realtime_ns / 1_000_000_000) as i64,
        tv_nsec: (realtime_ns % 1_000_000_000) as _,
    };
    rustix::time::clock_settime(rustix::time::ClockId::Realtime, time).map_err(io::Error::from)
}

/// Set when a signal asked this process to stop what it does.
static ASKED_TO_STOP: AtomicBool = AtomicBool::new(false);

extern "C" fn note_signal(signal: libc::c_int) {
    // A hang-up is no wish to stop: the terminal may go away because the very
    // services are being stopped that carried it.
    if signal != libc::SIGHUP {
        ASKED_TO_STOP.store(true, Ordering::Relaxed);
    }
}

/// From now on SIGINT and SIGTERM only set a flag, and SIGHUP does nothing.
/// Programs started later have their default signals, because a handler, other
/// than an ignored signal, does not pass through exec.
pub fn hold_signals() -> io::Result<()> {
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        // SAFETY: all-zero is a valid sigaction; the handler stores to an
        // atomic and is async-signal-safe.
        let result = unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            let handler: extern "C" fn(libc::c_int) = note_signal;
            action.sa_sigaction = handler as libc::sighandler_t;
            action.sa_flags = libc::SA_RESTART;
            libc::sigaction(signal, &action, std::ptr::null_mut())
        };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Whether a signal arrived since [`hold_signals`].
pub fn asked_to_stop() -> bool {
    ASKED_TO_STOP.load(Ordering::Relaxed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_detached_child_gets_exactly_the_descriptors_it_is_meant_to_get() {
        let (kept, other) = std::io::pipe().expect("pipe");
        let kept = OwnedFd::from(kept);
        let (kept_number, other_number) = (kept.as_raw_fd(), other.as_raw_fd());
        let mut command = Command::new("/bin/sh");
        command.args([
            "-c",
            &format!(
                "test -e /proc/self/fd/{kept_number} && ! test -e /proc/self/fd/{other_number}"
            ),
        ]);
        let mut child = spawn_detached(command, vec![kept]).expect("spawn");
        assert!(child.wait().expect("wait").success());
    }

    #[test]
    fn uuids_are_read_with_and_without_hyphens() {
        let plain = parse_uuid("00112233445566778899aabbccddeeff").expect("plain");
        assert_eq!(
            parse_uuid("00112233-4455-6677-8899-aabbccddeeff"),
            Some(plain)
        );
        assert_eq!(plain[1], 0x11);
        assert_eq!(parse_uuid("0011"), None);
        assert_eq!(parse_uuid("zz112233445566778899aabbccddeeff"), None);
        assert!(boot_id().is_ok());
    }

    #[test]
    fn this_process_is_alive_and_an_impossible_one_is_not() {
        assert!(is_alive(std::process::id()));
        assert!(!is_alive(0x7fff_ffff));
    }
}
