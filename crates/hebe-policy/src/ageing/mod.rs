//! Is the host ageing, and when is it exhausted?
//!
//! Samples of the running boot are put into bins, each indicator's bins are
//! tested for a trend ([`kendall`]), and a trend towards the limit gives the
//! time until it is reached. The axis is the time since boot, which no setting
//! of a clock moves and no restart of the sampler breaks; a reboot of the host
//! begins anew, because it is what ageing is cured by.
//!
//! Only what gets worse is a finding. The error rate is for a look at the whole
//! host: each of the k indicators known is tested at 1/k of it (Bonferroni).
//! Who looks every hour for a year sees more false alarms than that.

pub mod chart;
pub mod kendall;
pub mod words;

use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize};

use crate::span::{InvalidSpan, Span};
use kendall::{Kendall, Point, median_of_sorted};

/// Seasons that a period is divided into.
const SEASONS: usize = 24;
/// Periods that must have gone by before anything is said.
const PERIODS_MIN: usize = 5;
/// Bins that must be there before anything is said, without a period.
const BINS_MIN: usize = 10;
/// Most bins, without a period: pairs grow with their square.
const BINS_MAX: usize = 400;
/// Most periods that are looked at: the newest.
const PERIODS_MAX: usize = 60;
/// Clock differences that count as a jump, in seconds.
const JUMP_S: f64 = 60.0;

/// What is watched. The order is that of the record in the sample store: new
/// ones are added at the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Indicator {
    /// Memory that programs could still get, in bytes.
    MemoryAvailable,
    /// Kernel memory that cannot be reclaimed, in bytes.
    Slab,
    /// Part of the free memory that is in pieces below 2 MiB, 0 to 1.
    Fragmentation,
    /// Open files of the whole host.
    OpenFiles,
    /// Threads of the whole host.
    Threads,
    /// Swap in use, in bytes.
    Swap,
    /// Resident memory that a VMM has for itself, guest RAM not counted: the mean
    /// over all VMMs, so that starting a VM is no ageing; in bytes.
    VmmMemory,
    /// Resident memory that `hebed` has for itself, in bytes.
    DaemonMemory,
    /// How long a VMM takes to say how it is, in seconds: the mean over all
    /// VMMs. An exit of its guest that the VMM handles waits for the same
    /// processors and the same memory.
    VmmResponse,
    /// How long a disk request of a guest takes, in seconds: of the slowest
    /// disk of each VM, the mean over all VMs.
    DiskRequest,
    /// What lies below the state directory, samples aside, in bytes: what
    /// suspends and resumes leave behind (V-01).
    StateFiles,
}

/// In what an indicator is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// Bytes.
    Bytes,
    /// A part of 1.
    Part,
    /// Seconds.
    Seconds,
    /// So many.
    Count,
}

impl Indicator {
    /// All of them, in the order of the record.
    pub const ALL: [Self; 11] = [
        Self::MemoryAvailable,
        Self::Slab,
        Self::Fragmentation,
        Self::OpenFiles,
        Self::Threads,
        Self::Swap,
        Self::VmmMemory,
        Self::DaemonMemory,
        Self::VmmResponse,
        Self::DiskRequest,
        Self::StateFiles,
    ];

    /// In a reader's words.
    pub fn name(self) -> &'static str {
        match self {
            Self::MemoryAvailable => "available memory",
            Self::Slab => "kernel memory",
            Self::Fragmentation => "fragmentation",
            Self::OpenFiles => "open files",
            Self::Threads => "threads",
            Self::Swap => "swap in use",
            Self::VmmMemory => "VMM memory",
            Self::DaemonMemory => "daemon memory",
            Self::VmmResponse => "VMM response",
            Self::DiskRequest => "disk requests",
            Self::StateFiles => "state files",
        }
    }

    /// Whether a falling value is the bad one.
    pub fn falls(self) -> bool {
        self == Self::MemoryAvailable
    }

    /// In what it is measured.
    pub fn unit(self) -> Unit {
        match self {
            Self::MemoryAvailable
            | Self::Slab
            | Self::Swap
            | Self::VmmMemory
            | Self::DaemonMemory
            | Self::StateFiles => Unit::Bytes,
            Self::Fragmentation => Unit::Part,
            Self::VmmResponse | Self::DiskRequest => Unit::Seconds,
            Self::OpenFiles | Self::Threads => Unit::Count,
        }
    }
}

/// A value, and the one at which the host is exhausted.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Reading {
    /// Now.
    pub value: f64,
    /// At the end.
    pub limit: f64,
}

/// Everything at one instant.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// Which boot of the host.
    pub boot: [u8; 16],
    /// Since that boot, in seconds, time in sleep counted.
    pub up_s: f64,
    /// Wall clock, seconds since 1970: for people only.
    pub at_s: f64,
    /// One for each of [`Indicator::ALL`]; `None` where the host does not tell.
    pub readings: [Option<Reading>; Indicator::ALL.len()],
}

/// After which time load repeats itself, as people write it: a span, or `none`.
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

fn period<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Span>, D::Error> {
    let text = String::deserialize(from)?;
    let period: Result<Period, _> = text.parse();
    period.map(|p| p.0).map_err(serde::de::Error::custom)
}

/// How to look.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Look {
    /// After which time load repeats itself; `None` where it does not.
    #[serde(deserialize_with = "period")]
    pub period: Option<Span>,
    /// How often a host without any trend may be called ageing, per look.
    pub error_rate: f64,
    /// Of the intervals of slope and exhaustion.
    pub confidence: f64,
}

impl Default for Look {
    fn default() -> Self {
        Self {
            period: Some(Span::days(1)),
            error_rate: 0.05,
            confidence: 0.95,
        }
    }
}

/// Why a look says nothing.
#[derive(Clone, Copy, Debug, thiserror::Error, PartialEq)]
pub enum LookError {
    /// Out of range.
    #[error("an error rate of {0} is not between 0 and 1: 0.05 is common")]
    ErrorRate(f64),
    /// Out of range.
    #[error("a confidence of {0} is not between 0 and 1: 0.95 is common")]
    Confidence(f64),
    /// Too short.
    #[error(
        "a period of {0} is too short: it is divided by {SEASONS}, so give 24s or more, or none"
    )]
    Period(Span),
    /// Nothing there.
    #[error("there are no samples: take some with 'hebe host sample', from a timer")]
    NoSamples,
}

/// What becomes of an indicator.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(tag = "trend", rename_all = "kebab-case")]
pub enum Trend {
    /// There is too little to say anything.
    TooShort {
        /// Bins or periods there are.
        have: usize,
        /// Bins or periods that it takes.
        need: usize,
    },
    /// No trend for the worse is seen.
    None {
        /// How likely the data are without any trend.
        p: f64,
    },
    /// It gets worse.
    Ageing {
        /// How likely the data are without any trend.
        p: f64,
        /// Change per day.
        per_day: f64,
        /// Its interval.
        per_day_interval: (f64, f64),
        /// When the limit is reached, from the last sample on, in seconds.
        exhausted_in_s: f64,
        /// Earliest; the latest is `None` where it may never be.
        exhausted_interval_s: (f64, Option<f64>),
    },
}

/// One indicator.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Finding {
    /// Which.
    pub indicator: Indicator,
    /// As last read.
    pub last: Reading,
    /// What becomes of it.
    #[serde(flatten)]
    pub trend: Trend,
}

/// A look at the host.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Assessment {
    /// How it was looked.
    pub look: Look,
    /// Samples of the running boot.
    pub samples: usize,
    /// Samples of boots before it, which say nothing of this one: a reboot
    /// cures.
    pub samples_before: usize,
    /// Time that they span, in seconds.
    pub span_s: f64,
    /// Samples of this boot that went back in time and were left out.
    pub dropped: usize,
    /// Jumps of the wall clock within this boot; they do no harm.
    pub clock_jumps: usize,
    /// What was found, for each indicator that the host tells.
    pub findings: Vec<Finding>,
}

impl Assessment {
    /// The first indicator to be exhausted, if the host is ageing.
    pub fn soonest(&self) -> Option<(Indicator, f64)> {
        let ageing = self.findings.iter().filter_map(|f| match f.trend {
            Trend::Ageing { exhausted_in_s, .. } => Some((f.indicator, exhausted_in_s)),
            _ => None,
        });
        ageing.min_by(|a, b| a.1.total_cmp(&b.1))
    }
}

impl Look {
    /// Refuses what cannot be meant.
    pub fn check(&self) -> Result<(), LookError> {
        let within = |rate: f64| rate > 0.0 && rate < 1.0;
        if !within(self.error_rate) {
            return Err(LookError::ErrorRate(self.error_rate));
        }
        if !within(self.confidence) {
            return Err(LookError::Confidence(self.confidence));
        }
        match self.period.filter(|p| p.as_s() < SEASONS as u64) {
            Some(period) => Err(LookError::Period(period)),
            None => Ok(()),
        }
    }
}

/// Looks at the samples of the running boot `boot` among `samples`, which are
/// given in the order in which they were taken. Where there are none of it yet,
/// nothing is found.
pub fn assess(samples: &[Sample], boot: [u8; 16], look: Look) -> Result<Assessment, LookError> {
    look.check()?;
    if samples.is_empty() {
        return Err(LookError::NoSamples);
    }
    let mut run: Vec<&Sample> = Vec::new();
    let (mut dropped, mut clock_jumps) = (0, 0);
    for sample in samples.iter().filter(|s| s.boot == boot) {
        let Some(previous) = run.last() else {
            run.push(sample);
            continue;
        };
        let elapsed = sample.up_s - previous.up_s;
        // Also catches what is no number.
        if elapsed.is_nan() || elapsed <= 0.0 || elapsed.is_infinite() {
            dropped += 1;
            continue;
        }
        let by_clock = sample.at_s - previous.at_s;
        clock_jumps += usize::from((by_clock - elapsed).abs() > JUMP_S);
        run.push(sample);
    }
    let known: Vec<(usize, Indicator)> = Indicator::ALL
        .into_iter()
        .enumerate()
        .filter(|(i, _)| run.iter().any(|s| usable(s, *i).is_some()))
        .collect();
    let error_rate = look.error_rate / known.len().max(1) as f64;
    let findings = known
        .iter()
        .filter_map(|(i, indicator)| {
            let series: Vec<Point> = run
                .iter()
                .filter_map(|s| Some((s.up_s, usable(s, *i)?.value)))
                .collect();
            let last = run.iter().rev().find_map(|s| usable(s, *i))?;
            Some(Finding {
                indicator: *indicator,
                last,
                trend: trend(&series, *indicator, last.limit, look, error_rate),
            })
        })
        .collect();
    let ends = run.first().zip(run.last());
    Ok(Assessment {
        look,
        samples: run.len(),
        samples_before: samples.iter().filter(|s| s.boot != boot).count(),
        span_s: ends.map_or(0.0, |(first, last)| last.up_s - first.up_s),
        dropped,
        clock_jumps,
        findings,
    })
}

fn usable(sample: &Sample, index: usize) -> Option<Reading> {
    let reading = sample.readings.get(index).copied().flatten();
    reading.filter(|r| r.value.is_finite() && r.limit.is_finite())
}

fn trend(series: &[Point], indicator: Indicator, limit: f64, look: Look, error_rate: f64) -> Trend {
    let (seasons, have, need) = match look.period {
        Some(period) => {
            let (seasons, periods) = by_season(series, period.as_s() as f64);
            (seasons, periods, PERIODS_MIN)
        }
        None => {
            let bins = bins(series);
            let have = bins.len();
            (vec![bins.into_iter().map(Some).collect()], have, BINS_MIN)
        }
    };
    if have < need {
        return Trend::TooShort { have, need };
    }
    let Some(found) = Kendall::test(&seasons) else {
        return Trend::TooShort { have, need };
    };
    let slope = found.slope();
    let worse = if indicator.falls() { -1.0 } else { 1.0 };
    let worsens = found.score * worse > 0.0 && slope * worse > 0.0;
    if found.p >= error_rate || !worsens {
        return Trend::None { p: found.p };
    }
    let interval = found.slope_interval(look.confidence);
    let left = distance(&seasons, slope, series, limit) * worse;
    let until = |slope: f64| (left / (slope * worse)).max(0.0);
    let (slow, fast) = if worse > 0.0 {
        interval
    } else {
        (interval.1, interval.0)
    };
    Trend::Ageing {
        p: found.p,
        per_day: slope * 86_400.0,
        per_day_interval: (interval.0 * 86_400.0, interval.1 * 86_400.0),
        exhausted_in_s: until(slope),
        exhausted_interval_s: (until(fast), (slow * worse > 0.0).then(|| until(slow))),
    }
}

/// From the line through the data, at the last sample, to the limit.
fn distance(seasons: &kendall::Seasons, slope: f64, series: &[Point], limit: f64) -> f64 {
    let now = series.last().map_or(0.0, |p| p.0);
    let points = seasons.iter().flatten().flatten();
    let mut levels: Vec<f64> = points.map(|(t, v)| v + slope * (now - t)).collect();
    levels.sort_unstable_by(f64::total_cmp);
    limit - median_of_sorted(&levels)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    median_of_sorted(&values)
}

/// The medians of runs of points that lie in the same bin.
fn merge(series: &[Point], bin: impl Fn(f64) -> u64) -> Vec<(u64, Point)> {
    series
        .chunk_by(|a, b| bin(a.0) == bin(b.0))
        .map(|run| {
            let time = run.iter().map(|p| p.0).sum::<f64>() / run.len() as f64;
            let value = median(run.iter().map(|p| p.1).collect());
            (bin(run[0].0), (time, value))
        })
        .collect()
}

/// At most [`BINS_MAX`] points.
fn bins(series: &[Point]) -> Vec<Point> {
    let (Some(first), Some(last)) = (series.first(), series.last()) else {
        return Vec::new();
    };
    if series.len() <= BINS_MAX {
        return series.to_vec();
    }
    let width = (last.0 - first.0) / (BINS_MAX - 1) as f64;
    let merged = merge(series, |t| ((t - first.0) / width) as u64);
    merged.into_iter().map(|(_, point)| point).collect()
}

/// Points by season and period, counted back from the last one, and the number
/// of periods that have gone by whole.
fn by_season(series: &[Point], period: f64) -> (Vec<Vec<Option<Point>>>, usize) {
    let (Some(first), Some(last)) = (series.first(), series.last()) else {
        return (Vec::new(), 0);
    };
    let whole = ((last.0 - first.0) / period) as usize;
    let kept = (whole + 1).min(PERIODS_MAX);
    let start = last.0 - kept as f64 * period;
    let width = period / SEASONS as f64;
    // The last point lies in the last bin, not one beyond it.
    let most = (kept * SEASONS - 1) as u64;
    let newest: Vec<Point> = series.iter().filter(|p| p.0 >= start).copied().collect();
    let mut seasons = vec![vec![None; kept]; SEASONS];
    for (bin, point) in merge(&newest, |t| (((t - start) / width) as u64).min(most)) {
        let bin = bin as usize;
        seasons[bin % SEASONS][bin / SEASONS] = Some(point);
    }
    (seasons, whole)
}

#[cfg(test)]
mod tests;
