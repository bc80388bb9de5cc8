//! The answer as a chart in SVG: downtime by number of VMs, with intervals and
//! samples. Deterministic: the same answer gives the same bytes.

use std::fmt::Write;

use super::data::Quantity;
use super::line::Estimate;
use super::report::{Report, Row};
use super::text;

const LEFT: f64 = 70.0;
const TOP: f64 = 92.0;
const WIDTH: f64 = 720.0;
const HEIGHT: f64 = 380.0;

/// One curve.
struct Series {
    label: String,
    colour: &'static str,
    dash: &'static str,
    /// Its samples, if it has any of its own.
    quantity: Option<Quantity>,
    points: Vec<(f64, Estimate)>,
}

/// Where numbers of VMs and seconds lie.
struct Scale {
    n: (f64, f64),
    seconds: (f64, f64),
}

impl Scale {
    fn x(&self, n: f64) -> f64 {
        LEFT + (n - self.n.0) / (self.n.1 - self.n.0) * WIDTH
    }

    fn y(&self, seconds: f64) -> f64 {
        let (low, high) = self.seconds;
        TOP + HEIGHT - (seconds.clamp(low, high) - low) / (high - low) * HEIGHT
    }
}

/// Draws the answer.
pub fn svg(report: &Report) -> String {
    let series = series(report);
    let scale = scale(report, &series);
    let (width, height) = (LEFT + WIDTH + 30.0, TOP + HEIGHT + 60.0);
    let mut out = String::new();
    let _ = writeln!(
        out,
        r##"<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0}" height="{height:.0}" viewBox="0 0 {width:.0} {height:.0}" font-family="sans-serif" font-size="13">"##
    );
    let _ = writeln!(
        out,
        r##"<rect width="100%" height="100%" fill="#ffffff"/>"##
    );
    let title = format!("Downtime by number of VMs, from {}", report.source);
    let heads = [(title.as_str(), 26, 17), (&report.formulas.gain, 48, 13)];
    for (head, y, size) in heads {
        let head = escape(head);
        let _ = writeln!(
            out,
            r##"<text x="16" y="{y}" font-size="{size}">{head}</text>"##
        );
    }
    axes(&mut out, &scale);
    for (index, one) in series.iter().enumerate() {
        draw(&mut out, one, &scale);
        samples(&mut out, one, report, &scale);
        let x = LEFT + 180.0 * index as f64;
        let _ = writeln!(
            out,
            r##"<line x1="{x:.0}" y1="70" x2="{:.0}" y2="70" stroke="{}" stroke-width="2.5"{}/><text x="{:.0}" y="74">{}</text>"##,
            x + 26.0,
            one.colour,
            one.dash,
            x + 32.0,
            escape(&one.label)
        );
    }
    out.push_str("</svg>\n");
    out
}

fn series(report: &Report) -> Vec<Series> {
    let alpha = text::number(report.usage.alpha);
    let pick = |of: &dyn Fn(&Row) -> Option<Estimate>| {
        let some = report.rows.iter();
        some.filter_map(|row| Some((f64::from(row.n), of(row)?)))
            .collect::<Vec<_>>()
    };
    let mut all = vec![
        Series {
            label: "warm, d_w".into(),
            colour: "#5b9e6f",
            dash: "",
            quantity: Some(Quantity::Warm),
            points: pick(&|row| Some(row.warm)),
        },
        Series {
            label: format!("cold, d_c at α = {alpha}"),
            colour: "#a84b4b",
            dash: "",
            quantity: None,
            points: pick(&|row| Some(row.cold)),
        },
        Series {
            label: "saved".into(),
            colour: "#d98c3f",
            dash: "",
            quantity: Some(Quantity::Saved),
            points: pick(&|row| row.saved),
        },
        Series {
            label: format!("gain, r at α = {alpha}"),
            colour: "#5f81ab",
            dash: r#" stroke-dasharray="6 4""#,
            quantity: None,
            points: pick(&|row| Some(row.gain)),
        },
    ];
    all.retain(|one| !one.points.is_empty());
    all
}

fn scale(report: &Report, series: &[Series]) -> Scale {
    let values = || {
        series
            .iter()
            .flat_map(|s| s.points.iter().map(|p| p.1.value))
    };
    let measured = report.samples.iter().map(|s| s.seconds);
    let high = values().chain(measured).fold(1e-3, f64::max);
    let low = values().fold(0.0, f64::min);
    let step = step(high - low);
    let last = report.rows.last().map_or(1.0, |row| f64::from(row.n));
    Scale {
        n: (0.0, last.max(1.0)),
        seconds: ((low / step).floor() * step, (high / step).ceil() * step),
    }
}

/// A round step that gives at most ten marks.
fn step(length: f64) -> f64 {
    let mut step = 1e-4;
    loop {
        for factor in [1.0, 2.0, 5.0] {
            if length / (step * factor) <= 10.0 {
                return step * factor;
            }
        }
        step *= 10.0;
    }
}

fn axes(out: &mut String, scale: &Scale) {
    let (low, high) = scale.seconds;
    let marks = step(high - low);
    let count = ((high - low) / marks).round() as u32;
    for index in 0..=count {
        let at = low + f64::from(index) * marks;
        let y = scale.y(at);
        let _ = writeln!(
            out,
            r##"<line x1="{LEFT:.0}" y1="{y:.1}" x2="{:.0}" y2="{y:.1}" stroke="#dddddd"/><text x="{:.0}" y="{:.1}" text-anchor="end" fill="#555555">{}</text>"##,
            LEFT + WIDTH,
            LEFT - 8.0,
            y + 4.0,
            text::number(at)
        );
    }
    let marks = step(scale.n.1).max(1.0);
    let count = (scale.n.1 / marks).floor() as u32;
    for index in 0..=count {
        let at = f64::from(index) * marks;
        let (x, y) = (scale.x(at), TOP + HEIGHT + 18.0);
        let _ = writeln!(
            out,
            r##"<text x="{x:.1}" y="{y:.0}" text-anchor="middle" fill="#555555">{at:.0}</text>"##
        );
    }
    let (x, y) = (LEFT + WIDTH / 2.0, TOP + HEIGHT + 42.0);
    let _ = writeln!(
        out,
        r##"<text x="{x:.0}" y="{y:.0}" text-anchor="middle" fill="#555555">VMs</text><text x="8" y="{:.0}" fill="#555555">seconds</text>"##,
        TOP - 6.0
    );
}

fn path(points: impl Iterator<Item = (f64, f64)>) -> String {
    let pairs: Vec<String> = points.map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
    pairs.join(" ")
}

fn draw(out: &mut String, series: &Series, scale: &Scale) {
    let at = |n: f64, seconds: f64| (scale.x(n), scale.y(seconds));
    let banded = || {
        let some = series.points.iter();
        some.filter_map(|(n, e)| Some((*n, e.interval?)))
    };
    if banded().count() > 1 {
        let upper = banded().map(|(n, (_, high))| at(n, high));
        let back: Vec<(f64, f64)> = banded().map(|(n, (low, _))| at(n, low)).collect();
        let all = path(upper.chain(back.into_iter().rev()));
        let _ = writeln!(
            out,
            r##"<polygon points="{all}" fill="{}" fill-opacity="0.15"/>"##,
            series.colour
        );
    }
    if let [(n, only)] = series.points[..] {
        let (x, y) = at(n, only.value);
        let _ = writeln!(
            out,
            r##"<circle cx="{x:.1}" cy="{y:.1}" r="5" fill="{}"/>"##,
            series.colour
        );
        return;
    }
    let all = path(series.points.iter().map(|(n, e)| at(*n, e.value)));
    let _ = writeln!(
        out,
        r##"<polyline points="{all}" fill="none" stroke="{}" stroke-width="2.5"{}/>"##,
        series.colour, series.dash
    );
}

fn samples(out: &mut String, series: &Series, report: &Report, scale: &Scale) {
    let own = report
        .samples
        .iter()
        .filter(|s| Some(s.quantity) == series.quantity);
    for sample in own {
        let (x, y) = (scale.x(sample.n), scale.y(sample.seconds));
        let _ = writeln!(
            out,
            r##"<circle cx="{x:.1}" cy="{y:.1}" r="3" fill="none" stroke="{}"/>"##,
            series.colour
        );
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}
