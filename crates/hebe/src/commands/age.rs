//! `host sample` and `host age`: is the host ageing?

use std::fs;

use hebe_host::Host;
use hebe_host::ageing::{self, AgeingError, SLOTS, SampleStore, path_below, read};
use hebe_host::listing::with_cause;
use hebe_policy::ageing::words::{alert, amount, time, trend};
use hebe_policy::ageing::{Assessment, Finding, Indicator, Look, Reading, Sample, assess, chart};
use hebe_types::{VmId, counted};
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
    let sample = ageing::sample(host)
        .map_err(|e| Failure(format!("this host cannot be sampled: {}", with_cause(&e))))?;
    SampleStore::open(&path_below(&host.layout.state), SLOTS)?.append(&sample)?;
    out.answer(&Taken::from(&sample), String::new);
    Ok(Exit::Done)
}

/// A sample, with the names that `host age` uses.
#[derive(Serialize)]
struct Taken {
    boot_id: String,
    up_s: f64,
    at_s: f64,
    readings: Vec<Named>,
}

#[derive(Serialize)]
struct Named {
    indicator: Indicator,
    #[serde(flatten)]
    reading: Reading,
}

impl From<&Sample> for Taken {
    fn from(sample: &Sample) -> Self {
        let pairs = Indicator::ALL.into_iter().zip(sample.readings);
        let told = pairs.filter_map(|(indicator, reading)| {
            let reading = reading?;
            Some(Named { indicator, reading })
        });
        Self {
            boot_id: VmId(sample.boot).to_string(),
            up_s: sample.up_s,
            at_s: sample.at_s,
            readings: told.collect(),
        }
    }
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
    let boot = host.system.boot_id();
    let assessment = assess(&samples, boot, look).map_err(|e| Failure(e.to_string()))?;
    if let Some(path) = &args.svg {
        let title = format!(
            "How the host is doing: {}",
            counted(samples.len(), "sample")
        );
        let text = chart::svg(&title, &samples, Some(&assessment), None);
        fs::write(path, text).map_err(|e| {
            let why = with_cause(&e);
            Failure(format!("cannot write {}: {why}", path.display()))
        })?;
    }
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
    if assessment.samples == 0 {
        return format!(
            "no sample of this boot yet; {} of earlier boots can say nothing of it",
            counted(assessment.samples_before, "sample")
        );
    }
    let rows: Vec<Vec<String>> = assessment.findings.iter().map(row).collect();
    let mut text = format!(
        "{} of this boot over {}\n\n",
        counted(assessment.samples, "sample"),
        time(assessment.span_s)
    );
    text += &table(&["INDICATOR", "NOW", "LIMIT", "TREND"], &rows);
    if assessment.dropped > 0 {
        text += &format!(
            "\nnote: {} went back in time and had to be left out",
            counted(assessment.dropped, "sample")
        );
    }
    if let Some(alert) = alert(assessment) {
        text += &format!("\n{alert}");
    }
    text
}

fn row(finding: &Finding) -> Vec<String> {
    let (indicator, last) = (finding.indicator, finding.last);
    vec![
        indicator.name().to_owned(),
        amount(indicator, last.value),
        amount(indicator, last.limit),
        trend(finding),
    ]
}
