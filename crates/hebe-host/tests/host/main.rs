//! The host's orders from end to end, with real processes, real locks and a
//! real store in a plain file. Two things stand in: the machine (so that
//! leaving the kernel is an event in a list) and the VMM: this very program,
//! started with a VMM's arguments, speaks the control protocol and commits
//! states, and has no guest.

mod apart;
mod claims;
mod elsewhere;
mod failing;
mod fake_vmm;
mod kills;
mod life;
mod live_update;
mod luo_faults;
mod luo_systemd;
mod networks;
mod overlays;
mod races;
mod reboots;
mod steps;
mod stopping;
mod verdicts;
mod world;

use std::panic::{self, AssertUnwindSafe};
use std::process::ExitCode;

type Case = (&'static str, fn());

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.iter().any(|a| a == "--lock-fd") {
        return fake_vmm::run(&arguments);
    }
    if arguments.first().is_some_and(|a| a == "--operate") {
        return kills::operate(&arguments[1..]);
    }
    if arguments.first().is_some_and(|a| a == "--keep") {
        return luo_faults::keep(&arguments[1..]);
    }
    let filter = arguments.iter().find(|a| !a.starts_with('-'));
    let wanted = |name: &str| filter.is_none_or(|f| name.contains(f.as_str()));
    let groups = [
        life::CASES,
        reboots::CASES,
        steps::CASES,
        stopping::CASES,
        apart::CASES,
        claims::CASES,
        elsewhere::CASES,
        failing::CASES,
        kills::CASES,
        live_update::CASES,
        luo_faults::CASES,
        luo_systemd::CASES,
        networks::CASES,
        overlays::CASES,
        races::CASES,
        verdicts::CASES,
    ];
    let cases: Vec<Case> = groups
        .concat()
        .into_iter()
        .filter(|(name, _)| wanted(name))
        .collect();
    if arguments.iter().any(|a| a == "--list") {
        for (name, _) in &cases {
            println!("{name}: test");
        }
        return ExitCode::SUCCESS;
    }
    let mut failed = 0;
    for (name, case) in &cases {
        let ok = panic::catch_unwind(AssertUnwindSafe(case)).is_ok();
        println!("test {name} ... {}", if ok { "ok" } else { "FAILED" });
        failed += usize::from(!ok);
    }
    println!("{} passed, {failed} failed", cases.len() - failed);
    if failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
