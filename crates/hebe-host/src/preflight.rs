//! What a reboot would do to each VM, and whether it can be begun at all.

use std::path::{Path, PathBuf};

use hebe_flow::life::Life;
use hebe_flow::reboot::Fate;
use hebe_flow::resume::SavedFact;
use hebe_types::{ByteSize, RebootMethod, VmName};
use serde::Serialize;

use crate::cmdline;
use crate::definitions;
use crate::host::Host;
use crate::listing::{self, Survey, VmRow, VmState, with_cause};
use crate::saved::SavedPaths;
use crate::stores::StoreView;
use crate::system::Leave;

/// What an operator asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RebootOptions {
    /// How VMs get over the reboot.
    pub method: RebootMethod,
    /// The next kernel; by default the running one's file.
    pub kernel: Option<PathBuf>,
    /// Its initramfs; by default the one that belongs to the kernel.
    pub initrd: Option<PathBuf>,
    /// Added to the command line.
    pub append: Option<String>,
    /// Replaces the command line.
    pub cmdline: Option<String>,
    /// Reset the machine instead of jumping; for saved and cold.
    pub hard: bool,
    /// Jump instead of resetting the machine; for cold.
    pub kexec: bool,
    /// How long a guest has to power off, in seconds.
    pub timeout_s: u64,
    /// Power off guests that do not do it in time.
    pub force: bool,
}

impl RebootOptions {
    /// Why two of the wishes do not go together; none is dropped in silence.
    pub fn contradiction(&self) -> Option<&'static str> {
        let names_kernel = self.kernel.is_some()
            || self.initrd.is_some()
            || self.append.is_some()
            || self.cmdline.is_some();
        match (self.method, self.hard) {
            (RebootMethod::Warm, true) => Some(
                "--hard resets the machine, which ends what is kept in memory: use it with --method saved or --method cold",
            ),
            (_, true) if self.kexec || names_kernel => {
                Some("--hard resets the machine, and a kernel is named for a jump: leave one out")
            }
            (RebootMethod::Warm | RebootMethod::Saved, _) if self.force => Some(
                "--force powers off guests that do not shut down, which only --method cold asks of them: leave it out",
            ),
            _ => None,
        }
    }
}

/// The next kernel.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct NextKernel {
    /// Its image.
    pub kernel: PathBuf,
    /// Its initramfs.
    pub initrd: Option<PathBuf>,
    /// Its command line.
    pub cmdline: String,
}

/// How a check ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Level {
    /// Holds.
    Ok,
    /// Does not stop the reboot; an operator may mind.
    Warn,
    /// Stops the reboot.
    Fail,
}

/// One check.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Check {
    /// Stable name, such as `reservation` or `vmm:web`.
    pub id: String,
    /// How it ended.
    pub level: Level,
    /// What was found.
    pub sentence: String,
    /// The way out, where one is needed.
    pub remedy: Option<String>,
}

impl Check {
    /// A check that holds.
    pub fn ok(id: impl Into<String>, sentence: impl Into<String>) -> Self {
        Self {
            id: id.into(),
            level: Level::Ok,
            sentence: sentence.into(),
            remedy: None,
        }
    }

    /// A check that does not hold.
    pub fn bad(
        id: impl Into<String>,
        level: Level,
        sentence: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Self {
            id: id.into(),
            level,
            sentence: sentence.into(),
            remedy: Some(remedy.into()),
        }
    }
}

/// What happens to one VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct VmVerdict {
    /// Which VM.
    pub vm: VmName,
    /// How it is now.
    pub state: VmState,
    /// What is done to it; `None` where nothing needs to be done.
    pub fate: Option<Fate>,
    /// The same as a sentence, with the reason.
    pub sentence: String,
}

/// The whole answer.
#[derive(Clone, Debug, Serialize)]
pub struct Verdict {
    /// The method asked for.
    pub method: RebootMethod,
    /// How the kernel is left: `kexec` or `reset`.
    pub leave: &'static str,
    /// The next kernel, where one is loaded.
    pub next: Option<NextKernel>,
    /// Per VM.
    pub vms: Vec<VmVerdict>,
    /// The checks.
    pub checks: Vec<Check>,
}

impl Verdict {
    /// Whether the reboot may be begun.
    pub fn passes(&self) -> bool {
        self.checks.iter().all(|c| c.level != Level::Fail)
    }

    /// The checks that stop it, as one sentence.
    pub fn why_not(&self) -> String {
        let failed = self.checks.iter().filter(|c| c.level == Level::Fail);
        let texts: Vec<String> = failed
            .map(|c| match &c.remedy {
                Some(remedy) => format!("{} ({remedy})", c.sentence),
                None => c.sentence.clone(),
            })
            .collect();
        texts.join("; ")
    }

    /// How the kernel is to be left.
    pub fn leave(&self) -> Leave {
        if self.next.is_some() {
            Leave::Kexec
        } else {
            Leave::Reset
        }
    }
}

/// Decides and checks everything that can be checked while nothing changes.
/// With `probe`, the kernel is loaded and unloaded again, if none is loaded.
pub fn preflight(host: &Host, options: &RebootOptions, probe: bool) -> (Verdict, Survey) {
    let survey = usable(host, listing::survey(host));
    let vms = fates(options.method, &survey);
    let next = wants_kexec(options).then(|| next_kernel(host, options));
    let mut checks = Vec::new();
    if let Some(why) = options.contradiction() {
        let remedy = "see `hebe reboot --help`";
        checks.push(Check::bad("options", Level::Fail, why, remedy));
    }
    match &next {
        Some(next) => {
            checks.extend(kernel_checks(host, next, probe));
            checks.push(reservation(host, next, &survey));
        }
        None => checks.extend(reset_checks(&survey)),
    }
    checks.push(store_check(&survey, &vms));
    checks.extend(vm_checks(host, &survey, &vms));
    checks.extend(state_dir_checks(host, &survey, &vms));
    let verdict = Verdict {
        method: options.method,
        leave: if next.is_some() { "kexec" } else { "reset" },
        next,
        vms,
        checks,
    };
    (verdict, survey)
}

/// A store that something else wrote to takes nothing any more, reports
/// included: a reboot has to do without it, as without one it cannot read.
fn usable(host: &Host, survey: Survey) -> Survey {
    match host.store.check() {
        Ok(()) => survey,
        Err(error) => Survey {
            store: None,
            store_trouble: Some(with_cause(&error)),
            ..survey
        },
    }
}

/// A cold reboot resets the machine unless a jump, or anything that only a jump
/// can use, was asked for; the others jump, because what is in memory survives nothing else (warm) and because a
/// reset takes long.
fn wants_kexec(options: &RebootOptions) -> bool {
    match options.method {
        RebootMethod::Warm => true,
        RebootMethod::Saved => !options.hard,
        RebootMethod::Cold => {
            let asked = options.kexec
                || options.kernel.is_some()
                || options.initrd.is_some()
                || options.append.is_some()
                || options.cmdline.is_some();
            asked && !options.hard
        }
    }
}

fn fates(method: RebootMethod, survey: &Survey) -> Vec<VmVerdict> {
    let verdict = |row: &VmRow| {
        let (fate, sentence) = fate(method, row);
        VmVerdict {
            vm: row.name.clone(),
            state: row.state,
            fate,
            sentence,
        }
    };
    survey.rows.values().map(verdict).collect()
}

fn fate(method: RebootMethod, row: &VmRow) -> (Option<Fate>, String) {
    let up = row.life.has_vmm();
    match (method, row.life) {
        (_, Life::Held | Life::Frozen) => (
            None,
            "is frozen in the store already and stays there".into(),
        ),
        (_, Life::Saved | Life::SavedHeld) => (None, "is saved in a file already".into()),
        _ if !up => (None, format!("is {}: nothing to do", row.state.as_str())),
        (RebootMethod::Warm, _) if row.segment.is_some() => (
            Some(Fate::Keep),
            "is kept in memory: its RAM lies in the reserved range".into(),
        ),
        (RebootMethod::Warm, _) => (
            Some(Fate::Save),
            "is saved to disk: its RAM is a memfd, which ends with this kernel".into(),
        ),
        (RebootMethod::Saved, _) => (
            Some(Fate::Save),
            "is saved to disk, as the method says".into(),
        ),
        (RebootMethod::Cold, _) => (
            Some(Fate::ShutDown),
            "is shut down and booted again, as the method says".into(),
        ),
    }
}

fn next_kernel(host: &Host, options: &RebootOptions) -> NextKernel {
    let release = host.system.release();
    let kernel = options
        .kernel
        .clone()
        .unwrap_or_else(|| format!("/boot/vmlinuz-{release}").into());
    let initrd = options.initrd.clone().or_else(|| sibling_initrd(&kernel));
    let running = host.system.cmdline();
    let base = options.cmdline.as_deref().unwrap_or(&running);
    NextKernel {
        kernel,
        initrd,
        cmdline: cmdline::next(base, options.append.as_deref()),
    }
}

/// Debian's names: `vmlinuz-VERSION` and `initrd.img-VERSION`.
fn sibling_initrd(kernel: &Path) -> Option<PathBuf> {
    let version = kernel.file_name()?.to_str()?.strip_prefix("vmlinuz-")?;
    let path = kernel.with_file_name(format!("initrd.img-{version}"));
    path.exists().then_some(path)
}

fn kernel_checks(host: &Host, next: &NextKernel, probe: bool) -> Vec<Check> {
    let mut checks = Vec::new();
    for path in std::iter::once(&next.kernel).chain(&next.initrd) {
        let id = if *path == next.kernel {
            "kernel"
        } else {
            "initrd"
        };
        checks.push(match std::fs::File::open(path) {
            Ok(_) => Check::ok(id, format!("{} can be read", path.display())),
            Err(error) => Check::bad(
                id,
                Level::Fail,
                format!("{} cannot be read ({error})", path.display()),
                format!("name a file that exists with --{id}"),
            ),
        });
    }
    let readable = checks.iter().all(|c| c.level == Level::Ok);
    let loaded = host.system.kernel_loaded();
    checks.push(match loaded {
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
fn reservation(host: &Host, next: &NextKernel, survey: &Survey) -> Check {
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
    if running != coming {
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

/// Nothing in memory is promised to outlive a reset.
fn reset_checks(survey: &Survey) -> Vec<Check> {
    // One whose VMM lives is as frozen: that VMM ends with this kernel too.
    let frozen = survey
        .rows
        .values()
        .filter(|row| matches!(row.life, Life::Frozen | Life::Held));
    frozen
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
        .collect()
}

/// A store that cannot be read, or that something else wrote to, gives no VM
/// back to the next kernel.
fn store_check(survey: &Survey, vms: &[VmVerdict]) -> Check {
    let kept = vms.iter().filter(|v| v.fate == Some(Fate::Keep)).count();
    match (&survey.store, &survey.store_trouble) {
        (_, Some(trouble)) => Check::bad(
            "store",
            if kept > 0 { Level::Fail } else { Level::Warn },
            format!("the store cannot be used: {trouble}"),
            "see `hebe store list` and `hebe host check`",
        ),
        (Some(store), None) => described(store),
        (None, None) => Check::ok("store", "this host has no store, and no VM needs one"),
    }
}

fn described(store: &StoreView) -> Check {
    let path = store.path.display();
    let plain = store.phys_range.is_none();
    let in_use = store.segments.len();
    if plain && !path.to_string().starts_with("/dev/dax") && in_use > 0 {
        return Check::bad(
            "store",
            Level::Warn,
            format!("the store {path} is a plain file: it outlives the reload only on a disk"),
            "use a devdax device for VMs that are to be kept in memory",
        );
    }
    Check::ok(
        "store",
        format!("the store {path} outlives the reload; {in_use} segments"),
    )
}

fn vm_checks(host: &Host, survey: &Survey, vms: &[VmVerdict]) -> Vec<Check> {
    let mut checks = Vec::new();
    for vm in vms {
        let name = &vm.vm;
        match vm.state {
            VmState::Unresponsive => checks.push(Check::bad(
                format!("vmm:{name}"),
                Level::Fail,
                format!("the VMM of '{name}' does not answer"),
                format!("look at its log, or end it with `hebe stop {name} --force`"),
            )),
            VmState::Damaged => checks.push(Check::bad(
                format!("damaged:{name}"),
                Level::Warn,
                format!("VM '{name}' is damaged and stays as it is"),
                format!("`hebe show {name}` says why, `hebe drop {name} --yes` gives it up"),
            )),
            _ if vm.fate.is_some() => checks.push(Check::ok(
                format!("vmm:{name}"),
                format!("the VMM of '{name}' answers"),
            )),
            _ => {}
        }
        checks.extend(half_saved(host, survey, name));
        checks.extend(failed(survey, vm));
        if vm.fate.is_some() {
            checks.extend(files_of(host, survey, vm));
        }
    }
    checks
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

/// A VM with which KVM cannot go on has no state that could be kept.
fn failed(survey: &Survey, vm: &VmVerdict) -> Option<Check> {
    let name = &vm.vm;
    let why = survey.rows.get(name)?.status.as_ref()?.failed.as_ref()?;
    matches!(vm.fate, Some(Fate::Keep | Fate::Save)).then(|| {
        Check::bad(
            format!("failed:{name}"),
            Level::Fail,
            format!("VM '{name}' failed and cannot run again: {why}"),
            format!("`hebe stop {name}` ends it"),
        )
    })
}

/// What the VM needs to come back must be there now.
fn files_of(host: &Host, survey: &Survey, vm: &VmVerdict) -> Option<Check> {
    let name = &vm.vm;
    let id = format!("files:{name}");
    match survey.definitions.get(name) {
        Some(Ok(config)) => {
            let path = definitions::find(&host.layout, name)?;
            match definitions::check_files(config, &path) {
                Ok(()) => Some(Check::ok(id, format!("the files of '{name}' are there"))),
                Err(error) => Some(Check::bad(
                    id,
                    Level::Fail,
                    error.to_string(),
                    "put the file back, or stop the VM first",
                )),
            }
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

/// Room for saved VMs, on something that outlives the kernel.
fn state_dir_checks(host: &Host, survey: &Survey, vms: &[VmVerdict]) -> Vec<Check> {
    let saved: Vec<&VmVerdict> = vms.iter().filter(|v| v.fate == Some(Fate::Save)).collect();
    let shut = vms.iter().any(|v| v.fate == Some(Fate::ShutDown));
    let dir = &host.layout.state;
    let mut checks = Vec::new();
    if saved.is_empty() && !shut {
        return checks;
    }
    if host.system.is_volatile(dir).unwrap_or(false) {
        checks.push(Check::bad(
            "state-dir",
            Level::Fail,
            format!("{} lies in memory and ends with this kernel", dir.display()),
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

    use super::*;

    /// One thing that can be asked for.
    type Wish = fn(&mut RebootOptions);

    fn jumps(method: RebootMethod, wishes: &[Wish]) -> bool {
        let mut options = RebootOptions {
            method,
            ..RebootOptions::default()
        };
        wishes.iter().for_each(|wish| wish(&mut options));
        wants_kexec(&options)
    }

    #[test]
    fn whatever_only_a_jump_can_use_makes_a_cold_reboot_jump() {
        let asked: [Wish; 5] = [
            |o| o.kexec = true,
            |o| o.kernel = Some("/k".into()),
            |o| o.initrd = Some("/i".into()),
            |o| o.append = Some("quiet".into()),
            |o| o.cmdline = Some("quiet".into()),
        ];
        let hard: Wish = |o| o.hard = true;
        assert!(!jumps(RebootMethod::Cold, &[]));
        for (number, wish) in asked.into_iter().enumerate() {
            assert!(jumps(RebootMethod::Cold, &[wish]), "wish {number}");
        }
        assert!(jumps(RebootMethod::Saved, &[]));
        assert!(!jumps(RebootMethod::Saved, &[hard]));
        assert!(jumps(RebootMethod::Warm, &[]));
    }

    #[test]
    fn no_wish_is_dropped_in_silence() {
        let options = |method, wish: Wish| {
            let mut options = RebootOptions {
                method,
                ..RebootOptions::default()
            };
            wish(&mut options);
            options
        };
        use RebootMethod::{Cold, Saved, Warm};
        let hard: Wish = |o| o.hard = true;
        let hard_into: Wish = |o| (o.hard, o.kernel) = (true, Some("/k".into()));
        let force: Wish = |o| o.force = true;
        for (method, wish) in [
            (Warm, hard),
            (Saved, hard_into),
            (Cold, hard_into),
            (Warm, force),
            (Saved, force),
        ] {
            let options = options(method, wish);
            assert!(options.contradiction().is_some(), "{options:?}");
        }
        for (method, wish) in [(Saved, hard), (Cold, hard), (Cold, force)] {
            assert_eq!(options(method, wish).contradiction(), None);
        }
    }

    #[test]
    fn a_store_that_gives_no_vm_back_stops_a_reboot_that_would_keep_one() {
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
        let check = store_check(&survey, &[kept]);
        assert_eq!(check.level, Level::Fail);
        assert!(check.sentence.contains("guard"), "{check:?}");
        assert!(check.remedy.is_some());
        assert_eq!(store_check(&survey, &[]).level, Level::Warn);
        survey.store_trouble = None;
        assert_eq!(store_check(&survey, &[]).level, Level::Ok);
    }
}
