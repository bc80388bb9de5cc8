//! Starts `hebe-vmm` as `hebe` does.

use std::fs::{self, File};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use hebe_api::{Client, ClientError, Request, Response, VmStatus, VmmState};
use rustix::fs::{FlockOperation, flock};

use crate::guest;

/// A VMM in a directory of its own, which holds the VM's lock.
pub struct Vmm {
    pub child: Child,
    pub dir: tempfile::TempDir,
}

impl Vmm {
    /// Starts one in `dir`, around the definition `config`; `prepare` may add
    /// arguments and returns more descriptors to hand over.
    pub fn start(
        dir: tempfile::TempDir,
        config: &str,
        prepare: impl FnOnce(&mut Command) -> Vec<OwnedFd>,
    ) -> Self {
        let path = dir.path().join("config.toml");
        fs::write(&path, config).expect("definition");
        let lock = OwnedFd::from(File::create(dir.path().join("lock")).expect("lock"));
        flock(&lock, FlockOperation::NonBlockingLockExclusive).expect("nobody has it");
        let mut command = Command::new(env!("CARGO_BIN_EXE_hebe-vmm"));
        command.args(["--name", "web", "--vm-id", &"11".repeat(16)]);
        command.arg("--run-dir").arg(dir.path());
        command.arg("--lock-fd").arg(lock.as_raw_fd().to_string());
        let log = File::create(dir.path().join("log")).expect("log");
        command.stdin(Stdio::null()).stderr(log);
        let mut keep = prepare(&mut command);
        if !command.get_args().any(|arg| arg == "--segment") {
            command.arg("--memfd");
        }
        if !command.get_args().any(|arg| arg == "--config-fd") {
            command.arg("--config").arg(path);
        }
        keep.push(lock);
        let child = hebe_sys::proc::spawn_detached(command, keep).expect("spawn");
        Self { child, dir }
    }

    /// Starts one with a guest that runs.
    pub fn run(code: &[u8], disks: &str) -> Self {
        let vmm = Self::start_guest(code, disks);
        assert_eq!(vmm.status().state, VmmState::Running);
        vmm
    }

    /// Starts one with a guest.
    pub fn start_guest(code: &[u8], disks: &str) -> Self {
        let dir = tempfile::tempdir().expect("dir");
        let kernel = dir.path().join("kernel");
        fs::write(&kernel, guest::image(code)).expect("kernel");
        let kernel = kernel.display();
        let config = format!("name = 'web'\nmemory = '8MiB'\nkernel = '{kernel}'\n{disks}");
        Self::start(dir, &config, |_| Vec::new())
    }

    /// A connection to its control socket.
    pub fn connect(&self) -> Client {
        let until = Instant::now() + Duration::from_secs(120);
        loop {
            match Client::connect(&self.dir.path().join("vmm.sock")) {
                Ok(client) => return client,
                Err(e) => assert!(Instant::now() < until, "{e}: {}", self.log()),
            }
            thread::sleep(Duration::from_millis(2));
        }
    }

    /// Asks it.
    pub fn ask(&self, request: &Request) -> Result<Response, ClientError> {
        self.connect().call(request)
    }

    /// How its VM is.
    pub fn status(&self) -> VmStatus {
        match self.ask(&Request::Status) {
            Ok(Response::Status(status)) => status,
            other => panic!("{other:?}: {}", self.log()),
        }
    }

    /// What it wrote to standard error.
    pub fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }

    /// Waits for its end; returns whether its status was 0, and `exit.json`.
    pub fn wait(&mut self) -> (bool, serde_json::Value) {
        let status = self.child.wait().expect("wait");
        let text = fs::read(self.dir.path().join("exit.json")).expect("exit.json");
        (
            status.success(),
            serde_json::from_slice(&text).expect("JSON"),
        )
    }

    /// Whether somebody holds the VM's lock.
    pub fn is_locked(&self) -> bool {
        let lock = File::open(self.dir.path().join("lock")).expect("lock");
        flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err()
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A FIFO.
pub fn fifo(path: &Path) {
    let made = Command::new("mkfifo").arg(path).status().expect("mkfifo");
    assert!(made.success());
}
