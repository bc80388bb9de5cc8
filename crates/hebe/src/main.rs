//! `hebe`: run VMs, and put a new kernel under all of them at once.

mod cli;
mod commands;
#[cfg(test)]
mod hints;
mod output;

use std::process::ExitCode;

use clap::Parser;
use hebe_host::Host;
use hebe_sys::clock::stamp_now;

fn main() -> ExitCode {
    // First of all: the timeline's "user space" is this instant.
    let started = stamp_now();
    let cli = cli::Cli::parse();
    if let Err(error) = cli.check() {
        error.exit();
    }
    let out = output::Output::new(cli.json);
    match commands::run(&Host::here(), cli.command, &out, started) {
        Ok(exit) => exit.into(),
        Err(failure) => {
            out.failure(&failure);
            output::Exit::Failed.into()
        }
    }
}
