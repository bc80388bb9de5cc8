//! Looks at VMs and host for `top`; changes nothing of them.

use std::collections::BTreeMap;
use std::fs;
use std::time::{Duration, Instant};

use hebe_host::Host;
use hebe_host::ageing::{path_below, read};
use hebe_host::listing::{self, VmRow, with_cause};
use hebe_host::report::complete_report;
use hebe_policy::ageing::{Look, LookError, Trend, assess};
use hebe_types::VmName;

use super::frame::{Age, HostLook, Part, Snapshot, VmLook};

/// How old a verdict on the host's age and a report may be: samples come every
/// ten minutes, and a reboot ends this program.
const SLOW_EVERY: Duration = Duration::from_secs(60);

/// Looks again and again.
pub struct Looker<'a> {
    host: &'a Host,
    /// What each VMM had taken when it was last looked at, by process.
    taken: BTreeMap<u32, (Instant, u64)>,
    /// What changes slowly, and when it was looked at.
    slow: Option<(Instant, Age, BTreeMap<VmName, f64>)>,
}

impl<'a> Looker<'a> {
    /// Has seen nothing yet: the first look knows of no share of a processor.
    pub fn new(host: &'a Host) -> Self {
        Self {
            host,
            taken: BTreeMap::new(),
            slow: None,
        }
    }

    /// How everything is now.
    pub fn look(&mut self) -> Snapshot {
        let survey = listing::survey(self.host);
        let (age, downtimes) = self.slow();
        let mut taken = BTreeMap::new();
        let vms = survey.rows.values().map(|row| {
            let cpu_percent = row.pid.and_then(|pid| {
                let now = (Instant::now(), cpu_ticks(pid)?);
                taken.insert(pid, now);
                share(*self.taken.get(&pid)?, now)
            });
            VmLook {
                cpu_percent,
                downtime_ms: downtimes.get(&row.name).copied(),
                ..of_row(row)
            }
        });
        let vms = vms.collect();
        self.taken = taken;
        let store = survey.store.as_ref().filter(|s| !s.kept_only);
        Snapshot {
            host: HostLook {
                kernel: self.host.system.release(),
                up_s: hebe_sys::proc::since_boot_ns() as f64 / 1e9,
                age,
                memory: memory(&fs::read_to_string("/proc/meminfo").unwrap_or_default()),
                store: store.map(|s| Part {
                    part: s.capacity.0.saturating_sub(s.free.0),
                    whole: s.capacity.0,
                }),
                store_trouble: survey.store_trouble.clone(),
            },
            vms,
        }
    }

    fn slow(&mut self) -> (Age, BTreeMap<VmName, f64>) {
        let fresh = |at: &Instant| at.elapsed() < SLOW_EVERY;
        match &self.slow {
            Some((at, age, downtimes)) if fresh(at) => (age.clone(), downtimes.clone()),
            _ => {
                let (age, downtimes) = (age(self.host), downtimes(self.host));
                self.slow = Some((Instant::now(), age.clone(), downtimes.clone()));
                (age, downtimes)
            }
        }
    }
}

fn of_row(row: &VmRow) -> VmLook {
    VmLook {
        name: row.name.clone(),
        state: row.state.as_str(),
        detail: row.detail.clone(),
        cpu_percent: None,
        memory: row.memory,
        store: row.store,
        downtime_ms: None,
    }
}

fn downtimes(host: &Host) -> BTreeMap<VmName, f64> {
    let report = complete_report(host).ok().flatten();
    let all = report.map(|report| report.downtimes()).unwrap_or_default();
    let known = |d: hebe_host::timeline::Downtime| Some((d.vm, d.stopped_ms?));
    all.into_iter().filter_map(known).collect()
}

fn age(host: &Host) -> Age {
    let unknown = |error: &dyn std::error::Error| Age::Unknown {
        reason: with_cause(error),
    };
    let samples = match read(&path_below(&host.layout.state)) {
        Ok(samples) => samples,
        Err(error) => return unknown(&error),
    };
    let look = Look {
        period: "1d".parse().ok(),
        error_rate: 0.05,
        confidence: 0.95,
    };
    match assess(&samples, host.system.boot_id(), look) {
        Err(LookError::NoSamples) => Age::NoSamples,
        Err(error) => unknown(&error),
        Ok(assessment) => {
            let early = |trend: &Trend| matches!(trend, Trend::TooShort { .. });
            match assessment.soonest() {
                Some((indicator, exhausted_in_s)) => Age::Ageing {
                    indicator: indicator.name(),
                    exhausted_in_s,
                },
                None if assessment.findings.iter().all(|f| early(&f.trend)) => Age::TooEarly,
                None => Age::None,
            }
        }
    }
}

/// What a process has taken of processors so far, in clock ticks.
fn cpu_ticks(pid: u32) -> Option<u64> {
    ticks(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

/// Fields 14 and 15 of proc_pid_stat(5); the name before may hold anything.
fn ticks(stat: &str) -> Option<u64> {
    let (_, behind) = stat.rsplit_once(')')?;
    let mut words = behind.split_whitespace().skip(11);
    let mut number = || words.next()?.parse::<u64>().ok();
    number()?.checked_add(number()?)
}

/// Of one processor between two looks, in per cent.
fn share(before: (Instant, u64), now: (Instant, u64)) -> Option<f64> {
    let ticks = now.1.checked_sub(before.1)?;
    let seconds = now.0.duration_since(before.0).as_secs_f64();
    let a_second = rustix::param::clock_ticks_per_second() as f64;
    (seconds > 0.0).then(|| ticks as f64 / a_second / seconds * 100.0)
}

fn memory(meminfo: &str) -> Option<Part> {
    let bytes = |key: &str| {
        let line = meminfo.lines().find_map(|line| line.strip_prefix(key))?;
        let kib: u64 = line.split_whitespace().next()?.parse().ok()?;
        kib.checked_mul(1024)
    };
    Some(Part {
        part: bytes("MemAvailable:")?,
        whole: bytes("MemTotal:")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_share_of_a_processor_is_that_between_two_looks() {
        let stat = "7 (a) b) 1) R 1 7 7 0 -1 4194304 100 0 0 0 250 50 0 0 20 0 1 0 5 1 1\n";
        assert_eq!(ticks(stat), Some(300));
        assert_eq!(ticks("7 (x"), None);
        let begin = Instant::now();
        let a_second = rustix::param::clock_ticks_per_second();
        let after = |ticks| (begin + Duration::from_secs(2), ticks);
        assert_eq!(share((begin, 10), after(10 + a_second)), Some(50.0));
        // Another process by the same number.
        assert_eq!(share((begin, 10), after(9)), None);
        assert_eq!(share((begin, 10), (begin, 11)), None);
        assert!(cpu_ticks(std::process::id()).is_some());
    }

    #[test]
    fn memory_is_what_the_kernel_says() {
        let text = "MemTotal:  2048 kB\nMemFree: 1 kB\nMemAvailable:   1024 kB\n";
        let part = Part {
            part: 1 << 20,
            whole: 2 << 20,
        };
        assert_eq!(memory(text), Some(part));
        assert_eq!(memory("MemTotal:  2048 kB\n"), None);
    }
}
