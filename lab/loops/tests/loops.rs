//! The loops and the fault checks, where this machine's KVM runs the guest.

use std::io::Write;
use std::time::Duration;

use suspend_loop::environment::{Environment, Kind, Trial, trial};
use suspend_loop::faults;
use suspend_loop::loops::{Options, run};
use suspend_loop::rig::Plan;

const TRIAL_MAX: Duration = Duration::from_secs(20);
const PROGRESS_MAX: Duration = Duration::from_secs(120);
const SEED: u64 = 0x2007;

/// Past the test harness, which keeps the output of tests that pass.
fn say(text: &str) {
    let _ = writeln!(std::io::stderr(), "{text}");
}

// One test: a rig counts this process's threads and descriptors, and another
// test's would be in the way.
#[test]
fn a_guest_survives_suspends_and_resumes() {
    let environment = Environment::detect();
    let mut ran = false;
    for vcpus in [2, 1, 4] {
        match trial(vcpus, TRIAL_MAX).expect("the trial itself does not fail") {
            Trial::Runs(plan, _) => {
                ran = true;
                check(plan, &environment);
            }
            Trial::Cannot(why) => say(&format!(
                "skipped here: suspend/resume loops with {vcpus} vCPUs: {why} (runs in the lab)"
            )),
        }
    }
    let hardware = matches!(environment.kind, Kind::Native | Kind::Nested);
    assert!(
        ran || !hardware || hebe_kvm::host_can_run().is_err(),
        "this machine has a KVM with hardware behind it, and the guest does not run on it"
    );
}

fn check(plan: Plan, environment: &Environment) {
    for check in faults::run(plan, SEED, PROGRESS_MAX) {
        if let Some(why) = check.skipped {
            let vcpus = plan.vcpus;
            say(&format!(
                "skipped here: {}, {vcpus} vCPUs: {why} (runs in the lab)",
                check.name
            ));
        }
        assert_eq!(check.error, None, "{}", check.name);
    }
    let loops = if environment.kind == Kind::Native {
        100
    } else {
        10
    };
    let report = run(&Options {
        plan,
        loops,
        seed: SEED,
        run_us_max: 20_000,
        progress_max: PROGRESS_MAX,
        tell_every: 0,
    });
    say(&report.summary());
    assert_eq!(report.error, None);
}
