//! `cargo xtask test`: everything that CI runs, in one command.

use std::process::{Command, ExitCode};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use clap::Args;
use lab::assets::Assets;
use lab::binaries::workspace_root;
use lab::machine::EmulatorFailure;
use lab::progress::Progress;

use crate::lab_tests;
use crate::ui::{self, Spinner};

/// What to test.
#[derive(Args)]
pub struct TestArgs {
    /// Longer campaigns, too: hours of loops and more kernels.
    #[arg(long)]
    full: bool,
    /// Only the checks whose name contains this word.
    #[arg(long, value_name = "WORD")]
    only: Option<String>,
    /// Say which checks there are.
    #[arg(long)]
    list: bool,
}

/// How a check ended that did not fail.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All of it ran.
    Passed,
    /// It did not run, and why; a failure with `--full`.
    Skipped(String),
}

/// One check.
struct Check {
    name: &'static str,
    run: fn(&Scene) -> Result<Outcome>,
}

/// What a check works with.
pub struct Scene<'a> {
    /// Kernels and QEMU.
    pub assets: &'a Assets,
    /// Where to say what happens.
    pub progress: &'a dyn Progress,
    /// Longer campaigns.
    pub full: bool,
}

/// How often a check is repeated because the emulated processor failed.
const EMULATOR_FAILURES: u32 = 2;

const CHECKS: [Check; 13] = [
    Check {
        name: "format",
        run: |_| cargo(&["fmt", "--all", "--check"], &[]),
    },
    Check {
        name: "tidy",
        run: |_| passed(crate::tidy::run()),
    },
    Check {
        name: "clippy",
        run: |_| {
            cargo(
                &[
                    "clippy",
                    "--workspace",
                    "--all-targets",
                    "--locked",
                    "--quiet",
                    "--",
                    "-D",
                    "warnings",
                ],
                &[],
            )
        },
    },
    Check {
        name: "docs",
        run: |_| {
            let flags = [("RUSTDOCFLAGS", "-D warnings")];
            cargo(
                &["doc", "--workspace", "--no-deps", "--locked", "--quiet"],
                &flags,
            )
        },
    },
    Check {
        name: "unit, property and contract tests",
        run: |_| cargo(&["test", "--workspace", "--locked", "--quiet"], &[]),
    },
    Check {
        name: "fleet: real etcd",
        run: fleet,
    },
    Check {
        name: "lab: orders that are refused",
        run: |scene| passed(lab_tests::refusals::run(scene)),
    },
    Check {
        name: "lab: three methods, both kernel directions",
        run: |scene| passed(lab_tests::methods::run(scene)),
    },
    Check {
        name: "lab: the agent in guests",
        run: |scene| passed(lab_tests::agent::run(scene)),
    },
    Check {
        name: "lab: damage and kills",
        run: |scene| passed(lab_tests::faults::run(scene)),
    },
    Check {
        name: "lab: live update, twice",
        run: lab_tests::live_update::run,
    },
    Check {
        name: "lab: tests that run guests",
        run: |scene| passed(lab_tests::kvm_tests::run(scene)),
    },
    Check {
        name: "lab: suspend and resume loops",
        run: |scene| passed(lab_tests::loops::run(scene)),
    },
];

/// Runs the checks; all of them, even after one failed.
pub fn run(assets: &Assets, args: &TestArgs, progress: &Spinner) -> Result<ExitCode> {
    let wanted = |check: &&Check| {
        args.only
            .as_ref()
            .is_none_or(|word| check.name.contains(word))
    };
    let checks: Vec<&Check> = CHECKS.iter().filter(wanted).collect();
    if checks.is_empty() {
        bail!(
            "no check has '{}' in its name: see --list",
            args.only.as_deref().unwrap_or_default()
        );
    }
    if args.list {
        checks.iter().for_each(|check| println!("{}", check.name));
        return Ok(ExitCode::SUCCESS);
    }
    let context = Scene {
        assets,
        progress,
        full: args.full,
    };
    let whole = Instant::now();
    let (mut lines, mut failed, mut skipped) = (Vec::new(), 0, 0);
    for check in &checks {
        println!("--- {}", check.name);
        let start = Instant::now();
        let result = run_one(check, &context);
        progress.clear();
        let seconds = start.elapsed().as_secs_f64();
        let line = match result {
            Ok(Outcome::Passed) => format!("ok  {} ({seconds:.0} s)", check.name),
            Ok(Outcome::Skipped(why)) => {
                skipped += 1;
                format!("skipped  {}: {why}", check.name)
            }
            Err(error) => {
                failed += 1;
                let why = ui::chain(&error);
                format!("FAILED  {} ({seconds:.0} s): {why}", check.name)
            }
        };
        println!("{line}");
        lines.push(line);
    }
    // Once more, all in one place: what failed may lie far above.
    println!("\n{}", lines.join("\n"));
    println!(
        "\n{} passed, {failed} failed, {skipped} did not run, in {:.0} minutes",
        checks.len() - failed - skipped,
        whole.elapsed().as_secs_f64() / 60.0,
    );
    // Whoever asks for everything is told when that is not what happened.
    let good = failed == 0 && (skipped == 0 || !args.full);
    Ok(if good {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Runs a check; again, [`EMULATOR_FAILURES`] times at most, where the emulator
/// failed under it.
fn run_one(check: &Check, scene: &Scene) -> Result<Outcome> {
    for _ in 0..EMULATOR_FAILURES {
        match (check.run)(scene) {
            Err(error) if error.is::<EmulatorFailure>() => {
                scene.progress.note(&format!(
                    "    repeated, because the emulator failed: {}",
                    ui::chain(&error)
                ));
            }
            other => return other,
        }
    }
    (check.run)(scene)
}

fn passed(result: Result<()>) -> Result<Outcome> {
    result.map(|()| Outcome::Passed)
}

/// The tests of slots, which do nothing where there is no etcd, with one.
fn fleet(scene: &Scene) -> Result<Outcome> {
    let etcd = scene.assets.etcd(scene.progress)?;
    let etcd = etcd.to_str().context("etcd's path is no text")?;
    let environment = [("HEBE_ETCD", etcd), ("HEBE_REQUIRE_ETCD", "1")];
    for (package, test) in [("hebe-fleet", "etcd"), ("hebe", "slots")] {
        cargo(
            &["test", "--locked", "--quiet", "-p", package, "--test", test],
            &environment,
        )?;
    }
    Ok(Outcome::Passed)
}

fn cargo(arguments: &[&str], environment: &[(&str, &str)]) -> Result<Outcome> {
    let program = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let status = Command::new(program)
        .args(arguments)
        .envs(environment.iter().copied())
        .current_dir(workspace_root())
        .status()
        .context("cargo does not run")?;
    if !status.success() {
        bail!("cargo {} failed", arguments.join(" "));
    }
    Ok(Outcome::Passed)
}
