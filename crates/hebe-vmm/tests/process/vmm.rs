//! Starts `hebe-vmm` as `hebe` does.

use std::fs::{self, File};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use rustix::fs::{FlockOperation, flock};

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
        command.args(["--name", "web", "--vm-id", &"11".repeat(16), "--memfd"]);
        command.arg("--run-dir").arg(dir.path());
        command.arg("--lock-fd").arg(lock.as_raw_fd().to_string());
        let log = File::create(dir.path().join("log")).expect("log");
        command.stdin(Stdio::null()).stderr(log);
        let mut keep = prepare(&mut command);
        if !command.get_args().any(|arg| arg == "--config-fd") {
            command.arg("--config").arg(path);
        }
        keep.push(lock);
        let child = hebe_sys::proc::spawn_detached(command, keep).expect("spawn");
        Self { child, dir }
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
