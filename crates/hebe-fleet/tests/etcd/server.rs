//! A real etcd on loopback, in a folder of its own.

use std::fs::File;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use hebe_fleet::config::EtcdConfig;
use hebe_fleet::etcd::{Change, Condition, Etcd};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

/// How long etcd may take to answer for the first time.
const START_MAX: Duration = Duration::from_secs(180);
/// How often a cluster is begun anew because one of its ports, which were free, was
/// taken before it got there.
const STARTS_MAX: u32 = 10;

/// How long it may take to answer then.
const ANSWER_MAX: Duration = Duration::from_secs(20);

/// The program: `HEBE_ETCD`, or `etcd` in `PATH`. Without one the tests say so
/// and do nothing, unless `HEBE_REQUIRE_ETCD` is set.
pub fn program() -> Option<PathBuf> {
    let named = std::env::var_os("HEBE_ETCD").map(PathBuf::from);
    let in_path = || {
        let path = std::env::var_os("PATH")?;
        let mut places = std::env::split_paths(&path).map(|dir| dir.join("etcd"));
        places.find(|program| program.is_file())
    };
    let found = named.or_else(in_path);
    if found.is_none() {
        assert!(
            std::env::var_os("HEBE_REQUIRE_ETCD").is_none(),
            "there is no etcd: install Debian's etcd-server, or name the program in HEBE_ETCD"
        );
        eprintln!("nothing was tested: there is no etcd (HEBE_ETCD, PATH)");
    }
    found
}

struct Member {
    program: PathBuf,
    arguments: Vec<String>,
    log: PathBuf,
    child: Option<Child>,
}

impl Member {
    fn start(&mut self) {
        let log = File::options().create(true).append(true).open(&self.log);
        let log = log.expect("log");
        let child = Command::new(&self.program)
            .args(&self.arguments)
            // What a test writes need not outlive this computer, whose disk is busy
            // with other tests; an etcd that does not know the word lets it be.
            .env("ETCD_UNSAFE_NO_FSYNC", "true")
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("log"))
            .stderr(log)
            .spawn();
        self.child = Some(child.expect("etcd starts"));
    }

    fn has_ended(&mut self) -> bool {
        let child = self.child.as_mut();
        child.is_some_and(|child| child.try_wait().is_ok_and(|ended| ended.is_some()))
    }

    fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        self.kill();
    }
}

/// A cluster of one or more members.
pub struct Server {
    members: Vec<Member>,
    /// Where clients reach each member.
    pub endpoints: Vec<String>,
    /// With which files and login.
    pub access: EtcdConfig,
    _dir: TempDir,
}

/// So many ports that are free, all of them different.
fn free_ports(count: usize) -> Vec<u16> {
    let bind = |_| TcpListener::bind("127.0.0.1:0").expect("port");
    let held: Vec<TcpListener> = (0..count).map(bind).collect();
    let port = |listener: &TcpListener| listener.local_addr().expect("address").port();
    held.iter().map(port).collect()
}

impl Server {
    /// Starts a cluster and waits until it answers; none without etcd.
    pub fn start(size: usize) -> Option<Self> {
        Self::start_with(size, EtcdConfig::default(), &[])
    }

    /// [`Server::start`], with further flags of etcd, for clients that come with
    /// `access`: over TLS if that names an authority.
    pub fn start_with(size: usize, access: EtcdConfig, flags: &[(&str, String)]) -> Option<Self> {
        let program = program()?;
        for _ in 1..STARTS_MAX {
            let mut server = Self::once(&program, size, &access, flags);
            if server.answers() {
                return Some(server);
            }
        }
        let server = Self::once(&program, size, &access, flags);
        server.wait();
        Some(server)
    }

    fn once(program: &Path, size: usize, access: &EtcdConfig, flags: &[(&str, String)]) -> Self {
        let dir = tempfile::tempdir().expect("folder");
        let scheme = if access.ca.is_some() { "https" } else { "http" };
        let ports = free_ports(2 * size);
        let url = |scheme: &str, port: u16| format!("{scheme}://127.0.0.1:{port}");
        let urls = |scheme: &str, ports: &[u16]| -> Vec<String> {
            ports.iter().map(|port| url(scheme, *port)).collect()
        };
        let (endpoints, peers) = (urls(scheme, &ports[..size]), urls("http", &ports[size..]));
        let cluster: Vec<String> = (0..size).map(|i| format!("m{i}={}", peers[i])).collect();
        let member = |i: usize| Member {
            program: program.to_owned(),
            arguments: [
                ("name", format!("m{i}")),
                (
                    "data-dir",
                    dir.path().join(format!("m{i}")).display().to_string(),
                ),
                ("listen-client-urls", endpoints[i].clone()),
                ("advertise-client-urls", endpoints[i].clone()),
                ("listen-peer-urls", peers[i].clone()),
                ("initial-advertise-peer-urls", peers[i].clone()),
                ("initial-cluster", cluster.join(",")),
            ]
            .into_iter()
            .chain(flags.iter().cloned())
            .map(|(key, value)| format!("--{key}={value}"))
            .collect(),
            log: dir.path().join(format!("m{i}.log")),
            child: None,
        };
        let mut server = Self {
            members: (0..size).map(member).collect(),
            endpoints,
            access: access.clone(),
            _dir: dir,
        };
        server.members.iter_mut().for_each(Member::start);
        server
    }

    /// Waits until a majority answers, or a member has ended.
    fn answers(&mut self) -> bool {
        let begun = Instant::now();
        while self.client().range("/").is_err() && begun.elapsed() < START_MAX {
            if self.members.iter_mut().any(Member::has_ended) {
                return false;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        begun.elapsed() < START_MAX
    }

    /// How clients reach it.
    pub fn config(&self) -> EtcdConfig {
        EtcdConfig {
            endpoints: self.endpoints.clone(),
            ..self.access.clone()
        }
    }

    /// A client of all members.
    pub fn client(&self) -> Etcd {
        Etcd::new(&self.config(), ANSWER_MAX).expect("client")
    }

    /// Waits until a majority answers.
    pub fn wait(&self) {
        let begun = Instant::now();
        while self.client().range("/").is_err() {
            let log = std::fs::read_to_string(&self.members[0].log).unwrap_or_default();
            let tail = log.lines().rev().take(5).collect::<Vec<_>>().join("\n");
            assert!(begun.elapsed() < START_MAX, "etcd does not answer:\n{tail}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Waits until a lease of so many seconds that begins now is over, as etcd
    /// counts.
    pub fn outlast_lease(&self, seconds: u64) {
        let client = self.client();
        let lease = client.lease(seconds).expect("lease");
        let put = Change::Put("/canary".into(), Vec::new(), lease);
        let always = Condition::QuietSince("/nothing/".into(), 0);
        assert!(client.change(&[always], &[put]).expect("answer"));
        let begun = Instant::now();
        while !client.range("/canary").expect("answer").entries.is_empty() {
            assert!(begun.elapsed() < START_MAX, "the lease does not end");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    fn signal(&self, member: usize, signal: Signal) {
        let child = self.members[member].child.as_ref().expect("it runs");
        kill_process(Pid::from_child(child), signal).expect("signal");
    }

    /// Stops a member in its tracks: connections are accepted, nothing is
    /// answered, as behind a cut network.
    pub fn cut(&self, member: usize) {
        self.signal(member, Signal::STOP);
    }

    /// Lets it go on.
    pub fn mend(&self, member: usize) {
        self.signal(member, Signal::CONT);
    }

    /// Kills a member.
    pub fn kill(&mut self, member: usize) {
        self.members[member].kill();
    }

    /// Starts it again, with what it has on disk.
    pub fn restart(&mut self, member: usize) {
        for _ in 1..STARTS_MAX {
            self.members[member].start();
            if self.answers() {
                return;
            }
        }
        self.members[member].start();
        self.wait();
    }
}
