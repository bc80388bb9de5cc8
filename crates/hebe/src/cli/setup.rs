//! Flags of `host setup`.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use hebe_types::ByteSize;

/// What `hebe host setup --help` shows below the flags.
pub const SETUP_HELP: &str = "\
Exit status 3: nobody agreed; nothing was changed.

Examples:
  hebe host setup --dry-run
  hebe host setup --size 16GiB
  hebe host setup --store luo --yes
  hebe host setup --undo";

/// Flags of `host setup`.
#[derive(Debug, Args)]
pub struct SetupArgs {
    /// How much memory to reserve for VMs, at the top of the machine's [default: half].
    #[arg(long)]
    pub size: Option<ByteSize>,
    /// What carries VMs over a reboot [default: what was chosen before, else devdax].
    #[arg(long, value_enum)]
    pub store: Option<SetupStore>,
    /// Take back what this command wrote.
    #[arg(long, conflicts_with_all = ["size", "store"])]
    pub undo: bool,
    /// Show what would change, and stop there.
    #[arg(long, conflicts_with = "yes")]
    pub dry_run: bool,
    /// Do it without asking.
    #[arg(long)]
    pub yes: bool,
    /// Where the root file system is.
    #[arg(long, value_name = "DIR", default_value = "/", hide = true)]
    pub root: PathBuf,
}

/// A store that needs something of the boot loader.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum SetupStore {
    /// A reserved range.
    Devdax,
    /// Linux's Live Update Orchestrator.
    Luo,
}
