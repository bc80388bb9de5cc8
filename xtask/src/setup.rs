//! `cargo xtask setup`: fetches what the lab needs.

use std::process::ExitCode;

use anyhow::Result;
use lab::assets::{Assets, KernelName};
use lab::progress::Progress;

use crate::ui::Spinner;

/// What to fetch.
#[derive(clap::Args)]
pub struct SetupArgs {
    /// The generic kernels, too (large).
    #[arg(long)]
    all: bool,
}

/// Fetches QEMU and kernels and says what is there.
pub fn run(assets: &Assets, args: &SetupArgs, progress: &Spinner) -> Result<ExitCode> {
    let qemu = assets.machine_qemu(progress)?;
    progress.note(&format!("QEMU {}: {}", qemu.major, qemu.program.display()));
    for name in KernelName::STOCK {
        let generic = matches!(name, KernelName::V6_1Generic | KernelName::V7_3Generic);
        if generic && !args.all {
            continue;
        }
        let kernel = assets.kernel(name, progress)?;
        progress.note(&format!(
            "kernel {name}: {} ({})",
            kernel.release,
            kernel.image.display()
        ));
    }
    assets.busybox(progress)?;
    progress.clear();
    Ok(ExitCode::SUCCESS)
}
