//! The papers' usage model: what a reboot of the VMM layer costs with n VMs,
//! and what that makes of a year.
//!
//! ```text
//! d_w(n) = reboot_vmm(n) + resume(n)                                    R-32
//! d_c(n) = reset_hw + reboot_vmm(0) + reboot_os(n) − reboot_os(1)·α     R-33
//! α      = time since the last OS rejuvenation ÷ its interval, 0 < α ≤ 1 R-34
//! r(n)   = d_c(n) − d_w(n)                                              R-35
//! ```
//!
//! Guests are rejuvenated every t, the host every T (R-30). A warm or a saved
//! reboot leaves the guests' schedule alone; a cold one renews them too, and
//! their schedule starts again from it (R-31). So over T there are T/t OS
//! rejuvenations, and with a cold reboot α fewer:
//!
//! ```text
//! warm, saved:   D = T/t · reboot_os(1) + d
//! cold:          D = T/t · reboot_os(1) + d_c     (d_c holds the − α)
//! evacuate:      D = T/t · reboot_os(1) + moves · pause of one migration
//! availability = 1 − D/T
//! ```
//!
//! Where host reboots keep in step with a schedule that starts again after each
//! (R-31, Fig. 2b), α is no free number: see [`in_step`].

use std::collections::BTreeMap;

use serde::Serialize;

use super::data::{Quantity, Sample, Table};
use super::line::{Combination, Estimate, Line, NoLine};
use crate::span::Span;

/// Seconds of a year: 365.25 days.
pub const YEAR_S: f64 = 365.25 * 86_400.0;

/// How VMs get over the renewal of the host below them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Method {
    /// Frozen on memory.
    Warm,
    /// Saved to disk.
    Saved,
    /// Shut down and booted.
    Cold,
    /// Migrated to another host while this one reboots.
    Evacuate,
}

impl Method {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Warm, Self::Saved, Self::Cold, Self::Evacuate];

    /// In a reader's words.
    pub fn name(self) -> &'static str {
        match self {
            Self::Warm => "warm",
            Self::Saved => "saved",
            Self::Cold => "cold",
            Self::Evacuate => "evacuate",
        }
    }
}

/// What is known of a host, and how it is used.
#[derive(Clone, Debug, PartialEq)]
pub struct Model {
    /// Seconds by number of VMs.
    pub lines: BTreeMap<Quantity, Line>,
    /// The measurements behind them.
    pub samples: Vec<Sample>,
    /// Downtimes known at one number of VMs only: quantity, n, seconds.
    pub points: Vec<Sample>,
}

/// How the host and its guests are rejuvenated.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Usage {
    /// Number of VMs.
    pub n: u32,
    /// α: which part of the OS interval has gone by at a host reboot.
    pub alpha: f64,
    /// t: from one rejuvenation of a guest to the next.
    pub os_interval: Span,
    /// T: from one rejuvenation of the host to the next.
    pub host_interval: Span,
    /// Downtime of one guest's rejuvenation alone, where it is known better
    /// than by reboot_os(1), in seconds.
    pub os_downtime_s: Option<f64>,
    /// A VM's downtime in one migration, where it was not measured, in seconds.
    pub evacuate_pause_s: Option<f64>,
    /// Migrations of a VM per host reboot: 2 if it comes back, else 1.
    pub moves: u32,
    /// Of intervals, between 0 and 1.
    pub confidence: f64,
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error, PartialEq)]
pub enum ModelError {
    /// A line needs more.
    #[error(
        "there is one sample of '{0}': a line needs two numbers of VMs, and an interval three samples"
    )]
    OneSample(Quantity),
    /// A line needs different n.
    #[error("all samples of '{quantity}' have n = {n}: measure a second number of VMs")]
    OneN {
        /// Of what.
        quantity: Quantity,
        /// The one n.
        n: f64,
    },
    /// Nothing is known of something that is needed.
    #[error("nothing is known of '{0}': measure it, or its parts {1}")]
    Unknown(Quantity, &'static str),
    /// Nobody said what an OS rejuvenation costs.
    #[error(
        "the measurements do not say what one OS rejuvenation costs: give --os-downtime SECONDS, or measure 'reboot-os'"
    )]
    NoOsDowntime,
    /// Out of range.
    #[error("α = {0} is not above 0 and at most 1")]
    Alpha(f64),
    /// α says that the guests went longer without rejuvenation than the host.
    #[error(
        "α = {alpha} cannot be with a host reboot every {host} and an OS interval of {os}: a cold reboot renews the guests, so that α is at most {most:.4}"
    )]
    AlphaTooLate {
        /// As given.
        alpha: f64,
        /// T.
        host: Span,
        /// t.
        os: Span,
        /// T/t.
        most: f64,
    },
    /// Zero.
    #[error("an interval must be longer than 0s")]
    NoInterval,
    /// Out of range.
    #[error("a confidence of {0} is not between 0 and 1: 0.95 is common")]
    Confidence(f64),
    /// Not a time.
    #[error("{what} = {value} is not a time: give seconds, 0 or more")]
    BadSeconds {
        /// Which flag.
        what: &'static str,
        /// As given.
        value: f64,
    },
    /// A line leads below zero.
    #[error(
        "the fitted line of '{what}' is below zero at n = {n}: measure nearer to that number of VMs"
    )]
    BelowZero {
        /// Which method.
        what: &'static str,
        /// Where.
        n: u32,
    },
    /// More downtime than time.
    #[error(
        "the downtimes of '{what}' add up to more than the {interval} from one host reboot to the next: make the intervals longer"
    )]
    NoTimeLeft {
        /// Which method.
        what: &'static str,
        /// T.
        interval: Span,
    },
}

/// The formula of a downtime: `slope · n + constant − alpha · α`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Formula {
    /// Seconds per VM.
    pub slope: Estimate,
    /// Seconds at n = 0 and α = 0.
    pub constant: Estimate,
    /// What α is multiplied with.
    pub alpha: Estimate,
}

/// The sign of r over 0 < α ≤ 1, for one n.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(tag = "sign", rename_all = "kebab-case")]
pub enum Sign {
    /// Warm is shorter for every α.
    Positive {
        /// Whether the interval at α = 1 lies above zero, too; `None` without one.
        certain: Option<bool>,
    },
    /// Warm is shorter below this α, cold above.
    Changes {
        /// Where r is zero.
        at_alpha: f64,
    },
    /// Cold is shorter, or as short, for every α.
    NotPositive,
}

/// What one method makes of a year.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Availability {
    /// Which method.
    pub method: Method,
    /// Downtime of one host rejuvenation, α credited, in seconds.
    pub downtime_s: Estimate,
    /// Part of the time that a VM serves, 0 to 1.
    pub availability: Estimate,
    /// Downtime a year, OS rejuvenations included, in seconds.
    pub year_s: Estimate,
}

impl Usage {
    /// Refuses what cannot be meant.
    pub fn check(&self) -> Result<(), ModelError> {
        if !(self.alpha > 0.0 && self.alpha <= 1.0) {
            return Err(ModelError::Alpha(self.alpha));
        }
        if self.os_interval.as_s() == 0 || self.host_interval.as_s() == 0 {
            return Err(ModelError::NoInterval);
        }
        if !(self.confidence > 0.0 && self.confidence < 1.0) {
            return Err(ModelError::Confidence(self.confidence));
        }
        let most = self.rejuvenations();
        if self.alpha > most {
            return Err(ModelError::AlphaTooLate {
                alpha: self.alpha,
                host: self.host_interval,
                os: self.os_interval,
                most,
            });
        }
        let given = [
            ("--os-downtime", self.os_downtime_s),
            ("--evacuate-pause", self.evacuate_pause_s),
        ];
        for (what, value) in given {
            if let Some(value) = value.filter(|v| !(0.0..=YEAR_S).contains(v)) {
                return Err(ModelError::BadSeconds { what, value });
            }
        }
        Ok(())
    }

    /// T/t: OS rejuvenations from one host rejuvenation to the next.
    fn rejuvenations(&self) -> f64 {
        self.host_interval.as_s() as f64 / self.os_interval.as_s() as f64
    }
}

/// α where each cold reboot starts the guests' schedule again (R-31): within T
/// there is then room for ⌈T/t⌉ − 1 OS rejuvenations, and the cold reboot comes
/// α·t after the last. 4 weeks and 1 week give 1: the cold reboot falls on the
/// day of an OS rejuvenation and stands for it.
pub fn in_step(os_interval: Span, host_interval: Span) -> f64 {
    let (os, host) = (os_interval.as_s(), host_interval.as_s());
    let rest = host % os.max(1);
    if rest == 0 {
        1.0
    } else {
        rest as f64 / os as f64
    }
}

impl Model {
    /// Fits a line to each quantity that a table has.
    pub fn fit(table: &Table) -> Result<Self, ModelError> {
        let mut groups: BTreeMap<Quantity, Vec<(f64, f64)>> = BTreeMap::new();
        for sample in &table.samples {
            let group = groups.entry(sample.quantity).or_default();
            group.push((sample.n, sample.seconds));
        }
        let mut lines = BTreeMap::new();
        for (quantity, samples) in groups {
            let line = if quantity.is_constant() {
                let seconds: Vec<f64> = samples.iter().map(|s| s.1).collect();
                Line::level(&seconds).ok_or(NoLine::TooFew)
            } else {
                Line::fit(&samples)
            };
            let n = samples[0].0;
            let line = line.map_err(|why| match why {
                NoLine::TooFew => ModelError::OneSample(quantity),
                NoLine::OneN => ModelError::OneN { quantity, n },
            })?;
            lines.insert(quantity, line);
        }
        Ok(Self {
            lines,
            samples: table.samples.clone(),
            points: Vec::new(),
        })
    }

    /// The numbers of VMs that were measured, from and to.
    pub fn measured(&self) -> Option<(f64, f64)> {
        let constant = |s: &&Sample| !s.quantity.is_constant();
        let all = || self.samples.iter().filter(constant).map(|s| s.n);
        all().reduce(f64::min).zip(all().reduce(f64::max))
    }

    fn knows(&self, quantity: Quantity) -> bool {
        self.lines.contains_key(&quantity)
    }

    /// d_w(n), R-32: as measured, or from its parts.
    fn warm(&self, n: f64) -> Result<Combination, ModelError> {
        use Quantity::{RebootVmm, Resume, Warm};
        if self.knows(Warm) {
            return Ok(Combination::of(Warm, n));
        }
        if self.knows(RebootVmm) && self.knows(Resume) {
            return Ok(Combination::of(RebootVmm, n) + Combination::of(Resume, n));
        }
        Err(ModelError::Unknown(Warm, "reboot-vmm and resume"))
    }

    /// d_c(n) at α = 0, R-33: as measured, or from its parts.
    fn cold(&self, n: f64) -> Result<Combination, ModelError> {
        use Quantity::{Cold, RebootOs, RebootVmm, ResetHw};
        if self.knows(Cold) {
            return Ok(Combination::of(Cold, n));
        }
        if [ResetHw, RebootVmm, RebootOs]
            .iter()
            .all(|q| self.knows(*q))
        {
            return Ok(Combination::of(ResetHw, 0.0)
                + Combination::of(RebootVmm, 0.0)
                + Combination::of(RebootOs, n));
        }
        Err(ModelError::Unknown(
            Cold,
            "reset-hw, reboot-vmm and reboot-os",
        ))
    }

    /// What one OS rejuvenation costs: as given, or reboot_os(1).
    fn os_downtime(&self, usage: &Usage) -> Result<Combination, ModelError> {
        match usage.os_downtime_s {
            Some(seconds) => Ok(Combination::constant(seconds)),
            None if self.knows(Quantity::RebootOs) => Ok(Combination::of(Quantity::RebootOs, 1.0)),
            None => Err(ModelError::NoOsDowntime),
        }
    }

    /// The downtime of one method with n VMs, α credited; `None` where nothing
    /// is known of saved or of migrated VMs.
    fn downtime(&self, method: Method, usage: &Usage) -> Result<Option<Combination>, ModelError> {
        let n = f64::from(usage.n);
        Ok(match method {
            Method::Warm => Some(self.warm(n)?),
            Method::Cold => Some(self.cold(n)? - self.os_downtime(usage)? * usage.alpha),
            Method::Saved if self.knows(Quantity::Saved) => {
                Some(Combination::of(Quantity::Saved, n))
            }
            Method::Saved => {
                let here = |p: &&Sample| p.quantity == Quantity::Saved && p.n == n;
                let point = self.points.iter().find(here);
                point.map(|p| Combination::constant(p.seconds))
            }
            Method::Evacuate => {
                let pause = match usage.evacuate_pause_s {
                    Some(seconds) => Some(Combination::constant(seconds)),
                    None if self.knows(Quantity::Evacuate) => {
                        Some(Combination::of(Quantity::Evacuate, n))
                    }
                    None => None,
                };
                pause.map(|pause| pause * f64::from(usage.moves))
            }
        })
    }

    /// d_w as a formula.
    pub fn warm_formula(&self, usage: &Usage) -> Result<Formula, ModelError> {
        self.formula(&|n| self.warm(n), Combination::default(), usage)
    }

    /// d_c as a formula.
    pub fn cold_formula(&self, usage: &Usage) -> Result<Formula, ModelError> {
        self.formula(&|n| self.cold(n), self.os_downtime(usage)?, usage)
    }

    /// r as a formula.
    pub fn gain_formula(&self, usage: &Usage) -> Result<Formula, ModelError> {
        let gain = |n| Ok(self.cold(n)? - self.warm(n)?);
        self.formula(&gain, self.os_downtime(usage)?, usage)
    }

    fn formula(
        &self,
        at: &dyn Fn(f64) -> Result<Combination, ModelError>,
        alpha: Combination,
        usage: &Usage,
    ) -> Result<Formula, ModelError> {
        let estimate = |c: &Combination| c.estimate(&self.lines, usage.confidence);
        Ok(Formula {
            slope: estimate(&(at(1.0)? - at(0.0)?)),
            constant: estimate(&at(0.0)?),
            alpha: estimate(&alpha),
        })
    }

    /// r(n) at an α, R-35. α = 0 is the limit that it never quite reaches.
    pub fn gain(&self, n: u32, alpha: f64, usage: &Usage) -> Result<Estimate, ModelError> {
        let n = f64::from(n);
        let gain = self.cold(n)? - self.warm(n)? - self.os_downtime(usage)? * alpha;
        Ok(gain.estimate(&self.lines, usage.confidence))
    }

    /// The sign of r(n) over 0 < α ≤ 1. r falls with α, for an OS rejuvenation
    /// takes time: its value at 1 is the least.
    pub fn sign(&self, n: u32, usage: &Usage) -> Result<Sign, ModelError> {
        let (most, least) = (self.gain(n, 0.0, usage)?, self.gain(n, 1.0, usage)?);
        Ok(if least.value > 0.0 {
            Sign::Positive {
                certain: least.interval.map(|(low, _)| low > 0.0),
            }
        } else if most.value <= 0.0 {
            Sign::NotPositive
        } else {
            Sign::Changes {
                at_alpha: most.value / (most.value - least.value),
            }
        })
    }

    /// The downtime of one method; `None` where nothing is known of it.
    pub fn downtime_of(
        &self,
        method: Method,
        usage: &Usage,
    ) -> Result<Option<Estimate>, ModelError> {
        let downtime = self.downtime(method, usage)?;
        Ok(downtime.map(|d| d.estimate(&self.lines, usage.confidence)))
    }

    /// What one method makes of a year; `None` where nothing is known of it.
    pub fn availability(
        &self,
        method: Method,
        usage: &Usage,
    ) -> Result<Option<Availability>, ModelError> {
        usage.check()?;
        let Some(downtime) = self.downtime(method, usage)? else {
            return Ok(None);
        };
        let what = method.name();
        let downtime_s = downtime.estimate(&self.lines, usage.confidence);
        // α credited, cold may honestly be short; whole downtimes may not be
        // below zero.
        let whole = match method {
            Method::Cold => self.cold(f64::from(usage.n))?,
            _ => downtime.clone(),
        };
        if whole.estimate(&self.lines, usage.confidence).value < 0.0 {
            return Err(ModelError::BelowZero { what, n: usage.n });
        }
        let interval_s = usage.host_interval.as_s() as f64;
        let all = self.os_downtime(usage)? * usage.rejuvenations() + downtime;
        let part = (all * (1.0 / interval_s)).estimate(&self.lines, usage.confidence);
        if part.value >= 1.0 {
            return Err(ModelError::NoTimeLeft {
                what,
                interval: usage.host_interval,
            });
        }
        let map = |f: &dyn Fn(f64) -> f64| Estimate {
            value: f(part.value),
            interval: part.interval.map(|(low, high)| {
                let (a, b) = (f(low), f(high));
                (a.min(b), a.max(b))
            }),
        };
        Ok(Some(Availability {
            method,
            downtime_s,
            availability: map(&|part| 1.0 - part),
            year_s: map(&|part| part * YEAR_S),
        }))
    }
}
