//! Tests that need KVM and kernels: they run in the emulated machine, whose
//! processor has nested virtualization whatever this one has.

pub mod ageing;
pub mod agent;
pub mod balloon;
pub mod boot_loader;
pub mod debian;
pub mod faults;
pub mod fleet;
pub mod kvm_tests;
pub mod live_update;
mod live_update_faults;
pub mod live_update_systemd;
pub mod loops;
pub mod methods;
pub mod package;
pub mod refusals;
pub mod systemd;

use anyhow::{Context, Result, ensure};
use lab::agent::ExecOutput;
use lab::scenario::Lab;
use serde_json::Value;

/// Runs a command of the product that must work, and reads its JSON.
fn json(lab: &Lab, argv: &[&str]) -> Result<Value> {
    let text = lab.machine.exec_ok(argv)?;
    serde_json::from_str(&text)
        .with_context(|| format!("{} printed no JSON: {text}", argv.join(" ")))
}

/// The states of all VMs, by name, as `hebe list` tells them.
fn states(lab: &Lab) -> Result<Vec<(String, String, String)>> {
    let list = json(lab, &["hebe", "list", "--json"])?;
    let rows = list
        .as_array()
        .or_else(|| list["vms"].as_array())
        .context("no list of VMs")?;
    let text = |row: &Value, key: &str| row[key].as_str().unwrap_or_default().to_owned();
    Ok(rows
        .iter()
        .map(|r| (text(r, "name"), text(r, "state"), text(r, "detail")))
        .collect())
}

/// The state of one VM; `absent` if it is not listed.
fn state(lab: &Lab, name: &str) -> Result<(String, String)> {
    let found = states(lab)?.into_iter().find(|(n, _, _)| n == name);
    Ok(
        found.map_or(("absent".into(), String::new()), |(_, state, reason)| {
            (state, reason)
        }),
    )
}

/// An order that must be refused: with one clear sentence that contains
/// `words`, and a non-zero exit status.
fn refused(lab: &Lab, argv: &[&str], words: &[&str]) -> Result<()> {
    let output: ExecOutput = lab.machine.exec(argv)?;
    let text = output.all_text();
    let order = argv.join(" ");
    ensure!(!output.ok(), "`{order}` was not refused: {text}");
    ensure!(!text.contains("panicked"), "`{order}` panicked: {text}");
    for word in words {
        ensure!(
            text.contains(word),
            "`{order}` was refused without the word '{word}': {text}"
        );
    }
    Ok(())
}
