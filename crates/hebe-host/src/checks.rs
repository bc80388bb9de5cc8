//! What must hold before a reboot is begun; each check with the way out.

use std::fs::File;
use std::io;
use std::path::Path;

use hebe_flow::life::Life;
use hebe_flow::reboot::Fate;
use hebe_flow::resume::SavedFact;
use hebe_types::{ByteSize, VmConfig, VmName, counted};

use crate::cmdline;
use crate::definitions;
use crate::host::Host;
use crate::listing::{Survey, VmRow, VmState, with_cause};
use crate::notes;
use crate::overlays;
use crate::pending::{self, Pending};
use crate::preflight::{Check, Level, NextKernel, VmVerdict};
use crate::saved::SavedPaths;
use crate::stores::{ExecView, StoreView};

pub(crate) fn kernel(host: &Host, next: &NextKernel, probe: bool) -> Vec<Check> {
    let mut checks = Vec::new();
    for path in std::iter::once(&next.kernel).chain(&next.initrd) {
        let id = if *path == next.kernel {
            "kernel"
        } else {
            "initrd"
        };
        checks.push(match readable_file(path) {
            Ok(len) if id == "initrd" && len > INITRD_MAX => large_initrd(path, len),
            Ok(_) => Check::ok(id, format!("{} can be read", path.display())),
            Err(error) => Check::bad(
                id,
                Level::Fail,
                format!("{} cannot be read ({error})", path.display()),
                format!("name a file that exists with --{id}"),
            ),
        });
    }
    let readable = checks.iter().all(|c| c.level != Level::Fail);
    let loaded = host.system.kernel_loaded();
    checks.push(match loaded {
        Some(_) if host.system.kexec_disabled() == Some(true) => Check::bad(
            "kexec",
            Level::Fail,
            "loading kernels was switched off until the next boot (kernel.kexec_load_disabled = 1)",
            "remove that setting from /etc/sysctl.d and reboot once, or use --method saved --hard",
        ),
        None => Check::bad(
            "kexec",
            Level::Fail,
            "the running kernel has no kexec",
            "boot a kernel with CONFIG_KEXEC_FILE=y, or use --method saved --hard",
        ),
        Some(false) if probe && readable => probe_load(host, next),
        Some(true) => Check::bad(
            "kexec",
            Level::Warn,
            "a kernel is loaded already, and will be replaced",
            "nothing to do, unless somebody else means to use it",
        ),
        Some(false) => Check::ok("kexec", "the running kernel can load another one"),
    });
    checks
}

/// The size of a file that can be read.
fn readable_file(path: &Path) -> io::Result<ByteSize> {
    let meta = File::open(path)?.metadata()?;
    if meta.is_file() {
        return Ok(ByteSize(meta.len()));
    }
    Err(io::Error::other("it is not a file"))
}

/// An initramfs of more bytes than this is worth a word.
const INITRD_MAX: ByteSize = ByteSize::mib(64);

fn large_initrd(path: &Path, len: ByteSize) -> Check {
    Check::bad(
        "initrd",
        Level::Warn,
        format!(
            "{} has {} MiB: kexec checks the hash of every byte, and the new kernel unpacks them, while all VMs stand still",
            path.display(),
            len.0 >> 20
        ),
        "have it made with this machine's modules alone (initramfs-tools: MODULES=dep; dracut: hostonly=yes) and compressed with zstd",
    )
}

/// Loading a kernel and leaving this one are for root alone; found out late,
/// it would be found out with the services stopped.
pub(crate) fn right(host: &Host) -> Option<Check> {
    (!host.system.may_reboot()).then(|| {
        Check::bad(
            "root",
            Level::Fail,
            "only root may reboot this machine",
            "run it with sudo",
        )
    })
}

/// What is to be stopped first is found out while nothing is stopped.
pub(crate) fn host_config(host: &Host) -> Check {
    match host.config() {
        Ok(_) => Check::ok("host-config", "host.toml can be used, or there is none"),
        Err(error) => Check::bad(
            "host-config",
            Level::Fail,
            error.to_string(),
            "correct that file",
        ),
    }
}

/// A reboot adds to the list of VMs to boot, which it must be able to read.
pub(crate) fn pending(host: &Host) -> Option<Check> {
    let layout = &host.layout;
    match Pending::read(layout) {
        Ok(pending) => Some(Check::bad(
            "pending",
            Level::Warn,
            pending.trouble(layout)?,
            "nothing to do for the reboot: what stands there stays there",
        )),
        Err(error) => Some(Check::bad(
            "pending",
            Level::Fail,
            pending::unreadable(layout, &error),
            "then reboot again",
        )),
    }
}

/// The next kernel finds the store, and resumes from it, in its initramfs or
/// after it; the modules that it needs for that are rarely built in.
pub(crate) fn initramfs(
    next: &NextKernel,
    survey: &Survey,
    verdicts: &[VmVerdict],
) -> Option<Check> {
    let needed = keeps(verdicts) || frozen(survey).next().is_some();
    (needed && next.initrd.is_none()).then(|| {
        Check::bad(
            "initrd",
            Level::Warn,
            format!("{} is loaded without an initramfs", next.kernel.display()),
            "name one with --initrd, unless what makes the store's device is built into that kernel",
        )
    })
}

fn keeps(verdicts: &[VmVerdict]) -> bool {
    verdicts.iter().any(|v| v.fate == Some(Fate::Keep))
}

/// VMs that are frozen in memory. One whose VMM lives is as frozen: that VMM
/// ends with this kernel too.
fn frozen(survey: &Survey) -> impl Iterator<Item = &VmRow> {
    let rows = survey.rows.values();
    rows.filter(|row| matches!(row.life, Life::Frozen | Life::Held))
}

fn probe_load(host: &Host, next: &NextKernel) -> Check {
    let loaded = host
        .system
        .load_kernel(&next.kernel, next.initrd.as_deref(), &next.cmdline);
    let _ = host.system.unload_kernel();
    match loaded {
        Ok(()) => Check::ok(
            "kexec",
            "the kernel was loaded for a try, and unloaded again",
        ),
        Err(error) => Check::bad(
            "kexec",
            Level::Fail,
            format!("the kernel cannot be loaded: {}", with_cause(&error)),
            "name another kernel with --kernel",
        ),
    }
}

/// The range is "persistent" only because both command lines say so; a kernel
/// without the words would hand the frozen RAM out as free memory.
pub(crate) fn reservation(host: &Host, next: &NextKernel, survey: &Survey) -> Check {
    let id = "reservation";
    let running = cmdline::reservations(&host.system.cmdline());
    let coming = cmdline::reservations(&next.cmdline);
    let list = |all: &[cmdline::Reservation]| {
        let texts: Vec<String> = all.iter().map(cmdline::written).collect();
        if texts.is_empty() {
            "none".to_owned()
        } else {
            texts.join(" ")
        }
    };
    let noted = reserved_elsewhere(host, survey);
    let lacks = running.iter().any(|r| !coming.contains(r));
    let back: Vec<cmdline::Reservation> = coming
        .iter()
        .filter(|r| !running.contains(r))
        .copied()
        .collect();
    if lacks || back.iter().any(|r| !noted.contains(r)) {
        return Check::bad(
            id,
            Level::Fail,
            format!(
                "the next kernel would not keep the same reserved memory: now {}, then {}",
                list(&running),
                list(&coming)
            ),
            "give the next command line exactly the memmap= words of /proc/cmdline, or leave --cmdline out",
        );
    }
    if !back.is_empty() {
        return Check::bad(
            id,
            Level::Warn,
            format!(
                "the next kernel reserves {} again, where VMs were frozen that are lost under this one",
                list(&back)
            ),
            "nothing to do: what was overwritten meanwhile is found out, and not resumed",
        );
    }
    let range = survey.store.as_ref().and_then(|s| s.phys_range);
    match range {
        Some((start, len)) if !running.is_empty() => {
            if coming.iter().any(|r| cmdline::covers(r, start, len)) {
                Check::ok(id, format!("the next kernel keeps {}", list(&coming)))
            } else {
                Check::bad(
                    id,
                    Level::Fail,
                    format!(
                        "the store lies at {start:#x}, {} long, and no reservation on the command line covers it",
                        ByteSize(len)
                    ),
                    "add the memmap= word that covers the store",
                )
            }
        }
        _ => Check::ok(
            id,
            format!("reserved memory stays as it is ({})", list(&running)),
        ),
    }
}

/// What was reserved where VMs were frozen that are lost under this kernel.
fn reserved_elsewhere(host: &Host, survey: &Survey) -> Vec<cmdline::Reservation> {
    let noted = notes::all(&host.layout);
    let lost = notes::elsewhere(&noted, survey.store.as_ref());
    lost.flat_map(|note| cmdline::reservations(&note.reserved.join(" ")))
        .collect()
}

/// Nothing in memory is promised to outlive a reset.
pub(crate) fn reset(survey: &Survey) -> Vec<Check> {
    let mut checks: Vec<Check> = frozen(survey)
        .map(|row| {
            Check::bad(
                format!("frozen:{}", row.name),
                Level::Fail,
                format!("VM '{}' is frozen in memory, which a reset may clear", row.name),
                format!(
                    "`hebe resume {0}` first, or jump with --kexec, or give it up with `hebe drop {0} --yes`",
                    row.name
                ),
            )
        })
        .collect();
    // Another release or kernel may still read it.
    let segments = survey.store.iter().flat_map(|s| &s.segments);
    let damaged = segments.filter(|s| matches!(s.exec, ExecView::Damaged { .. }));
    checks.extend(damaged.map(|segment| {
        let id = segment.id;
        Check::bad(
            format!("segment:{id}"),
            Level::Fail,
            format!("segment {id} cannot be read, and a reset may clear what another release or kernel could"),
            format!("jump with --kexec, or give it up with `hebe store drop {id} --yes`"),
        )
    }));
    let lost = survey.rows.values().filter(|row| row.life == Life::Lost);
    checks.extend(lost.map(|row| {
        Check::bad(
            format!("lost:{}", row.name),
            Level::Fail,
            format!("VM '{}' may still be frozen in memory, which a reset may clear", row.name),
            format!(
                "jump to the kernel that has its store with --kexec and --append, or give it up with `hebe drop {} --yes`",
                row.name
            ),
        )
    }));
    checks
}

/// A store that cannot be read, or that something else wrote to, gives no VM
/// back to the next kernel.
pub(crate) fn store(host: &Host, survey: &Survey, verdicts: &[VmVerdict]) -> Check {
    match (&survey.store, &survey.store_trouble) {
        (_, Some(trouble)) => Check::bad(
            "store",
            if keeps(verdicts) {
                Level::Fail
            } else {
                Level::Warn
            },
            format!("the store cannot be used: {trouble}"),
            "see `hebe store list` and `hebe host check`",
        ),
        (Some(store), None) if !store.kept_only => {
            let needed = keeps(verdicts) || frozen(survey).next().is_some();
            described(host, store, needed)
        }
        (_, None) => Check::ok("store", "this host has no store, and no VM needs one"),
    }
}

/// Whether the store outlives the reload, which VMs in it may need.
fn described(host: &Host, store: &StoreView, needed: bool) -> Check {
    let path = store.path.display();
    let in_use = store.segments.len();
    let plain = store.phys_range.is_none() && !store.path.starts_with("/dev");
    if plain && needed {
        // What lies in memory there ends with this kernel, and the VMs with it.
        let dir = store.path.parent().unwrap_or(Path::new("/"));
        let ends = host.system.is_volatile(dir).unwrap_or(true);
        return Check::bad(
            "store",
            if ends { Level::Fail } else { Level::Warn },
            if ends {
                format!("the store {path} is a plain file in memory, which ends with this kernel")
            } else {
                format!(
                    "the store {path} is a plain file: it outlives the reload on its disk alone"
                )
            },
            "use a devdax device for VMs that are to be kept in memory, or --method saved",
        );
    }
    let segments = counted(in_use, "segment");
    Check::ok(
        "store",
        match needed {
            true => format!("the store {path} outlives the reload; {segments}"),
            // A reset may clear it.
            false => format!("no VM needs the store {path} over this reboot; {segments}"),
        },
    )
}

pub(crate) fn vms(host: &Host, survey: &Survey, verdicts: &[VmVerdict]) -> Vec<Check> {
    let mut checks = Vec::new();
    for vm in verdicts {
        let name = &vm.vm;
        match vm.state {
            VmState::Unresponsive => checks.push(Check::bad(
                format!("vmm:{name}"),
                Level::Fail,
                format!("the VMM of '{name}' does not answer"),
                format!(
                    "look at its log, or end it with `hebe stop {name} --force`, which gives up what ran in it"
                ),
            )),
            VmState::Damaged => checks.push(damaged(survey, name)),
            _ if vm.fate.is_some() => checks.push(Check::ok(
                format!("vmm:{name}"),
                format!("the VMM of '{name}' answers"),
            )),
            _ => {}
        }
        checks.extend(half_saved(host, survey, name));
        checks.extend(failed(survey, vm));
        checks.extend(unkept(survey, vm));
        if vm.fate.is_some_and(|fate| fate != Fate::End) {
            checks.extend(files_of(host, survey, vm));
            checks.extend(thrown_away(host, vm));
        }
    }
    checks
}

fn damaged(survey: &Survey, name: &VmName) -> Check {
    let row = survey.rows.get(name);
    let sentence = format!("VM '{name}' is damaged and stays as it is");
    // Nothing of it is there but its definition, which only a person mends.
    let (sentence, way_out) = match row.filter(|row| row.life == Life::Absent) {
        Some(row) => (
            match &row.detail {
                Some(why) => format!("VM '{name}' cannot be booted: {why}"),
                None => sentence,
            },
            "correct its definition, or remove that file".to_owned(),
        ),
        None => (
            sentence,
            format!("`hebe show {name}` says why, `hebe drop {name} --yes` gives it up"),
        ),
    };
    Check::bad(format!("damaged:{name}"), Level::Warn, sentence, way_out)
}

/// A VM that stands still because it was saved counts as saved only if its
/// file was committed: whoever ordered the save may have been killed before.
fn half_saved(host: &Host, survey: &Survey, name: &VmName) -> Option<Check> {
    let held = survey.rows.get(name)?.life == Life::SavedHeld;
    let complete = SavedPaths::new(&host.layout, name).fact() == Some(SavedFact::Complete);
    (held && !complete).then(|| {
        Check::bad(
            format!("saved:{name}"),
            Level::Fail,
            format!("VM '{name}' was being saved, and its file is not complete"),
            format!("`hebe resume {name}` lets it run again"),
        )
    })
}

/// A VM with which KVM cannot go on has no state that could be kept. Its guest
/// may have brought that about, and must not hold up the host with it.
fn failed(survey: &Survey, vm: &VmVerdict) -> Option<Check> {
    let name = &vm.vm;
    let status = survey.rows.get(name)?.status.as_ref()?;
    let why = status.failed.as_deref().unwrap_or("it does not say why");
    (vm.fate == Some(Fate::End)).then(|| {
        Check::bad(
            format!("failed:{name}"),
            Level::Warn,
            format!(
                "VM '{name}' failed and cannot run again ({why}): it is ended, and 'crashed' after the reboot"
            ),
            format!(
                "nothing to do for the reboot; `hebe stop {name}` and `hebe start {name}` boot it before that"
            ),
        )
    })
}

/// A VM freezes into its segment; one that cannot be read afterwards gives no
/// VM back, whatever the VMM could still write to it.
fn unkept(survey: &Survey, vm: &VmVerdict) -> Option<Check> {
    let name = &vm.vm;
    let segment = survey.store.as_ref()?.segment_of(name)?;
    let ExecView::Damaged { reason } = &segment.exec else {
        return None;
    };
    (vm.fate == Some(Fate::Keep)).then(|| {
        Check::bad(
            format!("segment:{name}"),
            Level::Fail,
            format!("the segment of '{name}' could not be resumed from: {reason}"),
            format!("use --method saved, or `hebe stop {name}` first"),
        )
    })
}

/// What the VM needs to come back must be there now: of one that is kept or
/// saved, what it was started with, and of one that boots, what it is defined
/// with.
fn files_of(host: &Host, survey: &Survey, vm: &VmVerdict) -> Option<Check> {
    let name = &vm.vm;
    let id = format!("files:{name}");
    let used = host.layout.vm_dir(name).join("config.toml");
    if vm.fate != Some(Fate::ShutDown)
        && let Ok(config) = definitions::read(&used)
    {
        return Some(files_check(id, &config, &used, false));
    }
    match survey.definitions.get(name) {
        Some(Ok(config)) => {
            let path = definitions::find(&host.layout, name)?;
            let boots = vm.fate == Some(Fate::ShutDown);
            Some(files_check(id, config, &path, boots))
        }
        other if vm.fate == Some(Fate::ShutDown) => Some(Check::bad(
            id,
            Level::Fail,
            match other {
                Some(Err(error)) => error.to_string(),
                _ => format!("VM '{name}' has no definition to be booted from"),
            },
            format!(
                "write {}, or use --method saved",
                definitions::expected_path(&host.layout, name).display()
            ),
        )),
        _ => None,
    }
}

/// A VM that is shut down loses what its guest wrote to disks that keep nothing.
fn thrown_away(host: &Host, vm: &VmVerdict) -> Option<Check> {
    let name = &vm.vm;
    let loses = vm.fate == Some(Fate::ShutDown) && overlays::has_any(&host.layout, name);
    loses.then(|| {
        Check::bad(
            format!("snapshot:{name}"),
            Level::Warn,
            format!("'{name}' is shut down, and what it wrote to disks with snapshot = true goes"),
            "use --method warm or --method saved if it is to be kept",
        )
    })
}

/// Of a VM that is resumed the disks alone must be there.
fn files_check(id: String, config: &VmConfig, path: &Path, boots: bool) -> Check {
    let disks = definitions::check_disks(config, path).map_err(|e| (Level::Fail, e));
    let needed = if boots { Level::Fail } else { Level::Warn };
    let boot = || definitions::check_boot_files(config, path).map_err(|e| (needed, e));
    match disks.and_then(|()| boot()) {
        Ok(()) => Check::ok(id, format!("the files of '{}' are there", config.name)),
        Err((Level::Warn, error)) => Check::bad(
            id,
            Level::Warn,
            format!("{error}; the VM is resumed without it, and its guest's next reset needs it"),
            "put the file back before the guest resets",
        ),
        Err((level, error)) => Check::bad(
            id,
            level,
            error.to_string(),
            "put the file back, or stop the VM first",
        ),
    }
}

/// Room for saved VMs, on something that outlives the kernel.
pub(crate) fn state_dir(host: &Host, survey: &Survey, vms: &[VmVerdict]) -> Vec<Check> {
    let saved: Vec<&VmVerdict> = vms.iter().filter(|v| v.fate == Some(Fate::Save)).collect();
    let shut = vms.iter().any(|v| v.fate == Some(Fate::ShutDown));
    let dir = &host.layout.state;
    let mut checks = Vec::new();
    let needed = !saved.is_empty() || shut;
    let noted = keeps(vms) || frozen(survey).next().is_some();
    if !needed && !noted {
        return checks;
    }
    if !host.system.is_writable(dir).unwrap_or(false) {
        checks.push(Check::bad(
            "state-dir",
            Level::Fail,
            format!("{} cannot be written", dir.display()),
            "mount it for writing, or name another directory in HEBE_STATE_DIR",
        ));
    } else if host.system.is_volatile(dir).unwrap_or(false) {
        let (level, what) = if needed {
            (Level::Fail, "and ends with this kernel")
        } else {
            let what = "so the next kernel does not know what was frozen, and resumes it only with `hebe resume --all --unnoted`";
            (Level::Warn, what)
        };
        checks.push(Check::bad(
            "state-dir",
            level,
            format!("{} lies in memory, {what}", dir.display()),
            "mount a disk there, or name a directory on one in HEBE_STATE_DIR",
        ));
    }
    if saved.is_empty() {
        return checks;
    }
    let memory = |v: &&VmVerdict| {
        let row = survey.rows.get(&v.vm);
        row.and_then(|r| r.memory).map_or(0, ByteSize::bytes)
    };
    // State and metadata on top of RAM: a little for each VM.
    let needed: u64 = saved.iter().map(memory).sum::<u64>() + saved.len() as u64 * (4 << 20);
    checks.push(match host.system.free_space(dir) {
        Ok(free) if free.bytes() >= needed => Check::ok(
            "disk-space",
            format!(
                "{} MiB are free for saved VMs and {} MiB may be needed",
                free.0 >> 20,
                needed >> 20
            ),
        ),
        Ok(free) => Check::bad(
            "disk-space",
            Level::Fail,
            format!(
                "saved VMs may need {} MiB and {} has {} MiB free",
                needed >> 20,
                dir.display(),
                free.0 >> 20
            ),
            "free some space, or name another directory in HEBE_STATE_DIR",
        ),
        Err(error) => Check::bad(
            "disk-space",
            Level::Fail,
            format!(
                "the free space of {} cannot be told ({error})",
                dir.display()
            ),
            "check that the directory can be reached",
        ),
    });
    checks
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::sync::Arc;

    use super::*;
    use crate::host::Layout;
    use crate::stores::DeviceStore;
    use crate::system::Machine;

    #[test]
    fn a_large_initramfs_is_a_warning_and_no_failure() {
        let dir = tempfile::tempdir().expect("dir");
        let (image, initrd) = (dir.path().join("vmlinuz"), dir.path().join("initrd"));
        let file = File::create(&initrd).expect("create");
        File::create(&image).expect("create");
        let host = Host {
            layout: Layout::below(dir.path()),
            store: Arc::new(DeviceStore::new(Some("/no/such/store".into()))),
            system: Arc::new(Machine::default()),
        };
        let next = NextKernel {
            kernel: image,
            initrd: Some(initrd),
            cmdline: String::new(),
        };
        let of_initrd = |bytes: u64| {
            file.set_len(bytes).expect("size");
            let checks = kernel(&host, &next, false);
            checks.into_iter().find(|c| c.id == "initrd").expect("one")
        };
        assert_eq!(of_initrd(64 << 20).level, Level::Ok);
        let large = of_initrd((64 << 20) + 1);
        assert_eq!(large.level, Level::Warn);
        assert!(large.remedy.expect("a remedy").contains("MODULES=dep"));
    }

    #[test]
    fn a_store_that_gives_no_vm_back_stops_a_reboot_that_would_keep_one() {
        let host = Host {
            layout: Layout::below(Path::new("/no/such")),
            store: Arc::new(DeviceStore::new(Some("/no/such/store".into()))),
            system: Arc::new(Machine::default()),
        };
        let kept = VmVerdict {
            vm: "web".parse().expect("name"),
            state: VmState::Running,
            fate: Some(Fate::Keep),
            sentence: String::new(),
        };
        let mut survey = Survey {
            store: None,
            store_trouble: Some("its guard is overwritten".into()),
            rows: BTreeMap::new(),
            definitions: BTreeMap::new(),
        };
        let check = store(&host, &survey, &[kept]);
        assert_eq!(check.level, Level::Fail);
        assert!(check.sentence.contains("guard"), "{check:?}");
        assert!(check.remedy.is_some());
        assert_eq!(store(&host, &survey, &[]).level, Level::Warn);
        survey.store_trouble = None;
        assert_eq!(store(&host, &survey, &[]).level, Level::Ok);
    }
}
