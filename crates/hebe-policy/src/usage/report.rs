//! One answer of the usage model: everything that `hebe plan` says.

use std::collections::BTreeMap;

use serde::Serialize;

use super::data::{Quantity, Sample, Table};
use super::line::{Estimate, Line};
use super::model::{Availability, Formula, Method, Model, ModelError, Sign, Usage, in_step};
use super::paper::{self, Published};
use super::text;

/// Most rows of the table by number of VMs.
const ROWS_MAX: u32 = 12;

/// The model for one number of VMs.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Row {
    /// Number of VMs.
    pub n: u32,
    /// d_w(n).
    pub warm: Estimate,
    /// d_c(n) at the α asked for.
    pub cold: Estimate,
    /// Saved, where something is known of it.
    pub saved: Option<Estimate>,
    /// r(n) at the α asked for.
    pub gain: Estimate,
    /// r(n) at α = 1, the least.
    pub gain_least: Estimate,
    /// The sign of r(n) over all α.
    #[serde(flatten)]
    pub sign: Sign,
}

/// The formulas as people write them.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Formulas {
    /// `d_w(n) = …`
    pub warm: String,
    /// `d_c(n) = …`
    pub cold: String,
    /// `r(n) = …`
    pub gain: String,
}

/// The answer.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// Where the figures come from, in words.
    pub source: String,
    /// What was asked.
    pub usage: Usage,
    /// The lines behind everything.
    pub lines: BTreeMap<Quantity, Line>,
    /// The measurements behind the lines.
    pub samples: Vec<Sample>,
    /// The formulas as text.
    pub formulas: Formulas,
    /// d_w in numbers.
    pub warm: Formula,
    /// d_c in numbers.
    pub cold: Formula,
    /// r in numbers.
    pub gain: Formula,
    /// By number of VMs.
    pub rows: Vec<Row>,
    /// By method.
    pub availability: Vec<Availability>,
    /// α if each cold reboot starts the guests' schedule again.
    pub alpha_in_step: f64,
    /// The papers' availabilities, with the papers' data.
    pub published: Option<Vec<Published>>,
    /// What a reader should know besides.
    pub notes: Vec<String>,
}

/// The papers' figures.
pub fn of_paper(usage: Usage) -> Result<Report, ModelError> {
    let mut report = build(
        &paper::model(),
        usage,
        "the papers' functions (R-50)".into(),
    )?;
    report.published = Some(paper::published(usage.confidence)?);
    report.notes.push(
        "the papers' functions carry no interval, and of saved VMs only the downtime at n = 11 is printed (R-45)".into(),
    );
    if usage.evacuate_pause_s.is_none() {
        report.notes.push(
            "the pause of a migration, 0.4 s, is of another test bed (V-36) than the rest".into(),
        );
    }
    Ok(report)
}

/// Figures fitted to measurements. `source` says in words where they are from.
pub fn of_table(table: &Table, usage: Usage, source: String) -> Result<Report, ModelError> {
    let mut report = build(&Model::fit(table)?, usage, source)?;
    if let Some(service) = &table.service
        && !table.other_services.is_empty()
    {
        report.notes.push(format!(
            "only service '{service}' is counted; there are {} besides (--service)",
            table.other_services.join(", ")
        ));
    }
    Ok(report)
}

fn build(model: &Model, usage: Usage, source: String) -> Result<Report, ModelError> {
    usage.check()?;
    let warm = model.warm_formula(&usage)?;
    let cold = model.cold_formula(&usage)?;
    let gain = model.gain_formula(&usage)?;
    let mut availability = Vec::new();
    for method in Method::ALL {
        availability.extend(model.availability(method, &usage)?);
    }
    let alpha_in_step = in_step(usage.os_interval, usage.host_interval);
    Ok(Report {
        source,
        lines: model.lines.clone(),
        samples: model.samples.clone(),
        formulas: Formulas {
            warm: text::formula("d_w(n)", &warm, false),
            cold: text::formula("d_c(n)", &cold, true),
            gain: text::formula("r(n)", &gain, true),
        },
        warm,
        cold,
        gain,
        rows: rows(model, &usage)?,
        notes: notes(model, &usage, &availability, alpha_in_step),
        availability,
        alpha_in_step,
        published: None,
        usage,
    })
}

/// A row for each of at most twelve numbers of VMs, that asked for among them.
fn rows(model: &Model, usage: &Usage) -> Result<Vec<Row>, ModelError> {
    let measured = model.measured().map_or(0, |(_, to)| to as u32);
    let last = usage.n.max(measured).max(1);
    let step = last.div_ceil(ROWS_MAX) as usize;
    let mut ns: Vec<u32> = (1..=last).step_by(step).collect();
    ns.extend([last, usage.n]);
    ns.sort_unstable();
    ns.dedup();
    ns.into_iter()
        .map(|n| {
            let at = Usage { n, ..*usage };
            let of = |method| model.downtime_of(method, &at);
            let unknown = |quantity| ModelError::Unknown(quantity, "none");
            Ok(Row {
                n,
                warm: of(Method::Warm)?.ok_or(unknown(Quantity::Warm))?,
                cold: of(Method::Cold)?.ok_or(unknown(Quantity::Cold))?,
                saved: of(Method::Saved)?,
                gain: model.gain(n, usage.alpha, usage)?,
                gain_least: model.gain(n, 1.0, usage)?,
                sign: model.sign(n, usage)?,
            })
        })
        .collect()
}

fn notes(
    model: &Model,
    usage: &Usage,
    availability: &[Availability],
    alpha_in_step: f64,
) -> Vec<String> {
    let mut notes = Vec::new();
    if let Some((from, to)) = model.measured()
        && !(from..=to).contains(&f64::from(usage.n))
    {
        notes.push(format!(
            "n = {} lies outside what was measured ({from} to {to}): the lines are only prolonged there",
            usage.n
        ));
    }
    let fitted = model.lines.iter().filter(|(_, line)| line.samples > 0);
    for (quantity, _) in fitted.filter(|(_, line)| line.spread.is_none()) {
        notes.push(format!(
            "'{quantity}' has too few samples, or all alike, so that no interval can be told"
        ));
    }
    if (alpha_in_step - usage.alpha).abs() > 1e-9 {
        notes.push(format!(
            "α = {} is a mean over reboots at any time; where each cold reboot starts the guests' schedule again and falls due with it (R-31), α is {}",
            usage.alpha,
            text::number(alpha_in_step)
        ));
    }
    let known = |method| availability.iter().any(|a| a.method == method);
    if !known(Method::Saved) {
        notes.push(format!(
            "nothing is known of saved VMs at n = {}: measure 'saved'",
            usage.n
        ));
    }
    if known(Method::Evacuate) {
        notes.push(
            "evacuate counts the pauses of migrations alone: a spare host, and the slower service while VMs move (V-02, V-41), are not in it".into(),
        );
    } else {
        notes.push(
            "nothing is known of migrations: give --evacuate-pause SECONDS, or measure 'evacuate'"
                .into(),
        );
    }
    notes
}
