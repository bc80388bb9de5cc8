//! `hebed`: serves and supervises a host's VMs.

use std::process::ExitCode;

use clap::Parser;
use hebed::cli::{Args, write_completions, write_manual};
use hebed::log;
use hebed::systemd::Systemd;

fn main() -> ExitCode {
    // SAFETY: first of all, so no other thread has been started.
    let mut systemd = unsafe { Systemd::take() };
    // SAFETY: called once, and nothing has been opened yet.
    let sockets = unsafe { systemd.sockets() };
    let args = Args::parse();
    let mut stdout = std::io::stdout();
    let printed = match args.completions {
        Some(shell) => Some(write_completions(shell, &mut stdout)),
        None => args.manual_page.then(|| write_manual(&mut stdout)),
    };
    if let Some(printed) = printed {
        return match printed {
            Ok(()) => ExitCode::SUCCESS,
            Err(_) => ExitCode::FAILURE,
        };
    }
    // VMs in store `luo` have many files; a VMM inherits the limit.
    let _ = hebe_sys::proc::raise_file_limit();
    let handed = sockets.and_then(|fds| fds.into_iter().map(hebed::server::adopt).collect());
    let ended = match handed {
        Ok(handed) => hebed::run::run(&args, systemd, handed),
        Err(error) => Err(error.to_string()),
    };
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(sentence) => {
            log::error(sentence);
            ExitCode::FAILURE
        }
    }
}
