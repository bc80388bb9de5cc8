//! A network of a VM's own without privileges: `passt(1)`, a process that turns
//! the guest's packets into sockets of its own. VMM and passt have the two ends
//! of a pair of sockets, so each ends with the other, and a resume starts a new
//! one that hands out the same address.

use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;
use std::{env, fs};

use hebe_sys::proc::spawn_detached;
use hebe_types::{Forward, MacAddr, NetConfig, USER_ADDRESS, USER_GATEWAY};

/// How long it may take until it answers.
const READY_WAIT: Duration = Duration::from_secs(20);
/// Longest frame on its socket, in bytes.
const FRAME_MAX: usize = 65536;

/// Why there is none.
#[derive(Debug, thiserror::Error)]
pub enum PasstError {
    /// Not there.
    #[error(
        "network = \"user\" needs the program passt, which is not installed: install the package passt, or use network = \"nat\" as root"
    )]
    Absent,
    /// It did not start.
    #[error("passt does not start: {0}")]
    Start(#[from] io::Error),
    /// It ended, or does not answer.
    #[error("passt does not serve: {0}")]
    Ended(String),
}

/// The program, if it is installed.
pub fn program() -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let dirs = env::split_paths(&path).chain(["/usr/bin".into(), "/usr/local/bin".into()]);
    dirs.map(|dir| dir.join("passt")).find(|p| p.is_file())
}

/// Starts one for this NIC, and waits until it answers; gives the VMM's end. Its
/// words go to `log`.
pub fn start(net: &NetConfig, log: &Path) -> Result<OwnedFd, PasstError> {
    let program = program().ok_or(PasstError::Absent)?;
    let (ours, theirs) = UnixStream::pair()?;
    let mut command = Command::new(program);
    command.args(arguments(net, theirs.as_raw_fd()));
    command.stdin(Stdio::null()).stdout(Stdio::null());
    command.stderr(fs::File::create(log)?);
    let mut child = spawn_detached(command, vec![theirs.into()])?;
    let mac = net.mac.unwrap_or(MacAddr([0x52, 0x54, 0, 0, 0, 1]));
    let ended = |how: String| {
        let said = fs::read_to_string(log).unwrap_or_default();
        // What it says about a log daemon that is not there is no reason.
        let mut lines = said.lines().filter(|line| !line.contains("syslog"));
        let last = lines.rfind(|line| !line.trim().is_empty());
        PasstError::Ended(last.map_or(how, |l| l.trim().chars().take(200).collect()))
    };
    match greet(&ours, mac) {
        Ok(()) => Ok(ours.into()),
        Err(error) => {
            let _ = child.kill();
            let status = child.wait();
            Err(ended(
                status.map_or(error.to_string(), |s| format!("{error} ({s})")),
            ))
        }
    }
}

/// Asks for the gateway's Ethernet address, as a guest does first of all.
fn greet(mut stream: &UnixStream, mac: MacAddr) -> io::Result<()> {
    let ask = [
        [0xff; 6].as_slice(),
        &mac.0,
        // ARP for IPv4 over Ethernet, a request (RFC 826).
        &[8, 6, 0, 1, 8, 0, 6, 4, 0, 1],
        &mac.0,
        &USER_ADDRESS.octets(),
        &[0; 6],
        &USER_GATEWAY.octets(),
    ]
    .concat();
    stream.set_read_timeout(Some(READY_WAIT))?;
    // In one piece: passt (as of 2023) drops a length that it reads alone.
    let len = (ask.len() as u32).to_be_bytes();
    stream.write_all(&[len.as_slice(), &ask].concat())?;
    // To its end: the VMM begins with whole frames.
    let mut len = [0; 4];
    stream.read_exact(&mut len)?;
    let mut answer = vec![0; (u32::from_be_bytes(len) as usize).min(FRAME_MAX)];
    stream.read_exact(&mut answer)?;
    stream.set_read_timeout(None)
}

fn arguments(net: &NetConfig, fd: i32) -> Vec<String> {
    let mut words: Vec<String> = ["--foreground", "--stderr", "--quiet", "--fd"]
        .map(str::to_owned)
        .to_vec();
    words.push(fd.to_string());
    let mut say = |flag: &str, value: String| words.extend([flag.to_owned(), value]);
    say("--address", USER_ADDRESS.to_string());
    say("--netmask", "24".to_owned());
    say("--gateway", USER_GATEWAY.to_string());
    // Frames of ordinary size: the guest's driver negotiates nothing more here.
    say("--mtu", "1500".to_owned());
    for forward in &net.forward {
        let flag = if forward.udp { "-u" } else { "-t" };
        say(flag, port(forward));
    }
    words
}

/// `[ADDRESS/]HOST:GUEST`, passt(1).
fn port(forward: &Forward) -> String {
    let address = forward.address.map_or(String::new(), |a| format!("{a}/"));
    format!("{address}{}:{}", forward.host, forward.guest)
}

#[cfg(test)]
mod tests {
    use hebe_types::Network;

    use super::*;

    /// The real one, where it is installed; says so where not.
    #[test]
    fn it_answers_and_ends_with_its_vmm() {
        let dir = tempfile::tempdir().expect("dir");
        let log = dir.path().join("log");
        let net = NetConfig::made(Network::User);
        let ours = match start(&net, &log) {
            Err(PasstError::Absent) => {
                return writeln!(io::stderr(), "skipped: passt is not installed").expect("stderr");
            }
            started => started.expect("it answers"),
        };
        // Once more, on the VMM's side of things.
        greet(&UnixStream::from(ours), MacAddr([2, 0, 0, 0, 0, 1])).expect("an answer");
        let mut refused = net;
        refused.forward = vec!["1:1".parse().expect("forward"); 2];
        refused.forward[1].address = Some([192, 0, 2, 77].into());
        let error = start(&refused, &log).expect_err("an address of nobody");
        assert!(matches!(error, PasstError::Ended(_)), "{error}");
    }

    #[test]
    fn it_is_told_the_address_and_the_ports() {
        let mut net = NetConfig::made(Network::User);
        net.forward = ["127.0.0.1:8080:80", "udp:53:5353"]
            .map(|f| f.parse().expect("forward"))
            .to_vec();
        let words = arguments(&net, 7).join(" ");
        for part in [
            "--fd 7",
            "--address 10.0.2.15",
            "--gateway 10.0.2.2",
            "-t 127.0.0.1/8080:80",
            "-u 53:5353",
        ] {
            assert!(words.contains(part), "{part}: {words}");
        }
    }
}
