//! The daemon as a process: its API, its bounds, its supervision, its deaths.
//!
//! What stands in for a VMM is this very program, started with a VMM's
//! arguments: mostly one without a guest, and the real one where a test's
//! directory says so and the machine runs guests.

mod agents;
mod api;
mod bounds;
mod browser;
#[allow(dead_code, reason = "shared with the tests of hebe-fleet")]
#[path = "../../../hebe-fleet/tests/etcd/certificates.rs"]
mod certificates;
mod chromium;
mod client;
#[path = "../../../hebe-host/tests/host/fake_vmm.rs"]
mod fake_vmm;
mod guest;
mod kills;
mod secure;
mod supervision;
mod world;

use std::panic::{self, AssertUnwindSafe};
use std::path::Path;
use std::process::ExitCode;

type Case = (&'static str, fn());

/// Where a test says that VMMs are to be real.
const REAL: &str = "real";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.iter().any(|a| a == "--lock-fd") {
        return vmm(&arguments);
    }
    let filter = arguments.iter().find(|a| !a.starts_with('-'));
    let wanted = |name: &str| filter.is_none_or(|f| name.contains(f.as_str()));
    let groups = [
        api::CASES,
        bounds::CASES,
        secure::CASES,
        supervision::CASES,
        kills::CASES,
        browser::CASES,
        agents::CASES,
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

/// The VMM of `ROOT/run/vms/NAME`.
fn vmm(arguments: &[String]) -> ExitCode {
    let dir = arguments.windows(2).find(|pair| pair[0] == "--run-dir");
    let dir = Path::new(&dir.expect("--run-dir")[1]);
    let root = dir.ancestors().nth(3).expect("root/run/vms/NAME");
    if !root.join(REAL).exists() {
        return fake_vmm::run(arguments);
    }
    let args = <hebe_vmm::args::Args as clap::Parser>::parse();
    match hebe_vmm::run(args) {
        Ok(outcome) => outcome.exit_code(),
        Err(error) => {
            hebe_vmm::log_error(&format!("{error:#}"));
            ExitCode::FAILURE
        }
    }
}
