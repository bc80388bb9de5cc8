//! What the host does to the machine itself, behind a trait so that tests can
//! run a whole reboot without one.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use hebe_flow::stopping::Going;
use hebe_sys::fdstore::{FdStore, Given, ServiceStore};
use hebe_sys::kexec::{self, KexecError};
use hebe_sys::luo::{self, LiveUpdate, LuoError, Orchestrator};
use hebe_sys::{clock, fdstore, proc};
use hebe_types::{ByteSize, Stamp, VmName};

pub use hebe_sys::kexec::Leave;

use crate::host::Host;
use crate::limits::groups::Groups;
use crate::limits::{self, GroupView, Limits, OutOfMemory};
use crate::systemd;

/// Why the machine did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum SystemError {
    /// A file of the next kernel cannot be read.
    #[error("cannot read {path}: name a file that exists with --kernel and --initrd")]
    Unreadable {
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// kexec refused.
    #[error(transparent)]
    Kexec(#[from] KexecError),
    /// A command of host.toml could not be started or failed.
    #[error("the command `{command}` {how}")]
    Command {
        /// Which command.
        command: String,
        /// What went wrong.
        how: String,
    },
}

/// The machine.
pub trait System: Send + Sync {
    /// Loads the next kernel.
    fn load_kernel(
        &self,
        kernel: &Path,
        initrd: Option<&Path>,
        cmdline: &str,
    ) -> Result<(), SystemError>;
    /// Unloads it.
    fn unload_kernel(&self) -> Result<(), SystemError>;
    /// Whether a kernel is loaded; `None` when there is no kexec.
    fn kernel_loaded(&self) -> Option<bool>;
    /// Whether loading kernels was switched off until the next boot.
    fn kexec_disabled(&self) -> Option<bool>;
    /// Whether this process may load kernels and leave this one.
    fn may_reboot(&self) -> bool;
    /// Leaves this kernel; returns only on failure.
    fn leave(&self, how: Leave) -> SystemError;
    /// Writes all dirty pages of files to their disks.
    fn sync(&self);
    /// Runs a shell command.
    fn run(&self, command: &str, timeout: Duration) -> Result<(), SystemError>;
    /// The id of this boot.
    fn boot_id(&self) -> [u8; 16];
    /// The running kernel's command line.
    fn cmdline(&self) -> String;
    /// The running kernel's release.
    fn release(&self) -> String;
    /// Bytes that may still be written below `dir`.
    fn free_space(&self, dir: &Path) -> io::Result<ByteSize>;
    /// Whether something can be written below `dir`.
    fn is_writable(&self, dir: &Path) -> io::Result<bool>;
    /// Whether what is written below `dir` ends with this kernel.
    fn is_volatile(&self, dir: &Path) -> io::Result<bool>;
    /// This instant.
    fn stamp(&self) -> Stamp;
    /// `CLOCK_MONOTONIC`, in nanoseconds.
    fn monotonic_ns(&self) -> u64;
    /// Time since this kernel set up its clocks, in nanoseconds.
    fn since_boot_ns(&self) -> u64;
    /// Sets the wall clock, in nanoseconds.
    fn set_realtime_ns(&self, realtime_ns: u64) -> io::Result<()>;
    /// Whether this kernel can carry memory into the next one.
    fn live_update(&self) -> Result<(), LuoError> {
        Err(LuoError::NotOffered)
    }
    /// What carries it. Only one process at a time has it.
    fn orchestrator(&self) -> Result<Box<dyn Orchestrator>, LuoError> {
        Err(LuoError::NotOffered)
    }
    /// Who holds open files for the service that this process is part of, also
    /// over a kexec; why there is nobody.
    fn fd_store(&self) -> Result<Arc<dyn FdStore>, String> {
        Err("PID 1 is not systemd".into())
    }
    /// Whether the service in which VMs are frozen has such a store, and room in
    /// it for so many; what there is, or why there is none. Any process may ask.
    fn fd_store_of(&self, _unit: &str, _room: usize) -> Result<String, String> {
        Err("PID 1 is not systemd".into())
    }
    /// Whether PID 1 handed sessions of the kernel before over to this process.
    fn was_handed_sessions(&self) -> bool {
        false
    }
    /// Starts the process that holds what the kernel before handed over, and
    /// waits until it has all of it; how many VMs that are, whole or not.
    fn start_keeper(&self, _host: &Host) -> Result<usize, String> {
        Ok(0)
    }
    /// Where the service manager takes the host.
    ///
    /// # Errors
    /// It does not say.
    fn going(&self) -> Result<Going, String> {
        Ok(Going::Stays)
    }
    /// Whether a service manager carries out the suspend event
    /// ([`crate::stopping`]) when it is asked to leave.
    ///
    /// # Errors
    /// Why it does not.
    fn armed(&self) -> Result<(), String> {
        Err("there is no service manager".into())
    }
    /// Asks the service manager to leave.
    ///
    /// # Errors
    /// It refused.
    fn ask(&self, _how: Leave) -> Result<(), String> {
        Err("there is no service manager".into())
    }
    /// Gives a VMM a place that outlives whoever started it, and limits there.
    ///
    /// # Errors
    /// It stays where it is, or has not all of its limits; why.
    fn adopt(&self, _vm: &VmName, _pid: u32, _limits: &Limits) -> Result<(), String> {
        Ok(())
    }
    /// Moves the process that carries a network of this VM's own, and ends with the
    /// VM, to where it is left alone as long and limited.
    ///
    /// # Errors
    /// It stays where it is, or without limits; why.
    fn adopt_passt(&self, _vm: &VmName, _pid: u32) -> Result<(), String> {
        Ok(())
    }
    /// Whether what a VMM leaves in the place of this process keeps nobody waiting
    /// when that ends.
    fn place_ends_alone(&self) -> bool {
        false
    }
    /// Where VMMs are limited, and whether they can be.
    ///
    /// # Errors
    /// They cannot, and why.
    fn can_limit(&self) -> Result<String, String> {
        Err("there are no control groups".into())
    }
    /// What holds of a process, by the kernel's word.
    ///
    /// # Errors
    /// It cannot be told, and why.
    fn limits_of(&self, _pid: u32) -> Result<GroupView, String> {
        Err("there are no control groups".into())
    }
    /// Whether the kernel ended this process for want of memory; `None` also where
    /// that cannot be told.
    fn out_of_memory(&self, _pid: u32) -> Option<OutOfMemory> {
        None
    }
    /// The VMM of this VM has ended, and needs its place no more.
    fn let_go(&self, _vm: &VmName) {}
    /// The same of every VM whose VMM ended by itself.
    fn let_go_of_ended(&self) {}
    /// Starts the process that serves networks that Hebe makes, and waits until
    /// it does.
    fn start_net_helper(&self, _host: &Host) -> Result<(), String> {
        Ok(())
    }
    /// Memory that can be had without taking it from anybody.
    fn available_memory(&self) -> Option<ByteSize> {
        None
    }
}

/// The real machine.
#[derive(Clone, Debug, Default)]
pub struct Machine {
    given: Arc<Given>,
}

impl Machine {
    /// With what systemd gave this process.
    pub fn new(given: Given) -> Self {
        Self {
            given: Arc::new(given),
        }
    }
}

impl System for Machine {
    fn load_kernel(
        &self,
        kernel: &Path,
        initrd: Option<&Path>,
        cmdline: &str,
    ) -> Result<(), SystemError> {
        let open = |path: &Path| {
            File::open(path).map_err(|source| SystemError::Unreadable {
                path: path.to_owned(),
                source,
            })
        };
        let kernel = open(kernel)?;
        let initrd = initrd.map(open).transpose()?;
        kexec::load(kernel.as_fd(), initrd.as_ref().map(AsFd::as_fd), cmdline)?;
        Ok(())
    }

    fn unload_kernel(&self) -> Result<(), SystemError> {
        Ok(kexec::unload()?)
    }

    fn kernel_loaded(&self) -> Option<bool> {
        kexec::is_loaded()
    }

    fn kexec_disabled(&self) -> Option<bool> {
        kexec::is_disabled()
    }

    fn may_reboot(&self) -> bool {
        rustix::process::geteuid().is_root()
    }

    fn leave(&self, how: Leave) -> SystemError {
        kexec::leave(how).into()
    }

    fn sync(&self) {
        rustix::fs::sync();
    }

    fn run(&self, command: &str, timeout: Duration) -> Result<(), SystemError> {
        run_command(command, timeout).map_err(|how| SystemError::Command {
            command: command.to_owned(),
            how,
        })
    }

    fn boot_id(&self) -> [u8; 16] {
        proc::boot_id().unwrap_or_default()
    }

    fn cmdline(&self) -> String {
        let text = std::fs::read_to_string("/proc/cmdline").unwrap_or_default();
        text.trim_end().to_owned()
    }

    fn release(&self) -> String {
        proc::kernel_release()
    }

    fn free_space(&self, dir: &Path) -> io::Result<ByteSize> {
        let stat = rustix::fs::statvfs(nearest(dir))?;
        Ok(ByteSize(stat.f_bavail.saturating_mul(stat.f_frsize)))
    }

    fn is_writable(&self, dir: &Path) -> io::Result<bool> {
        let access = rustix::fs::Access::WRITE_OK;
        match rustix::fs::access(nearest(dir), access) {
            Ok(()) => Ok(true),
            // Also root is told of a file system that is mounted to be read.
            Err(rustix::io::Errno::ACCESS | rustix::io::Errno::ROFS) => Ok(false),
            Err(e) => Err(e.into()),
        }
    }

    fn is_volatile(&self, dir: &Path) -> io::Result<bool> {
        // tmpfs and ramfs, linux/magic.h.
        const IN_MEMORY: [u64; 2] = [0x0102_1994, 0x8584_58f6];
        let stat = rustix::fs::statfs(nearest(dir))?;
        Ok(IN_MEMORY.contains(&(stat.f_type as u64)))
    }

    fn stamp(&self) -> Stamp {
        clock::stamp_now()
    }

    fn monotonic_ns(&self) -> u64 {
        proc::monotonic_ns()
    }

    fn since_boot_ns(&self) -> u64 {
        proc::since_boot_ns()
    }

    fn set_realtime_ns(&self, realtime_ns: u64) -> io::Result<()> {
        proc::set_realtime_ns(realtime_ns)
    }

    fn live_update(&self) -> Result<(), LuoError> {
        luo::offered()
    }

    fn orchestrator(&self) -> Result<Box<dyn Orchestrator>, LuoError> {
        Ok(Box::new(LiveUpdate::open()?))
    }

    fn start_keeper(&self, host: &Host) -> Result<usize, String> {
        crate::luo::asking::start(&host.layout, &self.given)
    }

    fn fd_store(&self) -> Result<Arc<dyn FdStore>, String> {
        Ok(Arc::new(ServiceStore::open(&self.given)?))
    }

    fn fd_store_of(&self, unit: &str, room: usize) -> Result<String, String> {
        fdstore::room_in(unit, room)
    }

    fn was_handed_sessions(&self) -> bool {
        let mut fds = self.given.fds.iter();
        fds.any(|(name, _)| crate::luo::store::is_ours(name))
    }

    fn going(&self) -> Result<Going, String> {
        systemd::going()
    }

    fn armed(&self) -> Result<(), String> {
        systemd::armed()
    }

    fn ask(&self, how: Leave) -> Result<(), String> {
        systemd::ask(how)
    }

    fn adopt(&self, vm: &VmName, pid: u32, limits: &Limits) -> Result<(), String> {
        // Where nobody manages control groups, not even in part.
        if systemd::booted() {
            return systemd::adopt(vm, pid, limits);
        }
        Groups::here()?.confine(vm, pid, limits)
    }

    fn adopt_passt(&self, vm: &VmName, pid: u32) -> Result<(), String> {
        if systemd::booted() {
            return systemd::adopt_passt(vm, pid);
        }
        Groups::here()?.confine(vm, pid, &Limits::of_passt())
    }

    fn place_ends_alone(&self) -> bool {
        systemd::place_ends_alone()
    }

    fn can_limit(&self) -> Result<String, String> {
        if systemd::booted() {
            systemd::can_adopt()?;
            return Ok(format!("scopes in {}", systemd::SLICE));
        }
        Groups::here()?.check()
    }

    fn limits_of(&self, pid: u32) -> Result<GroupView, String> {
        limits::look(pid)
    }

    fn out_of_memory(&self, pid: u32) -> Option<OutOfMemory> {
        limits::killed::look(pid)
    }

    fn let_go(&self, vm: &VmName) {
        if let (false, Ok(groups)) = (systemd::booted(), Groups::here()) {
            groups.remove(vm);
        }
    }

    fn let_go_of_ended(&self) {
        if let (false, Ok(groups)) = (systemd::booted(), Groups::here()) {
            groups.sweep();
        }
    }

    fn start_net_helper(&self, host: &Host) -> Result<(), String> {
        crate::network::start_helper(&host.layout)
    }

    fn available_memory(&self) -> Option<ByteSize> {
        let text = std::fs::read_to_string("/proc/meminfo").ok()?;
        let line = text.lines().find_map(|l| l.strip_prefix("MemAvailable:"))?;
        let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
        Some(ByteSize(kib << 10))
    }
}

/// A directory may not be there yet; its nearest ancestor is.
fn nearest(dir: &Path) -> &Path {
    dir.ancestors()
        .find(|d| d.exists())
        .unwrap_or(Path::new("/"))
}

fn run_command(command: &str, timeout: Duration) -> Result<(), String> {
    let mut child = Command::new("/bin/sh")
        .args(["-c", command])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .map_err(|e| format!("cannot be started: {e}"))?;
    let began = Instant::now();
    loop {
        match child.try_wait() {
            Ok(Some(status)) if status.success() => return Ok(()),
            Ok(Some(status)) => return Err(format!("failed: {status}")),
            Ok(None) if began.elapsed() >= timeout => {
                let _ = child.kill();
                let _ = child.wait();
                return Err(format!("did not end within {} s", timeout.as_secs()));
            }
            Ok(None) => thread::sleep(Duration::from_millis(5)),
            Err(e) => return Err(format!("cannot be waited for: {e}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_report_how_they_ended() {
        let second = Duration::from_secs(120);
        assert!(run_command("true", second).is_ok());
        let failed = run_command("exit 3", second).expect_err("fails");
        assert!(failed.contains('3'), "{failed}");
        let late = run_command("exec sleep 30", Duration::from_millis(30)).expect_err("late");
        assert!(late.contains("did not end"), "{late}");
    }

    #[test]
    fn a_missing_kernel_is_named() {
        let error = Machine::default()
            .load_kernel(Path::new("/no/such/vmlinuz"), None, "")
            .expect_err("missing");
        assert!(error.to_string().contains("/no/such/vmlinuz"), "{error}");
    }

    #[test]
    fn free_space_is_that_of_the_nearest_directory() {
        let space = Machine::default().free_space(Path::new("/tmp/not/there/yet"));
        assert!(space.expect("statvfs").bytes() > 0);
    }
}
