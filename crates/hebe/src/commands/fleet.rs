//! `fleet`: slots of a group of hosts, rolls through it, and what a roll would
//! be.

use std::fs;
use std::path::Path;

use hebe_fleet::order::{random_id, wall_s};
use hebe_host::Host;
use hebe_host::listing::with_cause;
use hebe_policy::fleet::forecast::{Forecast, Inventory, InventoryError};
use hebe_types::counted;

use super::{rolls, slots};
use crate::cli::{FleetCommand, RollArgs};
use crate::output::{Exit, Failure, Outcome, Output, table};

/// `hebe fleet`.
pub fn fleet(host: &Host, command: &FleetCommand, out: &Output) -> Outcome {
    match command {
        FleetCommand::Status => slots::status(host, out),
        FleetCommand::Lock { wait } => slots::lock(host, *wait, out),
        FleetCommand::Release { wait } => slots::release(host, *wait, out),
        FleetCommand::Unlock { host: name, yes } => slots::unlock(host, name, *yes, out),
        FleetCommand::Roll(args) => roll(host, args, out),
    }
}

fn roll(host: &Host, args: &RollArgs, out: &Output) -> Outcome {
    if let Some(order) = &args.order {
        return rolls::order(host, order, out);
    }
    let path = args.inventory.as_deref().unwrap_or(Path::new(""));
    let wrong = |e: InventoryError| Failure(format!("{}: {e}", path.display()));
    let inventory = inventory(path)?;
    let forecast = inventory.forecast().map_err(wrong)?;
    if args.dry_run {
        out.answer(&forecast, || text(&forecast));
        return Ok(Exit::Done);
    }
    let rollout = |by: &str| {
        let id = random_id().map_err(|e| Failure(format!("no random number is to be had: {e}")))?;
        inventory.rollout(&id, by, wall_s()).map_err(wrong)
    };
    rolls::begin(host, &inventory, rollout, args.wait, out)
}

fn inventory(path: &Path) -> Result<Inventory, Failure> {
    let file = path.display();
    let content = fs::read_to_string(path)
        .map_err(|e| Failure(format!("cannot read {file}: {}", with_cause(&e))))?;
    toml::from_str(&content).map_err(|e| Failure(format!("{file}: {}", sentence(&e, &content))))
}

/// A TOML error in one line, with the line that it is about.
fn sentence(error: &toml::de::Error, content: &str) -> String {
    let at = error.span().map_or(0, |span| span.start);
    let line = content.get(..at).unwrap_or_default().lines().count().max(1);
    let message = error.message().replace('\n', " ");
    format!("line {line}: {message}")
}

fn clock(seconds: u64) -> String {
    let (hours, minutes) = (seconds / 3600, seconds / 60 % 60);
    format!("{hours}:{minutes:02}:{:02}", seconds % 60)
}

fn text(forecast: &Forecast) -> String {
    let steps: Vec<Vec<String>> = forecast
        .steps
        .iter()
        .map(|s| vec![s.host.clone(), clock(s.from_s), clock(s.to_s)])
        .collect();
    let whole = forecast.capacity_whole;
    let part = |capacity: f64| {
        let percent = if whole > 0.0 {
            100.0 * capacity / whole
        } else {
            100.0
        };
        format!("{percent:.0} %")
    };
    let capacity: Vec<Vec<String>> = forecast
        .capacity
        .iter()
        .map(|c| {
            vec![
                clock(c.from_s),
                format!("{:.1}", c.capacity),
                part(c.capacity),
            ]
        })
        .collect();
    format!(
        "group {}: {}, at most {} at once, {} if all goes as expected\n\n{}\n{}\nleast capacity: {:.1} of {whole:.1} ({})\n",
        forecast.group,
        counted(forecast.steps.len(), "host"),
        forecast.at_most,
        clock(forecast.duration_s),
        table(&["HOST", "REBOOTS AT", "SERVES AT"], &steps),
        table(&["FROM", "CAPACITY", ""], &capacity),
        forecast.capacity_least,
        part(forecast.capacity_least),
    )
}
