//! Flags of `balloon`.

use clap::Args;
use hebe_types::{ByteSize, VmName};

/// Flags of `balloon`.
#[derive(Debug, Args)]
pub struct BalloonArgs {
    /// The VM.
    pub name: VmName,
    /// Leave its guest with so much RAM: it gives the rest back, as far as it can.
    #[arg(long, value_name = "SIZE")]
    pub target: Option<ByteSize>,
}
