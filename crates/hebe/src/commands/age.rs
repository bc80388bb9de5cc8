//! `host sample` and `host age`: is the host ageing?

use hebe_host::Host;
use hebe_host::ageing::{AgeingError, SLOTS, SampleStore, path_below, read, sample_here};
use hebe_host::listing::with_cause;
use hebe_policy::ageing::{Assessment, Finding, Indicator, Look, Trend, assess};
use serde::Serialize;

use crate::cli::AgeArgs;
use crate::output::{Exit, Failure, Outcome, Output, table};

impl From<AgeingError> for Failure {
    fn from(error: AgeingError) -> Self {
        Self(with_cause(&error))
    }
}

/// `hebe host sample`.
pub fn sample(host: &Host, out: &Output) -> Outcome {
    let sample = sample_here()
        .map_err(|e| Failure(format!("this host cannot be sampled: {}", with_cause(&e))))?;
    SampleStore::open(&path_below(&host.layout.state), SLOTS)?.append(&sample)?;
    out.answer(&sample, String::new);
    Ok(Exit::Done)
}

#[derive(Serialize)]
struct Answer<'a> {
    ageing: bool,
    #[serde(flatten)]
    assessment: &'a Assessment,
}

/// `hebe host age`.
pub fn age(host: &Host, args: &AgeArgs, out: &Output) -> Outcome {
    let look = Look {
        period: args.period.0,
        error_rate: args.error_rate,
        confidence: args.confidence,
    };
    let samples = read(&path_below(&host.layout.state))?;
    let assessment = assess(&samples, look).map_err(|e| Failure(e.to_string()))?;
    let ageing = assessment.soonest().is_some();
    let answer = Answer {
        ageing,
        assessment: &assessment,
    };
    out.answer(&answer, || text(&assessment));
    Ok(if ageing {
        Exit::CheckFailed
    } else {
        Exit::Done
    })
}

fn text(assessment: &Assessment) -> String {
    let rows: Vec<Vec<String>> = assessment.findings.iter().map(row).collect();
    let mut text = format!(
        "{} samples of this boot over {}\n\n",
        assessment.samples,
        time(assessment.span_s)
    );
    text += &table(&["INDICATOR", "NOW", "LIMIT", "TREND"], &rows);
    if assessment.dropped > 0 {
        text += &format!(
            "\nnote: {} samples went back in time and were left out",
            assessment.dropped
        );
    }
    if let Some((indicator, seconds)) = assessment.soonest() {
        text += &format!(
            "\nthe host is ageing: {} is exhausted first, in {}",
            indicator.name(),
            time(seconds)
        );
    }
    text
}

fn row(finding: &Finding) -> Vec<String> {
    let indicator = finding.indicator;
    let trend = match finding.trend {
        Trend::TooShort { have, need } => format!("too early to tell: {have} of {need}"),
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
    };
    let last = finding.last;
    vec![
        indicator.name().to_owned(),
        amount(indicator, last.value),
        amount(indicator, last.limit),
        trend,
    ]
}

fn amount(indicator: Indicator, value: f64) -> String {
    if indicator == Indicator::Fragmentation {
        return format!("{:.1} %", value * 100.0);
    }
    if !indicator.is_bytes() {
        return format!("{value:.0}");
    }
    let units = [("GiB", 30), ("MiB", 20), ("KiB", 10)];
    let fits = |(_, shift): &&(&str, i32)| value.abs() >= 2f64.powi(*shift);
    match units.iter().find(fits) {
        Some((unit, shift)) => format!("{:.1} {unit}", value / 2f64.powi(*shift)),
        None => format!("{value:.0} B"),
    }
}

fn time(seconds: f64) -> String {
    if seconds >= 365.25 * 86_400.0 * 10.0 {
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
