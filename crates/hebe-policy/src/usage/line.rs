//! Straight lines fitted to measurements, and weighted sums of their values
//! that keep track of what is not known exactly.

use std::collections::BTreeMap;
use std::ops::{Add, Mul, Sub};

use serde::Serialize;
use statrs::distribution::{ContinuousCDF, StudentsT};

use super::data::Quantity;

/// A line in the number of VMs: `slope · n + intercept`, in seconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Line {
    /// Seconds per VM.
    pub slope: f64,
    /// Seconds at n = 0.
    pub intercept: f64,
    /// How uncertain both are; `None` where only the line is known, or where
    /// the samples leave nothing to judge it by.
    #[serde(skip)]
    pub spread: Option<Spread>,
    /// Samples behind it; 0 where it was published, not fitted.
    pub samples: usize,
}

/// Covariance of a fitted line's two parameters.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spread {
    /// Of the intercept.
    pub var_intercept: f64,
    /// Of the slope.
    pub var_slope: f64,
    /// Between both.
    pub covariance: f64,
    /// Degrees of freedom of the residuals.
    pub freedom: f64,
}

/// A value with its interval.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Estimate {
    /// The value.
    pub value: f64,
    /// Its confidence interval; `None` where it cannot be told.
    pub interval: Option<(f64, f64)>,
}

/// Why no line goes through some samples.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoLine {
    /// Fewer than two samples.
    TooFew,
    /// All have the same n.
    OneN,
}

impl Line {
    /// A line that somebody published.
    pub const fn published(slope: f64, intercept: f64) -> Self {
        Self {
            slope,
            intercept,
            spread: None,
            samples: 0,
        }
    }

    /// A value that does not depend on n.
    pub const fn constant(seconds: f64) -> Self {
        Self::published(0.0, seconds)
    }

    /// The least-squares line through `(n, seconds)` samples. The spread takes
    /// the residuals as independent, with one variance for every n.
    pub fn fit(samples: &[(f64, f64)]) -> Result<Self, NoLine> {
        let count = samples.len() as f64;
        if samples.len() < 2 {
            return Err(NoLine::TooFew);
        }
        let mean_n = samples.iter().map(|s| s.0).sum::<f64>() / count;
        let mean_s = samples.iter().map(|s| s.1).sum::<f64>() / count;
        let sum = |f: &dyn Fn(&(f64, f64)) -> f64| samples.iter().map(f).sum::<f64>();
        let square_n = sum(&|s| (s.0 - mean_n).powi(2));
        if square_n == 0.0 {
            return Err(NoLine::OneN);
        }
        let slope = sum(&|s| (s.0 - mean_n) * (s.1 - mean_s)) / square_n;
        let intercept = mean_s - slope * mean_n;
        let residual = sum(&|s| (s.1 - intercept - slope * s.0).powi(2));
        let freedom = count - 2.0;
        // Samples that are all alike, and two samples, say nothing of the
        // spread; no interval is better than one of width zero.
        let known = freedom > 0.0 && samples.iter().any(|s| s.1 != samples[0].1);
        let spread = known.then(|| {
            let variance = residual / freedom;
            Spread {
                var_intercept: variance * (1.0 / count + mean_n.powi(2) / square_n),
                var_slope: variance / square_n,
                covariance: -variance * mean_n / square_n,
                freedom,
            }
        });
        Ok(Self {
            slope,
            intercept,
            spread,
            samples: samples.len(),
        })
    }

    /// A value that does not depend on n, from repeated measurements of it;
    /// `None` without any.
    pub fn level(samples: &[f64]) -> Option<Self> {
        let count = samples.len() as f64;
        let mean = samples.iter().sum::<f64>() / count;
        let residual: f64 = samples.iter().map(|s| (s - mean).powi(2)).sum();
        let freedom = count - 1.0;
        let known = freedom > 0.0 && samples.iter().any(|s| *s != samples[0]);
        (!samples.is_empty()).then(|| Self {
            spread: known.then(|| Spread {
                var_intercept: residual / freedom / count,
                var_slope: 0.0,
                covariance: 0.0,
                freedom,
            }),
            samples: samples.len(),
            ..Self::constant(mean)
        })
    }

    /// The value at `n`.
    pub fn at(&self, n: f64) -> f64 {
        self.slope * n + self.intercept
    }
}

/// A weighted sum of values of several lines. Terms of the same line are added
/// up before their uncertainty is looked at: `reboot_vmm(0) − reboot_vmm(n)`
/// is less uncertain than either.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Combination {
    constant: f64,
    /// Weights of intercept and slope.
    weights: BTreeMap<Quantity, (f64, f64)>,
}

impl Combination {
    /// A number without doubt.
    pub fn constant(value: f64) -> Self {
        Self {
            constant: value,
            ..Self::default()
        }
    }

    /// The value of a quantity's line at `n`.
    pub fn of(quantity: Quantity, n: f64) -> Self {
        Self {
            constant: 0.0,
            weights: BTreeMap::from([(quantity, (1.0, n))]),
        }
    }

    /// Its value and its interval at a `confidence` below 1. Independent lines
    /// are assumed; degrees of freedom are joined as Welch and Satterthwaite do.
    ///
    /// The interval is unknown as soon as one line's spread is.
    pub fn estimate(&self, lines: &BTreeMap<Quantity, Line>, confidence: f64) -> Estimate {
        let mut value = self.constant;
        let mut variance = Some((0.0, 0.0));
        for (quantity, (w0, w1)) in &self.weights {
            let Some(line) = lines.get(quantity) else {
                return Estimate {
                    value: f64::NAN,
                    interval: None,
                };
            };
            value += w0 * line.intercept + w1 * line.slope;
            if (*w0, *w1) == (0.0, 0.0) {
                continue;
            }
            variance = variance
                .zip(line.spread)
                .map(|((total, over_freedom), spread)| {
                    let own = w0 * w0 * spread.var_intercept
                        + w1 * w1 * spread.var_slope
                        + 2.0 * w0 * w1 * spread.covariance;
                    // Rounding must not make it negative.
                    let own = own.max(0.0);
                    (total + own, over_freedom + own * own / spread.freedom)
                });
        }
        let interval = variance.and_then(|(total, over_freedom)| {
            let freedom = total * total / over_freedom;
            let t = StudentsT::new(0.0, 1.0, freedom).ok()?;
            let half = t.inverse_cdf(0.5 + confidence / 2.0) * total.sqrt();
            half.is_finite().then_some((value - half, value + half))
        });
        Estimate { value, interval }
    }
}

impl Add for Combination {
    type Output = Self;

    fn add(mut self, other: Self) -> Self {
        self.constant += other.constant;
        for (quantity, (w0, w1)) in other.weights {
            let own = self.weights.entry(quantity).or_default();
            *own = (own.0 + w0, own.1 + w1);
        }
        self
    }
}

impl Mul<f64> for Combination {
    type Output = Self;

    fn mul(mut self, factor: f64) -> Self {
        self.constant *= factor;
        for (w0, w1) in self.weights.values_mut() {
            (*w0, *w1) = (*w0 * factor, *w1 * factor);
        }
        self
    }
}

impl Sub for Combination {
    type Output = Self;

    fn sub(self, other: Self) -> Self {
        self + other * -1.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn close(a: f64, b: f64) -> bool {
        (a - b).abs() <= 1e-9 * (1.0 + a.abs() + b.abs())
    }

    /// A textbook case worked out by hand: x = 1..5, y = 2, 4, 5, 4, 5.
    /// Slope 6/10, intercept 2.2, residual sum 2.4, t(0.975; 3) = 3.18245.
    #[test]
    fn the_textbook_line_and_its_interval() {
        let samples = [(1.0, 2.0), (2.0, 4.0), (3.0, 5.0), (4.0, 4.0), (5.0, 5.0)];
        let line = Line::fit(&samples).expect("line");
        assert!(close(line.slope, 0.6) && close(line.intercept, 2.2));
        let lines = BTreeMap::from([(Quantity::Warm, line)]);
        let at = |n| Combination::of(Quantity::Warm, n).estimate(&lines, 0.95);
        let slope = (Combination::of(Quantity::Warm, 1.0) - Combination::of(Quantity::Warm, 0.0))
            .estimate(&lines, 0.95);
        let (low, high) = slope.interval.expect("interval");
        let half = 3.182_446_305 * (0.8_f64 / 10.0).sqrt();
        assert!((high - 0.6 - half).abs() < 1e-6 && (0.6 - low - half).abs() < 1e-6);
        let (low, high) = at(3.0).interval.expect("interval");
        let half = 3.182_446_305 * (0.8_f64 / 5.0).sqrt();
        assert!(((high - low) / 2.0 - half).abs() < 1e-6);
    }

    #[test]
    fn too_little_gives_no_line_and_no_interval() {
        assert_eq!(Line::fit(&[]), Err(NoLine::TooFew));
        assert_eq!(Line::fit(&[(1.0, 5.0)]), Err(NoLine::TooFew));
        assert_eq!(Line::fit(&[(4.0, 5.0), (4.0, 6.0)]), Err(NoLine::OneN));
        let two = Line::fit(&[(1.0, 5.0), (2.0, 6.0)]).expect("line");
        assert_eq!(two.spread, None);
        let alike = Line::fit(&[(1.0, 5.0), (2.0, 5.0), (3.0, 5.0)]).expect("line");
        assert_eq!((alike.slope, alike.spread), (0.0, None));
        assert_eq!(Line::level(&[]), None);
        assert_eq!(Line::level(&[47.0]).expect("level").at(9.0), 47.0);
    }

    #[test]
    fn a_difference_within_one_line_is_less_uncertain_than_its_ends() {
        let samples = [(1.0, 2.0), (2.0, 4.1), (3.0, 5.7), (4.0, 8.3)];
        let lines = BTreeMap::from([(Quantity::Warm, Line::fit(&samples).expect("line"))]);
        let width = |c: Combination| {
            let (low, high) = c.estimate(&lines, 0.95).interval.expect("interval");
            high - low
        };
        let of = |n| Combination::of(Quantity::Warm, n);
        assert!(width(of(2.0) - of(0.0)) < width(of(0.0)));
        let nothing = (of(2.0) - of(2.0)).estimate(&lines, 0.95);
        assert_eq!(nothing.value, 0.0);
    }

    proptest! {
        /// What lies on a line is found again, wherever it lies.
        #[test]
        fn exact_lines_are_found(slope in -50.0..50.0f64, intercept in -500.0..500.0f64,
                                 ns in prop::collection::btree_set(0u32..1000, 2..20)) {
            let samples: Vec<(f64, f64)> = ns.iter()
                .map(|n| (f64::from(*n), slope * f64::from(*n) + intercept)).collect();
            let line = Line::fit(&samples).expect("line");
            prop_assert!((line.slope - slope).abs() < 1e-6);
            prop_assert!((line.intercept - intercept).abs() < 1e-5);
        }
    }

    /// The interval holds the truth about as often as it says: 90 % of 1,000
    /// seeded draws, three standard errors of that count either way.
    #[test]
    fn intervals_cover_what_they_promise() {
        let mut noise = crate::testing::Noise::new(7);
        let mut held = 0;
        for _ in 0..1000 {
            let samples: Vec<(f64, f64)> = (1..=6)
                .map(|n| (f64::from(n), 3.0 * f64::from(n) + 10.0 + noise.normal()))
                .collect();
            let lines = BTreeMap::from([(Quantity::Cold, Line::fit(&samples).expect("line"))]);
            let at = Combination::of(Quantity::Cold, 8.0).estimate(&lines, 0.9);
            let (low, high) = at.interval.expect("interval");
            held += usize::from(low <= 34.0 && 34.0 <= high);
        }
        assert!((872..=928).contains(&held), "{held}");
    }
}
