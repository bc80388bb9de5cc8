//! Commands and flags of `fleet`.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use hebe_policy::fleet::slots::FleetName;
use hebe_policy::span::Span;

/// What `fleet roll` says at its end.
pub const ROLL_HELP: &str = "\
Hosts take their turns by themselves: where hebed runs and policy.toml has
  [[rule]]
  when = \"roll\"
and by hand with `hebe reboot --roll`. The roll lies in etcd, so that any host of
the group can look at it and stop it.

An inventory:
  group = \"rack1\"
  at_most = 2                  # hosts under way at once          [1]
  give_up_after = \"15min\"      # then a host counts as lost       [15min]
  expected = \"60s\"             # from the order to the last VM's answer
  order = \"smallest-first\"     # or \"listed\"                      [listed]
  [reboot]
  kernel = \"/boot/vmlinuz-7.3.0\"         # on each host     [the running one]
  initrd = \"/boot/initrd.img-7.3.0\"      # [the one that belongs to the kernel]
  method = \"warm\"            # or \"saved\", \"cold\"                [warm]
  only_if = \"/run/reboot-required\"       # pass over hosts without this file
  [[host]]
  name = \"a\"
  capacity = 11                # in any unit                      [1]
  expected = \"90s\"             # where it differs

Exit status 3: a host failed, refused or is not back, or the roll was aborted.

Examples:
  hebe fleet roll --dry-run rack1.toml
  hebe fleet roll --wait rack1.toml
  hebe fleet roll status --wait
  hebe fleet roll pause";

/// What `fleet status` says at its end.
const STATUS_HELP: &str = "\
Exit status 3: a host did not come back, and no host of the group begins.

fleet.toml in the configuration directory says who keeps the slots:
  group = \"rack1\"
  at_most = 1                  # hosts under way at once          [1]
  host = \"node7\"               # this one                         [the machine's name]
  give_up_after = \"15min\"      # then it counts as not back       [15min]
  patience = \"1h\"              # how long a slot is waited for    [1h]
  always = false               # `hebe reboot` without --fleet, too
  [etcd]
  endpoints = [\"http://10.0.0.1:2379\"]
  # or
  [fleetlock]
  url = \"http://10.0.0.1:3333\"

Examples:
  hebe fleet status
  hebe fleet status --json";

/// What to do with a group of hosts.
#[derive(Debug, Subcommand)]
pub enum FleetCommand {
    /// Who of the group is under way, and whether somebody did not come back.
    #[command(after_help = STATUS_HELP)]
    Status,
    /// Take a slot for this host and keep it, for something else than `hebe reboot`.
    #[command(after_help = "\
The slot stays, also over a reboot, until `hebe fleet release`.

Examples:
  hebe fleet lock
  hebe fleet lock --wait 10min")]
    Lock {
        /// How long to wait for one [default: `patience` in fleet.toml].
        #[arg(long, value_name = "TIME")]
        wait: Option<Span>,
    },
    /// Give this host's slot back, once every VM answers if it was rebooted.
    #[command(after_help = "\
Exit status 5: a VM does not answer, and the slot is kept.

Examples:
  hebe fleet release
  hebe fleet release --wait 10min")]
    Release {
        /// How long to wait for VMs [default: until the host counts as not back].
        #[arg(long, value_name = "TIME")]
        wait: Option<Span>,
    },
    /// Free the slot of a host that cannot do so itself.
    #[command(after_help = "Example:\n  hebe fleet unlock node7 --yes")]
    Unlock {
        /// The host.
        host: FleetName,
        /// Yes: it is known how that host is, and the others may go on.
        #[arg(long)]
        yes: bool,
    },
    /// Take all hosts of the group through a reboot, one after the other.
    #[command(
        after_help = ROLL_HELP,
        args_conflicts_with_subcommands = true,
        subcommand_negates_reqs = true
    )]
    Roll(RollArgs),
}

/// Flags of `fleet roll`.
#[derive(Debug, Args)]
pub struct RollArgs {
    /// The hosts, in TOML.
    #[arg(required = true)]
    pub inventory: Option<PathBuf>,
    /// Say the order, the duration and the capacity at each moment, and stop there.
    #[arg(long)]
    pub dry_run: bool,
    /// Stay until the roll is over or stops, and say what happens.
    #[arg(long, conflicts_with = "dry_run")]
    pub wait: bool,
    /// What to do with the roll that was begun.
    #[command(subcommand)]
    pub order: Option<RollOrder>,
}

/// What to do with a roll that was begun, by whomever.
#[derive(Debug, Subcommand)]
pub enum RollOrder {
    /// How far it is.
    #[command(after_help = "\
Exit status 3: it stopped or was aborted, or a host refused or failed.

Examples:
  hebe fleet roll status
  hebe fleet roll status --wait")]
    Status {
        /// Stay until it is over or stops, and say what happens.
        #[arg(long)]
        wait: bool,
    },
    /// Let no further host begin; those under way go on. Once this comes back, none does.
    #[command(after_help = "Example:\n  hebe fleet roll pause")]
    Pause,
    /// Let it go on, after it was paused or stopped.
    #[command(after_help = "Example:\n  hebe fleet roll continue")]
    Continue,
    /// Let no further host begin, ever; those under way go on.
    #[command(after_help = "Example:\n  hebe fleet roll abort")]
    Abort,
    /// Do not wait for this host.
    #[command(after_help = "Example:\n  hebe fleet roll skip node7")]
    Skip {
        /// The host.
        host: FleetName,
    },
    /// Let this host have its turn once more.
    #[command(after_help = "Example:\n  hebe fleet roll retry node7")]
    Retry {
        /// The host.
        host: FleetName,
    },
}
