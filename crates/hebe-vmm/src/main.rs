//! `hebe-vmm`: the process around one VM. Started by `hebe`, not by hand.

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    let args = hebe_vmm::args::Args::parse();
    // SAFETY: the command line was parsed, and nothing has been opened yet.
    if let Err(error) = unsafe { hebe_vmm::descriptors::close_others(&args) } {
        return fail(&format!("inherited descriptors cannot be closed: {error}"));
    }
    match hebe_vmm::run(args) {
        Ok(outcome) => outcome.exit_code(),
        Err(error) => fail(&format!("{error:#}")),
    }
}

fn fail(why: &str) -> ExitCode {
    hebe_vmm::log_error(why);
    ExitCode::FAILURE
}
