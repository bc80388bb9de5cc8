//! Guest clocks over a pause.
//!
//! Guests see the pause as time that went by (the semantics of migration, not
//! of S3): their wall clock is right at once and their monotonic clock jumps
//! forward, never back. Two clocks must agree on the length of the pause: the
//! TSC and kvmclock. [`ClockPlan`] settles it once for all vCPUs.

use hebe_state::v1::machine::ClockV1;

/// How the clocks go on after a resume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClockPlan {
    /// kvmclock at the instant for which the plan was made.
    pub kvmclock_ns: u64,
    /// What to add to each vCPU's saved TSC offset, modulo 2^64.
    pub tsc_offset_delta: u64,
    /// The pause, in nanoseconds.
    pub pause_ns: u64,
    /// The host's TSC went on through the pause (kexec), so that it measured it.
    pub tsc_continued: bool,
}

/// Two measures of a pause may differ by this much before the TSC's is taken
/// for another clock's: the wall clock of a fresh kernel comes from an RTC of
/// one second's grain, and calibrations differ by some 100 ppm.
const DISAGREEMENT_NS_MAX: u64 = 3_000_000_000;

impl ClockPlan {
    /// Decides from the clocks at suspend and now.
    ///
    /// kexec does not reset the TSC: when it went on, by about as much as the
    /// wall clock did, it is the better measure, and the guests' TSC offsets
    /// stay as they were. A hardware reset sets it to zero (or it is another
    /// machine's): then the wall clock measures the pause and the offsets are
    /// moved so that guest TSCs go on from where they were.
    pub fn new(saved: &ClockV1, now_tsc: u64, now_realtime_ns: u64) -> Self {
        let wall_ns = now_realtime_ns.saturating_sub(saved.realtime_ns);
        let ticks_ns = now_tsc
            .checked_sub(saved.host_tsc)
            .filter(|_| saved.host_tsc_khz > 0)
            .and_then(|ticks| ticks_to_ns(ticks, saved.host_tsc_khz));
        let tolerance_ns = DISAGREEMENT_NS_MAX + wall_ns / 1000;
        match ticks_ns.filter(|ns| ns.abs_diff(wall_ns) <= tolerance_ns) {
            Some(pause_ns) => Self {
                kvmclock_ns: saved.kvmclock_ns.saturating_add(pause_ns),
                tsc_offset_delta: 0,
                pause_ns,
                tsc_continued: true,
            },
            None => {
                let ticks = ns_to_ticks(wall_ns, saved.host_tsc_khz);
                let expected_tsc = saved.host_tsc.wrapping_add(ticks);
                Self {
                    kvmclock_ns: saved.kvmclock_ns.saturating_add(wall_ns),
                    tsc_offset_delta: expected_tsc.wrapping_sub(now_tsc),
                    pause_ns: wall_ns,
                    tsc_continued: false,
                }
            }
        }
    }
}

fn ticks_to_ns(ticks: u64, khz: u32) -> Option<u64> {
    u64::try_from(u128::from(ticks) * 1_000_000 / u128::from(khz)).ok()
}

fn ns_to_ticks(ns: u64, khz: u32) -> u64 {
    (u128::from(ns) * u128::from(khz) / 1_000_000) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAVED: ClockV1 = ClockV1 {
        kvmclock_ns: 5_000_000_000,
        realtime_ns: 1_700_000_000_000_000_000,
        host_tsc: 40_000_000_000,
        host_tsc_khz: 2_000_000,
    };

    #[test]
    fn after_kexec_the_tsc_measures_the_pause() {
        // 4 s by the TSC; the wall clock lost most of a second.
        let plan = ClockPlan::new(
            &SAVED,
            SAVED.host_tsc + 8_000_000_000,
            SAVED.realtime_ns + 3_100_000_000,
        );
        assert!(plan.tsc_continued);
        assert_eq!(plan.tsc_offset_delta, 0);
        assert_eq!(plan.kvmclock_ns, 9_000_000_000);
    }

    #[test]
    fn after_a_reset_the_wall_clock_measures_it_and_guest_tscs_go_on() {
        let plan = ClockPlan::new(&SAVED, 1_000_000, SAVED.realtime_ns + 60_000_000_000);
        assert!(!plan.tsc_continued);
        assert_eq!(plan.pause_ns, 60_000_000_000);
        // Guest TSC = host TSC + offset: with an offset of 0 it must be 60 s further on.
        let guest_tsc = 1_000_000u64.wrapping_add(plan.tsc_offset_delta);
        assert_eq!(guest_tsc, SAVED.host_tsc + 120_000_000_000);
    }

    #[test]
    fn a_tsc_that_ran_on_elsewhere_is_not_believed() {
        // A longer-running machine: its TSC is far ahead.
        let plan = ClockPlan::new(
            &SAVED,
            SAVED.host_tsc + (1 << 50),
            SAVED.realtime_ns + 1_000_000_000,
        );
        assert!(!plan.tsc_continued);
        assert_eq!(plan.kvmclock_ns, 6_000_000_000);
    }

    #[test]
    fn clocks_never_go_back_even_if_the_wall_clock_did() {
        let plan = ClockPlan::new(&SAVED, 5, SAVED.realtime_ns - 10_000_000_000);
        assert_eq!(plan.kvmclock_ns, SAVED.kvmclock_ns);
        assert_eq!(5u64.wrapping_add(plan.tsc_offset_delta), SAVED.host_tsc);
    }
}
