//! Is there a trend? The test of Mann and Kendall, and its seasonal form by
//! Hirsch, Slack and Smith (1982), which compares like with like: a value at
//! three in the morning with those of other nights.
//!
//! Values of one period hang together (a busy day is busy all day), and a test
//! that takes them as independent sees trends in it. The covariance between
//! seasons by Hirsch and Slack (1984), with gaps as Gilbert (1987) treats them,
//! is therefore part of the variance; where it comes out smaller than
//! independence would have it, independence counts.
//!
//! The slope is Sen's: the median over all pairs, so that single odd values do
//! not move it; its interval follows from the test's own variance.

use statrs::distribution::{ContinuousCDF, Normal};

/// A value at a time, in seconds; times within one season differ by whole
/// periods and a little.
pub type Point = (f64, f64);

/// Values by season (outer) and period (inner); `None` where nothing is known.
pub type Seasons = [Vec<Option<Point>>];

/// What the test found.
#[derive(Clone, Debug, PartialEq)]
pub struct Kendall {
    /// Pairs that rise less pairs that fall.
    pub score: f64,
    /// Of the score, were there no trend.
    pub variance: f64,
    /// How likely so much of a score is without a trend, either way.
    pub p: f64,
    /// Slopes of all pairs, in order, per second.
    slopes: Vec<f64>,
}

impl Kendall {
    /// Tests values; `None` where no season has two of them.
    pub fn test(seasons: &Seasons) -> Option<Self> {
        let mut slopes = Vec::new();
        let mut score = 0.0;
        let mut independent = 0.0;
        for season in seasons {
            let points: Vec<Point> = season.iter().flatten().copied().collect();
            for (i, early) in points.iter().enumerate() {
                for late in &points[i + 1..] {
                    score += sign(late.1 - early.1);
                    let slope = (late.1 - early.1) / (late.0 - early.0);
                    if slope.is_finite() {
                        slopes.push(slope);
                    }
                }
            }
            independent += own_variance(&points);
        }
        if slopes.is_empty() {
            return None;
        }
        slopes.sort_unstable_by(f64::total_cmp);
        let variance = independent.max(independent + covariances(seasons));
        let z = if variance > 0.0 {
            // The score has steps; this is the correction for continuity.
            (score.abs() - 1.0).max(0.0) / variance.sqrt()
        } else {
            0.0
        };
        let p = 2.0 * (1.0 - Normal::standard().cdf(z));
        Some(Self {
            score,
            variance,
            p,
            slopes,
        })
    }

    /// Sen's slope, per second.
    pub fn slope(&self) -> f64 {
        median_of_sorted(&self.slopes)
    }

    /// The slope's interval at a confidence below 1.
    pub fn slope_interval(&self, confidence: f64) -> (f64, f64) {
        let z = Normal::standard().inverse_cdf(0.5 + confidence / 2.0);
        let count = self.slopes.len() as f64;
        let reach = z * self.variance.sqrt();
        let last = self.slopes.len() - 1;
        // Ranks count from 1; beyond the ends, the ends are all that is known.
        let low = ((count - reach) / 2.0).floor().max(1.0) as usize - 1;
        let high = (((count + reach) / 2.0).ceil() as usize).min(last);
        (self.slopes[low.min(last)], self.slopes[high])
    }
}

fn sign(value: f64) -> f64 {
    if value > 0.0 {
        1.0
    } else if value < 0.0 {
        -1.0
    } else {
        0.0
    }
}

/// Middle of a sorted list; not a number for an empty one.
pub fn median_of_sorted(values: &[f64]) -> f64 {
    let middle = values.len() / 2;
    match values.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => values[middle],
        _ => values[middle - 1].midpoint(values[middle]),
    }
}

/// Variance of one season's score without a trend, ties taken into account.
fn own_variance(points: &[Point]) -> f64 {
    let term = |n: f64| n * (n - 1.0) * (2.0 * n + 5.0);
    let mut values: Vec<f64> = points.iter().map(|p| p.1).collect();
    values.sort_unstable_by(f64::total_cmp);
    let ties: f64 = values
        .chunk_by(|a, b| a == b)
        .map(|tied| term(tied.len() as f64))
        .sum();
    (term(points.len() as f64) - ties) / 18.0
}

/// One season, made ready for comparing it with others.
struct Ranked {
    /// Middle ranks from 1; the middle one for a gap.
    ranks: Vec<f64>,
    /// Signs of all pairs of periods, 0 where one is a gap.
    signs: Vec<f64>,
    /// Values there are.
    count: f64,
}

impl Ranked {
    fn of(season: &[Option<Point>], periods: usize) -> Self {
        let value = |j: usize| season.get(j).copied().flatten().map(|p| p.1);
        let count = season.iter().flatten().count() as f64;
        let between = |i: usize, j: usize| match (value(i), value(j)) {
            (Some(early), Some(late)) => sign(late - early),
            _ => 0.0,
        };
        let rank = |j: usize| {
            let beats: f64 = (0..periods).map(|i| between(i, j)).sum();
            (count + 1.0 + beats) / 2.0
        };
        let pairs = (0..periods).flat_map(|i| (i + 1..periods).map(move |j| (i, j)));
        Self {
            ranks: (0..periods).map(rank).collect(),
            signs: pairs.map(|(i, j)| between(i, j)).collect(),
            count,
        }
    }
}

/// The sum of covariances between the scores of different seasons.
fn covariances(seasons: &Seasons) -> f64 {
    let periods = seasons.iter().map(Vec::len).max().unwrap_or(0);
    let ranked: Vec<Ranked> = seasons.iter().map(|s| Ranked::of(s, periods)).collect();
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(x, y)| x * y).sum::<f64>();
    let mut total = 0.0;
    for (i, g) in ranked.iter().enumerate() {
        for h in &ranked[i + 1..] {
            let expected = periods as f64 * (g.count + 1.0) * (h.count + 1.0);
            let own = dot(&g.signs, &h.signs) + 4.0 * dot(&g.ranks, &h.ranks) - expected;
            total += 2.0 * own / 3.0;
        }
    }
    total
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Noise;
    use proptest::prelude::*;

    fn one_season(values: &[f64]) -> Vec<Vec<Option<Point>>> {
        let points = values.iter().enumerate();
        vec![points.map(|(i, v)| Some((i as f64, *v))).collect()]
    }

    /// By hand: 1, 3, 2, 4, 4 has 8 rising pairs, 1 falling, 1 tie; the
    /// variance is (5·4·15 − 2·1·9)/18 = 15.667.
    #[test]
    fn a_small_case_by_hand() {
        let found = Kendall::test(&one_season(&[1.0, 3.0, 2.0, 4.0, 4.0])).expect("test");
        assert_eq!(found.score, 7.0);
        assert!((found.variance - 282.0 / 18.0).abs() < 1e-12);
        // z = 6/3.9581 = 1.5159, p = 0.1295.
        assert!((found.p - 0.1295).abs() < 1e-3, "{}", found.p);
        // Slopes: 2, ½, 1, ¾, −1, ½, ⅓, 2, 1, 0; their median is ⅝.
        assert!((found.slope() - 0.625).abs() < 1e-12, "{}", found.slope());
    }

    #[test]
    fn nothing_and_constants_have_no_trend() {
        assert_eq!(Kendall::test(&[]), None);
        assert_eq!(Kendall::test(&one_season(&[5.0])), None);
        let flat = Kendall::test(&one_season(&[5.0; 40])).expect("test");
        assert_eq!((flat.score, flat.slope(), flat.p), (0.0, 0.0, 1.0));
        assert_eq!(flat.slope_interval(0.95), (0.0, 0.0));
    }

    /// Seasons that are copies of each other say no more than one of them.
    #[test]
    fn copies_of_a_season_are_no_new_evidence() {
        let mut noise = Noise::new(3);
        let values: Vec<f64> = (0..12).map(|_| noise.normal()).collect();
        let one = one_season(&values);
        let many: Vec<_> = (0..24).map(|_| one[0].clone()).collect();
        let (one, many) = (Kendall::test(&one), Kendall::test(&many));
        let (one, many) = (one.expect("one"), many.expect("many"));
        assert!((many.score - 24.0 * one.score).abs() < 1e-9);
        assert!((many.variance - 576.0 * one.variance).abs() < 1e-6);
    }

    /// White noise: alarms as often as stated, for 1,000 seeded series, within
    /// three standard errors above; the correction makes it a little rarer.
    #[test]
    fn noise_has_no_trend_at_the_stated_error_rate() {
        let mut noise = Noise::new(11);
        let mut alarms = 0;
        for _ in 0..1000 {
            let values: Vec<f64> = (0..40).map(|_| noise.normal()).collect();
            let found = Kendall::test(&one_season(&values)).expect("test");
            alarms += usize::from(found.p < 0.05);
        }
        assert!((25..=71).contains(&alarms), "{alarms}");
    }

    fn days(noise: &mut Noise, days: usize, whole_day: f64, slope: f64) -> Vec<Vec<Option<Point>>> {
        let mut seasons = vec![Vec::new(); 24];
        for day in 0..days {
            let busy = whole_day * noise.normal();
            for (hour, season) in seasons.iter_mut().enumerate() {
                let at = (day * 24 + hour) as f64 * 3600.0;
                let cycle = 50.0 * (std::f64::consts::TAU * hour as f64 / 24.0).sin();
                let value = cycle + busy + noise.normal() + slope * at;
                // One hour in ten was not sampled.
                season.push((noise.uniform() > 0.1).then_some((at, value)));
            }
        }
        seasons
    }

    /// A daily cycle fifty times the noise, and days that are busy as a whole:
    /// still no more alarms than stated.
    #[test]
    fn seasons_and_busy_days_are_no_trend() {
        let mut noise = Noise::new(5);
        for whole_day in [0.0, 10.0] {
            let mut alarms = 0;
            for _ in 0..300 {
                let found = Kendall::test(&days(&mut noise, 10, whole_day, 0.0)).expect("test");
                alarms += usize::from(found.p < 0.05);
            }
            // 15 are expected; three standard errors above are 26.
            assert!(alarms <= 26, "{whole_day}: {alarms}");
        }
    }

    #[test]
    fn a_trend_under_a_season_is_found_with_its_slope() {
        let mut noise = Noise::new(9);
        let slope = 5.0 / 86_400.0;
        let (mut found_it, mut held) = (0, 0);
        for _ in 0..100 {
            let found = Kendall::test(&days(&mut noise, 10, 1.0, slope)).expect("test");
            found_it += usize::from(found.p < 0.01 && found.slope() > 0.0);
            let (low, high) = found.slope_interval(0.95);
            held += usize::from(low <= slope && slope <= high);
        }
        assert_eq!(found_it, 100);
        assert!(held >= 90, "{held}");
    }

    proptest! {
        /// Turned upside down, the same is found with the other sign.
        #[test]
        fn up_and_down_are_alike(values in prop::collection::vec(-1e6..1e6f64, 2..60)) {
            let up = Kendall::test(&one_season(&values)).expect("up");
            let turned: Vec<f64> = values.iter().map(|v| -v).collect();
            let down = Kendall::test(&one_season(&turned)).expect("down");
            prop_assert_eq!(up.score, -down.score);
            prop_assert_eq!(up.p, down.p);
            prop_assert!((up.slope() + down.slope()).abs() < 1e-6);
            let (low, high) = up.slope_interval(0.95);
            prop_assert!(low <= up.slope() && up.slope() <= high);
        }
    }
}
