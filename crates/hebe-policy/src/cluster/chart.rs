//! The cycles as a chart in SVG: what is lost by size of the group, and
//! throughput over the roll of one size. Deterministic.

use std::fmt::Write;

use super::{Cycle, Way};

const LEFT: f64 = 84.0;
const WIDTH: f64 = 700.0;
const HEIGHT: f64 = 230.0;
const TOPS: [f64; 2] = [92.0, 412.0];

fn colour(way: Way) -> &'static str {
    match way {
        Way::Warm => "#5b9e6f",
        Way::Cold => "#a84b4b",
        Way::Migrate => "#5f81ab",
    }
}

/// One line of the lower panel: seconds, and throughput as a part of all hosts.
pub struct Curve {
    /// What it is.
    pub label: String,
    /// Whose colour it has.
    pub way: Way,
    /// Its points, in order.
    pub points: Vec<(f64, f64)>,
}

impl Curve {
    /// Throughput of a simulated cycle, up to `until_s`.
    pub fn of(cycle: &Cycle, until_s: f64) -> Self {
        let mut points = Vec::new();
        let whole = f64::from(cycle.hosts);
        for level in cycle.levels.iter().take_while(|l| l.from_s <= until_s) {
            let value = level.hosts / whole;
            if let Some((_, last)) = points.last().copied() {
                points.push((level.from_s, last));
            }
            points.push((level.from_s, value));
        }
        if let Some((_, last)) = points.last().copied() {
            points.push((until_s, last));
        }
        Self {
            label: cycle.way.name().to_owned(),
            way: cycle.way,
            points,
        }
    }
}

/// Draws both panels: `cycles` of several sizes above, `curves` below.
pub fn svg(title: &str, cycles: &[Cycle], below: &str, curves: &[Curve]) -> String {
    let (width, height) = (LEFT + WIDTH + 30.0, TOPS[1] + HEIGHT + 56.0);
    let mut out = String::new();
    let _ = writeln!(
        out,
        r##"<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0}" height="{height:.0}" viewBox="0 0 {width:.0} {height:.0}" font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="#ffffff"/><text x="16" y="26" font-size="16">{}</text>"##,
        escape(title)
    );
    for (index, way) in Way::ALL.into_iter().enumerate() {
        let x = LEFT + 210.0 * index as f64;
        let _ = writeln!(
            out,
            r##"<line x1="{x:.0}" y1="46" x2="{:.0}" y2="46" stroke="{}" stroke-width="2.5"/><text x="{:.0}" y="50">{}</text>"##,
            x + 26.0,
            colour(way),
            x + 32.0,
            way.name()
        );
    }
    let heads = ["Throughput lost in one cycle, by number of hosts", below];
    for (top, head) in TOPS.into_iter().zip(heads) {
        let _ = writeln!(
            out,
            r##"<text x="{LEFT:.0}" y="{:.0}" font-size="13">{}</text><rect x="{LEFT:.0}" y="{top:.0}" width="{WIDTH:.0}" height="{HEIGHT:.0}" fill="none" stroke="#cccccc"/>"##,
            top - 10.0,
            escape(head)
        );
    }
    lost(&mut out, cycles);
    over_time(&mut out, curves);
    out.push_str("</svg>\n");
    out
}

/// Whole powers of ten around some values.
fn decades(values: impl Iterator<Item = f64> + Clone) -> (f64, f64) {
    let logs = values.filter(|v| *v > 0.0).map(f64::log10);
    let low = logs.clone().fold(f64::INFINITY, f64::min).floor();
    let high = logs.fold(f64::NEG_INFINITY, f64::max).ceil();
    match low < high {
        true => (low, high),
        false if low.is_finite() => (low, low + 1.0),
        false => (0.0, 1.0),
    }
}

/// Both axes in powers of ten.
fn lost(out: &mut String, cycles: &[Cycle]) {
    let (x_from, x_to) = decades(cycles.iter().map(|c| f64::from(c.hosts)));
    let (y_from, y_to) = decades(cycles.iter().map(|c| c.lost_part));
    let x = |hosts: f64| LEFT + (hosts.log10() - x_from) / (x_to - x_from) * WIDTH;
    let bottom = TOPS[0] + HEIGHT;
    let y = |part: f64| bottom - (part.log10() - y_from) / (y_to - y_from) * HEIGHT;
    let mut decade = y_from;
    while decade <= y_to {
        let at = y(10f64.powf(decade));
        let percent = 10f64.powf(decade + 2.0);
        let _ = writeln!(
            out,
            r##"<line x1="{LEFT:.0}" y1="{at:.1}" x2="{:.0}" y2="{at:.1}" stroke="#dddddd"/><text x="{:.0}" y="{:.1}" text-anchor="end" fill="#555555">{percent} %</text>"##,
            LEFT + WIDTH,
            LEFT - 6.0,
            at + 4.0
        );
        decade += 1.0;
    }
    let mut sizes: Vec<u32> = cycles.iter().map(|c| c.hosts).collect();
    sizes.sort_unstable();
    sizes.dedup();
    for size in sizes {
        let _ = writeln!(
            out,
            r##"<text x="{:.1}" y="{:.0}" text-anchor="middle" fill="#555555">{size}</text>"##,
            x(f64::from(size)),
            bottom + 16.0
        );
    }
    for way in Way::ALL {
        let mut own: Vec<&Cycle> = cycles.iter().filter(|c| c.way == way).collect();
        own.sort_by_key(|c| c.hosts);
        let points = own.iter().filter(|c| c.lost_part > 0.0);
        let points: Vec<(f64, f64)> = points
            .map(|c| (x(f64::from(c.hosts)), y(c.lost_part)))
            .collect();
        line(out, way, &points);
        for (x, y) in points {
            let _ = writeln!(
                out,
                r##"<circle cx="{x:.1}" cy="{y:.1}" r="3" fill="{}"/>"##,
                colour(way)
            );
        }
    }
}

/// From nothing to all hosts, over seconds.
fn over_time(out: &mut String, curves: &[Curve]) {
    let all = curves.iter().flat_map(|c| &c.points);
    let end = all.map(|p| p.0).fold(1.0, f64::max);
    let bottom = TOPS[1] + HEIGHT;
    for part in [0.0, 0.25, 0.5, 0.75, 1.0] {
        let y = bottom - part / 1.1 * HEIGHT;
        let _ = writeln!(
            out,
            r##"<line x1="{LEFT:.0}" y1="{y:.1}" x2="{:.0}" y2="{y:.1}" stroke="#dddddd"/><text x="{:.0}" y="{:.1}" text-anchor="end" fill="#555555">{:.0} %</text>"##,
            LEFT + WIDTH,
            LEFT - 6.0,
            y + 4.0,
            part * 100.0
        );
    }
    let _ = writeln!(
        out,
        r##"<text x="{LEFT:.0}" y="{0:.0}" fill="#555555">0</text><text x="{1:.0}" y="{0:.0}" text-anchor="end" fill="#555555">{end:.0} s</text>"##,
        bottom + 16.0,
        LEFT + WIDTH
    );
    for curve in curves {
        let at = |(s, part): &(f64, f64)| {
            let y = bottom - part.clamp(0.0, 1.1) / 1.1 * HEIGHT;
            (LEFT + s / end * WIDTH, y)
        };
        let points: Vec<(f64, f64)> = curve.points.iter().map(at).collect();
        let _ = writeln!(out, "<!-- {} -->", escape(&curve.label).replace("--", "-"));
        line(out, curve.way, &points);
    }
}

fn line(out: &mut String, way: Way, points: &[(f64, f64)]) {
    let pairs: Vec<String> = points
        .iter()
        .map(|(x, y)| format!("{x:.1},{y:.1}"))
        .collect();
    let _ = writeln!(
        out,
        r##"<polyline points="{}" fill="none" stroke="{}" stroke-width="2"/>"##,
        pairs.join(" "),
        colour(way)
    );
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::super::{Level, Way};
    use super::*;

    fn cycle(way: Way, hosts: u32) -> Cycle {
        let level = |from_s, hosts| Level { from_s, hosts };
        let all = f64::from(hosts);
        Cycle {
            way,
            hosts,
            cycle_s: 100.0,
            area: 90.0 * all,
            lost: 10.0,
            lost_part: 0.1 / all,
            least: all - 1.0,
            renewed: hosts,
            roll_s: 10.0,
            levels: vec![level(0.0, all - 1.0), level(10.0, all)],
        }
    }

    #[test]
    fn each_way_has_its_line_in_each_panel() {
        let cycles: Vec<Cycle> = Way::ALL
            .into_iter()
            .flat_map(|way| [3, 1000].map(|hosts| cycle(way, hosts)))
            .collect();
        let curves: Vec<Curve> = cycles
            .iter()
            .step_by(2)
            .map(|c| Curve::of(c, 50.0))
            .collect();
        assert_eq!(curves[0].points.len(), 4);
        let text = svg("a < b", &cycles, "c", &curves);
        assert_eq!(text.matches("<polyline").count(), 6);
        assert!(text.contains("a &lt; b") && !text.contains("NaN"), "{text}");
        let none = svg("", &[], "", &[]);
        assert!(
            none.ends_with("</svg>\n") && !none.contains("NaN"),
            "{none}"
        );
    }
}
