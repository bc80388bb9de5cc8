//! The way into a real root file system, and the agent in it.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::Ordering;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::mount::mount_move;

use crate::{agent, dax, host, modules, sys};

const ROOT: &str = "/sysroot";
/// The root's partition, and the disk with programs and modules.
const ROOT_DEVICE: &str = "/dev/vda1";
const DATA_DEVICE: &str = "/dev/vdb";
/// How long the disks may take to appear.
const DISKS: Duration = Duration::from_secs(120);

/// How long the bridge may take.
const BRIDGE: Duration = Duration::from_secs(300);

/// As PID 1: mounts the root and becomes its init. Comes back with an error
/// alone.
pub fn enter() -> Result<()> {
    modules::load("early");
    modules::load("kvm");
    modules::load("late");
    for device in [ROOT_DEVICE, DATA_DEVICE] {
        if !dax::wait_for(Path::new(device), DISKS) {
            bail!("there is no {device}");
        }
    }
    sys::mount_disk(ROOT_DEVICE, ROOT, "ext4", sys::Access::Write)?;
    sys::mount_disk(
        DATA_DEVICE,
        &format!("{ROOT}/data"),
        "ext4",
        sys::Access::Write,
    )?;
    for name in ["hebe", "etc"] {
        let place = if name == "etc" {
            "etc/hebe"
        } else {
            "var/lib/hebe"
        };
        sys::bind(&format!("{ROOT}/data/{name}"), &format!("{ROOT}/{place}"))?;
    }
    for folder in ["dev", "proc", "sys"] {
        let to = format!("{ROOT}/{folder}");
        mount_move(format!("/{folder}"), &to).with_context(|| format!("cannot move {folder}"))?;
    }
    // What lies in the initramfs is memory, and nobody sees it any more.
    for folder in ["/bin", "/lab"] {
        let _ = fs::remove_dir_all(folder);
    }
    rustix::process::chdir(ROOT).context("cannot enter the root")?;
    mount_move(".", "/").context("cannot move the root")?;
    rustix::process::chroot(".").context("cannot change the root")?;
    rustix::process::chdir("/").context("cannot enter the root")?;
    let error = Command::new("/sbin/init").env_clear().exec();
    Err(error).context("cannot run /sbin/init")
}

/// As a unit of systemd: what the host role does behind its start-up.
pub fn agent(userspace_tsc: u64) -> Result<()> {
    sys::take_console()?;
    println!("LAB: userspace {userspace_tsc}");
    let agent = agent::start(userspace_tsc)?;
    dax::settle();
    if sys::cmdline_value("lab.store").as_deref() == Some("init") {
        host::hebe("store-init", &["store", "init"]);
    }
    // VMs are attached to it, and systemd-networkd makes it.
    dax::wait_for(Path::new("/sys/class/net/br0"), BRIDGE);
    // A package that is installed does this itself, and earlier.
    if !sys::cmdline_has("lab.noresume") && !Path::new(RESUME_UNIT).exists() {
        host::hebe("resume", &["resume", "--all"]);
        println!("LAB: resumed {}", sys::tsc());
    }
    let state = Command::new("systemctl")
        .args(["is-system-running", "--wait"])
        .stdin(Stdio::null())
        .output()
        .context("cannot run systemctl")?;
    agent.settled.store(true, Ordering::Release);
    let state = String::from_utf8_lossy(&state.stdout).trim().to_owned();
    println!("LAB: settled {} {state}", sys::tsc());
    loop {
        thread::park();
    }
}

const RESUME_UNIT: &str = "/usr/lib/systemd/system/hebe-resume.service";
