//! What a guest's cloud-init is told.

use std::path::PathBuf;

use clap::Args;

/// Flags of `run` for guests with cloud-init. Any of them adds a read-only disk
/// for its "NoCloud" data source behind the other disks.
#[derive(Debug, Default, Args)]
pub struct SeedArgs {
    /// What the guest's cloud-init does at its first boot.
    #[arg(long, value_name = "FILE", requires = "name")]
    pub user_data: Option<PathBuf>,
    /// The guest's host name, by cloud-init  [the VM's name, if cloud-init is told anything].
    #[arg(long, requires = "name")]
    pub hostname: Option<String>,
    /// Public keys that may log in, by cloud-init; may be given again.
    #[arg(long, value_name = "FILE", requires = "name")]
    pub ssh_key: Vec<PathBuf>,
}
