//! A host, a world beyond it and guests, each a network namespace.

use std::fs;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsFd;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use hebe_net::{Care, NetworkError, Place, Port, serve};
use hebe_sys::tap::Tap;
use hebe_types::{NetConfig, Network, VmId, VmName};
use rustix::fs::{FlockOperation, flock};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// How long anything may take.
const WAIT: Duration = Duration::from_secs(180);
/// How long what is to be refused is tried.
const TRY: Duration = Duration::from_millis(500);

/// Tries until there is something, or for so long.
pub fn eventually<T>(mut look: impl FnMut() -> Option<T>) -> Option<T> {
    let until = Instant::now() + WAIT;
    loop {
        let found = look();
        if found.is_some() || Instant::now() >= until {
            return found;
        }
        thread::sleep(Duration::from_millis(50));
    }
}

/// Straight to stderr: a test that did not run must not look like one that did.
fn skipped(why: &str) {
    writeln!(io::stderr(), "skipped: networks: {why}").expect("stderr");
}

fn run(words: &[&str]) -> Result<String, String> {
    let output = Command::new(words[0])
        .args(&words[1..])
        .stdin(Stdio::null())
        .output()
        .map_err(|e| format!("{}: {e}", words[0]))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    Err(format!("{words:?}: {said}"))
}

/// A network namespace; gone when dropped.
pub struct Space {
    name: String,
}

static COUNT: AtomicU32 = AtomicU32::new(0);

impl Space {
    fn new() -> Result<Self, String> {
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("hebe-test-{}-{number}", std::process::id());
        run(&["ip", "netns", "add", &name])?;
        let space = Self { name };
        space.within(|| run(&["ip", "link", "set", "lo", "up"]))?;
        Ok(space)
    }

    /// Does something in it, on a thread of its own.
    pub fn within<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let path = format!("/var/run/netns/{}", self.name);
        thread::scope(|scope| {
            let worker = scope.spawn(|| {
                enter(&path);
                work()
            });
            worker.join().expect("a thread in a namespace")
        })
    }

    /// Runs a program in it, which must succeed.
    pub fn run(&self, words: &[&str]) -> String {
        self.within(|| run(words)).expect("a program")
    }

    /// Connects, sends, and gives what comes until the end; `None` where nobody
    /// answers.
    pub fn ask(&self, at: (Ipv4Addr, u16), word: &[u8]) -> Option<String> {
        self.within(|| {
            let at = SocketAddr::from(at);
            let mut stream = TcpStream::connect_timeout(&at, TRY).ok()?;
            stream.set_read_timeout(Some(TRY)).ok()?;
            stream.write_all(word).ok()?;
            stream.shutdown(Shutdown::Write).ok()?;
            let mut text = String::new();
            stream.read_to_string(&mut text).ok()?;
            Some(text).filter(|text| !text.is_empty())
        })
    }

    /// Whether somebody says that nobody is there.
    pub fn is_refused(&self, at: (Ipv4Addr, u16)) -> bool {
        let at = SocketAddr::from(at);
        let tried = self.within(|| TcpStream::connect_timeout(&at, TRY));
        tried.is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
    }

    pub fn ask_udp(&self, at: (Ipv4Addr, u16)) -> Option<String> {
        self.within(|| {
            let socket = UdpSocket::bind("0.0.0.0:0").ok()?;
            socket.set_read_timeout(Some(TRY)).ok()?;
            socket.send_to(b"?", at).ok()?;
            let mut room = [0; 64];
            let (len, from) = socket.recv_from(&mut room).ok()?;
            // From where it was asked, not from behind it.
            (from == SocketAddr::from(at)).then(|| String::from_utf8_lossy(&room[..len]).into())
        })
    }

    /// Says `word` to whoever connects.
    pub fn serve(&self, port: u16, word: &'static str) -> Served {
        self.serve_with(port, move |_| word.to_owned())
    }

    /// Says to whoever connects from which address that is.
    pub fn serve_peers(&self, port: u16) -> Served {
        self.serve_with(port, |peer| peer.ip().to_string())
    }

    fn serve_with(
        &self,
        port: u16,
        word: impl Fn(SocketAddr) -> String + Send + 'static,
    ) -> Served {
        let listener = self.within(|| TcpListener::bind(("0.0.0.0", port)));
        let listener = listener.expect("a port");
        listener.set_nonblocking(true).expect("non-blocking");
        Served::start(move || {
            let Ok((mut stream, peer)) = listener.accept() else {
                return;
            };
            let _ = stream.set_nonblocking(false);
            let _ = stream.set_read_timeout(Some(WAIT));
            let _ = stream.write_all(word(peer).as_bytes());
            let _ = stream.shutdown(Shutdown::Write);
        })
    }

    pub fn serve_udp(&self, port: u16, word: &'static str) -> Served {
        let socket = self.within(|| UdpSocket::bind(("0.0.0.0", port)));
        let socket = socket.expect("a port");
        socket.set_nonblocking(true).expect("non-blocking");
        Served::start(move || {
            if let Ok((_, from)) = socket.recv_from(&mut [0; 64]) {
                let _ = socket.send_to(word.as_bytes(), from);
            }
        })
    }
}

impl Drop for Space {
    fn drop(&mut self) {
        let _ = run(&["ip", "netns", "del", &self.name]);
    }
}

fn enter(path: &str) {
    let space = fs::File::open(path).expect("a namespace");
    let kind = Some(LinkNameSpaceType::Network);
    move_into_link_name_space(space.as_fd(), kind).expect("root");
}

/// A server; ends when dropped.
pub struct Served {
    stop: Arc<AtomicBool>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Served {
    fn start(turn: impl Fn() + Send + 'static) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&stop);
        let thread = thread::spawn(move || {
            while !told.load(Ordering::Relaxed) {
                turn();
                thread::sleep(Duration::from_millis(2));
            }
        });
        let thread = Some(thread);
        Self { stop, thread }
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let _ = self.thread.take().map(thread::JoinHandle::join);
    }
}

/// A guest: its NIC's other end is what a tap would be on the host.
pub struct Guest {
    pub space: Space,
    tap: String,
    host: String,
}

impl Guest {
    /// What busybox's client is given: address, router, host name.
    pub fn dhcp(&self, world: &World) -> Vec<String> {
        let said = world.root.path().join(format!("{}.lease", self.tap));
        let script = world.root.path().join("script");
        let text = format!(
            "#!/bin/sh\n[ \"$1\" = bound ] || exit 0\n\
             ip addr add $ip/$mask dev $interface\n\
             ip route add default via $router\n\
             echo $ip $router $hostname > {}\n",
            said.display()
        );
        fs::write(&script, text).expect("script");
        run(&["chmod", "755", &script.display().to_string()]).expect("chmod");
        let script = script.display().to_string();
        let _ = self.space.run(&[
            "busybox", "udhcpc", "-i", "eth0", "-f", "-q", "-n", "-t", "120", "-T", "1", "-s",
            &script,
        ]);
        let text = fs::read_to_string(said).expect("a lease");
        text.split_whitespace().map(str::to_owned).collect()
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = run(&["ip", "-n", &self.host, "link", "del", &self.tap]);
    }
}

/// A NIC that frames are written to and read from as a guest likes.
pub struct Nic(Tap);

impl Nic {
    /// Behind a virtio-net header.
    pub fn send(&self, frame: &[u8]) {
        assert!(self.try_send(frame));
    }

    pub fn try_send(&self, frame: &[u8]) -> bool {
        let whole = [&[0; 12], frame].concat();
        rustix::io::write(&self.0, &whole).is_ok()
    }

    /// The frames that come, up to one that holds `last`.
    pub fn come(&self, last: &[u8]) -> Vec<Vec<u8>> {
        let mut frames = Vec::new();
        let holds = |frame: &Vec<u8>| frame.windows(last.len()).any(|part| part == last);
        let come = eventually(|| {
            let mut room = vec![0; 4096];
            while let Ok(len) = rustix::io::read(&self.0, &mut room) {
                frames.push(room[12..len].to_vec());
            }
            frames.iter().any(holds).then_some(())
        });
        come.expect("the last frame");
        frames
    }
}

pub struct World {
    pub host: Space,
    pub outside: Space,
    pub outside_address: Ipv4Addr,
    root: tempfile::TempDir,
    state: Arc<tempfile::TempDir>,
    /// Held as a VMM holds them.
    locks: Mutex<Vec<(VmName, fs::File)>>,
    helpers: Mutex<Vec<std::process::Child>>,
}

impl World {
    pub fn new(label: &str) -> Option<Self> {
        // Started again as a helper, it is one.
        be_helper();
        for program in ["ip", "nft", "busybox"] {
            let found = Command::new("which").arg(program).output();
            if !found.is_ok_and(|output| output.status.success()) {
                skipped(&format!("{label}: {program} is not installed"));
                return None;
            }
        }
        let made = Self::make();
        made.map_err(|why| skipped(&format!("{label}: {why}"))).ok()
    }

    fn make() -> Result<Self, String> {
        let (host, outside) = (Space::new()?, Space::new()?);
        let (h, o) = (host.name.as_str(), outside.name.as_str());
        run(&[
            "ip", "link", "add", "up0", "netns", h, "type", "veth", "peer", "name", "eth0",
            "netns", o,
        ])?;
        for (space, address, device) in [(h, "192.0.2.1/24", "up0"), (o, "192.0.2.2/24", "eth0")] {
            run(&["ip", "-n", space, "addr", "add", address, "dev", device])?;
            run(&["ip", "-n", space, "link", "set", device, "up"])?;
        }
        host.within(|| fs::write("/proc/sys/net/ipv4/ip_forward", "0"))
            .map_err(|e| e.to_string())?;
        host.within(|| run(&["nft", "list", "ruleset"]))?;
        let root = tempfile::tempdir().map_err(|e| e.to_string())?;
        let state = tempfile::tempdir().map_err(|e| e.to_string())?;
        Ok(Self {
            host,
            outside,
            outside_address: Ipv4Addr::new(192, 0, 2, 2),
            root,
            state: Arc::new(state),
            locks: Mutex::default(),
            helpers: Mutex::default(),
        })
    }

    pub fn run_dir(&self) -> &Path {
        self.root.path()
    }

    pub fn state(&self) -> Arc<tempfile::TempDir> {
        Arc::clone(&self.state)
    }

    fn place(&self) -> Place {
        Place::open(self.root.path(), self.state.path()).expect("place")
    }

    /// A VM that is about to boot, with its lock held and its address leased.
    pub fn port(&self, name: &str, forward: &[&str]) -> Port {
        let vm: VmName = name.parse().expect("name");
        let id = VmId([name.len() as u8 + name.as_bytes()[0]; 16]);
        let mut nets = vec![NetConfig::made(Network::Nat)];
        nets[0].forward = forward.iter().map(|f| f.parse().expect("port")).collect();
        let place = self.place();
        let leased = self
            .host
            .within(|| place.lease(&vm, &mut nets, &|_| true).map(|()| nets));
        let net = leased.expect("leased").remove(0).resolved(&vm, id, 0);
        let dir = self.root.path().join("vms").join(name);
        fs::create_dir_all(&dir).expect("mkdir");
        let lock = fs::File::create(dir.join("lock")).expect("lock");
        flock(&lock, FlockOperation::NonBlockingLockExclusive).expect("free");
        self.locks.lock().expect("lock").push((vm.clone(), lock));
        Port {
            vm,
            tap: net.tap,
            mac: net.mac.expect("a MAC"),
            address: net.address.expect("an address"),
            forward: net.forward,
            expected_until_ns: None,
        }
    }

    /// As when the VMM ends, however it does.
    pub fn release(&self, name: &str) {
        let mut locks = self.locks.lock().expect("lock");
        // In so many words: a child that another test has just forked has the
        // descriptor, too.
        for (_, lock) in locks.extract_if(.., |(vm, _)| vm.as_str() == name) {
            flock(&lock, FlockOperation::Unlock).expect("held");
        }
    }

    pub fn plug(&self, port: &Port, care: Care) -> Result<Vec<String>, NetworkError> {
        let place = self.place();
        self.host
            .within(|| place.plug(std::slice::from_ref(port), care, &|| self.start_helper()))
    }

    /// As where many VMs are resumed: what they do `meanwhile` is done before their
    /// rules are in.
    pub fn expect(
        &self,
        ports: &[Port],
        meanwhile: impl FnOnce(),
    ) -> Result<Vec<String>, NetworkError> {
        let place = self.place();
        let expected = self.host.within(|| place.expect(ports))?;
        meanwhile();
        let expected = expected.expect("there are ports");
        assert!(ports.iter().all(|port| expected.vms().contains(&port.vm)));
        let start = || self.start_helper();
        Ok(self.host.within(|| expected.finish(|| (), &start)))
    }

    /// As where whoever makes the network is killed before the rules are in.
    pub fn half_expect(&self, ports: &[Port]) {
        let place = self.place();
        let expected = self.host.within(|| place.expect(ports));
        drop(expected.expect("noted"));
    }

    /// As when all of them are there.
    pub fn over(&self) {
        self.place().over().expect("written");
    }

    /// As who looks after it does.
    pub fn tend(&self) -> Result<bool, NetworkError> {
        let place = self.place();
        self.host.within(|| place.tend(&|| self.start_helper()))
    }

    /// A process of its own, as in earnest.
    fn start_helper(&self) -> Result<(), String> {
        let this = std::env::current_exe().map_err(|e| e.to_string())?;
        let mut child = Command::new(this)
            .args([
                "--exact",
                "rules_that_somebody_flushes_come_back",
                "--nocapture",
                // One that runs alone is announced on its line, where the helper's
                // word is to stand.
                "--test-threads=2",
            ])
            .env(HELPER, self.root.path())
            .env(STATE, self.state.path())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|e| e.to_string())?;
        let stdout = child.stdout.take().ok_or("no output")?;
        self.helpers.lock().expect("lock").push(child);
        let (say, said) = mpsc::channel();
        thread::spawn(move || {
            use std::io::{BufRead, BufReader};
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                let _ = say.send(line);
            }
        });
        let mut last = String::new();
        while let Ok(line) = said.recv_timeout(WAIT) {
            if line == serve::READY {
                return Ok(());
            }
            last = line;
        }
        Err(last)
    }

    pub fn kill_helper(&self) {
        for child in self.helpers.lock().expect("lock").iter_mut() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// The guest whose NIC this is, plugged in.
    pub fn guest(&self, port: &Port) -> Guest {
        let space = Space::new().expect("a namespace");
        let (h, g, tap) = (&self.host.name, &space.name, &port.tap);
        run(&[
            "ip", "link", "add", tap, "netns", h, "type", "veth", "peer", "name", "eth0", "netns",
            g,
        ])
        .expect("veth");
        let mac = port.mac.to_string();
        run(&["ip", "-n", g, "link", "set", "eth0", "address", &mac]).expect("mac");
        run(&["ip", "-n", g, "link", "set", "eth0", "up"]).expect("up");
        run(&["ip", "-n", h, "link", "set", tap, "master", "hebe0"]).expect("joined");
        run(&["ip", "-n", h, "link", "set", tap, "up"]).expect("up");
        Guest {
            space,
            tap: tap.clone(),
            host: h.clone(),
        }
    }

    /// The guest's NIC as a VMM has it, plugged in; `None` where there are no taps.
    pub fn nic(&self, port: &Port) -> Option<Nic> {
        let tap = self.host.within(|| Tap::open(&port.tap));
        let tap = tap.map_err(|why| skipped(&why.to_string())).ok()?;
        self.host.within(|| {
            tap.join_bridge("hebe0").expect("joined");
            tap.set_up().expect("up");
        });
        Some(Nic(tap))
    }

    pub fn rules(&self) -> String {
        self.host.run(&["nft", "list", "ruleset"])
    }

    /// Whether nothing is left of it: bridge, rules, helper.
    pub fn is_gone(&self) -> bool {
        let gone = eventually(|| {
            let links = self.host.run(&["ip", "-o", "link"]);
            let clean = !links.contains("hebe0") && !self.rules().contains("hebe");
            clean.then_some(())
        });
        let ended = eventually(|| {
            let mut helpers = self.helpers.lock().expect("lock");
            let all = helpers
                .iter_mut()
                .all(|h| matches!(h.try_wait(), Ok(Some(_))));
            all.then_some(())
        });
        gone.is_some() && ended.is_some()
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.kill_helper();
    }
}

const HELPER: &str = "NETWORK_TEST_RUN";
const STATE: &str = "NETWORK_TEST_STATE";

fn be_helper() {
    let (Some(run), Some(state)) = (std::env::var_os(HELPER), std::env::var_os(STATE)) else {
        return;
    };
    let place = Place::open(Path::new(&run), Path::new(&state)).expect("place");
    let served = serve::run(&place, io::stdout());
    std::process::exit(i32::from(served.is_err()));
}
