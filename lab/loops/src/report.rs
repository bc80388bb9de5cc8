//! What a run found, with raw samples.

use std::time::Duration;

use serde::{Serialize, Serializer};

use crate::environment::Environment;
use crate::guest::Counters;

/// Durations in microseconds, all of them kept.
#[derive(Clone, Debug, Default)]
pub struct Samples(Vec<u64>);

impl Samples {
    /// Adds one.
    pub fn push(&mut self, duration: Duration) {
        self.0.push(duration.as_micros() as u64);
    }

    /// Smallest, median and largest; zeros when there are none.
    pub fn spread_us(&self) -> (u64, u64, u64) {
        let mut sorted = self.0.clone();
        sorted.sort_unstable();
        match sorted.as_slice() {
            [] => (0, 0, 0),
            all => (all[0], all[all.len() / 2], all[all.len() - 1]),
        }
    }
}

impl Serialize for Samples {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Shown<'a> {
            min_us: u64,
            median_us: u64,
            max_us: u64,
            raw_us: &'a [u64],
        }
        let (min_us, median_us, max_us) = self.spread_us();
        Shown {
            min_us,
            median_us,
            max_us,
            raw_us: &self.0,
        }
        .serialize(serializer)
    }
}

/// A whole run.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Where it took place.
    pub environment: Environment,
    /// Repeats the run's random numbers.
    pub seed: u64,
    /// vCPUs.
    pub vcpus: u8,
    /// Guest RAM in bytes.
    pub memory_bytes: u64,
    /// Suspends and resumes wanted.
    pub loops_wanted: u32,
    /// Suspends and resumes done, each with a fresh VM.
    pub loops_done: u32,
    /// Pauses undone in place.
    pub pauses: u32,
    /// Freezes undone in place.
    pub thaws: u32,
    /// AVX registers were part of the test.
    pub avx: bool,
    /// The TSC was checked between vCPUs, and against the timer.
    pub tsc_checked: bool,
    /// How each vCPU's timer worked: TSC deadline, or one-shot count.
    pub deadline_timers: Vec<bool>,
    /// Largest execution state.
    pub state_bytes_max: u64,
    /// From the request to the commit.
    pub freeze: Samples,
    /// Of that, until all vCPUs were out of the guest.
    pub stop: Samples,
    /// From reading the state to the first entry into the guest.
    pub resume: Samples,
    /// From there until every vCPU had made progress of every kind.
    pub progress: Samples,
    /// Counters at the end.
    pub counters: Vec<Counters>,
    /// Wall time of the run.
    pub took_s: f64,
    /// What went wrong; the run ended there.
    pub error: Option<String>,
}

impl Report {
    /// A few lines for people.
    pub fn summary(&self) -> String {
        let spread = |samples: &Samples| {
            let (min, median, max) = samples.spread_us();
            format!("{min} / {median} / {max} µs")
        };
        let sum = |field: fn(&Counters) -> u64| self.counters.iter().map(field).sum::<u64>();
        let deadline = self.deadline_timers.iter().filter(|d| **d).count();
        format!(
            "{} of {} suspend/resume loops, {} pauses and {} thaws in place, {} vCPUs, seed {:#x}, {:.1} s\n\
             on {} ({:?}, {}), kernel {}\n\
             tested: x87, SSE{}; TSC {}; {} TSC-deadline and {} one-shot timers; {} passes, {} ticks, \
             {} IPIs, {} serial interrupts, {} I/O rounds, {} halts, {} pages verified\n\
             freeze (min / median / max): {}, of it stopping vCPUs: {}\n\
             resume: {}; until all made progress: {}; state {} bytes",
            self.loops_done,
            self.loops_wanted,
            self.pauses,
            self.thaws,
            self.vcpus,
            self.seed,
            self.took_s,
            self.environment.processor,
            self.environment.kind,
            self.environment.modules.join(", "),
            self.environment.kernel,
            if self.avx {
                ", AVX"
            } else {
                " (no AVX here: not tested)"
            },
            if self.tsc_checked {
                "never back on and between vCPUs, timers not early"
            } else {
                "never back on a vCPU (between vCPUs not tested: this host's is not synchronous)"
            },
            deadline,
            self.deadline_timers.len() - deadline,
            sum(|c| c.passes),
            sum(|c| c.ticks),
            sum(|c| c.ipis_in),
            sum(|c| c.serial_irqs),
            sum(|c| c.ios),
            sum(|c| c.halts),
            sum(|c| c.work_pages),
            spread(&self.freeze),
            spread(&self.stop),
            spread(&self.resume),
            spread(&self.progress),
            self.state_bytes_max,
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spread_is_of_sorted_samples() {
        let mut samples = Samples::default();
        assert_eq!(samples.spread_us(), (0, 0, 0));
        for ms in [5, 1, 9] {
            samples.push(Duration::from_millis(ms));
        }
        assert_eq!(samples.spread_us(), (1000, 5000, 9000));
    }
}
