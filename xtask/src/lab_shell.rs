//! `cargo xtask lab`: a lab host to try things in.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use lab::agent::{Agent, ExecOutput};
use lab::assets::{Assets, KernelName};
use lab::progress::Progress;
use lab::scenario::{GuestSpec, Lab, LabOptions};
use lab::system::System;
use lab::trial::{self, Method};

use crate::ui::Spinner;

/// Longest time one command may take.
const COMMAND_LIMIT: Duration = Duration::from_secs(600);

/// Which host, and what to run in it.
#[derive(clap::Args)]
pub struct LabArgs {
    /// Kernel of the host.
    #[arg(long, default_value = "6.1-cloud")]
    host: KernelName,
    /// A Debian root disk with systemd as PID 1: debian12, debian13 or a suite.
    #[arg(long)]
    system: Option<System>,
    /// More packages for that root disk.
    #[arg(long, value_delimiter = ',', requires = "system")]
    packages: Vec<String>,
    /// It starts by its firmware, GRUB, and a kernel and an initramfs of its own;
    /// --host, --others, --reserve and --append say nothing then.
    #[arg(long, requires = "system")]
    boot_loader: bool,
    /// Files to put into the host, below /data/files.
    #[arg(long, value_name = "FILES", value_delimiter = ',')]
    files: Vec<PathBuf>,
    /// Kernels that the host can be rebooted into (under /data/boot).
    #[arg(long, value_delimiter = ',', default_value = "7.3-cloud")]
    others: Vec<KernelName>,
    /// Kernels for guests (under /data/guest).
    #[arg(long, value_delimiter = ',', default_value = "6.1-cloud")]
    guest_kernels: Vec<KernelName>,
    /// Define and start this many guests (vm1, vm2 …) before the command.
    #[arg(long, default_value_t = 0)]
    guests: u8,
    /// RAM of each guest, in MiB.
    #[arg(long, default_value_t = 256)]
    guest_memory: u64,
    /// vCPUs of each guest.
    #[arg(long, default_value_t = 1)]
    guest_vcpus: u8,
    /// RAM of the machine, in MiB.
    #[arg(long, default_value_t = 4096)]
    memory: u64,
    /// The reserved range at 4 GiB, in MiB.
    #[arg(long, default_value_t = 1536)]
    reserve: u64,
    /// More words for the host's command line.
    #[arg(long, default_value = "", allow_hyphen_values = true)]
    append: String,
    /// Leave out the product's programs.
    #[arg(long)]
    bare: bool,
    /// Do not format the store at the first boot.
    #[arg(long)]
    no_store: bool,
    /// After the command, reboot the host into this kernel and watch the guests.
    #[arg(long, value_name = "KERNEL")]
    reboot: Option<KernelName>,
    /// How the guests get over that reboot: warm, saved or cold.
    #[arg(long, default_value = "warm")]
    method: Method,
    /// Leave the host running after the command, until Enter is pressed.
    #[arg(long)]
    keep: bool,
    /// Run the command in a host that another run keeps, by its agent port.
    #[arg(long, value_name = "PORT")]
    pub attach: Option<u16>,
    /// Print the serial line at the end.
    #[arg(long)]
    serial: bool,
    /// The command and its arguments; `sh -c '…'` works.
    #[arg(last = true)]
    pub command: Vec<String>,
}

/// Boots a host, runs the command, powers off.
pub fn run(assets: &Assets, args: &LabArgs, progress: &Spinner) -> Result<ExitCode> {
    let defaults = LabOptions::default();
    let options = LabOptions {
        host: args.host,
        system: args.system.clone().map(|mut system| {
            system.packages.extend(args.packages.iter().cloned());
            system.has_loader = args.boot_loader;
            system
        }),
        others: args.others.clone(),
        guest_kernels: args.guest_kernels.clone(),
        files: args.files.clone(),
        guests: args.guests.max(4),
        memory_mib: args.memory,
        reserve_mib: args.reserve,
        product: if args.bare {
            Vec::new()
        } else {
            defaults.product.clone()
        },
        tools: true,
        store_init: !args.no_store,
        append: args.append.clone(),
        ..defaults
    };
    let mut lab = Lab::boot(assets, options, progress)?;
    progress.note(&format!(
        "{} runs after {:.1} s (agent port {})",
        lab.boot.kernel,
        lab.boot_time.as_secs_f64(),
        lab.machine.agent.port()
    ));
    let result = commands(&mut lab, args, progress);
    progress.clear();
    if args.serial || result.is_err() {
        eprintln!(
            "--- serial line ---\n{}",
            lab.machine.serial.text()?.trim_end()
        );
    }
    if args.keep {
        for ports in &lab.machine.guests {
            eprintln!("10.0.2.{}: {ports:?}", ports.host_byte);
        }
        eprintln!(
            "the host stays until Enter is pressed; in another terminal: cargo xtask lab --attach {} -- COMMAND",
            lab.machine.agent.port()
        );
        std::io::stdin().read_line(&mut String::new())?;
    }
    let code = result?;
    lab.machine.check()?;
    lab.machine.power_off()?;
    Ok(code)
}

fn commands(lab: &mut Lab, args: &LabArgs, progress: &Spinner) -> Result<ExitCode> {
    let kernel = args
        .guest_kernels
        .first()
        .copied()
        .unwrap_or(KernelName::V6_1Cloud);
    let mut guests = Vec::new();
    for index in 0..args.guests {
        guests.push(GuestSpec {
            memory_mib: args.guest_memory,
            vcpus: args.guest_vcpus,
            ..GuestSpec::numbered(index, kernel)
        });
    }
    if !guests.is_empty() {
        progress.step("starting guests");
        lab.start(&guests)?;
        for status in lab.wait_for_guests(&guests)? {
            progress.note(&format!(
                "guest up: {} for {:.1} s",
                status.kernel, status.uptime_s
            ));
        }
    }
    progress.clear();
    let code = match args.command.is_empty() {
        true => ExitCode::SUCCESS,
        false => execute(&lab.machine.agent, &args.command)?,
    };
    if let Some(kernel) = args.reboot {
        let trial = trial::reboot(lab, &guests, args.method, kernel, &[], progress)?;
        progress.clear();
        println!("{}", serde_json::to_string_pretty(&trial)?);
    }
    Ok(code)
}

/// Runs a command in a host that is already there.
pub fn attach(port: u16, command: &[String]) -> Result<ExitCode> {
    execute(&Agent::new(port), command)
}

fn execute(agent: &Agent, command: &[String]) -> Result<ExitCode> {
    let argv: Vec<&str> = command.iter().map(String::as_str).collect();
    let output = agent.exec(&argv, b"", COMMAND_LIMIT)?;
    std::io::stdout().write_all(&output.stdout)?;
    std::io::stderr().write_all(&output.stderr)?;
    Ok(exit_code(&output))
}

fn exit_code(output: &ExecOutput) -> ExitCode {
    if output.timed_out {
        eprintln!(
            "the command ran longer than {} s and was killed",
            COMMAND_LIMIT.as_secs()
        );
    }
    match (output.code, output.signal) {
        (Some(code), _) => ExitCode::from(code as u8),
        (None, Some(signal)) => {
            eprintln!("the command was killed by signal {signal}");
            ExitCode::from(128u8.saturating_add(signal as u8))
        }
        (None, None) => ExitCode::FAILURE,
    }
}
