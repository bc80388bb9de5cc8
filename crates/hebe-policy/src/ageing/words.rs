//! What was found, in a reader's words.

use super::{Assessment, Finding, Indicator, Trend, Unit};

/// Longer times are not told apart, in seconds.
const LONG_S: f64 = 365.25 * 86_400.0 * 10.0;

/// The largest count of a kernel, or nearly.
const UNBOUNDED: f64 = 9e18;

/// A value of an indicator.
pub fn amount(indicator: Indicator, value: f64) -> String {
    match indicator.unit() {
        Unit::Part => format!("{:.1} %", value * 100.0),
        Unit::Seconds if value.abs() < 1.0 => format!("{:.2} ms", value * 1e3),
        Unit::Seconds => format!("{value:.1} s"),
        // What Linux says where nothing bounds it (`file-max`).
        Unit::Count if value >= UNBOUNDED => "none".to_owned(),
        Unit::Count => format!("{value:.0}"),
        Unit::Bytes => {
            let units = [("GiB", 30), ("MiB", 20), ("KiB", 10)];
            let fits = |(_, shift): &&(&str, i32)| value.abs() >= 2f64.powi(*shift);
            match units.iter().find(fits) {
                Some((unit, shift)) => format!("{:.1} {unit}", value / 2f64.powi(*shift)),
                None => format!("{value:.0} B"),
            }
        }
    }
}

/// A length of time, given in seconds.
pub fn time(seconds: f64) -> String {
    if seconds >= LONG_S {
        "more than 10 years".to_owned()
    } else if seconds >= 2.0 * 86_400.0 {
        format!("{:.1} days", seconds / 86_400.0)
    } else if seconds >= 7200.0 {
        format!("{:.1} h", seconds / 3600.0)
    } else if seconds >= 120.0 {
        format!("{:.0} min", seconds / 60.0)
    } else {
        format!("{seconds:.0} s")
    }
}

/// What becomes of an indicator.
pub fn trend(finding: &Finding) -> String {
    let indicator = finding.indicator;
    match finding.trend {
        Trend::TooShort { have, need } => {
            format!("too early to tell: {have} of the {need} spans of time it takes")
        }
        Trend::None { .. } => "none for the worse".to_owned(),
        Trend::Ageing {
            per_day,
            per_day_interval: (low, high),
            exhausted_in_s,
            exhausted_interval_s: (earliest, latest),
            ..
        } => format!(
            "{} a day [{} … {}]; exhausted in {} [{} … {}]",
            amount(indicator, per_day),
            amount(indicator, low),
            amount(indicator, high),
            time(exhausted_in_s),
            time(earliest),
            latest.map_or("never".to_owned(), time)
        ),
    }
}

/// Why somebody should look, in one sentence; `None` if the host is not ageing.
pub fn alert(assessment: &Assessment) -> Option<String> {
    let (indicator, seconds) = assessment.soonest()?;
    Some(format!(
        "the host is ageing: {} is exhausted first, in {}",
        indicator.name(),
        time(seconds)
    ))
}

/// [`alert`] with the figures behind it: value, limit and trend.
pub fn alert_with_reason(assessment: &Assessment) -> Option<String> {
    let (indicator, _) = assessment.soonest()?;
    let mut findings = assessment.findings.iter();
    let finding = findings.find(|f| f.indicator == indicator)?;
    Some(format!(
        "{} ({} now, limit {}, {})",
        alert(assessment)?,
        amount(indicator, finding.last.value),
        amount(indicator, finding.last.limit),
        trend(finding)
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_and_times_have_their_units() {
        for (indicator, value, text) in [
            (Indicator::MemoryAvailable, 1.5 * 1_073_741_824.0, "1.5 GiB"),
            (Indicator::Slab, -2_097_152.0, "-2.0 MiB"),
            (Indicator::StateFiles, 12.0, "12 B"),
            (Indicator::Fragmentation, 0.253, "25.3 %"),
            (Indicator::Threads, 321.4, "321"),
            (Indicator::OpenFiles, i64::MAX as f64, "none"),
            (Indicator::VmmResponse, 0.001_234, "1.23 ms"),
            (Indicator::DiskRequest, 12.34, "12.3 s"),
        ] {
            assert_eq!(amount(indicator, value), text);
        }
        for (seconds, text) in [
            (1e10, "more than 10 years"),
            (3.0 * 86_400.0, "3.0 days"),
            (7200.0, "2.0 h"),
            (150.0, "2 min"),
            (119.0, "119 s"),
        ] {
            assert_eq!(time(seconds), text);
        }
    }
}
