//! A host in a directory, and daemons on it.

use std::fs;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use hebe_host::listing::{self, VmState};
use hebe_host::lock::VmLock;
use hebe_host::store_init::{InitOptions, init};
use hebe_host::stores::DeviceStore;
use hebe_host::system::Machine;
use hebe_host::{Host, Layout};
use hebe_types::VmName;
use serde_json::Value;

use crate::client::{self, Reply};

/// How long anything may take here: the machine may be busy with other tests.
pub const PATIENCE: Duration = Duration::from_secs(180);

pub struct World {
    pub root: tempfile::TempDir,
    pub host: Host,
}

pub fn name(text: &str) -> VmName {
    text.parse().expect("name")
}

impl World {
    /// A host with a store of 64 MiB in a file.
    pub fn new() -> Self {
        let root = tempfile::tempdir().expect("dir");
        fs::create_dir(root.path().join("fake")).expect("mkdir");
        let kernel = crate::guest::image();
        fs::write(root.path().join("kernel"), kernel).expect("kernel");
        let store = root.path().join("store");
        let file = fs::File::create(&store).expect("store");
        file.set_len(64 << 20).expect("size");
        let mut layout = Layout::below(root.path());
        layout.vmm = std::env::current_exe().expect("exe");
        layout.store = Some(store.clone());
        let host = Host {
            layout,
            store: Arc::new(DeviceStore::new(Some(store))),
            system: Arc::new(Machine::default()),
        };
        init(&host, &InitOptions::default()).expect("a store");
        Self { root, host }
    }

    /// Writes a definition of 4 MiB.
    pub fn define(&self, vm: &str, more: &str) {
        let dir = self.host.layout.config.join("vms");
        fs::create_dir_all(&dir).expect("mkdir");
        let kernel = self.root.path().join("kernel");
        let text = format!(
            "name = \"{vm}\"\nmemory = \"4MiB\"\nkernel = \"{}\"\n{more}\n",
            kernel.display()
        );
        fs::write(dir.join(format!("{vm}.toml")), text).expect("write");
    }

    /// Tells a VM's fake VMM what to do wrong.
    pub fn tell(&self, vm: &str, words: &str) {
        fs::write(self.root.path().join("fake").join(vm), words).expect("write");
    }

    pub fn socket(&self) -> PathBuf {
        self.host.layout.run.join("hebed.sock")
    }

    /// A command that starts a daemon on this host.
    pub fn command(&self) -> Command {
        self.command_by(Command::new(env!("CARGO_BIN_EXE_hebed")))
    }

    /// The same by a command that starts it as its last word says.
    pub fn command_by(&self, mut command: Command) -> Command {
        let layout = &self.host.layout;
        command
            .env("HEBE_RUN_DIR", &layout.run)
            .env("HEBE_CONFIG_DIR", &layout.config)
            .env("HEBE_STATE_DIR", &layout.state)
            .env("HEBE_STORE", layout.store.as_ref().expect("a store"))
            .env("HEBE_VMM", &layout.vmm)
            .args(["--poll-ms", "50", "--no-samples"])
            .stdin(Stdio::null());
        command
    }

    /// A daemon that answers.
    pub fn daemon(&self) -> Daemon<'_> {
        self.daemon_with(&[])
    }

    /// One with more arguments.
    pub fn daemon_with(&self, arguments: &[String]) -> Daemon<'_> {
        let mut command = self.command();
        command.args(arguments);
        self.daemon_of(command)
    }

    /// One that this command starts.
    pub fn daemon_of(&self, mut command: Command) -> Daemon<'_> {
        let log = self.root.path().join("daemon.log");
        let log = fs::OpenOptions::new().create(true).append(true).open(log);
        command.stderr(log.expect("log"));
        let daemon = Daemon {
            child: command.spawn().expect("hebed starts"),
            world: self,
        };
        let began = Instant::now();
        while client::connect(&self.socket()).is_err() {
            assert!(began.elapsed() < PATIENCE, "it answers: {}", self.log());
            thread::sleep(Duration::from_millis(2));
        }
        daemon
    }

    /// What all daemons said.
    pub fn log(&self) -> String {
        fs::read_to_string(self.root.path().join("daemon.log")).unwrap_or_default()
    }

    /// How a VM is, looked at without any daemon.
    pub fn state(&self, vm: &str) -> Option<VmState> {
        let survey = listing::survey(&self.host);
        survey.rows.get(&name(vm)).map(|row| row.state)
    }

    pub fn pid(&self, vm: &str) -> Option<u32> {
        listing::survey(&self.host).rows.get(&name(vm))?.pid
    }

    /// Waits until a VM is so.
    pub fn until(&self, vm: &str, wanted: VmState) {
        let began = Instant::now();
        while self.state(vm) != Some(wanted) {
            assert!(
                began.elapsed() < PATIENCE,
                "{vm} is {:?}, not {wanted:?}: {}",
                self.state(vm),
                self.log()
            );
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// Ends a VM's VMM as a crash does.
    pub fn crash(&self, vm: &str) {
        let pid = self.pid(vm).expect("up");
        kill(pid);
        let dir = self.host.layout.vm_dir(&name(vm));
        let began = Instant::now();
        while VmLock::is_held(&dir) {
            assert!(began.elapsed() < PATIENCE, "it dies");
            thread::sleep(Duration::from_millis(1));
        }
    }
}

pub fn kill(pid: u32) {
    let pid = i32::try_from(pid).ok();
    let pid = pid.and_then(rustix::process::Pid::from_raw).expect("pid");
    let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
}

impl Drop for World {
    fn drop(&mut self) {
        for _ in 0..3 {
            let survey = listing::survey(&self.host);
            survey
                .rows
                .values()
                .filter_map(|row| row.pid)
                .for_each(kill);
        }
    }
}

/// A daemon; killed when dropped.
pub struct Daemon<'a> {
    pub child: Child,
    world: &'a World,
}

impl Daemon<'_> {
    pub fn get(&self, path: &str) -> Reply {
        self.ask("GET", path, None)
    }

    pub fn post(&self, path: &str, body: &str) -> Reply {
        self.ask("POST", path, Some(body))
    }

    pub fn ask(&self, method: &str, path: &str, body: Option<&str>) -> Reply {
        let request = client::request(method, path, body);
        client::raw(&self.world.socket(), &request)
            .unwrap_or_else(|e| panic!("{method} {path}: {e}: {}", self.world.log()))
    }

    /// Orders something, and waits until the job ended.
    pub fn order(&self, path: &str, body: &str) -> Value {
        let reply = self.post(path, body);
        assert_eq!(reply.status, 202, "{path}: {reply:?}");
        let place = reply.header("location").expect("Location").to_owned();
        self.job(&place)
    }

    pub fn job(&self, place: &str) -> Value {
        let began = Instant::now();
        loop {
            let job = self.get(place).json();
            if job["state"] != "running" {
                return job;
            }
            assert!(began.elapsed() < PATIENCE, "{job}");
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Asks until the answer is as wanted.
    pub fn until(&self, path: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        let began = Instant::now();
        loop {
            let answer = self.get(path).json();
            if wanted(&answer) {
                return answer;
            }
            assert!(began.elapsed() < PATIENCE, "{path}: {answer}");
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Waits until the daemon is at nothing: a VM that runs is not yet one
    /// whose start has ended.
    pub fn settled(&self) {
        self.until("/v1/jobs", |jobs| {
            let mut jobs = jobs["jobs"].as_array().into_iter().flatten();
            jobs.all(|job| job["state"] != "running")
        });
    }

    pub fn kill(mut self) {
        self.child.kill().expect("kill");
        self.child.wait().expect("wait");
    }
}

impl Drop for Daemon<'_> {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
