//! Commands and flags of `fleet`.

use std::path::PathBuf;

use clap::{Args, Subcommand};

/// What `fleet roll` says at its end.
pub const ROLL_HELP: &str = "\
An inventory:
  group = \"rack1\"
  at_most = 2                  # hosts under way at once          [1]
  give_up_after = \"15min\"      # then a host counts as lost       [15min]
  expected = \"60s\"             # from the order to the last VM's answer
  order = \"smallest-first\"     # or \"listed\"                      [listed]
  [[host]]
  name = \"a\"
  capacity = 11                # in any unit                      [1]
  expected = \"90s\"             # where it differs

Example:
  hebe fleet roll --dry-run fleet.toml";

/// What to do with a group of hosts.
#[derive(Debug, Subcommand)]
pub enum FleetCommand {
    /// What a roll through the hosts would be; the roll itself is not there yet.
    #[command(after_help = ROLL_HELP)]
    Roll(RollArgs),
}

/// Flags of `fleet roll`.
#[derive(Debug, Args)]
pub struct RollArgs {
    /// The hosts, in TOML.
    pub inventory: PathBuf,
    /// Say the order, the duration and the capacity at each moment.
    #[arg(long, required = true)]
    pub dry_run: bool,
}
