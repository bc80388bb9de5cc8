//! Flags of `logs`, `top` and `dashboard`.

use std::path::PathBuf;

use clap::Args;
use hebe_types::VmName;

/// Most lines that `--lines` takes.
const LINES_MAX: u64 = 10_000;

/// Examples of `logs`.
pub const LOGS_HELP: &str = "\
Examples:
  hebe logs web
  hebe logs web --console --lines 50
  hebe logs web --follow
  hebe logs web --json | tail -1
  hebe logs web --console --raw        # with what the guest sends to steer a terminal";

/// Examples of `top`.
pub const TOP_HELP: &str = "\
Keys: q leaves.

Examples:
  hebe top
  hebe top --once
  hebe top --json";

/// Examples of `dashboard`.
pub const DASHBOARD_HELP: &str = "\
It listens on 127.0.0.1 alone. The address that it prints lets one browser in, once: whoever
opens it first can do what hebed's socket allows, also reboot the host.

Examples:
  hebe dashboard
  hebe dashboard --port 8080           # for ssh -L 8080:127.0.0.1:8080 HOST";

/// Flags of `logs`.
#[derive(Debug, Args)]
pub struct LogsArgs {
    /// The VM; its files are enough.
    pub name: VmName,
    /// What its guest wrote to its console, instead of what its VMM noted.
    #[arg(long)]
    pub console: bool,
    /// Go on with what is added, until Ctrl-C.
    #[arg(long, short)]
    pub follow: bool,
    /// Only so many of the last lines, at most 10000.
    #[arg(long, short = 'n', value_name = "N", value_parser = clap::value_parser!(u64).range(0..=LINES_MAX))]
    pub lines: Option<u64>,
    /// The console's bytes as they are. A guest can steer the terminal with them.
    #[arg(long, requires = "console")]
    pub raw: bool,
}

/// Flags of `top`.
#[derive(Clone, Copy, Debug, Args)]
pub struct TopArgs {
    /// Print it once, and end.
    #[arg(long)]
    pub once: bool,
}

/// Flags of `dashboard`.
#[derive(Debug, Args)]
pub struct DashboardArgs {
    /// The port on 127.0.0.1; 0 is any that is free.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub port: u16,
    /// Where hebed listens [default: hebed.sock in HEBE_RUN_DIR].
    #[arg(long, value_name = "PATH")]
    pub socket: Option<PathBuf>,
}
