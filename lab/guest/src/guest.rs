//! The guest role.

use anyhow::Result;

/// Runs the guest.
pub fn run() -> Result<()> {
    Ok(())
}
