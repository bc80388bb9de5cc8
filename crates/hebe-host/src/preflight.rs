//! What a reboot would do to each VM, and whether it can be begun at all.

use std::path::{Path, PathBuf};

use hebe_flow::life::Life;
use hebe_flow::reboot::Fate;
use hebe_types::{RebootMethod, VmName};
use serde::{Deserialize, Serialize};

use crate::checks;
use crate::cmdline;
use crate::host::Host;
use crate::listing::{self, Survey, VmRow, VmState, with_cause};
use crate::luo;
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
    /// Leave by this process itself, also where a service manager would do it.
    pub direct: bool,
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
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
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
    checks.extend(checks::right(host));
    checks.push(checks::host_config(host));
    checks.extend(checks::pending(host));
    match &next {
        Some(next) => {
            checks.extend(checks::kernel(host, next, probe));
            checks.extend(checks::initramfs(next, &survey, &vms));
            checks.push(checks::reservation(host, next, &survey));
        }
        None => checks.extend(checks::reset(&survey)),
    }
    if let Some(next) = &next {
        checks.extend(luo::check::checks(
            host,
            next,
            &survey,
            &vms,
            options.direct,
        ));
    }
    checks.push(checks::store(host, &survey, &vms));
    checks.extend(checks::vms(host, &survey, &vms));
    checks.extend(checks::state_dir(host, &survey, &vms));
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
/// can use, was asked for; the others jump, because what is in memory survives
/// nothing else (warm) and because a reset takes long.
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
    // Only a VM that runs can be stopped in order.
    let paused = if row.life == Life::Paused {
        "; it is paused now, and will run afterwards"
    } else {
        ""
    };
    let carried = row.store == Some(luo::STORE);
    let (fate, why) = match (method, row.life) {
        (_, Life::Held | Life::Frozen) if carried => {
            return (
                None,
                "is frozen already, and Linux carries its memory over".into(),
            );
        }
        (_, Life::Held | Life::Frozen) => {
            return (
                None,
                "is frozen in the store already and stays there".into(),
            );
        }
        (_, Life::Saved | Life::SavedHeld) => {
            return (None, "is saved in a file already".into());
        }
        // Whatever the method: there is nothing that could go on, and nobody to
        // be asked to shut down.
        (_, Life::Failed) => (
            Fate::End,
            "failed and cannot run again: it is ended, and `crashed` afterwards",
        ),
        _ if !up => return (None, format!("is {}: nothing to do", row.state.as_str())),
        (RebootMethod::Warm, _) if row.segment.is_some() => (
            Fate::Keep,
            "is kept in memory: its RAM lies in the reserved range",
        ),
        (RebootMethod::Warm, _) if carried => (
            Fate::Keep,
            "is kept in memory: Linux's Live Update Orchestrator carries its RAM over",
        ),
        (RebootMethod::Warm, _) => (
            Fate::Save,
            "is saved to disk: its RAM is a memfd, which ends with this kernel",
        ),
        (RebootMethod::Saved, _) => (Fate::Save, "is saved to disk, as the method says"),
        (RebootMethod::Cold, _) => (
            Fate::ShutDown,
            "is shut down and booted again, as the method says",
        ),
    };
    (Some(fate), format!("{why}{paused}"))
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

#[cfg(test)]
mod tests {
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
}
