//! systemd as this host's PID 1: where it takes the host, asking it to, and a
//! place for VMMs that it leaves alone until the end.
//!
//! Everything here is best effort for VMs that run: a host whose PID 1 is
//! something else, or does not answer, runs VMs all the same.

mod bus;

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use hebe_flow::stopping::Going;
use hebe_types::VmName;

use crate::limits::Limits;
use crate::system::Leave;

/// The unit whose stop is the suspend event.
pub const UNIT: &str = "hebe-freeze.service";
/// The slice of all VMMs.
pub const SLICE: &str = "hebe.slice";
/// Made by systemd alone (sd_booted(3)).
const BOOTED: &str = "/run/systemd/system";
/// Where root speaks with PID 1 without a bus.
const PRIVATE: &str = "/run/systemd/private";
/// Where units may lie, the strongest first (systemd.unit(5)).
const UNIT_DIRS: [&str; 4] = [
    "/etc/systemd/system",
    "/run/systemd/system",
    "/usr/local/lib/systemd/system",
    "/usr/lib/systemd/system",
];
/// How long PID 1 may take to say where the host goes.
const QUEUE_WAIT: Duration = Duration::from_secs(30);

/// Whether PID 1 is systemd.
pub fn booted() -> bool {
    Path::new(BOOTED).is_dir()
}

/// Where the host goes. Where PID 1 does not say, it counts as one that goes
/// and whose memory does not survive: VMs that are saved although it stays up
/// are resumed by an order, and ones that are left running although it goes
/// are gone.
///
/// # Errors
/// PID 1 does not say, with the reason.
pub fn going() -> Result<Going, String> {
    let began = Instant::now();
    loop {
        match systemctl(&["list-jobs", "--no-legend", "--no-pager", "--full"]) {
            Ok(jobs) => return Ok(Going::from_jobs(&jobs)),
            Err(why) if began.elapsed() > QUEUE_WAIT => return Err(why),
            Err(_) => thread::sleep(Duration::from_millis(500)),
        }
    }
}

/// Whether this host's PID 1 carries out the suspend event when it is asked to
/// leave.
///
/// # Errors
/// Why it does not.
pub fn armed() -> Result<(), String> {
    if !booted() {
        return Err("PID 1 is not systemd".into());
    }
    match systemctl(&["is-active", UNIT]) {
        Ok(state) if state.trim() == "active" => Ok(()),
        Ok(state) => Err(format!("{UNIT} is {}", state.trim())),
        Err(why) => Err(format!("{UNIT} is not active ({why})")),
    }
}

/// Asks PID 1 to leave, host services first. Returns when the order is in its
/// queue, from which nothing takes it any more.
///
/// # Errors
/// It refused, with the reason.
pub fn ask(how: Leave) -> Result<(), String> {
    let target = match how {
        Leave::Kexec => "kexec.target",
        Leave::Reset => "reboot.target",
        Leave::PowerOff => "poweroff.target",
    };
    let order = [
        "start",
        "--no-block",
        "--job-mode=replace-irreversibly",
        target,
    ];
    systemctl(&order).map(drop)
}

/// How long it may take until a process is in its scope. A VM that is resumed waits
/// for it.
const MOVE_WAIT: Duration = Duration::from_secs(2);

/// Moves a VMM into a scope of its own in [`SLICE`], which no service and no
/// session takes along when it ends, and which a shutdown does not stop; with
/// these limits.
///
/// # Errors
/// It stays where it is, or is there without its limits; why.
pub(crate) fn adopt(vm: &VmName, pid: u32, limits: &Limits) -> Result<(), String> {
    let (name, title) = (format!("vm-{vm}"), format!("Hebe: VM {vm}"));
    let limited = adopt_as(&name, &title, pid, Some(limits));
    if limited.is_err() {
        // Its place matters more: in it the VM outlives who started it.
        let _ = adopt_as(&name, &title, pid, None);
    }
    limited
}

/// The same with the passt of a VM's network: a unit or a session that ends takes it
/// from the VM otherwise. It is not waited for: its VMM is, whose turn with PID 1
/// comes after this one.
///
/// # Errors
/// PID 1 did not take the order, and why.
pub(crate) fn adopt_passt(vm: &VmName, pid: u32) -> Result<(), String> {
    let (name, title) = (format!("passt-{vm}"), format!("Hebe: network of VM {vm}"));
    let limits = Limits::of_passt();
    let ordered = order_scope(&name, &title, pid, Some(&limits));
    ordered.or_else(|_| order_scope(&name, &title, pid, None))?;
    Ok(())
}

/// The same with a process that all VMs need, without a limit.
///
/// # Errors
/// It stays where it is, and why.
pub(crate) fn adopt_helper(name: &str, pid: u32) -> Result<(), String> {
    adopt_as(name, &format!("Hebe: {name}"), pid, None)
}

fn adopt_as(name: &str, title: &str, pid: u32, limits: Option<&Limits>) -> Result<(), String> {
    let scope = order_scope(name, title, pid, limits)?;
    let cgroup = || fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
    wait_for(&|| cgroup().contains(&scope), MOVE_WAIT)
}

/// Has PID 1 make a scope around a process; its name.
fn order_scope(
    name: &str,
    title: &str,
    pid: u32,
    limits: Option<&Limits>,
) -> Result<String, String> {
    can_adopt()?;
    let name = scope_name(name, pid);
    let scope = Scope {
        name: &name,
        title,
        pid,
        limits,
    };
    bus::start_scope(Path::new(PRIVATE), &scope).map_err(|e| format!("systemd: {e}"))?;
    Ok(name)
}

/// PID 1 answers before it has moved the process.
fn wait_for(moved: &dyn Fn() -> bool, patience: Duration) -> Result<(), String> {
    let until = Instant::now() + patience;
    while !moved() {
        if Instant::now() >= until {
            return Err("systemd has not moved the process into its scope yet".into());
        }
        thread::sleep(Duration::from_millis(2));
    }
    Ok(())
}

/// Whether processes can be given a scope.
///
/// # Errors
/// Why not.
pub(crate) fn can_adopt() -> Result<(), String> {
    if !booted() {
        return Err("PID 1 is not systemd".into());
    }
    // An implicit slice would be stopped with everything else.
    if !UNIT_DIRS.iter().any(|d| Path::new(d).join(SLICE).exists()) {
        return Err(format!("{SLICE} is not installed"));
    }
    if !rustix::process::geteuid().is_root() {
        return Err("only root may make scopes".into());
    }
    Ok(())
}

/// A scope to be made around a process that runs.
struct Scope<'a> {
    name: &'a str,
    title: &'a str,
    pid: u32,
    limits: Option<&'a Limits>,
}

/// Whether this process is part of a unit that ends without what VMs leave in it: it
/// ends with its own process alone (`KillMode=process`).
pub(crate) fn place_ends_alone() -> bool {
    booted() && fs::read_to_string("/proc/self/cgroup").is_ok_and(|group| ends_alone(&group))
}

fn ends_alone(group: &str) -> bool {
    let mut parts = group.trim_end().split('/');
    parts.any(|p| p == "hebe-resume.service" || p == "hebed.service")
}

/// Whether a VMM in this control group outlives the stop of ordinary services:
/// its own scope, or one of Hebe's units, which end alone (`KillMode=process`).
pub(crate) fn is_safe(group: &str) -> bool {
    ends_alone(group) || group.split('/').any(|p| p == SLICE)
}

/// The process is part of it: a scope ends with its last process, and the next
/// VMM of the same VM may come before systemd noticed.
fn scope_name(name: &str, pid: u32) -> String {
    // A hyphen is a level of the hierarchy for slices alone.
    format!("hebe-{name}-{pid}.scope")
}

fn systemctl(words: &[&str]) -> Result<String, String> {
    let output = Command::new("systemctl")
        .args(words)
        .stdin(Stdio::null())
        .env("SYSTEMD_COLORS", "0")
        .env("LC_ALL", "C")
        .output()
        .map_err(|e| format!("systemctl cannot be started: {e}"))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    let said = if said.is_empty() {
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    } else {
        said
    };
    Err(format!("systemctl {}: {said}", words.join(" ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vmm_in_a_session_is_not_safe() {
        for safe in [
            "/hebe.slice/hebe-vm-web-42.scope",
            "/system.slice/hebe-resume.service",
        ] {
            assert!(is_safe(safe), "{safe}");
        }
        for unsafe_place in [
            "/user.slice/user-0.slice/session-3.scope",
            "/system.slice/cron.service",
            "/",
        ] {
            assert!(!is_safe(unsafe_place), "{unsafe_place}");
        }
        // As the kernel tells it of a process.
        assert!(ends_alone("0::/system.slice/hebe-resume.service\n"));
        assert!(!ends_alone("0::/hebe.slice/hebe-vm-web-42.scope\n"));
    }

    #[test]
    fn a_process_is_waited_for_until_it_is_in_its_scope_and_not_for_ever() {
        let looks = std::cell::Cell::new(0);
        let third = || looks.replace(looks.get() + 1) == 2;
        assert_eq!(wait_for(&third, Duration::from_secs(60)), Ok(()));
        assert_eq!(looks.get(), 3);
        let why = wait_for(&|| false, Duration::from_millis(1));
        assert!(why.is_err_and(|why| why.contains("not moved")));
    }

    /// A VM that is saved in a directory that is not mounted looks like one that is
    /// stopped.
    #[test]
    fn nothing_starts_or_suspends_vms_without_the_state_directory() {
        for unit in [
            include_str!("../../../../packaging/hebe-freeze.service"),
            include_str!("../../../../packaging/hebe-resume.service"),
            include_str!("../../../../packaging/hebed.service"),
        ] {
            let mut lines = unit.lines();
            assert!(
                lines.any(|line| line == "RequiresMountsFor=/var/lib/hebe"),
                "{unit}"
            );
        }
    }

    #[test]
    fn a_scope_has_a_name_that_systemd_takes() {
        let scope = scope_name("vm-web-1", 42);
        assert_eq!(scope, "hebe-vm-web-1-42.scope");
        // unit_name_is_valid(): letters, digits and :-_.\, 255 bytes at most.
        let plain = |c: char| c.is_ascii_alphanumeric() || "-.".contains(c);
        assert!(scope.chars().all(plain) && scope.len() < 256);
    }
}
