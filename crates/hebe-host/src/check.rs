//! Is this machine ready? Each check with the exact remedy.

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};

use hebe_net::passt;
use hebe_store::StoreError;
use hebe_sys::kexec;
use hebe_sys::luo::LuoError;
use hebe_types::{Network, StoreKind, VmName, counted};

use crate::checks;
use crate::cmdline;
use crate::definitions;
use crate::host::Host;
use crate::launch::Instance;
use crate::listing::with_cause;
use crate::luo::check as luo_check;
use crate::network::life;
use crate::preflight::{Check, Level};
use crate::setup;
use crate::stores::{StoreAccess, StoreTrouble};
use crate::systemd;

/// Modules that bring a reserved range up as a devdax device.
pub(crate) const DAX_MODULES: &str = "nd_e820 nd_pmem device_dax dax_pmem";

/// All checks, in the order in which one would fix them.
pub fn host_check(host: &Host) -> Vec<Check> {
    let mut checks = vec![
        check_root(rustix::process::geteuid().is_root()),
        check_cpu(&read("/proc/cpuinfo")),
        check_kvm(Path::new("/dev/kvm")),
        check_kexec(kexec::is_loaded(), kexec::is_disabled()),
        check_lockdown(&read("/sys/kernel/security/lockdown")),
        check_reservation(&host.system.cmdline(), &setup::pending(Path::new("/"))),
        check_dax(Path::new("/sys/bus/dax/devices")),
        check_store(&*host.store),
        check_tun(Path::new("/dev/net/tun")),
        check_vmm(&host.layout.vmm),
    ];
    let luo = is_luo_wanted(host).then(|| host.system.live_update());
    if let Some(offered) = luo {
        for_live_update(&mut checks, offered, &host.system.release());
    }
    checks.push(checks::host_config(host));
    if systemd::booted() {
        checks.push(check_armed(host.system.armed()));
        checks.extend(check_places(host, Path::new("/proc")));
    }
    checks.extend(check_networks(
        networks_of(host),
        hebe_net::nft_program(),
        passt::program(),
    ));
    checks.push(check_limits(host.system.can_limit()));
    checks.extend(check_unlimited(host));
    checks.extend(check_dirs(host));
    checks
}

fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

fn check_root(is_root: bool) -> Check {
    if is_root {
        Check::ok("root", "hebe runs as root")
    } else {
        Check::bad(
            "root",
            Level::Warn,
            "hebe does not run as root: it can list VMs, and can neither reboot nor manage a store",
            "run it with sudo",
        )
    }
}

fn check_cpu(cpuinfo: &str) -> Check {
    let flags = cpuinfo
        .lines()
        .find(|l| l.starts_with("flags"))
        .unwrap_or_default();
    let has = |flag: &str| flags.split_whitespace().any(|f| f == flag);
    let vendor = if has("vmx") {
        "Intel VT-x"
    } else if has("svm") {
        "AMD-V"
    } else {
        // What counts is the check of /dev/kvm: nested under some hypervisors
        // KVM works without either flag.
        return Check::bad(
            "cpu",
            Level::Warn,
            "the processor shows neither VT-x nor AMD-V",
            "switch virtualization on in the firmware; in a VM, switch nesting on in its host",
        );
    };
    Check::ok("cpu", format!("the processor has {vendor}"))
}

fn check_kvm(path: &Path) -> Check {
    let opened = OpenOptions::new().read(true).write(true).open(path);
    match opened {
        Ok(_) => Check::ok("kvm", "/dev/kvm can be used"),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Check::bad(
            "kvm",
            Level::Fail,
            "/dev/kvm is there and may not be used",
            "run as root, or: usermod -aG kvm $USER",
        ),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Check::bad(
            "kvm",
            Level::Fail,
            "there is no /dev/kvm",
            "load the module: modprobe kvm_intel, or modprobe kvm_amd",
        ),
        Err(error) => Check::bad(
            "kvm",
            Level::Fail,
            format!("/dev/kvm does not open ({error}): nothing is behind it"),
            "load the module: modprobe kvm_intel, or modprobe kvm_amd",
        ),
    }
}

fn check_kexec(loaded: Option<bool>, disabled: Option<bool>) -> Check {
    match (loaded, disabled) {
        (None, _) => Check::bad(
            "kexec",
            Level::Fail,
            "the running kernel has no kexec",
            "boot a kernel with CONFIG_KEXEC_FILE=y",
        ),
        (_, Some(true)) => Check::bad(
            "kexec",
            Level::Fail,
            "loading kernels was switched off until the next boot (kernel.kexec_load_disabled = 1)",
            "remove that setting from /etc/sysctl.d, then reboot once",
        ),
        _ => Check::ok("kexec", "the running kernel can load another one"),
    }
}

fn check_lockdown(lockdown: &str) -> Check {
    let active = lockdown
        .split('[')
        .nth(1)
        .and_then(|rest| rest.split(']').next())
        .unwrap_or("none");
    if active == "none" {
        Check::ok("lockdown", "the kernel is not locked down")
    } else {
        Check::bad(
            "lockdown",
            Level::Warn,
            format!("the kernel is locked down ({active}): kexec takes signed kernels only"),
            "use kernels signed for this machine, or switch secure boot off",
        )
    }
}

/// `pending`: what the boot loader tells the kernel at the next start.
fn check_reservation(running: &str, pending: &[String]) -> Check {
    let found = cmdline::reservations(running);
    if found.is_empty() && !pending.is_empty() {
        return Check::bad(
            "reservation",
            Level::Warn,
            format!(
                "memory is reserved for VMs from the next start by the boot loader on: {}",
                pending.join(" ")
            ),
            "reboot once, with `systemctl reboot`",
        );
    }
    if found.is_empty() {
        return Check::bad(
            "reservation",
            Level::Warn,
            "no memory is reserved for VMs on the kernel command line",
            "`hebe host setup`, and reboot once; where there is no GRUB of Debian's kind, add memmap=SIZE!START yourself (such as memmap=16G!16G, in RAM that /proc/iomem shows as System RAM)",
        );
    }
    let texts: Vec<String> = found.iter().map(cmdline::written).collect();
    Check::ok("reservation", format!("reserved: {}", texts.join(" ")))
}

/// Somebody counts on it: the boot loader tells the kernel, or a VM is to be in
/// such a store.
fn is_luo_wanted(host: &Host) -> bool {
    let told = |word: &&str| word.starts_with("kho=") || word.starts_with("liveupdate=");
    let line = host.system.cmdline();
    let mut defined = definitions::all(&host.layout).into_values().flatten();
    cmdline::words(&line).iter().any(told) || defined.any(|vm| vm.store == StoreKind::Luo)
}

/// Where Linux carries memory, what a reserved range lacks is no fault.
fn for_live_update(checks: &mut Vec<Check>, offered: Result<(), LuoError>, release: &str) {
    let id = "live-update";
    let Err(error) = offered else {
        let of_range = ["reservation", "dax", "store"];
        checks.retain(|c| c.level != Level::Warn || !of_range.contains(&c.id.as_str()));
        checks.push(Check::ok(
            id,
            "the running kernel can carry memory into the next one",
        ));
        return;
    };
    let is_old = luo_check::version(release).is_some_and(|version| version < luo_check::FIRST);
    let why = match is_old {
        true => format!("this is Linux {release}, and live update came with 6.19"),
        false => with_cause(&error),
    };
    checks.push(Check::bad(
        id,
        Level::Warn,
        format!("VMs in store luo would end with this kernel: {why}"),
        "boot Linux 6.19 or newer, built with CONFIG_LIVEUPDATE=y, with the words kho=on liveupdate=on; or reserve memory: `hebe host setup --store devdax`, and reboot once",
    ));
}

fn check_dax(bus: &Path) -> Check {
    let devices = fs::read_dir(bus).map(|d| d.flatten().count());
    match devices {
        Ok(0) => Check::bad(
            "dax",
            Level::Warn,
            "there is no devdax device",
            "make one of the reserved range: `hebe store init`",
        ),
        Ok(n) => Check::ok("dax", format!("{n} devdax devices")),
        Err(_) => Check::bad(
            "dax",
            Level::Warn,
            "the kernel has no DAX bus",
            format!(
                "load the modules: modprobe -a {DAX_MODULES} (and put them into the initramfs)"
            ),
        ),
    }
}

fn check_store(access: &dyn StoreAccess) -> Check {
    let found = access.check().and_then(|()| access.view());
    match found {
        Ok(Some(store)) => Check::ok(
            "store",
            format!(
                "{} holds a store: {} MiB, {} MiB free, {}",
                store.path.display(),
                store.capacity.0 >> 20,
                store.free.0 >> 20,
                counted(store.segments.len(), "segment")
            ),
        ),
        Ok(None) => Check::bad(
            "store",
            Level::Warn,
            "there is no store: VMs live in memfds and do not outlive the host kernel",
            "reserve memory and run `hebe store init`",
        ),
        Err(StoreTrouble::Store(StoreError::Overrun { at })) => Check::bad(
            "store",
            Level::Fail,
            format!(
                "something else used the store's memory since the store was made (its guard is overwritten at byte {at:#x}): no VM in it is resumed, and nothing in it is changed"
            ),
            "see that every kernel boots with the same memmap= words, then give the VMs in the store up and make it anew: `hebe store init --force`",
        ),
        Err(error) => Check::bad(
            "store",
            Level::Fail,
            with_cause(&error),
            "see `hebe store list`",
        ),
    }
}

fn check_tun(path: &Path) -> Check {
    match OpenOptions::new().read(true).write(true).open(path) {
        Ok(_) => Check::ok("tun", "tap devices can be made"),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Check::bad(
            "tun",
            Level::Warn,
            "there is no /dev/net/tun: VMs can have no NIC",
            "load the module: modprobe tun",
        ),
        Err(error) => Check::bad(
            "tun",
            Level::Warn,
            format!("/dev/net/tun cannot be used ({error})"),
            "run as root, or give the user CAP_NET_ADMIN",
        ),
    }
}

fn check_vmm(path: &Path) -> Check {
    if path.is_file() {
        Check::ok("vmm", format!("{} is there", path.display()))
    } else {
        Check::bad(
            "vmm",
            Level::Fail,
            format!("{} is missing", path.display()),
            "install hebe-vmm beside hebe, or name it in HEBE_VMM",
        )
    }
}

/// Without the unit a shutdown ends every VMM with its guest running.
fn check_armed(armed: Result<(), String>) -> Check {
    match armed {
        Ok(()) => Check::ok(
            "freeze-unit",
            format!(
                "{} keeps the VMs when systemd takes the host down",
                systemd::UNIT
            ),
        ),
        Err(why) => Check::bad(
            "freeze-unit",
            Level::Warn,
            format!("when systemd takes the host down, its VMs are lost: {why}"),
            format!(
                "systemctl enable {0}, and systemctl start {0}",
                systemd::UNIT
            ),
        ),
    }
}

/// VMMs that a session or a service takes along when it is stopped, before the
/// suspend event.
fn check_places(host: &Host, proc: &Path) -> Vec<Check> {
    let elsewhere = |name: &VmName| {
        let pid = crate::vmm::process(&host.layout.socket(name))?;
        let path = proc.join(pid.to_string()).join("cgroup");
        let text = fs::read_to_string(path).ok()?;
        let group = text.lines().find_map(|line| line.strip_prefix("0::"))?;
        (!systemd::is_safe(group)).then(|| {
            Check::bad(
                format!("place:{name}"),
                Level::Warn,
                format!("the VMM of '{name}' is in {group}, and may end with it before its VM is suspended"),
                format!("install hebe.slice, then `hebe suspend {name}` and `hebe resume {name}`"),
            )
        })
    };
    let names = crate::listing::run_dirs(host).unwrap_or_default();
    names.iter().filter_map(elsewhere).collect()
}

/// Networks that Hebe makes, of VMs that are defined or may go on, each with one
/// of them.
fn networks_of(host: &Host) -> BTreeMap<Network, VmName> {
    let mut found = BTreeMap::new();
    let defined = definitions::all(&host.layout).into_values().flatten();
    let names = crate::listing::run_dirs(host).unwrap_or_default();
    let known = names.iter().filter_map(|name| {
        let instance = Instance::read(&host.layout.vm_dir(name))?;
        life(&host.layout, name, instance.vm)
    });
    for config in defined.chain(known) {
        for network in config.nets.iter().filter_map(|net| net.network) {
            found.entry(network).or_insert_with(|| config.name.clone());
        }
    }
    found
}

/// The programs of the networks that are used.
fn check_networks(
    used: BTreeMap<Network, VmName>,
    nft: Option<PathBuf>,
    passt: Option<PathBuf>,
) -> Vec<Check> {
    let check = |(network, vm): (Network, VmName)| {
        let (word, program, found, package) = match network {
            Network::Nat => ("nat", "nft", &nft, "nftables"),
            Network::User => ("user", "passt", &passt, "passt"),
        };
        let id = format!("network:{word}");
        match found {
            Some(path) => Check::ok(id, format!("network = \"{word}\" has {}", path.display())),
            None => Check::bad(
                id,
                Level::Warn,
                format!(
                    "network = \"{word}\", which VM '{vm}' has, needs the program {program}, which is not installed"
                ),
                format!(
                    "install the package {package}, also where VMs are resumed before the root file system is there"
                ),
            ),
        }
    };
    used.into_iter().map(check).collect()
}

/// Without them a guest that took its VMM over can exhaust the host.
fn check_limits(can: Result<String, String>) -> Check {
    match can {
        Ok(place) => Check::ok(
            "limits",
            format!("memory and threads of VMMs are limited: {place}"),
        ),
        Err(why) => Check::bad(
            "limits",
            Level::Warn,
            format!("memory and threads of VMMs are not limited: {why}"),
            "with systemd, install hebe.slice; elsewhere mount control groups of version 2 with memory and pids: mount -t cgroup2 none /sys/fs/cgroup",
        ),
    }
}

/// VMMs that run without limits, where there are any.
fn check_unlimited(host: &Host) -> Vec<Check> {
    if host.system.can_limit().is_err() {
        return Vec::new();
    }
    let unlimited = |name: &VmName| {
        let pid = crate::vmm::process(&host.layout.socket(name))?;
        let view = host.system.limits_of(pid).ok()?;
        (!view.is_limited()).then(|| {
            Check::bad(
                format!("limits:{name}"),
                Level::Warn,
                format!("the VMM of '{name}' has {view}"),
                format!("give it a new VMM: `hebe suspend {name}` and `hebe resume {name}`, or stop and start it"),
            )
        })
    };
    let names = crate::listing::run_dirs(host).unwrap_or_default();
    names.iter().filter_map(unlimited).collect()
}

fn check_dirs(host: &Host) -> Vec<Check> {
    let mut checks = Vec::new();
    let state = &host.layout.state;
    if !host.system.is_writable(state).unwrap_or(false) {
        checks.push(Check::bad(
            "state-dir",
            Level::Fail,
            format!("{} cannot be written", state.display()),
            "run as root, mount it for writing, or name another directory in HEBE_STATE_DIR",
        ));
    } else if host.system.is_volatile(state).unwrap_or(false) {
        checks.push(Check::bad(
            "state-dir",
            Level::Warn,
            format!(
                "{} lies in memory: saved VMs would not outlive the kernel",
                state.display()
            ),
            "mount a disk there, or name a directory on one in HEBE_STATE_DIR",
        ));
    } else {
        checks.push(Check::ok(
            "state-dir",
            format!("{} outlives the kernel and can be written", state.display()),
        ));
    }
    checks
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use hebe_store::{FormatOptions, Store};

    use super::*;
    use crate::stores::DeviceStore;

    #[test]
    fn each_check_has_a_remedy_when_it_does_not_hold() {
        let bad = [
            check_root(false),
            check_cpu("flags\t: fpu sse2\n"),
            check_kvm(Path::new("/no/such/kvm")),
            check_kexec(None, None),
            check_kexec(Some(false), Some(true)),
            check_lockdown("none [integrity] confidentiality\n"),
            check_reservation("quiet", &[]),
            check_reservation("quiet", &["memmap=1G!5G".to_owned()]),
            check_dax(Path::new("/no/such/bus")),
            check_tun(Path::new("/no/such/tun")),
            check_vmm(Path::new("/no/such/vmm")),
            check_armed(Err("it is inactive".into())),
            check_limits(Err("not mounted".into())),
        ];
        for check in bad {
            assert_ne!(check.level, Level::Ok, "{check:?}");
            assert!(check.remedy.is_some(), "{check:?}");
        }
        let good = [
            check_cpu("flags\t: fpu svm sse2\n"),
            check_kexec(Some(false), Some(false)),
            check_lockdown("[none] integrity\n"),
            check_lockdown(""),
            check_reservation("memmap=256M!4G", &[]),
            check_armed(Ok(())),
            check_limits(Ok("scopes".into())),
        ];
        for check in good {
            assert_eq!(check.level, Level::Ok, "{check:?}");
        }
    }

    #[test]
    fn live_update_is_asked_for_where_somebody_counts_on_it() {
        let range = || vec![check_root(true), check_reservation("quiet", &[])];
        let mut checks = range();
        for_live_update(&mut checks, Ok(()), "7.3.4");
        let ids: Vec<&str> = checks.iter().map(|c| c.id.as_str()).collect();
        assert_eq!(ids, ["root", "live-update"]);
        let said = |release: &str, error| {
            let mut checks = range();
            for_live_update(&mut checks, Err(error), release);
            assert_eq!(checks.len(), 3, "{checks:?}");
            let check = checks.pop().expect("the last");
            assert_eq!(check.level, Level::Warn);
            assert!(check.remedy.is_some(), "{check:?}");
            check.sentence
        };
        let old = said("6.1.0-50-cloud-amd64", LuoError::NotWorking);
        assert!(old.contains("6.1.0-50") && old.contains("6.19"), "{old}");
        let new = said("7.3.4", LuoError::NotEnabled("liveupdate=on"));
        assert!(new.contains("booted without liveupdate=on"), "{new}");

        let root = tempfile::tempdir().expect("dir");
        let host = Host {
            layout: crate::host::Layout::below(root.path()),
            ..Host::here()
        };
        assert!(!is_luo_wanted(&host), "nobody does");
        let dir = host.layout.config.join("vms");
        fs::create_dir_all(&dir).expect("mkdir");
        let text = "name = \"web\"\nmemory = \"4MiB\"\nkernel = \"/k\"\nstore = \"luo\"\n";
        fs::write(dir.join("web.toml"), text).expect("write");
        assert!(is_luo_wanted(&host));
    }

    #[test]
    fn a_network_without_its_program_is_told_to_who_uses_it() {
        let root = tempfile::tempdir().expect("dir");
        let host = Host {
            layout: crate::host::Layout::below(root.path()),
            ..Host::here()
        };
        assert!(networks_of(&host).is_empty());
        let dir = host.layout.config.join("vms");
        fs::create_dir_all(&dir).expect("mkdir");
        let text = |name: &str, more: &str| {
            let net = format!("[[net]]\nnetwork = \"{more}\"\n");
            let text = format!("name = \"{name}\"\nmemory = \"4MiB\"\nkernel = \"/k\"\n{net}");
            fs::write(dir.join(format!("{name}.toml")), text).expect("write");
        };
        text("web", "user");
        let used = networks_of(&host);
        assert_eq!(used.len(), 1, "{used:?}");
        let checks = check_networks(used, None, None);
        assert_eq!(checks[0].level, Level::Warn);
        assert!(checks[0].sentence.contains("'web'"), "{checks:?}");
        let remedy = checks[0].remedy.as_deref().expect("a remedy");
        assert!(remedy.contains("package passt"), "{remedy}");
        text("db", "nat");
        let here = || Some(PathBuf::from("/usr/bin/x"));
        let checks = check_networks(networks_of(&host), here(), None);
        let levels: Vec<_> = checks.iter().map(|c| (c.id.as_str(), c.level)).collect();
        assert!(levels.contains(&("network:nat", Level::Ok)), "{levels:?}");
        assert!(
            levels.contains(&("network:user", Level::Warn)),
            "{levels:?}"
        );
    }

    /// The store's last granule is the guard.
    #[test]
    fn an_overrun_store_is_not_ok_and_has_a_remedy() {
        let dir = tempfile::tempdir().expect("dir");
        let path = dir.path().join("store");
        let file = fs::File::create(&path).expect("create");
        file.set_len(32 << 20).expect("size");
        Store::format(&path, FormatOptions { force: false }).expect("format");
        let access = DeviceStore::new(Some(path));
        assert_eq!(check_store(&access).level, Level::Ok);
        file.write_all_at(b"kernel", (32 << 20) - 4096)
            .expect("write");
        let check = check_store(&access);
        assert_eq!(check.level, Level::Fail, "{check:?}");
        assert!(check.sentence.contains("0x1fff000"), "{check:?}");
        let remedy = check.remedy.expect("a remedy");
        assert!(remedy.contains("hebe store init --force"), "{remedy}");
    }
}
