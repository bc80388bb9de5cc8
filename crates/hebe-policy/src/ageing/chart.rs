//! Samples as a chart in SVG: a panel for each indicator, over the time of the
//! clock on the wall, with the boots of the host marked. A host that leaks and
//! is rebooted makes a sawtooth. Deterministic: the same samples give the same
//! bytes.

use std::fmt::Write;

use super::kendall::median_of_sorted;
use super::words::{amount, time, trend};
use super::{Assessment, Indicator, Sample, Trend, usable};

const LEFT: f64 = 96.0;
const WIDTH: f64 = 720.0;
const TOP: f64 = 56.0;
/// Of one panel, and from one to the next.
const HEIGHT: f64 = 120.0;
const STRIDE: f64 = 184.0;
/// Points of a panel: more are not to be told apart.
const POINTS_MAX: usize = 2_000;

/// One panel's points, by boot: wall clock and value.
type Boots = Vec<Vec<(f64, f64)>>;

struct Scale {
    time: (f64, f64),
    value: (f64, f64),
    top: f64,
}

impl Scale {
    fn x(&self, at: f64) -> f64 {
        let (from, to) = self.time;
        LEFT + (at - from) / (to - from) * WIDTH
    }

    fn y(&self, value: f64) -> f64 {
        let (low, high) = self.value;
        let part = (value.clamp(low, high) - low) / (high - low);
        self.top + HEIGHT - part * HEIGHT
    }
}

/// Draws `only` these indicators, or all that the samples tell of. The
/// assessment's trends are drawn into the running boot.
pub fn svg(
    title: &str,
    samples: &[Sample],
    assessment: Option<&Assessment>,
    only: Option<&[Indicator]>,
) -> String {
    let finite: Vec<&Sample> = samples.iter().filter(|s| s.at_s.is_finite()).collect();
    let wanted = |indicator: &Indicator| only.is_none_or(|only| only.contains(indicator));
    let panels: Vec<(Indicator, Boots)> = Indicator::ALL
        .into_iter()
        .enumerate()
        .filter(|(_, indicator)| wanted(indicator))
        .map(|(index, indicator)| (indicator, boots(&finite, index)))
        .filter(|(_, boots)| boots.iter().any(|b| !b.is_empty()))
        .collect();
    let times = finite.iter().map(|s| s.at_s);
    let from = times.clone().fold(f64::INFINITY, f64::min);
    let to = times.fold(f64::NEG_INFINITY, f64::max);
    let span = if to > from { (from, to) } else { (0.0, 1.0) };
    let width = LEFT + WIDTH + 24.0;
    let height = TOP + STRIDE * panels.len().max(1) as f64;
    let mut out = String::new();
    let _ = writeln!(
        out,
        r##"<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0}" height="{height:.0}" viewBox="0 0 {width:.0} {height:.0}" font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="#ffffff"/><text x="16" y="28" font-size="16">{}</text>"##,
        escape(title)
    );
    for (place, (indicator, boots)) in panels.iter().enumerate() {
        let scale = Scale {
            time: span,
            value: range(boots),
            top: TOP + 24.0 + STRIDE * place as f64,
        };
        panel(&mut out, *indicator, boots, &scale, assessment);
    }
    out.push_str("</svg>\n");
    out
}

/// The points of one indicator, divided where the boot changes; where there are
/// too many, every so manieth.
fn boots(samples: &[&Sample], index: usize) -> Boots {
    let every = samples.len().div_ceil(POINTS_MAX).max(1);
    samples
        .chunk_by(|a, b| a.boot == b.boot)
        .map(|boot| {
            let point = |s: &&Sample| Some((s.at_s, usable(s, index)?.value));
            boot.iter().step_by(every).filter_map(point).collect()
        })
        .collect()
}

/// From the least to the greatest value with a margin; never empty.
fn range(boots: &Boots) -> (f64, f64) {
    let values = || boots.iter().flatten().map(|p| p.1);
    let low = values().fold(f64::INFINITY, f64::min);
    let high = values().fold(f64::NEG_INFINITY, f64::max);
    let margin = match high - low {
        spread if spread > 0.0 && spread.is_finite() => spread * 0.06,
        _ => high.abs().max(1.0) * 0.06,
    };
    (low - margin, high + margin)
}

fn panel(
    out: &mut String,
    indicator: Indicator,
    boots: &Boots,
    scale: &Scale,
    assessment: Option<&Assessment>,
) {
    let (low, high) = scale.value;
    let (bottom, right) = (scale.top + HEIGHT, LEFT + WIDTH);
    let found = assessment.and_then(|a| a.findings.iter().find(|f| f.indicator == indicator));
    let said = found.map_or(String::new(), |f| format!(": {}", trend(f)));
    let _ = writeln!(
        out,
        r##"<text x="{LEFT:.0}" y="{:.0}" font-size="13">{}</text><rect x="{LEFT:.0}" y="{:.0}" width="{WIDTH:.0}" height="{HEIGHT:.0}" fill="none" stroke="#cccccc"/>"##,
        scale.top - 7.0,
        escape(&format!("{}{said}", indicator.name())),
        scale.top
    );
    for part in [0.0, 0.5, 1.0] {
        let value = low + (high - low) * part;
        let _ = writeln!(
            out,
            r##"<text x="{:.0}" y="{:.1}" text-anchor="end" fill="#555555">{}</text>"##,
            LEFT - 6.0,
            scale.y(value) + 4.0,
            amount(indicator, value)
        );
    }
    let length = scale.time.1 - scale.time.0;
    let _ = writeln!(
        out,
        r##"<text x="{LEFT:.0}" y="{:.0}" fill="#555555">0</text><text x="{right:.0}" y="{:.0}" text-anchor="end" fill="#555555">{}</text>"##,
        bottom + 16.0,
        bottom + 16.0,
        time(length)
    );
    for (index, boot) in boots.iter().enumerate().filter(|(_, b)| !b.is_empty()) {
        if index > 0 {
            let x = scale.x(boot[0].0);
            let _ = writeln!(
                out,
                r##"<line x1="{x:.1}" y1="{:.0}" x2="{x:.1}" y2="{bottom:.0}" stroke="#a84b4b" stroke-dasharray="4 3"/><text x="{:.1}" y="{:.0}" fill="#a84b4b">reboot</text>"##,
                scale.top,
                x + 4.0,
                scale.top + 13.0
            );
        }
        let pairs: Vec<String> = boot
            .iter()
            .map(|(at, value)| format!("{:.1},{:.1}", scale.x(*at), scale.y(*value)))
            .collect();
        let _ = writeln!(
            out,
            r##"<polyline points="{}" fill="none" stroke="#5f81ab" stroke-width="2"/>"##,
            pairs.join(" ")
        );
    }
    if let (Some(Trend::Ageing { per_day, .. }), Some(boot)) =
        (found.map(|f| f.trend), boots.last())
    {
        line(out, boot, per_day / 86_400.0, scale);
    }
}

/// The trend through the running boot's points: Sen's slope through their
/// middle.
fn line(out: &mut String, boot: &[(f64, f64)], per_s: f64, scale: &Scale) {
    let (Some(first), Some(last)) = (boot.first(), boot.last()) else {
        return;
    };
    let mut levels: Vec<f64> = boot.iter().map(|(t, v)| v - per_s * (t - last.0)).collect();
    levels.sort_unstable_by(f64::total_cmp);
    let level = median_of_sorted(&levels);
    let _ = writeln!(
        out,
        r##"<line x1="{:.1}" y1="{:.1}" x2="{:.1}" y2="{:.1}" stroke="#d98c3f" stroke-width="1.5"/>"##,
        scale.x(first.0),
        scale.y(level + per_s * (first.0 - last.0)),
        scale.x(last.0),
        scale.y(level)
    );
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::super::{Look, Reading, assess};
    use super::*;

    fn samples() -> Vec<Sample> {
        let one = |boot: u8, i: u32| {
            let mut readings = [None; Indicator::ALL.len()];
            readings[0] = Some(Reading {
                value: 1e9 - 1e6 * f64::from(i),
                limit: 0.0,
            });
            Sample {
                boot: [boot; 16],
                up_s: 10.0 * f64::from(i),
                at_s: 1e9 + 1e3 * f64::from(boot) + 10.0 * f64::from(i),
                readings,
            }
        };
        let boots = [1, 2].into_iter();
        boots
            .flat_map(|boot| (0..40).map(move |i| one(boot, i)))
            .collect()
    }

    #[test]
    fn a_sawtooth_has_its_teeth_its_reboot_and_its_trend() {
        let samples = samples();
        let look = Look {
            period: None,
            ..Look::default()
        };
        let found = assess(&samples, [2; 16], look).expect("assessment");
        let text = svg("a < b", &samples, Some(&found), None);
        assert_eq!(text.matches("<polyline").count(), 2);
        assert_eq!(text.matches(">reboot<").count(), 1);
        assert!(
            text.contains("a &lt; b") && text.contains("exhausted in"),
            "{text}"
        );
        assert!(text.contains("#d98c3f") && !text.contains("NaN"), "{text}");
        assert_eq!(text, svg("a < b", &samples, Some(&found), None));
        let other = svg("none", &samples, None, Some(&[Indicator::Slab]));
        assert!(!other.contains("<polyline"), "{other}");
    }

    #[test]
    fn whatever_was_sampled_can_be_drawn() {
        let mut wild = samples();
        for (i, sample) in wild.iter_mut().enumerate() {
            let value = [f64::NAN, f64::INFINITY, 0.0, -1.0][i % 4];
            sample.at_s = if i % 5 == 0 { f64::NAN } else { 7.0 };
            sample.readings[1] = Some(Reading { value, limit: 1.0 });
        }
        for some in [&wild[..], &wild[..1], &[]] {
            let text = svg("t", some, None, None);
            assert!(
                text.ends_with("</svg>\n") && !text.contains("NaN"),
                "{text}"
            );
        }
    }
}
