//! A network of a VM's own without privileges: `passt(1)`, a process that turns
//! the guest's packets into sockets of its own. VMM and passt have the two ends
//! of a pair of sockets, so each ends with the other, and a resume starts a new
//! one that hands out the same address.
//!
//! ```text
//!  boot:    spawn ── answers ──► VMM
//!  resume:  spawn ──► VMM                 what the guest sends waits in the socket
//!             └── reads ──► serves
//!             └── ends: no route? ── spawn anew on the same socket
//! ```
//! A VM that boots waits until its passt answers, and is refused where it does not.
//! One that goes on does not wait: both come up side by side ([`begin`]).

use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};
use std::{env, fs};

use hebe_sys::proc::spawn_detached;
use hebe_types::{Forward, MacAddr, NetConfig, USER_ADDRESS, USER_GATEWAY};

/// How long it may take until it answers.
const READY_WAIT: Duration = Duration::from_secs(20);
/// How often it is looked after until then.
const LOOK: Duration = Duration::from_millis(5);
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
    #[error(
        "passt cannot be started: check that the program may be run and the run directory written, or use network = \"nat\" as root ({0})"
    )]
    Start(#[from] io::Error),
    /// It ended, or does not answer.
    #[error("passt does not serve: put right what it says, or use network = \"nat\" as root ({0})")]
    Ended(String),
    /// It was started, lives, and has not begun to read.
    #[error(
        "passt has not begun to serve within {0} s: it may yet, and where it does not, use network = \"nat\" as root"
    )]
    Late(u64),
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
    let order = Order::of(net, log)?;
    let (error, ended) = match order.attempt(&[]) {
        Ok(passt) => return Ok(passt),
        Err(failed) => failed,
    };
    match ended {
        true => order.attempt(&WITHOUT_ROUTE).map_err(|_| error),
        false => Err(error),
    }
}

/// Starts one for this NIC, and waits for nothing. The VMM's end can be used at once:
/// what comes before passt reads waits for it. Its words go to `log`.
///
/// # Errors
/// It is not installed, or cannot be started.
pub fn begin(net: &NetConfig, log: &Path) -> Result<(OwnedFd, Coming), PasstError> {
    Order::of(net, log)?.begin()
}

/// One that was started, and may not serve yet.
#[derive(Debug)]
pub struct Coming {
    order: Order,
    child: Child,
    /// passt's end, for another one. While it is open the VMM's end does not end.
    theirs: UnixStream,
    /// What is in the socket before the VMM sends anything, in bytes.
    asked: u64,
}

impl Coming {
    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits until it serves. One that ends before is started once more, on the same
    /// socket, as it is where the host has no route; `anew` gets its process. Once
    /// `goes_on` says no, nobody needs it. On failure the VMM's end comes to its end.
    ///
    /// # Errors
    /// It ended, or does not take what it is sent.
    pub fn finish(
        mut self,
        goes_on: &dyn Fn() -> bool,
        anew: &dyn Fn(u32),
    ) -> Result<(), PasstError> {
        let error = match self.wait(goes_on)? {
            None => return Ok(()),
            Some(status) => self.order.error(format!("it ended, {status}")),
        };
        let theirs = self.theirs.try_clone()?;
        let Ok(child) = self.order.spawn(theirs, &WITHOUT_ROUTE) else {
            return Err(error);
        };
        self.child = child;
        anew(self.pid());
        match self.wait(goes_on)? {
            None => Ok(()),
            Some(_) => Err(error),
        }
    }

    /// Whether it reads: what it is asked first is gone from its socket then. How it
    /// ended, if it did.
    fn wait(&mut self, goes_on: &dyn Fn() -> bool) -> Result<Option<ExitStatus>, PasstError> {
        let until = Instant::now() + READY_WAIT;
        let mut most = self.asked;
        while goes_on() {
            if let Some(status) = self.child.try_wait()? {
                return Ok(Some(status));
            }
            let unread = rustix::io::ioctl_fionread(&self.theirs).map_err(io::Error::from)?;
            if unread < most {
                break;
            }
            // The VMM may have sent more.
            most = unread;
            if Instant::now() >= until {
                return Err(PasstError::Late(READY_WAIT.as_secs()));
            }
            thread::sleep(LOOK);
        }
        Ok(None)
    }
}

/// What is to be started.
#[derive(Debug)]
struct Order {
    program: PathBuf,
    net: NetConfig,
    log: PathBuf,
}

impl Order {
    fn of(net: &NetConfig, log: &Path) -> Result<Self, PasstError> {
        Ok(Self {
            program: program().ok_or(PasstError::Absent)?,
            net: net.clone(),
            log: log.to_owned(),
        })
    }

    fn begin(self) -> Result<(OwnedFd, Coming), PasstError> {
        let (ours, theirs) = UnixStream::pair()?;
        let ask = question(self.mac());
        (&ours).write_all(&ask)?;
        let child = self.spawn(theirs.try_clone()?, &[])?;
        let coming = Coming {
            order: self,
            child,
            theirs,
            asked: ask.len() as u64,
        };
        Ok((ours.into(), coming))
    }

    /// Tries to start it. With the error goes whether it ended by itself.
    fn attempt(&self, more: &[&str]) -> Result<Passt, (PasstError, bool)> {
        let lives = |error| (PasstError::Start(error), false);
        let (ours, theirs) = UnixStream::pair().map_err(lives)?;
        let mut child = self.spawn(theirs, more).map_err(|error| (error, false))?;
        let error = match greet(&ours, self.mac()) {
            Ok(()) => {
                let (end, pid) = (ours.into(), child.id());
                return Ok(Passt { end, pid });
            }
            Err(error) => error,
        };
        // Nobody else closes its end.
        let ended = matches!(
            error.kind(),
            io::ErrorKind::UnexpectedEof
                | io::ErrorKind::ConnectionReset
                | io::ErrorKind::BrokenPipe
        );
        let _ = child.kill();
        let how = match child.wait() {
            Ok(status) => format!("{error}, {status}"),
            Err(_) => error.to_string(),
        };
        Err((self.error(how), ended))
    }

    fn spawn(&self, theirs: UnixStream, more: &[&str]) -> Result<Child, PasstError> {
        let mut command = Command::new(&self.program);
        command
            .args(arguments(&self.net, theirs.as_raw_fd()))
            .args(more);
        command.stdin(Stdio::null()).stdout(Stdio::null());
        command.stderr(fs::File::create(&self.log)?);
        Ok(spawn_detached(command, vec![theirs.into()])?)
    }

    /// Its own last words where it left any, and `how` it ended where not.
    fn error(&self, how: String) -> PasstError {
        let said = fs::read(&self.log).unwrap_or_default();
        let said = String::from_utf8_lossy(&said);
        // What it says about a log daemon that is not there is no reason.
        let mut lines = said.lines().filter(|line| !line.contains("syslog"));
        let last = lines.rfind(|line| !line.trim().is_empty());
        PasstError::Ended(last.map_or(how, |l| l.trim().chars().take(200).collect()))
    }

    fn mac(&self) -> MacAddr {
        self.net.mac.unwrap_or(MacAddr([0x52, 0x54, 0, 0, 0, 1]))
    }
}

/// Asks for the gateway's Ethernet address, as a guest does first of all.
fn question(mac: MacAddr) -> Vec<u8> {
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
    // In one piece: passt (as of 2023) drops a length that it reads alone.
    let len = (ask.len() as u32).to_be_bytes();
    [len.as_slice(), &ask].concat()
}

/// Asks, and waits for the answer.
fn greet(mut stream: &UnixStream, mac: MacAddr) -> io::Result<()> {
    stream.write_all(&question(mac))?;
    await_answer(stream)
}

fn await_answer(mut stream: &UnixStream) -> io::Result<()> {
    stream.set_read_timeout(Some(READY_WAIT))?;
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
    use std::os::fd::AsFd;
    use std::sync::Mutex;

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
        let told = error.to_string();
        assert!(
            told.contains("192.0.2.77") && told.contains("network = "),
            "{told}"
        );
        let (end, coming) = begin(&refused, &log).expect("it is started");
        let error = coming.finish(&|| true, &|_| {}).expect_err("the same");
        assert_eq!(error.to_string(), told);
        assert!(is_over(&end), "who has the other end does not hear of it");
    }

    /// Whether the other end is closed.
    fn is_over(end: &OwnedFd) -> bool {
        let mut byte = [0];
        loop {
            match rustix::net::recv(end, &mut byte, rustix::net::RecvFlags::DONTWAIT) {
                Ok((0, _)) | Err(rustix::io::Errno::CONNRESET) => return true,
                Ok(_) => {}
                Err(_) => return false,
            }
        }
    }

    /// A VM that goes on sends before its passt reads.
    #[test]
    fn what_is_sent_before_it_reads_is_answered() {
        let dir = tempfile::tempdir().expect("dir");
        let log = dir.path().join("log");
        let net = NetConfig::made(Network::User);
        let (end, coming) = match begin(&net, &log) {
            Err(PasstError::Absent) => return skipped("passt is not installed"),
            begun => begun.expect("it is started"),
        };
        comes_up(end, coming, 0);
    }

    /// Asks at once, as a VMM that was not waited for, and wants both answers.
    fn comes_up(end: OwnedFd, coming: Coming, started_anew: usize) {
        let ours = UnixStream::from(end);
        let second = question(MacAddr([2, 0, 0, 0, 0, 1]));
        (&ours).write_all(&second).expect("room");
        let begun = Mutex::new(vec![coming.pid()]);
        let anew = |pid| begun.lock().expect("lock").push(pid);
        thread::scope(|scope| {
            let answers = scope.spawn(|| await_answer(&ours).and_then(|()| await_answer(&ours)));
            coming.finish(&|| true, &anew).expect("it serves");
            let answered = answers.join().expect("no panic");
            answered.expect("an answer to each");
        });
        let begun = begun.into_inner().expect("lock");
        assert_eq!(begun.len(), 1 + started_anew, "{begun:?}");
        assert!(!has_ended(*begun.last().expect("one")));
    }

    /// Notes its descriptors in `seen`, and `.` after them. Without a word about an
    /// interface it ends as passt does where there is no route, and else reads.
    const STAND_IN: &str = r#"#!/bin/bash
seen="$(dirname "$0")/seen"
for fd in /proc/$$/fd/*; do readlink "$fd"; done >> "$seen"
echo . >> "$seen"
while [ "$1" != --fd ]; do shift; done
fd=$2
case "$*" in
    *--interface*) exec cat <&"$fd" ;;
    *) echo 'no route' >&2; exit 1 ;;
esac
"#;

    fn stand_in(dir: &Path, script: &str) -> Order {
        use std::os::unix::fs::PermissionsExt;
        let (program, text) = (dir.join("passt"), dir.join("text"));
        fs::write(&text, script).expect("write");
        // What this process has open to write, a child that another test has forked
        // may have open still, and no such file can be run.
        let copied = Command::new("cp").args([&text, &program]).status();
        assert!(copied.expect("cp runs").success());
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).expect("mode");
        Order {
            program,
            net: NetConfig::made(Network::User),
            log: dir.join("log"),
        }
    }

    #[test]
    fn it_is_started_anew_on_the_same_socket_and_gets_nothing_else() {
        let dir = tempfile::tempdir().expect("dir");
        let order = stand_in(dir.path(), STAND_IN);
        let (end, coming) = order.begin().expect("it is started");
        let socket = |fd: &dyn AsFd| {
            let inode = rustix::fs::fstat(fd).expect("stat").st_ino;
            format!("socket:[{inode}]")
        };
        let (ours, theirs) = (socket(&end), socket(&coming.theirs));
        let begun = Mutex::new(Vec::new());
        let anew = |pid| begun.lock().expect("lock").push(pid);
        coming.finish(&|| true, &anew).expect("it reads");
        assert_eq!(begun.into_inner().expect("lock").len(), 1);
        let seen = fs::read_to_string(dir.path().join("seen")).expect("seen");
        let times = |what: &str| seen.lines().filter(|line| *line == what).count();
        let found = [".", &theirs, &ours].map(times);
        assert_eq!(found, [2, 2, 0], "{seen}");
    }

    #[test]
    fn one_that_ends_is_told_of_once_and_one_that_is_not_needed_not_at_all() {
        let dir = tempfile::tempdir().expect("dir");
        let ends = "#!/bin/sh\necho 'first word' >&2\necho \"port $1 is taken\" >&2\nexit 1\n";
        let (end, coming) = stand_in(dir.path(), ends).begin().expect("it is started");
        let error = coming.finish(&|| true, &|_| {}).expect_err("it ended");
        let told = error.to_string();
        assert!(told.ends_with("(port --foreground is taken)"), "{told}");
        assert!(is_over(&end));
        let (_end, coming) = stand_in(dir.path(), ends).begin().expect("it is started");
        let anew = |_| panic!("nobody needs it");
        coming.finish(&|| false, &anew).expect("nothing to tell");
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
            let begun = begin(&net, &dir.path().join("log2"));
            let (end, coming) = begun.expect("it is started");
            comes_up(end, coming, 1);
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
