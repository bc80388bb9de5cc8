//! A network of a VM's own without privileges: `passt(1)`, a process that turns
//! the guest's packets into sockets of its own. VMM and passt have the two ends
//! of a pair of sockets, so each ends with the other, and a resume starts a new
//! one that hands out the same address.

use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;
use std::{env, fs};

use hebe_sys::proc::spawn_detached;
use hebe_types::{Forward, MacAddr, NetConfig, USER_ADDRESS, USER_GATEWAY};

/// How long it may take until it answers.
const READY_WAIT: Duration = Duration::from_secs(20);
/// Longest frame on its socket, in bytes.
const FRAME_MAX: usize = 65536;
/// The gateway's Ethernet address. passt would take that of an interface of the
/// host's, which need not be the same after a reboot; locally administered.
const GATEWAY_MAC: &str = "52:55:0a:00:02:02";
/// Where the host has no route yet: a VM may be resumed before its host's network
/// is up. passt (seen in 0.0~git20230309, Debian 12) takes its addresses from an
/// interface that leads somewhere, ends where there is none, and needs it for nothing
/// else when it is told all of them.
const WITHOUT_ROUTE: [&str; 3] = ["--ipv4-only", "--interface", "lo"];

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

/// One that serves.
#[derive(Debug)]
pub struct Passt {
    /// The VMM's end. When it is closed, passt ends.
    pub end: OwnedFd,
    /// Its process.
    pub pid: u32,
}

/// Starts one for this NIC, and waits until it answers. Its words go to `log`.
///
/// # Errors
/// It is not installed, or does not serve.
pub fn start(net: &NetConfig, log: &Path) -> Result<Passt, PasstError> {
    let (error, ended) = match attempt(net, log, &[]) {
        Ok(passt) => return Ok(passt),
        Err(failed) => failed,
    };
    match ended {
        true => attempt(net, log, &WITHOUT_ROUTE).map_err(|_| error),
        false => Err(error),
    }
}

/// Tries to start it. With the error goes whether it ended by itself.
fn attempt(net: &NetConfig, log: &Path, more: &[&str]) -> Result<Passt, (PasstError, bool)> {
    let (ours, mut child) = spawn(net, log, more).map_err(|error| (error, false))?;
    let mac = net.mac.unwrap_or(MacAddr([0x52, 0x54, 0, 0, 0, 1]));
    let error = match greet(&ours, mac) {
        Ok(()) => {
            let (end, pid) = (ours.into(), child.id());
            return Ok(Passt { end, pid });
        }
        Err(error) => error,
    };
    // Nobody else closes its end.
    let ended = matches!(
        error.kind(),
        io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe
    );
    let _ = child.kill();
    let how = match child.wait() {
        Ok(status) => format!("{error} ({status})"),
        Err(_) => error.to_string(),
    };
    let said = fs::read_to_string(log).unwrap_or_default();
    // What it says about a log daemon that is not there is no reason.
    let mut lines = said.lines().filter(|line| !line.contains("syslog"));
    let last = lines.rfind(|line| !line.trim().is_empty());
    let words = last.map_or(how, |l| l.trim().chars().take(200).collect());
    Err((PasstError::Ended(words), ended))
}

fn spawn(net: &NetConfig, log: &Path, more: &[&str]) -> Result<(UnixStream, Child), PasstError> {
    let program = program().ok_or(PasstError::Absent)?;
    let (ours, theirs) = UnixStream::pair()?;
    let mut command = Command::new(program);
    command.args(arguments(net, theirs.as_raw_fd())).args(more);
    command.stdin(Stdio::null()).stdout(Stdio::null());
    command.stderr(fs::File::create(log)?);
    Ok((ours, spawn_detached(command, vec![theirs.into()])?))
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
    say("--mac-addr", GATEWAY_MAC.to_owned());
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
    use std::time::Instant;

    use hebe_types::Network;

    use super::*;

    /// The real one, where it is installed; says so where not.
    #[test]
    fn it_answers_and_ends_with_its_vmm() {
        let dir = tempfile::tempdir().expect("dir");
        let log = dir.path().join("log");
        let net = NetConfig::made(Network::User);
        let passt = match start(&net, &log) {
            Err(PasstError::Absent) => return skipped("passt is not installed"),
            started => started.expect("it answers"),
        };
        // Once more, on the VMM's side of things.
        let ours = UnixStream::from(passt.end);
        greet(&ours, MacAddr([2, 0, 0, 0, 0, 1])).expect("an answer");
        assert!(!has_ended(passt.pid));
        drop(ours);
        let end = Instant::now() + READY_WAIT;
        while !has_ended(passt.pid) {
            assert!(Instant::now() < end, "it goes on without its VMM");
            std::thread::sleep(Duration::from_millis(5));
        }
        let mut refused = net;
        refused.forward = vec!["1:1".parse().expect("forward"); 2];
        refused.forward[1].address = Some([192, 0, 2, 77].into());
        let error = start(&refused, &log).expect_err("an address of nobody");
        assert!(matches!(error, PasstError::Ended(_)), "{error}");
    }

    /// Straight to stderr: what did not run must not look like what did.
    fn skipped(why: &str) {
        writeln!(io::stderr(), "skipped: {why}").expect("stderr");
    }

    /// It stays this process's child until somebody waits for it: a zombie then.
    fn has_ended(pid: u32) -> bool {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let state = stat.rsplit(')').next().unwrap_or_default().trim_start();
        !matches!(state.chars().next(), Some('R' | 'S' | 'D'))
    }

    /// Says to this test that it is started in a network of its own.
    const APART: &str = "HEBE_TEST_WITHOUT_A_ROUTE";

    /// A VM is resumed before its host's network is up.
    #[test]
    fn it_answers_on_a_host_without_a_route() {
        if env::var_os(APART).is_some() {
            let routes = fs::read_to_string("/proc/net/route").unwrap_or_default();
            assert!(routes.lines().count() < 2, "{routes}");
            let dir = tempfile::tempdir().expect("dir");
            let net = NetConfig::made(Network::User);
            start(&net, &dir.path().join("log")).expect("it answers");
            return;
        }
        let apart = Command::new("unshare").args(["--net", "true"]).output();
        if !apart.is_ok_and(|output| output.status.success()) {
            return skipped("no network of its own can be made here");
        }
        if program().is_none() {
            return skipped("passt is not installed");
        }
        // This test once more, where there is no network at all.
        let this = env::current_exe().expect("this program");
        let mut again = Command::new("unshare");
        again
            .arg("--net")
            .arg(this)
            .arg("--exact")
            .env(APART, "yes");
        let again = again.arg("passt::tests::it_answers_on_a_host_without_a_route");
        let again = again.output().expect("unshare");
        let said = [again.stdout, again.stderr].concat();
        let said = String::from_utf8_lossy(&said);
        assert!(again.status.success(), "{said}");
        assert!(said.contains("1 passed"), "{said}");
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
            "--mac-addr 52:55:0a:00:02:02",
            "-t 127.0.0.1/8080:80",
            "-u 53:5353",
        ] {
            assert!(words.contains(part), "{part}: {words}");
        }
    }
}
