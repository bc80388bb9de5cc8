//! The host role: what a small distribution's early user space would do.
//!
//! Order matters for downtime: KVM, the reserved range and the bridge come
//! first, then the resume of frozen VMs, then everything else.

use std::fs;
use std::net::Ipv4Addr;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::Ordering;
use std::thread;

use anyhow::{Context, Result};

use crate::{agent, cpr, dax, modules, services, sys};

const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);
const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);

/// Runs the host until it is rebooted.
pub fn run(userspace_tsc: u64) -> Result<()> {
    println!("LAB: userspace {userspace_tsc}");
    // SAFETY: still the only thread of this process.
    unsafe { std::env::set_var("PATH", "/bin:/sbin") };
    // One after the other: two threads that load modules wait for each
    // other's locks, spinning, and both take longer.
    modules::load("early");
    let kvm = thread::spawn(|| modules::load("kvm"));
    sys::mount_pseudo("tmpfs", "/run", "mode=755")?;
    sys::mount_pseudo("tmpfs", "/tmp", "mode=1777")?;
    sys::mount_pseudo("devpts", "/dev/pts", "ptmxmode=666")?;
    rustix::system::sethostname(b"lab")?;
    report("network", network());
    let agent = agent::start(userspace_tsc)?;
    report("data disk", data_disk());
    dax::settle();
    // The thread only prints what goes wrong.
    let _ = kvm.join();
    println!("LAB: early {}", sys::tsc());
    if sys::cmdline_value("lab.store").as_deref() == Some("init") {
        hebe("store-init", &["store", "init"]);
    }
    if !sys::cmdline_has("lab.noresume") {
        hebe("resume", &["resume", "--all"]);
        println!("LAB: resumed {}", sys::tsc());
    }
    report("the peer's VMs", cpr::resume_all(userspace_tsc));
    modules::load("late");
    report(
        "cgroup2",
        sys::mount_pseudo("cgroup2", "/sys/fs/cgroup", ""),
    );
    report(
        "debugfs",
        sys::mount_pseudo("debugfs", "/sys/kernel/debug", ""),
    );
    if Path::new("/bin/busybox").exists() {
        let install = Command::new("/bin/busybox")
            .args(["--install", "-s", "/bin"])
            .status();
        report("busybox", install.map(|_| ()).map_err(Into::into));
    }
    report("services", services::start());
    agent.settled.store(true, Ordering::Release);
    println!("LAB: settled {}", sys::tsc());
    loop {
        thread::park();
    }
}

fn report(what: &str, result: Result<()>) {
    if let Err(e) = result {
        println!("LAB: {what}: {e:#}");
    }
}

fn network() -> Result<()> {
    let control = sys::NetControl::open()?;
    control.up("lo")?;
    let nic = fs::read_dir("/sys/class/net")
        .context("no /sys/class/net")?
        .filter_map(|e| Some(e.ok()?.file_name().to_string_lossy().into_owned()))
        .find(|n| n.starts_with("eth") || n.starts_with("en"))
        .context("no network card")?;
    control.bridge("br0", &nic)?;
    control.up(&nic)?;
    control.up("br0")?;
    control.address("br0", ADDRESS, 24)?;
    control.gateway(GATEWAY)
}

/// Disk, saved VMs and VM definitions outlive the host's kernel on `/data`.
fn data_disk() -> Result<()> {
    if !Path::new("/dev/vda").exists() {
        return Ok(());
    }
    sys::mount_disk("/dev/vda", "/data", "ext4", sys::Access::Write)?;
    sys::bind("/data/hebe", "/var/lib/hebe")?;
    sys::bind("/data/etc", "/etc/hebe")
}

/// Runs `hebe` to its end, its output to the log and the serial line.
pub fn hebe(label: &str, arguments: &[&str]) {
    let places = ["/bin/hebe", "/data/bin/hebe"];
    let Some(program) = places.into_iter().find(|p| Path::new(p).exists()) else {
        return;
    };
    let output = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .output();
    let text = match output {
        Ok(output) => format!(
            "{}{}{label}: {}\n",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr),
            output.status
        ),
        Err(e) => format!("{label}: {e}\n"),
    };
    report(
        "log",
        fs::write(format!("/run/hebe-{label}.log"), &text).map_err(Into::into),
    );
    for line in text.lines() {
        println!("LAB: hebe {line}");
    }
}
