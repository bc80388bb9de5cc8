//! `cargo xtask kernel`: the lab's own small kernel.

use std::process::ExitCode;

use anyhow::Result;
use lab::assets::Assets;
use lab::progress::Progress;

use crate::ui::Spinner;

/// How to build it.
#[derive(clap::Args)]
pub struct KernelArgs {
    /// Parallel jobs of make; as many as processors if not given.
    #[arg(long, short)]
    jobs: Option<usize>,
}

/// Builds the kernel, or says that it is there.
pub fn run(assets: &Assets, args: &KernelArgs, progress: &Spinner) -> Result<ExitCode> {
    let all = || std::thread::available_parallelism().map_or(1, usize::from);
    let kernel = lab::kernel::build(assets, args.jobs.unwrap_or_else(all), progress)?;
    progress.note(&format!(
        "kernel lab: {} ({})",
        kernel.release,
        kernel.image.display()
    ));
    progress.clear();
    Ok(ExitCode::SUCCESS)
}
