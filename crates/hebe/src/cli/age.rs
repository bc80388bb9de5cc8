//! Flags of `host age`.

use std::path::PathBuf;

use clap::Args;
use hebe_policy::ageing::Period;

/// What `host age` says at its end.
pub const AGE_HELP: &str = "\
Exit status 3: the host is ageing.

Examples:
  hebe host age
  hebe host age --period 1w
  hebe host age --period none      # a short test: load does not repeat itself
  hebe host age --svg age.svg      # all samples, with the reboots between them";

/// Flags of `host age`.
#[derive(Debug, Args)]
pub struct AgeArgs {
    /// After which time load repeats itself, or 'none'.
    #[arg(long, value_name = "SPAN", default_value = "1d")]
    pub period: Period,
    /// How often a host without a trend may be called ageing, per look.
    #[arg(long, default_value_t = 0.05)]
    pub error_rate: f64,
    /// Of the intervals.
    #[arg(long, default_value_t = 0.95)]
    pub confidence: f64,
    /// Write a chart of all samples into this file, those of earlier boots too.
    #[arg(long, value_name = "FILE")]
    pub svg: Option<PathBuf>,
}
