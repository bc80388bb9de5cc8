//! Flags of `reboot`.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use hebe_host::preflight::RebootOptions;
use hebe_policy::span::Span;
use hebe_types::RebootMethod;

/// Flags of `reboot`.
#[derive(Debug, Args)]
pub struct RebootArgs {
    /// How VMs get over the reboot.
    #[arg(long, value_enum, default_value_t = MethodArg::Warm)]
    pub method: MethodArg,
    /// The next kernel [default: the running one, in /boot].
    #[arg(long, value_name = "FILE")]
    pub kernel: Option<PathBuf>,
    /// Its initramfs [default: the one that belongs to the kernel].
    #[arg(long, value_name = "FILE")]
    pub initrd: Option<PathBuf>,
    /// Words to add to the running kernel's command line.
    #[arg(long, value_name = "WORDS", allow_hyphen_values = true)]
    pub append: Option<String>,
    /// A whole command line instead of the running kernel's.
    #[arg(long, value_name = "WORDS", allow_hyphen_values = true)]
    pub cmdline: Option<String>,
    /// With saved or cold: reset the machine instead of jumping.
    #[arg(long, conflicts_with_all = ["kexec", "kernel", "initrd", "append", "cmdline"])]
    pub hard: bool,
    /// With cold: jump instead of resetting the machine, as it does anyway
    /// where a kernel, initramfs or command line is named.
    #[arg(long)]
    pub kexec: bool,
    /// Say what would happen to each VM, check everything, and stop there.
    #[arg(long)]
    pub dry_run: bool,
    /// With cold: how long a guest has to shut down, in seconds [default: 60].
    #[arg(long, value_name = "SECONDS")]
    pub timeout: Option<u64>,
    /// With cold: power off guests that do not shut down in time.
    #[arg(long)]
    pub force: bool,
    /// Leave at once by kexec or reset, also where systemd would stop the host's services first.
    #[arg(long)]
    pub direct: bool,
    /// Check everything and load the next kernel for `systemctl kexec`, and stop there.
    #[arg(long, conflicts_with_all = ["direct", "dry_run", "hard", "fleet", "roll", "no_fleet"])]
    pub load: bool,
    /// Take one of the group's slots first; the new kernel's `hebe fleet release`
    /// gives it back [default: `always` in fleet.toml].
    #[arg(long, group = "slot")]
    pub fleet: bool,
    /// Take this host's turn in the roll through its group, if it has come: with
    /// a slot, into what the roll says.
    #[arg(long, group = "slot", conflicts_with_all = ["hard", "dry_run"])]
    pub roll: bool,
    /// With --fleet and --roll: how long to wait for a slot [default: `patience`
    /// in fleet.toml].
    #[arg(long, value_name = "TIME", requires = "slot")]
    pub wait: Option<Span>,
    /// Take none, whatever fleet.toml says.
    #[arg(long, conflicts_with = "slot")]
    pub no_fleet: bool,
    /// Print the timeline of the last reboot instead of rebooting.
    #[arg(long, conflicts_with_all = [
        "method", "kernel", "initrd", "append", "cmdline", "hard", "kexec", "dry_run", "timeout", "force",
        "fleet", "roll", "wait", "no_fleet", "direct", "load",
    ])]
    pub report: bool,
    /// With --report: draw it as a Gantt chart into this file.
    #[arg(long, value_name = "FILE", requires = "report")]
    pub svg: Option<PathBuf>,
}

/// How long a guest has to shut down at a cold reboot, in seconds.
const TIMEOUT_S: u64 = 60;

impl RebootArgs {
    /// What they ask of a reboot.
    pub fn options(&self) -> RebootOptions {
        RebootOptions {
            method: self.method.into(),
            kernel: self.kernel.clone(),
            initrd: self.initrd.clone(),
            append: self.append.clone(),
            cmdline: self.cmdline.clone(),
            hard: self.hard,
            kexec: self.kexec,
            timeout_s: self.timeout.unwrap_or(TIMEOUT_S),
            force: self.force,
            direct: self.direct,
        }
    }
}

/// How VMs get over a reboot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum MethodArg {
    /// Frozen in memory.
    Warm,
    /// Saved to disk.
    Saved,
    /// Shut down and booted.
    Cold,
}

impl From<MethodArg> for RebootMethod {
    fn from(method: MethodArg) -> Self {
        match method {
            MethodArg::Warm => Self::Warm,
            MethodArg::Saved => Self::Saved,
            MethodArg::Cold => Self::Cold,
        }
    }
}
