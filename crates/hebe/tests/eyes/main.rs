//! `logs`, `top` and `dashboard`, as programs.

mod dashboard;
mod logs;
mod top;

use std::fs;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// How long anything may take here: the machine may be busy with other tests.
const PATIENCE: Duration = Duration::from_secs(180);

/// A host without VMs that run, in a directory.
struct Host {
    root: tempfile::TempDir,
}

impl Host {
    fn new() -> Self {
        let root = tempfile::tempdir().expect("dir");
        Self { root }
    }

    /// The runtime directory of a VM, made.
    fn vm_dir(&self, name: &str) -> PathBuf {
        let dir = self.root.path().join("run/vms").join(name);
        fs::create_dir_all(&dir).expect("mkdir");
        dir
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let root = self.root.path();
        let mut command = Command::new(env!("CARGO_BIN_EXE_hebe"));
        command
            .args(arguments)
            .env("HEBE_RUN_DIR", root.join("run"))
            .env("HEBE_CONFIG_DIR", root.join("etc"))
            .env("HEBE_STATE_DIR", root.join("state"))
            .env("HEBE_STORE", root.join("store"))
            .env("HEBE_VMM", "/no/such/hebe-vmm")
            .stdin(Stdio::null());
        command
    }

    /// Exit status, stdout and stderr.
    fn hebe(&self, arguments: &[&str]) -> (i32, String, String) {
        let output = self.command(arguments).output().expect("hebe runs");
        let text = |bytes| String::from_utf8(bytes).expect("text");
        let status = output.status.code().expect("exited");
        (status, text(output.stdout), text(output.stderr))
    }
}

/// A program; killed when dropped.
struct Running(Child);

impl Running {
    /// Waits until it ended.
    fn ended(&mut self) -> std::process::ExitStatus {
        let mut status = None;
        until("it ends", || {
            status = self.0.try_wait().expect("wait");
            status.is_some()
        });
        status.expect("ended")
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let began = Instant::now();
    while !is_so() {
        assert!(began.elapsed() < PATIENCE, "{what}");
        thread::sleep(Duration::from_millis(5));
    }
}
