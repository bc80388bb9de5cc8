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

/// One check.
struct Check {
    name: &'static str,
    run: fn(&Scene) -> Result<()>,
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

const CHECKS: [Check; 10] = [
    Check {
        name: "format",
        run: |_| cargo(&["fmt", "--all", "--check"], &[]),
    },
    Check {
        name: "tidy",
        run: |_| crate::tidy::run(),
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
        name: "lab: orders that are refused",
        run: lab_tests::refusals::run,
    },
    Check {
        name: "lab: three methods, both kernel directions",
        run: lab_tests::methods::run,
    },
    Check {
        name: "lab: damage and kills",
        run: lab_tests::faults::run,
    },
    Check {
        name: "lab: live update, twice",
        run: lab_tests::live_update::run,
    },
    Check {
        name: "lab: suspend and resume loops",
        run: lab_tests::loops::run,
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
    let mut failed = Vec::new();
    for check in &checks {
        println!("--- {}", check.name);
        let start = Instant::now();
        let result = run_one(check, &context);
        progress.clear();
        let seconds = start.elapsed().as_secs_f64();
        match result {
            Ok(()) => println!("ok  {} ({seconds:.0} s)", check.name),
            Err(error) => {
                println!(
                    "FAILED  {} ({seconds:.0} s): {}",
                    check.name,
                    ui::chain(&error)
                );
                failed.push(check.name);
            }
        }
    }
    println!(
        "\n{} passed, {} failed",
        checks.len() - failed.len(),
        failed.len()
    );
    Ok(if failed.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Runs a check; once more if the emulator failed under it.
fn run_one(check: &Check, scene: &Scene) -> Result<()> {
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

fn cargo(arguments: &[&str], environment: &[(&str, &str)]) -> Result<()> {
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
    Ok(())
}
