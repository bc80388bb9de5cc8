//! `cargo xtask tidy`: rules that the compiler does not know.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use lab::binaries::workspace_root;
use serde_json::Value;

/// Longest source file, in lines.
const LINES_MAX: usize = 900;
/// Licences that a dependency may have.
const LICENCES: [&str; 14] = [
    "MIT",
    "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "ISC",
    "Zlib",
    "0BSD",
    "CC0-1.0",
    "BSL-1.0",
    "Unicode-3.0",
    "Unlicense",
    "MIT-0",
    "NCSA",
];
/// Layer of each member; a member depends on lower layers or its own only.
const LAYERS: [(&str, u32); 20] = [
    ("hebe-types", 0),
    ("hebe-state", 0),
    ("hebe-flow", 0),
    ("hebe-policy", 0),
    ("hebe-sys", 1),
    ("hebe-store", 1),
    ("hebe-kvm", 1),
    ("hebe-boot", 2),
    ("hebe-block", 2),
    ("hebe-devices", 2),
    ("hebe-snapshot", 2),
    ("hebe-api", 2),
    ("hebe-vmm", 3),
    ("hebe-migrate", 3),
    ("hebe-host", 3),
    ("hebe", 4),
    ("suspend-loop", 5),
    ("lab-guest", 5),
    ("lab", 6),
    ("xtask", 7),
];

/// Runs every check and prints what it finds.
pub fn run() -> Result<()> {
    let root = workspace_root();
    let metadata = metadata(&root)?;
    let mut findings = licences(&metadata);
    findings.extend(layers(&metadata));
    findings.extend(sources(&root)?);
    for finding in &findings {
        println!("{finding}");
    }
    if !findings.is_empty() {
        bail!("{} untidy places", findings.len());
    }
    println!("tidy");
    Ok(())
}

fn metadata(root: &Path) -> Result<Value> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.current_dir(root).args([
        "metadata",
        "--format-version=1",
        "--filter-platform=x86_64-unknown-linux-gnu",
    ]);
    let text = lab::apt::run(&mut command)?;
    serde_json::from_str(&text).context("cargo metadata printed no JSON")
}

/// Whether an SPDX expression can be met with the allowed licences. Only the
/// operators that crates use: OR, AND, parentheses, and the old slash.
fn licence_ok(expression: &str) -> bool {
    let flat = expression.replace(['(', ')'], " ").replace('/', " OR ");
    flat.split(" AND ")
        .all(|all| all.split(" OR ").any(|one| LICENCES.contains(&one.trim())))
}

fn licences(metadata: &Value) -> Vec<String> {
    let empty = Vec::new();
    let packages = metadata["packages"].as_array().unwrap_or(&empty);
    packages
        .iter()
        .filter(|p| !licence_ok(p["license"].as_str().unwrap_or("none")))
        .map(|p| format!("{}: licence {} is not on the list", p["name"], p["license"]))
        .collect()
}

fn layers(metadata: &Value) -> Vec<String> {
    let known: BTreeMap<&str, u32> = LAYERS.into_iter().collect();
    let empty = Vec::new();
    let mut findings = Vec::new();
    for package in metadata["packages"].as_array().unwrap_or(&empty) {
        let name = package["name"].as_str().unwrap_or_default();
        if !package["source"].is_null() {
            continue;
        }
        let Some(layer) = known.get(name) else {
            findings.push(format!(
                "{name}: no layer is written down for it in xtask/src/tidy.rs"
            ));
            continue;
        };
        for dependency in package["dependencies"].as_array().unwrap_or(&empty) {
            let on = dependency["name"].as_str().unwrap_or_default();
            let normal = dependency["kind"].is_null();
            if normal && known.get(on).is_some_and(|l| l > layer) {
                findings.push(format!("{name} (layer {layer}) depends on {on} above it"));
            }
        }
    }
    findings
}

/// Words that no file of the project holds: put together here, so that this
/// file holds none either.
fn forbidden() -> Vec<String> {
    let join = |parts: [&str; 2]| parts.concat();
    vec![
        join(["TO", "DO"]),
        join(["FIX", "ME"]),
        join(["XX", "X"]),
        join(["crates", ".io"]),
        join(["debian", ".org"]),
        join(["pypi", ".org"]),
        join(["npmjs", ".com"]),
        join(["todo", "!("]),
        join(["unimplemented", "!("]),
        join(["#[ign", "ore"]),
    ]
}

fn sources(root: &Path) -> Result<Vec<String>> {
    let words = forbidden();
    let mut findings = Vec::new();
    for file in tracked(root)? {
        let Ok(text) = fs::read_to_string(root.join(&file)) else {
            continue;
        };
        let shown = file.display();
        let rust = file.extension().is_some_and(|e| e == "rs");
        if rust && text.lines().count() > LINES_MAX {
            findings.push(format!("{shown}: more than {LINES_MAX} lines"));
        }
        if file.ends_with("Cargo.lock") {
            continue;
        }
        for (number, line) in text.lines().enumerate() {
            for word in words.iter().filter(|w| line.contains(w.as_str())) {
                findings.push(format!("{shown}:{}: holds '{word}'", number + 1));
            }
        }
    }
    Ok(findings)
}

fn tracked(root: &Path) -> Result<Vec<PathBuf>> {
    let mut command = Command::new("git");
    command
        .current_dir(root)
        .args(["ls-files", "--cached", "--others", "--exclude-standard"]);
    let text = lab::apt::run(&mut command)?;
    Ok(text.lines().map(PathBuf::from).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn licence_expressions() {
        assert!(licence_ok("MIT OR Apache-2.0"));
        assert!(licence_ok("MIT/Apache-2.0"));
        assert!(licence_ok("(MIT OR Apache-2.0) AND Unicode-3.0"));
        assert!(licence_ok("Apache-2.0 AND BSD-3-Clause"));
        assert!(!licence_ok("GPL-2.0"));
        assert!(!licence_ok("MIT AND GPL-3.0-only"));
        assert!(licence_ok("GPL-2.0 OR MIT"));
    }

    #[test]
    fn every_rule_can_fire() {
        let metadata = serde_json::json!({"packages": [
            {"name": "hebe-types", "source": null, "license": "MIT",
             "dependencies": [{"name": "hebe-vmm", "kind": null}]},
            {"name": "stranger", "source": null, "license": "none", "dependencies": []},
        ]});
        assert_eq!(layers(&metadata).len(), 2);
        assert_eq!(licences(&metadata).len(), 1);
    }
}
