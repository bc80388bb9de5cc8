//! The answer as text for people.

use std::fmt::Write;

use hebe_types::counted;

use super::line::Estimate;
use super::model::{Formula, Sign};
use super::paper::Published;
use super::report::{Report, Row};

/// A number in as few digits as it needs, with a real minus sign: two places,
/// or four below 1.
pub fn number(value: f64) -> String {
    let places = if value.abs() < 1.0 { 4 } else { 2 };
    let text = format!("{:.places$}", value.abs());
    let text = text.trim_end_matches('0').trim_end_matches('.');
    let sign = if value < 0.0 && text != "0" {
        "−"
    } else {
        ""
    };
    format!("{sign}{text}")
}

/// `name = slope·n + constant − alpha·α`, without the terms that are zero.
pub fn formula(name: &str, formula: &Formula, with_alpha: bool) -> String {
    let mut terms = vec![(formula.slope.value, "n"), (formula.constant.value, "")];
    if with_alpha {
        terms.push((-formula.alpha.value, "α"));
    }
    let mut text = String::new();
    for (value, unit) in terms {
        let digits = number(value.abs());
        if digits == "0" {
            continue;
        }
        let sign = match (text.is_empty(), value < 0.0) {
            (true, false) => "",
            (true, true) => "−",
            (false, false) => " + ",
            (false, true) => " − ",
        };
        let _ = write!(text, "{sign}{digits}{unit}");
    }
    if text.is_empty() {
        text.push('0');
    }
    format!("{name} = {text}")
}

fn range(estimate: &Estimate, show: &dyn Fn(f64) -> String) -> String {
    match estimate.interval {
        Some((low, high)) => format!(" [{} … {}]", show(low), show(high)),
        None => String::new(),
    }
}

/// A value of seconds with its interval.
fn seconds(estimate: &Estimate) -> String {
    let show = |v: f64| format!("{v:.2}").replace('-', "−");
    format!("{}{}", show(estimate.value), range(estimate, &show))
}

/// Columns as wide as their widest cell.
fn columns(out: &mut String, rows: &[Vec<String>]) {
    let count = rows.iter().map(Vec::len).max().unwrap_or(0);
    let widths: Vec<usize> = (0..count)
        .map(|i| {
            let cells = rows.iter().filter_map(|row| row.get(i));
            cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
        })
        .collect();
    for row in rows {
        let cells = row.iter().zip(&widths);
        let line: Vec<String> = cells.map(|(cell, w)| format!("{cell:<w$}")).collect();
        let _ = writeln!(out, "  {}", line.join("  ").trim_end());
    }
}

fn cells(list: &[&str]) -> Vec<String> {
    list.iter().map(|cell| (*cell).to_owned()).collect()
}

/// The whole answer.
pub fn report(report: &Report) -> String {
    let usage = &report.usage;
    let mut out = format!("from {}; seconds, n VMs\n\n", report.source);
    formulas(&mut out, report);
    let _ = writeln!(out, "\n{}\n", verdict(&report.rows));
    let alpha = number(usage.alpha);
    let mut rows = vec![vec![
        "n".into(),
        "d_w".into(),
        format!("d_c, α = {alpha}"),
        "saved".into(),
        format!("r, α = {alpha}"),
        "r, α = 1".into(),
    ]];
    rows.extend(report.rows.iter().map(|row| {
        vec![
            row.n.to_string(),
            seconds(&row.warm),
            seconds(&row.cold),
            row.saved.as_ref().map_or("-".into(), seconds),
            seconds(&row.gain),
            seconds(&row.gain_least),
        ]
    }));
    columns(&mut out, &rows);
    availability(&mut out, report);
    if let Some(published) = &report.published {
        of_paper(&mut out, published);
    }
    for note in &report.notes {
        let _ = write!(out, "\nnote: {note}");
    }
    out.push('\n');
    out
}

fn formulas(out: &mut String, report: &Report) {
    for (quantity, line) in &report.lines {
        let _ = write!(out, "  {:<11} ", quantity.name());
        let slope = number(line.slope);
        if slope == "0" {
            let _ = write!(out, "{}", number(line.intercept));
        } else {
            let sign = if line.intercept < 0.0 { '−' } else { '+' };
            let _ = write!(out, "{slope}n {sign} {}", number(line.intercept.abs()));
        }
        if line.samples > 0 {
            let _ = write!(out, "   ({})", counted(line.samples, "sample"));
        }
        out.push('\n');
    }
    out.push('\n');
    let all = [
        (&report.formulas.warm, &report.warm, false),
        (&report.formulas.cold, &report.cold, true),
        (&report.formulas.gain, &report.gain, true),
    ];
    for (text, formula, with_alpha) in all {
        let _ = writeln!(out, "  {text}");
        let mut known = Vec::new();
        let mut parts = vec![("per VM", &formula.slope), ("at n = 0", &formula.constant)];
        if with_alpha {
            parts.push(("of α", &formula.alpha));
        }
        for (what, estimate) in parts {
            if estimate.interval.is_some() {
                known.push(format!("{what}{}", range(estimate, &number)));
            }
        }
        if !known.is_empty() {
            let percent = number(report.usage.confidence * 100.0);
            let _ = writeln!(out, "      {percent} %: {}", known.join(", "));
        }
    }
    if report.published.is_some() && report.usage.os_downtime_s.is_none() {
        out.push_str("      the paper rounds it: 3.9n + 60 − 17α (R-51)\n");
    }
}

/// What the sign of r comes to, in one sentence.
pub fn verdict(rows: &[Row]) -> String {
    let ns = |fits: &dyn Fn(&Sign) -> bool| {
        let some: Vec<String> = rows
            .iter()
            .filter(|row| fits(&row.sign))
            .map(|row| row.n.to_string())
            .collect();
        some.join(", ")
    };
    let (first, last) = (rows.first(), rows.last());
    let all = |fits: &dyn Fn(&Sign) -> bool| rows.iter().all(|row| fits(&row.sign));
    let positive = |sign: &Sign| matches!(sign, Sign::Positive { .. });
    let unsure = |sign: &Sign| {
        matches!(
            sign,
            Sign::Positive {
                certain: Some(false)
            }
        )
    };
    if let (Some(first), Some(last)) = (first, last)
        && all(&positive)
    {
        let doubt = ns(&unsure);
        let doubt = if doubt.is_empty() {
            String::new()
        } else {
            format!(", though its interval at α = 1 reaches below zero for n = {doubt}")
        };
        return format!(
            "r(n) > 0 for 0 < α ≤ 1 and n from {} to {}: the warm reboot is the shorter one{doubt}",
            first.n, last.n
        );
    }
    if all(&|sign| matches!(sign, Sign::NotPositive)) {
        return "r(n) ≤ 0 for every α: the warm reboot saves nothing".into();
    }
    let mut parts = Vec::new();
    for row in rows {
        parts.push(match row.sign {
            Sign::Positive { .. } => format!("n = {}: always", row.n),
            Sign::Changes { at_alpha } => format!("n = {}: for α below {at_alpha:.2}", row.n),
            Sign::NotPositive => format!("n = {}: never", row.n),
        });
    }
    format!("r(n) > 0, {}", parts.join("; "))
}

fn percent(value: f64) -> String {
    format!("{:.4} %", value * 100.0)
}

/// Seconds in a unit that people can picture.
fn a_year(seconds: f64) -> String {
    if seconds >= 7200.0 {
        format!("{:.2} h", seconds / 3600.0)
    } else if seconds >= 120.0 {
        format!("{:.1} min", seconds / 60.0)
    } else {
        format!("{seconds:.1} s")
    }
}

fn availability(out: &mut String, report: &Report) {
    let usage = &report.usage;
    let _ = writeln!(
        out,
        "\nwith n = {}, α = {}, a rejuvenation of each guest every {} and of the host every {}:",
        usage.n,
        number(usage.alpha),
        usage.os_interval,
        usage.host_interval
    );
    let mut rows = vec![cells(&[
        "method",
        "down per host reboot (s)",
        "availability",
        "down a year",
    ])];
    rows.extend(report.availability.iter().map(|a| {
        vec![
            a.method.name().to_owned(),
            seconds(&a.downtime_s),
            format!(
                "{}{}",
                percent(a.availability.value),
                range(&a.availability, &percent)
            ),
            format!("{}{}", a_year(a.year_s.value), range(&a.year_s, &a_year)),
        ]
    }));
    columns(out, &rows);
}

fn of_paper(out: &mut String, published: &[Published]) {
    out.push_str(
        "\nJBoss at n = 11, guests weekly (33.6 s each), host every 4 weeks, α = 0.5 (R-47):\n",
    );
    let mut rows = vec![cells(&[
        "method",
        "measured (s)",
        "computed",
        "the paper's text",
    ])];
    rows.extend(published.iter().map(|p| {
        vec![
            p.method.name().to_owned(),
            number(p.measured_s),
            format!("{:.3} %", p.computed.availability.value * 100.0),
            format!("{:.3} %", p.printed_percent),
        ]
    }));
    columns(out, &rows);
    out.push_str(
        "  The paper's text gives the last two figures the other way round: by its own numbers\n  the labels of saved and cold are swapped there (D1).\n",
    );
}
