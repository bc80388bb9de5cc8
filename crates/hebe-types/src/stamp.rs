//! Instants that can be compared across a kexec.

use serde::{Deserialize, Serialize};

/// An instant on the machine's one clock that kexec does not reset: the TSC,
/// with the wall clock beside it for people and for machines without a
/// usable TSC.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stamp {
    /// TSC ticks.
    pub tsc: u64,
    /// `CLOCK_REALTIME` in nanoseconds.
    pub realtime_ns: u64,
}
