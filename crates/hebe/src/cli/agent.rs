//! Flags of `agent`.

use clap::{Args, Subcommand};
use hebe_types::VmName;

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
#[derive(Clone, Copy, Debug, Subcommand)]
pub enum AgentOrder {
    /// Is it there, and how is its guest?
    #[command(after_help = "Example:\n  hebe agent web ping")]
    Ping,
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
}
