//! Flags of `agent`.

use clap::{Args, Subcommand};
use hebe_types::VmName;

const WAIT_HELP: &str = "\
A guest that has no agent yet, or none that answers, is waited for, too.

Examples:
  hebe start web && hebe agent web wait
  hebe agent web wait migrated --timeout 600";

/// What can be a phase.
fn phase(text: &str) -> Result<String, String> {
    match hebe_agent::protocol::is_phase(text) {
        true => Ok(text.to_owned()),
        false => Err("a phase is 1 to 64 of a-z, 0-9 and '-'".to_owned()),
    }
}

const EXEC_HELP: &str = "\
The program runs as the agent does, which is root with the bounds of the agent's unit. It
has no input. The first 16 KiB of each of its outputs are shown when it has ended.

Exit status: the program's own; 255 if it did not run, or did not end by itself, with one
sentence on stderr. With --json the program's stands in the answer, too.

Examples:
  hebe agent web exec -- df -h /
  hebe agent web exec --timeout 120 -- apt-get update
  hebe agent web exec -- sh -c 'journalctl -n 20 | grep -i error'
  hebe agent web exec --json -- uname -r";

/// Flags of `agent`.
#[derive(Debug, Args)]
pub struct AgentArgs {
    /// The VM.
    pub name: VmName,
    /// What its agent is to do.
    #[command(subcommand)]
    pub order: AgentOrder,
}

/// What an agent is to do.
#[derive(Clone, Debug, Subcommand)]
pub enum AgentOrder {
    /// Is it there, and how is its guest?
    #[command(after_help = "Example:\n  hebe agent web ping")]
    Ping,
    /// Wait until the guest says that it has come to a phase, and how it is then.
    #[command(after_help = WAIT_HELP)]
    Wait {
        /// The phase: what `hebe-agent phase` is told in the guest.
        #[arg(default_value = "ready", value_parser = phase)]
        phase: String,
        /// How long to wait, in seconds, 1 to 86400.
        #[arg(long, value_name = "SECONDS", default_value_t = 120,
              value_parser = clap::value_parser!(u32).range(1..=86_400))]
        timeout: u32,
    },
    /// Set the guest's clock to the host's.
    #[command(after_help = "Example:\n  hebe agent web time")]
    Time,
    /// Make the guest's file systems consistent on their disks, and keep them so.
    #[command(after_help = "Examples:\n  hebe agent web freeze\n  hebe agent web freeze --for 30")]
    Freeze {
        /// They thaw by themselves after so many seconds, 1 to 60.
        #[arg(long = "for", value_name = "SECONDS", default_value_t = 10,
              value_parser = clap::value_parser!(u32).range(1..=60))]
        seconds: u32,
    },
    /// Let frozen file systems go on.
    #[command(after_help = "Example:\n  hebe agent web thaw")]
    Thaw,
    /// Shut the guest down from inside.
    #[command(
        after_help = "Examples:\n  hebe agent web shutdown\n  hebe agent web shutdown --reboot"
    )]
    Shutdown {
        /// Boot it again.
        #[arg(long)]
        reboot: bool,
    },
    /// Run a program in the guest, if its agent was started with --allow-exec.
    #[command(after_help = EXEC_HELP)]
    Exec {
        /// How long the program may take, in seconds, 1 to 300: then it is killed.
        #[arg(long, value_name = "SECONDS", default_value_t = 60,
              value_parser = clap::value_parser!(u32).range(1..=300))]
        timeout: u32,
        /// The program and its arguments, as they are: no shell looks at them.
        #[arg(required = true, trailing_var_arg = true, value_name = "PROGRAM")]
        words: Vec<String>,
    },
}
