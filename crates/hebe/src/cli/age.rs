//! Flags of `host age`.

use std::str::FromStr;

use clap::Args;
use hebe_policy::span::{InvalidSpan, Span};

/// What `host age` says at its end.
pub const AGE_HELP: &str = "\
Exit status 3: the host is ageing.

Examples:
  hebe host age
  hebe host age --period 1w
  hebe host age --period none      # a short test: load does not repeat itself";

/// A period, or none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Period(pub Option<Span>);

impl FromStr for Period {
    type Err = InvalidSpan;

    fn from_str(text: &str) -> Result<Self, InvalidSpan> {
        if text == "none" {
            return Ok(Self(None));
        }
        text.parse().map(|span| Self(Some(span)))
    }
}

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
}
