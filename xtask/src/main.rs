//! The project's own tasks: `cargo xtask COMMAND`.

mod bench;
mod deb;
mod demo;
mod image_build;
mod kernel;
mod lab_shell;
mod lab_tests;
mod package_check;
mod sawtooth;
mod setup;
mod test;
mod tidy;
mod ui;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Args, Parser, Subcommand};
use lab::assets::{Assets, Overrides};

/// Tasks of the Hebe project.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Cli {
    #[command(flatten)]
    overrides: OverrideArgs,
    #[command(subcommand)]
    command: Command,
}

/// What this machine has, instead of what would be fetched from Debian.
#[derive(Args)]
struct OverrideArgs {
    /// QEMU 10 or newer (qemu-system-x86_64).
    #[arg(long, global = true, value_name = "PATH")]
    qemu: Option<PathBuf>,
    /// Kernel image for hosts and guests.
    #[arg(long, global = true, value_name = "PATH")]
    kernel: Option<PathBuf>,
    /// That kernel's lib/modules/RELEASE folder.
    #[arg(long, global = true, value_name = "DIR")]
    modules: Option<PathBuf>,
}

impl OverrideArgs {
    /// As they were given, for another run of this program.
    fn again(&self) -> Vec<OsString> {
        let flags = [
            ("--qemu", &self.qemu),
            ("--kernel", &self.kernel),
            ("--modules", &self.modules),
        ];
        let given = flags.into_iter().filter_map(|(flag, path)| {
            let path = path.as_ref()?;
            Some([flag.into(), path.clone().into_os_string()])
        });
        given.flatten().collect()
    }
}

#[derive(Subcommand)]
enum Command {
    /// The papers' experiments, on the emulated machine.
    Bench(bench::BenchArgs),
    /// Run every test: what CI runs.
    Test(test::TestArgs),
    /// Warm-reboot a host under VMs, on real kernels in an emulated machine.
    Demo(demo::DemoArgs),
    /// Fetch everything the lab needs (the other commands do so, too).
    Setup(setup::SetupArgs),
    /// Build a Debian package of the product (dpkg-deb).
    Deb(deb::DebArgs),
    /// Boot a lab host with the product's programs and run commands in it.
    Lab(lab_shell::LabArgs),
    /// Build the lab's own small kernel from Debian's source package.
    Kernel(kernel::KernelArgs),
    /// Check licences, layers, file sizes and forbidden words.
    Tidy,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(cli) {
        Ok(code) => code,
        Err(e) => {
            eprintln!("error: {}", ui::chain(&e));
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> Result<ExitCode> {
    let progress = ui::Spinner::new();
    let again = cli.overrides.again();
    let overrides = Overrides {
        qemu: cli.overrides.qemu,
        kernel: cli.overrides.kernel,
        modules: cli.overrides.modules,
    };
    let assets = || Assets::open(overrides);
    match cli.command {
        Command::Bench(args) => bench::run(&assets()?, &args, &progress),
        Command::Test(args) => test::run(&assets()?, &args, &again, &progress),
        Command::Demo(args) => demo::run(&assets()?, &args, &progress),
        Command::Setup(args) => setup::run(&assets()?, &args, &progress),
        Command::Lab(args) => match args.attach {
            Some(port) => lab_shell::attach(port, &args.command),
            None => lab_shell::run(&assets()?, &args, &progress),
        },
        Command::Deb(args) => deb::run(&args, &progress),
        Command::Kernel(args) => kernel::run(&assets()?, &args, &progress),
        Command::Tidy => tidy::run().map(|()| ExitCode::SUCCESS),
    }
}
