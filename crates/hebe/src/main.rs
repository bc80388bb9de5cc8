//! `hebe`: run VMs, and put a new kernel under all of them at once.

mod bar;
mod cli;
mod commands;
#[cfg(test)]
mod hints;
mod output;
mod plain;

use std::process::ExitCode;

use clap::Parser;
use hebe_host::Host;
use hebe_sys::clock::stamp_now;
use hebe_sys::fdstore::Given;
use hebe_sys::proc::raise_file_limit;

/// Ends with what is wrong with the command line; as JSON, too, where that was
/// asked for.
fn wrong(error: &clap::Error) -> ! {
    if error.use_stderr() && std::env::args_os().any(|word| word == "--json") {
        output::Output::new(true).wrong(error);
    }
    error.exit()
}

fn main() -> ExitCode {
    // First of all: the timeline's "user space" is this instant.
    let started = stamp_now();
    // SAFETY: nothing has run yet in this process, which has one thread.
    let given = unsafe { Given::take() };
    // VMs in store `luo` have many files; a VMM inherits the limit.
    let _ = raise_file_limit();
    let parsed = cli::Cli::try_parse();
    let cli = match parsed.and_then(|cli| cli.check().map(|()| cli)) {
        Ok(cli) => cli,
        Err(error) => wrong(&error),
    };
    let out = output::Output::new(cli.json);
    let mut host = Host::here().given(given);
    host.layout.no_sandbox = cli.command.no_sandbox();
    host.layout.unnoted = cli.command.unnoted();
    if host.layout.no_sandbox {
        out.progress(
            "WARNING: --no-sandbox: VMMs that this command starts are not confined, and a guest that breaks out of its VM has all their rights; `hebe show` says so of each",
        );
    }
    match commands::run(&host, cli.command, &out, started) {
        Ok(exit) => match (exit, output::unwritten()) {
            (output::Exit::Done, Some(why)) => {
                out.progress(&format!(
                    "what was ordered is done, and the answer could not be written ({why})"
                ));
                output::Exit::Failed.into()
            }
            _ => exit.into(),
        },
        Err(failure) => {
            out.failure(&failure);
            output::Exit::Failed.into()
        }
    }
}
