//! `cargo xtask kernel`: the lab's own small kernel.

use std::process::ExitCode;

use anyhow::Result;
use lab::assets::Assets;
use lab::progress::Progress;

use crate::ui::Spinner;

/// How to build it.
#[derive(clap::Args)]
pub struct KernelArgs {
    /// Parallel jobs of make.
    #[arg(long, short, default_value_t = 2)]
    jobs: u32,
}

/// Builds the kernel, or says that it is there.
pub fn run(assets: &Assets, args: &KernelArgs, progress: &Spinner) -> Result<ExitCode> {
    let kernel = lab::kernel::build(assets, args.jobs, progress)?;
    progress.note(&format!(
        "kernel lab: {} ({})",
        kernel.release,
        kernel.image.display()
    ));
    progress.clear();
    Ok(ExitCode::SUCCESS)
}
