//! `cargo xtask test`: everything that CI runs, in one command.

mod lanes;

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use clap::Args;
use lab::apt::{self, Tool};
use lab::assets::Assets;
use lab::binaries::workspace_root;
use lab::machine::EmulatorFailure;
use lab::progress::Progress;

use crate::lab_tests;
use crate::ui::{self, Spinner};
use lanes::{Queue, Verdict};

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
    /// This check, by its whole name, as a part of another run.
    #[arg(long, value_name = "NAME", hide = true)]
    check: Option<String>,
}

/// One check.
struct Check {
    name: &'static str,
    run: fn(&Scene) -> Result<()>,
    /// About how long it takes in the emulated machine; 0 for what runs here.
    lab_minutes: u32,
}

impl Check {
    /// It takes one processor, that of its emulated machine, so that two such
    /// checks can go on at once.
    fn is_in_lab(&self) -> bool {
        self.lab_minutes > 0
    }
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

/// How many lab checks go on at once.
const LAB_LANES: usize = 2;
/// Checks that are for `--full`, or for who names them: what they are made of
/// comes from a suite that changes every day, and may be broken on one.
const ONLY_FULL: &[&str] = &["lab: live update by systemd"];
/// How often a check is repeated because the emulated processor failed.
const EMULATOR_FAILURES: u32 = 4;

const CHECKS: &[Check] = &[
    Check {
        name: "format",
        lab_minutes: 0,
        run: |_| cargo(&["fmt", "--all", "--check"], &[]),
    },
    Check {
        name: "tidy",
        lab_minutes: 0,
        run: |_| crate::tidy::run(),
    },
    Check {
        name: "clippy",
        lab_minutes: 0,
        run: |_| clippy(),
    },
    Check {
        name: "docs",
        lab_minutes: 0,
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
        lab_minutes: 0,
        run: |_| cargo(&["test", "--workspace", "--locked", "--quiet"], &[]),
    },
    Check {
        name: "fleet: real etcd",
        lab_minutes: 0,
        run: fleet,
    },
    Check {
        name: "dashboard in a browser",
        lab_minutes: 0,
        run: dashboard,
    },
    Check {
        name: "lab: a host in its group, two reboots",
        lab_minutes: 6,
        run: lab_tests::fleet::run,
    },
    Check {
        name: "image build",
        lab_minutes: 0,
        run: crate::image_build::run,
    },
    Check {
        name: "package in a Debian tree, with GRUB and initramfs-tools",
        lab_minutes: 0,
        run: crate::package_check::run,
    },
    Check {
        name: "lab: orders that are refused",
        lab_minutes: 1,
        run: lab_tests::refusals::run,
    },
    Check {
        name: "lab: three methods, both kernel directions",
        lab_minutes: 6,
        run: lab_tests::methods::run,
    },
    Check {
        name: "lab: a leak, flagged and cured by the policy",
        lab_minutes: 4,
        run: lab_tests::ageing::run,
    },
    Check {
        name: "lab: the agent in guests",
        lab_minutes: 2,
        run: lab_tests::agent::run,
    },
    Check {
        name: "lab: Debian in Debian, over systemctl kexec",
        lab_minutes: 5,
        run: lab_tests::debian::run,
    },
    Check {
        name: "lab: a host with systemd and the package",
        lab_minutes: 5,
        run: lab_tests::systemd::run,
    },
    Check {
        name: "lab: a host that starts by GRUB",
        lab_minutes: 5,
        run: lab_tests::boot_loader::run,
    },
    Check {
        name: "lab: damage and kills",
        lab_minutes: 3,
        run: lab_tests::faults::run,
    },
    Check {
        name: "lab: live update, twice",
        lab_minutes: 9,
        run: lab_tests::live_update::run,
    },
    Check {
        name: "lab: live update by systemd",
        lab_minutes: 6,
        run: lab_tests::live_update_systemd::run,
    },
    Check {
        name: "lab: balloons and live update",
        lab_minutes: 4,
        run: lab_tests::balloon::run,
    },
    Check {
        name: "lab: tests that run guests",
        lab_minutes: 3,
        run: lab_tests::kvm_tests::run,
    },
    Check {
        name: "lab: suspend and resume loops",
        lab_minutes: 3,
        run: lab_tests::loops::run,
    },
];

/// Runs the checks; all of them, even after one failed. `again` is what another
/// run of this program has to be told.
pub fn run(
    assets: &Assets,
    args: &TestArgs,
    again: &[OsString],
    progress: &Spinner,
) -> Result<ExitCode> {
    let context = Scene {
        assets,
        progress,
        full: args.full,
    };
    if let Some(name) = &args.check {
        let check = CHECKS.iter().find(|check| check.name == name);
        let check = check.with_context(|| format!("there is no check '{name}'"))?;
        return run_one(check, &context).map(|()| ExitCode::SUCCESS);
    }
    let wanted = |check: &&Check| match &args.only {
        Some(word) => check.name.contains(word),
        None => args.full || args.list || !ONLY_FULL.contains(&check.name),
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
    let whole = Instant::now();
    let verdicts = match checks[..] {
        [check] => {
            println!("--- {}", check.name);
            let result = run_one(check, &context);
            progress.clear();
            vec![Verdict::of(check.name, whole, result)]
        }
        _ => lanes::run(&queues(&checks), args.full, again)?,
    };
    let failed = tell(&verdicts, whole);
    Ok(if failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Lab checks on two lanes, and all others on one.
fn queues<'a>(checks: &[&'a Check]) -> [Queue<'a>; 2] {
    let (mut labs, others): (Vec<&Check>, Vec<&Check>) = checks.iter().partition(|c| c.is_in_lab());
    // The slowest first, so that no lane is left alone with it in the end.
    labs.sort_by_key(|check| std::cmp::Reverse(check.lab_minutes));
    let queue = |checks: Vec<&'a Check>, lanes| Queue {
        names: checks.into_iter().map(|check| check.name).collect(),
        lanes,
    };
    [queue(labs, LAB_LANES), queue(others, 1)]
}

/// Says everything once more, all in one place: what failed may lie far above.
/// How many failed.
fn tell(verdicts: &[Verdict], whole: Instant) -> usize {
    let failed = verdicts.iter().filter(|v| v.failed.is_some()).count();
    println!();
    verdicts.iter().for_each(|verdict| println!("{verdict}"));
    println!(
        "\nin {:.0} minutes:\n{} passed, {failed} failed",
        whole.elapsed().as_secs_f64() / 60.0,
        verdicts.len() - failed,
    );
    failed
}

/// Runs a check; again, [`EMULATOR_FAILURES`] times at most, where the emulator
/// failed under it.
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

/// The tests of slots and rolls, which do nothing where there is no etcd, with one.
fn fleet(scene: &Scene) -> Result<()> {
    let etcd = scene.assets.etcd(scene.progress)?;
    let etcd = etcd.to_str().context("etcd's path is no text")?;
    let environment = [("HEBE_ETCD", etcd), ("HEBE_REQUIRE_ETCD", "1")];
    for (package, test) in [
        ("hebe-fleet", "etcd"),
        ("hebe", "slots"),
        ("hebe", "rolls"),
        ("hebed", "turns"),
    ] {
        cargo(
            &["test", "--locked", "--quiet", "-p", package, "--test", test],
            &environment,
        )?;
    }
    Ok(())
}

/// The daemon's page, in Debian's Chromium without a window.
fn dashboard(scene: &Scene) -> Result<()> {
    let tool = Tool {
        program: "chromium",
        package: "chromium",
    };
    apt::ensure_tools(&[tool], scene.progress)?;
    let chromium =
        apt::find_program("chromium").context("chromium was installed and is nowhere")?;
    cargo(&["build", "--locked", "--quiet", "-p", "hebe"], &[])?;
    let target = std::env::var_os("CARGO_TARGET_DIR");
    let target = target.map_or_else(|| workspace_root().join("target"), PathBuf::from);
    let (program, picture) = (target.join("debug/hebe"), target.join("dashboard.png"));
    let text = |path: &Path| {
        path.to_str()
            .map(str::to_owned)
            .context("a path is no text")
    };
    let (chromium, program, picture) = (text(&chromium)?, text(&program)?, text(&picture)?);
    let environment = [
        ("HEBE_CHROMIUM", chromium.as_str()),
        ("HEBE_PROGRAM", &program),
        ("HEBE_PICTURE", &picture),
        ("HEBE_REQUIRE_BROWSER", "1"),
    ];
    let test = [
        "test", "--locked", "--quiet", "-p", "hebed", "--test", "hebed",
    ];
    let case = ["--", "the_page_is_live"];
    cargo(&[&test[..], &case].concat(), &environment)
}

/// The fuzz targets are a workspace of their own, with a lock file of its own.
/// That their fuzzer would be linked with a library that is not there matters
/// to nobody who only checks them, and spares a C++ compiler.
fn clippy() -> Result<()> {
    const HOW: &[&str] = &["--all-targets", "--locked", "--quiet"];
    const DENY: &[&str] = &["--", "-D", "warnings"];
    let check = |which: &[&str], environment: &[_]| {
        cargo(&[&["clippy"], which, HOW, DENY].concat(), environment)
    };
    check(&["--workspace"], &[])?;
    let fuzz = [
        "--manifest-path",
        "fuzz/Cargo.toml",
        "--target-dir",
        "target/fuzz",
    ];
    check(&fuzz, &[("CUSTOM_LIBFUZZER_PATH", "/none/libFuzzer.a")])
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
