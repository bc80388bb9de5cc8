//! `reboot`: the verdict, the reboot itself, and its report.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use hebe_fleet::order::NotRebooted;
use hebe_flow::reboot::Fate;
use hebe_host::Host;
use hebe_host::preflight::{Check, Level, RebootOptions, Verdict, preflight};
use hebe_host::reboot::{RebootEnd, reboot as run_reboot, stage};
use hebe_host::report::complete_report;
use hebe_host::saved::SavedPaths;
use hebe_host::system::Leave;
use hebe_host::timeline::{self, Downtime, Row, Timeline};
use hebe_host::{gantt, listing};
use hebe_policy::fleet::holder::Stop;
use hebe_policy::span::Span;
use hebe_types::{RebootMethod, VmName};
use serde::Serialize;

use super::slots::{self, Fleet};
use crate::bar::{Bar, Far};
use crate::cli::RebootArgs;
use crate::output::{Exit, Failure, Outcome, Output, table};

/// `hebe reboot`.
pub fn reboot(host: &Host, args: &RebootArgs, out: &Output) -> Outcome {
    if args.report {
        return report(host, args, out);
    }
    if args.roll {
        return super::rolls::take_turn(host, args, out);
    }
    let options = args.options();
    if args.load {
        return load(host, &options, out);
    }
    let fleet = Fleet::for_reboot(host, args.fleet, args.no_fleet)?;
    let (verdict, _) = preflight(host, &options, args.dry_run);
    if args.dry_run || !verdict.passes() {
        show_verdict(&verdict, args.dry_run, out);
        if !verdict.passes() {
            return Ok(Exit::CheckFailed);
        }
        return Ok(fleet.map_or(Exit::Done, |fleet| dry_slot(&fleet, out)));
    }
    out.progress(&verdict_text(&verdict));
    match fleet {
        Some(fleet) => in_turn(host, &fleet, args, out),
        None => Ok(ended(&run(host, &options, out), out)),
    }
}

#[derive(Serialize)]
struct Loaded {
    result: &'static str,
}

/// `hebe reboot --load`.
fn load(host: &Host, options: &RebootOptions, out: &Output) -> Outcome {
    if let Err(why) = host.system.armed() {
        let why = format!("nobody would keep the VMs when the host leaves: {why}");
        return Ok(ended(&RebootEnd::Refused(why), out));
    }
    let say = |text: &str| out.progress(text);
    match stage(host, options, &say) {
        Err(end) => Ok(ended(&end, out)),
        Ok(how) => {
            out.answer(&Loaded { result: "loaded" }, || match how {
                Leave::Kexec => "loaded: `systemctl kexec` leaves for it\n".to_owned(),
                _ => "noted: `systemctl reboot` does it\n".to_owned(),
            });
            Ok(Exit::Done)
        }
    }
}

/// Reboots; comes back only if that did not happen.
fn run(host: &Host, options: &RebootOptions, out: &Output) -> RebootEnd {
    let bar = (options.method == RebootMethod::Saved).then(|| saving(host, out));
    let say = |text: &str| match &bar {
        Some(bar) => bar.aside(|| out.progress(text)),
        None => out.progress(text),
    };
    match run_reboot(host, options, &say) {
        Ok(never) => match never {},
        Err(end) => end,
    }
}

/// How far the VMs are saved, by what is allocated to their files.
fn saving(host: &Host, out: &Output) -> Bar {
    let survey = listing::survey(host);
    let up = survey.rows.values().filter(|row| row.life.has_vmm());
    let files: Vec<_> = up
        .filter_map(|row| Some((SavedPaths::new(&host.layout, &row.name), row.memory?.0)))
        .collect();
    let size = |path: &Path| path.metadata().ok().map(|found| found.blocks() * 512);
    Bar::counting(out, "saving the VMs", move || {
        let (mut done, mut whole, mut begun) = (0, 0, false);
        for (paths, memory) in &files {
            let written = size(&paths.part).or_else(|| size(&paths.complete));
            begun |= written.is_some();
            // Zero pages are not written, so that a file is never larger.
            done += written.unwrap_or(0).min(*memory);
            whole += memory;
        }
        begun.then_some(Far::Bytes(done, whole))
    })
}

fn dry_slot(fleet: &Fleet, out: &Output) -> Exit {
    match fleet.would_have() {
        Ok(()) => Exit::Done,
        Err(why) => {
            out.progress(&format!("there would be no slot just now: {why}"));
            Exit::CheckFailed
        }
    }
}

/// How a turn ended that did not end in another kernel.
pub struct Ended {
    /// Where the slot is.
    pub stop: Stop,
    /// What pre-flight says under the slot, if that is why.
    pub refused: Option<Verdict>,
    /// How the reboot ended, if it was begun.
    pub reboot: Option<RebootEnd>,
}

/// Reboots under a slot of the group. While it is leased, everything is
/// checked again, for waiting may have taken long; then it is taken for good.
/// The caller holds [`slots::only_one`].
pub fn under_a_slot(
    host: &Host,
    fleet: &Fleet,
    options: &RebootOptions,
    wait: Option<Span>,
    out: &Output,
) -> Result<Ended, Failure> {
    let (mut refused, mut end) = (None, None);
    let check = || {
        let (verdict, survey) = preflight(host, options, false);
        if verdict.passes() {
            return Ok(slots::answering(&survey));
        }
        let why = verdict.why_not();
        refused = Some(verdict);
        Err(why)
    };
    let reboot = || not_rebooted(end.insert(run(host, options, out)));
    let say = |text: &str| out.progress(text);
    let stop = fleet.in_turn(wait, &say, check, reboot)?;
    Ok(Ended {
        stop,
        refused,
        reboot: end,
    })
}

/// Tells of a turn that did not end in another kernel.
pub fn tell(ended: Ended, out: &Output) -> Exit {
    let told = ended.refused.is_some() || ended.reboot.is_some();
    if told && matches!(ended.stop, Stop::Unreleased(_) | Stop::Stranded(_)) {
        out.progress(&ended.stop.to_string());
    }
    if let Some(verdict) = ended.refused {
        show_verdict(&verdict, false, out);
        return Exit::CheckFailed;
    }
    let refused = RebootEnd::Refused(ended.stop.to_string());
    self::ended(&ended.reboot.unwrap_or(refused), out)
}

fn in_turn(host: &Host, fleet: &Fleet, args: &RebootArgs, out: &Output) -> Outcome {
    let _only_one = slots::only_one(host)?;
    let ended = under_a_slot(host, fleet, &args.options(), args.wait, out)?;
    Ok(tell(ended, out))
}

/// For the group: whether the next host may go.
pub fn not_rebooted(end: &RebootEnd) -> NotRebooted {
    let (why, all_run) = match end {
        RebootEnd::Refused(why) => (why.clone(), true),
        RebootEnd::Aborted { why, stranded, .. } if stranded.is_empty() => (why.clone(), true),
        RebootEnd::Aborted { why, stranded, .. } => {
            let list: Vec<String> = stranded
                .iter()
                .map(|(vm, place)| format!("VM '{vm}' is {place}"))
                .collect();
            (format!("{why} ({})", list.join(", ")), false)
        }
    };
    NotRebooted { why, all_run }
}

#[derive(Serialize)]
struct VerdictAnswer<'a> {
    passes: bool,
    #[serde(flatten)]
    verdict: &'a Verdict,
}

/// The verdict, as an answer and a sentence.
pub fn show_verdict(verdict: &Verdict, dry_run: bool, out: &Output) {
    let answer = VerdictAnswer {
        passes: verdict.passes(),
        verdict,
    };
    out.answer(&answer, || verdict_text(verdict));
    if !verdict.passes() {
        let text = format!("the reboot is refused: {}", verdict.why_not());
        out.progress(&text);
    } else if dry_run {
        out.progress("everything holds; nothing was changed");
    }
}

fn verdict_text(verdict: &Verdict) -> String {
    let mut text = match &verdict.next {
        Some(next) => format!(
            "{} reboot by kexec into {}\n  command line: {}\n",
            method(verdict),
            next.kernel.display(),
            next.cmdline
        ),
        None => format!("{} reboot by a reset of the machine\n", method(verdict)),
    };
    for vm in &verdict.vms {
        let mark = match vm.fate {
            Some(Fate::Keep) => "keep",
            Some(Fate::Save) => "save",
            Some(Fate::ShutDown) => "shut down",
            Some(Fate::End) => "end",
            None => "-",
        };
        text.push_str(&format!(
            "  {:16} {mark:10} {}\n",
            vm.vm.as_str(),
            vm.sentence
        ));
    }
    text.push_str(&checks_text(&verdict.checks));
    text
}

fn method(verdict: &Verdict) -> &'static str {
    hebe_host::reboot::method_name(verdict.method)
}

/// Checks as lines, with the remedy under each that needs one.
pub fn checks_text(checks: &[Check]) -> String {
    let mut text = String::new();
    for check in checks {
        let mark = match check.level {
            Level::Ok => "ok  ",
            Level::Warn => "note",
            Level::Fail => "FAIL",
        };
        text.push_str(&format!("  {mark} {}: {}\n", check.id, check.sentence));
        if let Some(remedy) = &check.remedy {
            text.push_str(&format!("       way out: {remedy}\n"));
        }
    }
    text
}

#[derive(Serialize)]
#[serde(tag = "result", rename_all = "kebab-case")]
enum End<'a> {
    Refused {
        why: &'a str,
    },
    Aborted {
        why: &'a str,
        stranded: Vec<Stranded<'a>>,
        notes: &'a [String],
    },
}

#[derive(Serialize)]
struct Stranded<'a> {
    vm: &'a VmName,
    place: &'a str,
}

fn ended(end: &RebootEnd, out: &Output) -> Exit {
    match end {
        RebootEnd::Refused(why) => {
            out.answer(&End::Refused { why }, String::new);
            out.progress(&format!("the reboot is refused: {why}"));
            Exit::CheckFailed
        }
        RebootEnd::Aborted {
            why,
            stranded,
            notes,
        } => {
            let list = stranded.iter().map(|(vm, place)| Stranded { vm, place });
            let answer = End::Aborted {
                why,
                stranded: list.collect(),
                notes,
            };
            out.answer(&answer, String::new);
            for note in notes {
                out.progress(&format!("while undoing: {note}"));
            }
            for (vm, place) in stranded {
                out.progress(&format!("VM '{vm}' does not run; it is {place}"));
            }
            if stranded.is_empty() {
                out.progress(&format!("the reboot was undone and every VM runs: {why}"));
                Exit::Undone
            } else {
                out.progress(&format!("the reboot was undone: {why}"));
                Exit::Attention
            }
        }
    }
}

#[derive(Serialize)]
struct Report<'a> {
    #[serde(flatten)]
    timeline: &'a Timeline,
    rows: Vec<Row>,
    downtime: Vec<Downtime>,
}

fn report(host: &Host, args: &RebootArgs, out: &Output) -> Outcome {
    let timeline = complete_report(host)?.ok_or_else(|| {
        Failure("there is no report: this host has not been rebooted by hebe yet".into())
    })?;
    if let Some(path) = &args.svg {
        fs::write(path, gantt::svg(&timeline)).map_err(|e| {
            let text = listing::with_cause(&e);
            Failure(format!("cannot write {}: {text}", path.display()))
        })?;
    }
    let answer = Report {
        timeline: &timeline,
        rows: timeline.rows(),
        downtime: timeline.downtimes(),
    };
    out.answer(&answer, || timeline::table(&timeline));
    Ok(Exit::Done)
}

/// For `host check`, too.
pub fn checks_table(checks: &[Check]) -> String {
    let rows: Vec<Vec<String>> = checks
        .iter()
        .map(|c| {
            let level = match c.level {
                Level::Ok => "ok",
                Level::Warn => "note",
                Level::Fail => "FAIL",
            };
            vec![c.id.clone(), level.into(), c.sentence.clone()]
        })
        .collect();
    table(&["CHECK", "", "FOUND"], &rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_host_whose_vms_all_run_lets_the_next_one_go() {
        let aborted = |stranded| RebootEnd::Aborted {
            why: "kexec failed".into(),
            stranded,
            notes: Vec::new(),
        };
        for end in [RebootEnd::Refused("no kernel".into()), aborted(vec![])] {
            assert!(not_rebooted(&end).all_run, "{end:?}");
        }
        let web = "web".parse().expect("name");
        let told = not_rebooted(&aborted(vec![(web, "frozen in the store".into())]));
        assert!(!told.all_run);
        assert_eq!(told.why, "kexec failed (VM 'web' is frozen in the store)");
    }
}
