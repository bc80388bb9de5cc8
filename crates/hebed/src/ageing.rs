//! Looks at the samples of the host whenever there is a new one, whoever took
//! it, and tells when the host begins to age.
//!
//! ```text
//!            an indicator tends to its limit           ┌──────┐ another one is
//!  silent ──────────────────────────────────► alerted ─┤      │ first, or half of
//!    ▲                                           │     └──────┘ the time is gone:
//!    └───────────────────────────────────────────┘              alerted again
//!              none does any more: said once
//! ```

use std::time::SystemTime;

use hebe_host::Host;
use hebe_host::ageing::{path_below, read};
use hebe_policy::ageing::words::alert_with_reason;
use hebe_policy::ageing::{Assessment, Indicator, Look, Trend, assess};

/// What is known of the host's ageing.
#[derive(Debug, Default)]
pub struct Monitor {
    /// The samples that were assessed, by when their file was changed, and how.
    seen: Option<(SystemTime, Look)>,
    found: Option<Found>,
    /// What was said last: which is exhausted first, and in how many seconds.
    said: Option<(Indicator, f64)>,
}

#[derive(Debug)]
struct Found {
    assessment: Assessment,
    /// Uptime at the last sample, in seconds.
    up_s: f64,
}

/// Something to be told.
#[derive(Clone, Debug, PartialEq)]
pub struct News {
    /// One sentence with its reason.
    pub text: String,
    /// Somebody should look.
    pub trouble: bool,
}

impl Monitor {
    /// Takes a look, if there is a new sample; says what is to be told. Without
    /// a sample of the running boot there is nothing to find: what the last boot
    /// suffered from was cured by its end.
    #[must_use]
    pub fn look(mut self, host: &Host, look: Look) -> (Self, Option<News>) {
        let path = path_below(&host.layout.state);
        let changed = path.metadata().and_then(|meta| meta.modified()).ok();
        let now = changed.map(|at| (at, look));
        if now == self.seen {
            return (self, None);
        }
        self.seen = now;
        let boot = host.system.boot_id();
        let samples = read(&path).unwrap_or_default();
        let last = samples.iter().rev().find(|s| s.boot == boot);
        let assessment = assess(&samples, boot, look).ok();
        self.found = assessment.zip(last).map(|(assessment, last)| Found {
            assessment,
            up_s: last.up_s,
        });
        let news = self.news();
        (self, news)
    }

    fn news(&mut self) -> Option<News> {
        let found = self.found.as_ref();
        let soonest = found.and_then(|f| f.assessment.soonest());
        let Some((indicator, in_s)) = soonest else {
            self.said.take()?;
            return Some(News {
                text: "no indicator of the host tends to its limit any more".to_owned(),
                trouble: false,
            });
        };
        let old = |(said, said_s): (Indicator, f64)| said == indicator && in_s > said_s / 2.0;
        if self.said.is_some_and(old) {
            return None;
        }
        self.said = soonest;
        let text = found.and_then(|f| alert_with_reason(&f.assessment))?;
        Some(News {
            text,
            trouble: true,
        })
    }

    /// In how many seconds the host is exhausted, as seen `up_s` seconds after
    /// its boot.
    pub fn exhausted_in_s(&self, up_s: f64) -> Option<f64> {
        let found = self.found.as_ref()?;
        let (_, in_s) = found.assessment.soonest()?;
        Some(in_s - (up_s - found.up_s).max(0.0))
    }

    /// Every indicator that tends to its limit, and in how many seconds after
    /// the last sample it reaches it.
    pub fn exhaustions(&self) -> Vec<(Indicator, f64)> {
        let findings = self.found.iter().flat_map(|f| &f.assessment.findings);
        let ageing = findings.filter_map(|finding| match finding.trend {
            Trend::Ageing { exhausted_in_s, .. } => Some((finding.indicator, exhausted_in_s)),
            _ => None,
        });
        ageing.collect()
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use hebe_host::ageing::SampleStore;
    use hebe_host::host::Layout;
    use hebe_policy::ageing::{Reading, Sample};

    use super::*;

    fn host(dir: &Path) -> Host {
        let mut host = Host::here();
        host.layout = Layout::below(dir);
        host
    }

    const PLAIN: Look = Look {
        period: None,
        error_rate: 0.05,
        confidence: 0.95,
    };

    /// A minute of samples, one a second; memory falls by so many bytes in each.
    fn minute(boot: [u8; 16], from_s: u32, memory: f64, fall: f64) -> Vec<Sample> {
        let one = |i: u32| {
            let mut readings = [None; Indicator::ALL.len()];
            readings[0] = Some(Reading {
                value: memory - fall * f64::from(i),
                limit: 0.0,
            });
            Sample {
                boot,
                up_s: f64::from(from_s + i),
                at_s: f64::from(from_s + i),
                readings,
            }
        };
        (0..60).map(one).collect()
    }

    fn add(host: &Host, samples: &[Sample]) {
        let path = path_below(&host.layout.state);
        let mut store = SampleStore::open(&path, 1_000).expect("store");
        samples
            .iter()
            .for_each(|s| store.append(s).expect("sample"));
        // Two writes may come within one tick of the file system's clock.
        let file = std::fs::File::options().append(true).open(&path);
        let later = SystemTime::now() + std::time::Duration::from_secs(samples[0].up_s as u64);
        file.and_then(|f| f.set_modified(later)).expect("touch");
    }

    #[test]
    fn a_leak_is_told_once_with_its_reason_and_again_when_it_is_near() {
        let dir = tempfile::tempdir().expect("folder");
        let host = host(dir.path());
        let boot = host.system.boot_id();
        let (monitor, news) = Monitor::default().look(&host, PLAIN);
        assert_eq!((news, monitor.exhausted_in_s(0.0)), (None, None));
        add(&host, &minute(boot, 100, 1e6, 1e3));
        let (monitor, news) = monitor.look(&host, PLAIN);
        let news = news.expect("told");
        for word in [
            "available memory",
            "exhausted first, in 16 min",
            "a day",
            "limit 0 B",
        ] {
            assert!(news.text.contains(word), "{word}: {}", news.text);
        }
        assert!(news.trouble);
        // 941 s from the last sample, at 159 s.
        let left = monitor.exhausted_in_s(159.0).expect("known");
        assert!((left - 941.0).abs() < 1.0, "{left}");
        let later = monitor.exhausted_in_s(259.0).expect("known");
        assert!((left - later - 100.0).abs() < 1e-6, "{later}");
        assert_eq!(monitor.exhaustions().len(), 1);
        let (monitor, news) = monitor.look(&host, PLAIN);
        assert_eq!(news, None, "no new sample");
        add(&host, &minute(boot, 160, 94e4, 1e3));
        let (monitor, news) = monitor.look(&host, PLAIN);
        assert_eq!(news, None, "it was told");
        add(&host, &minute(boot, 700, 4e5, 1e3));
        let (_, news) = monitor.look(&host, PLAIN);
        assert!(news.is_some_and(|n| n.trouble), "half of the time is gone");
    }

    #[test]
    fn the_leak_of_the_boot_before_is_not_this_boots() {
        let dir = tempfile::tempdir().expect("folder");
        let host = host(dir.path());
        add(&host, &minute([7; 16], 100, 1e6, 1e3));
        let (monitor, news) = Monitor::default().look(&host, PLAIN);
        assert_eq!((news, monitor.exhausted_in_s(200.0)), (None, None));
        add(&host, &minute(host.system.boot_id(), 10, 1e6, 0.0));
        let (monitor, news) = monitor.look(&host, PLAIN);
        assert_eq!((news, monitor.exhausted_in_s(200.0)), (None, None));
    }

    #[test]
    fn that_it_is_over_is_said_once_and_how_to_look_may_change() {
        let dir = tempfile::tempdir().expect("folder");
        let host = host(dir.path());
        add(&host, &minute(host.system.boot_id(), 100, 1e6, 1e3));
        let (monitor, news) = Monitor::default().look(&host, PLAIN);
        assert!(news.is_some());
        // A minute says nothing to a look that compares days.
        let (monitor, news) = monitor.look(&host, Look::default());
        assert!(news.is_some_and(|n| !n.trouble));
        let (monitor, news) = monitor.look(&host, Look::default());
        assert_eq!((news, monitor.exhausted_in_s(160.0)), (None, None));
        let (_, news) = monitor.look(&host, PLAIN);
        assert!(news.is_some_and(|n| n.trouble));
    }
}
