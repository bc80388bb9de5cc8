//! `hebe-vmm`: the process around one VM. Started by `hebe`, not by hand.

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    let args = hebe_vmm::args::Args::parse();
    match hebe_vmm::run(args) {
        Ok(outcome) => outcome.exit_code(),
        Err(error) => {
            hebe_vmm::log_error(&format!("{error:#}"));
            ExitCode::FAILURE
        }
    }
}
