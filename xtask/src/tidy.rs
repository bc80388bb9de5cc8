//! Rules of the house that no compiler checks: which crate may use which,
//! which licences may come in, how long a file may grow, what no file says.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail, ensure};
use serde_json::Value;

/// Layer of each member; a member may use its own layer and those below.
const LAYERS: [(&str, u8); 18] = [
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
    ("hebe-api", 3),
    ("hebe-vmm", 3),
    ("hebe-host", 3),
    ("hebe", 4),
    ("lab-guest", 5),
    ("lab", 5),
    ("suspend-loop", 5),
];

/// Layer of members not listed: tools, which nothing of the product uses.
const LAYER_TOOLS: u8 = 5;

/// Licences that may come in; an expression passes if one of its
/// alternatives is made of these alone.
const LICENCES: [&str; 11] = [
    "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception",
    "MIT",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "ISC",
    "Zlib",
    "0BSD",
    "CC0-1.0",
    "BSL-1.0",
    "Unicode-3.0",
];

/// Longest source file, in lines.
const LINES_MAX: usize = 900;

/// Crates of layer 0 hold no unsafe code, no I/O, no clock and no threads.
const IMPURE: [&str; 8] = [
    "unsafe ",
    "std::fs",
    "std::net",
    "std::os",
    "std::process",
    "std::thread",
    "std::time::Instant",
    "std::time::SystemTime",
];

/// Runs every check, and reports all that they find.
pub fn run(root: &Path) -> anyhow::Result<()> {
    let metadata = metadata(root)?;
    let sources = sources(root)?;
    let mut findings = layers(&metadata)?;
    findings.extend(licences(&metadata)?);
    findings.extend(contents(root, &sources)?);
    for finding in &findings {
        eprintln!("tidy: {finding}");
    }
    if !findings.is_empty() {
        bail!("{} untidy places", findings.len());
    }
    println!("tidy: {} files, layers, licences and sizes are in order", sources.len());
    Ok(())
}

fn metadata(root: &Path) -> anyhow::Result<Value> {
    let output = Command::new("cargo")
        .args(["metadata", "--format-version", "1", "--locked"])
        .current_dir(root)
        .output()
        .context("cargo metadata does not run")?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(serde_json::from_slice(&output.stdout)?)
}

fn packages(metadata: &Value) -> anyhow::Result<&Vec<Value>> {
    metadata["packages"].as_array().context("cargo metadata lists no packages")
}

fn layers(metadata: &Value) -> anyhow::Result<Vec<String>> {
    let known: BTreeMap<&str, u8> = LAYERS.into();
    let layer = |name: &str| known.get(name).copied().unwrap_or(LAYER_TOOLS);
    let mut findings = Vec::new();
    for package in packages(metadata)? {
        // A path dependency has no source; what has one is not ours.
        if !package["source"].is_null() {
            continue;
        }
        let name = package["name"].as_str().unwrap_or_default();
        for dependency in package["dependencies"].as_array().into_iter().flatten() {
            let used = dependency["name"].as_str().unwrap_or_default();
            let only_for_tests = dependency["kind"] == "dev";
            if dependency["path"].is_null() || only_for_tests {
                continue;
            }
            if layer(used) > layer(name) {
                findings.push(format!(
                    "{name} (layer {}) must not use {used} (layer {})",
                    layer(name),
                    layer(used)
                ));
            }
        }
    }
    Ok(findings)
}

fn licences(metadata: &Value) -> anyhow::Result<Vec<String>> {
    let mut findings = Vec::new();
    for package in packages(metadata)? {
        let expression = package["license"].as_str().unwrap_or_default();
        if !allowed(expression) {
            findings.push(format!("{} has licence '{expression}'", package["name"]));
        }
    }
    Ok(findings)
}

/// Whether an SPDX expression can be met with the allowed licences. Handles
/// what occurs: `OR`, `AND`, `/`, and one level of parentheses.
fn allowed(expression: &str) -> bool {
    let plain = expression.replace('/', " OR ");
    // "(A OR B) AND C": each conjunct must have an allowed alternative.
    plain.split(" AND ").all(|conjunct| {
        conjunct
            .split(" OR ")
            .any(|licence| LICENCES.contains(&licence.trim_matches(['(', ')', ' '])))
    })
}

fn sources(root: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let output = Command::new("git")
        .args(["ls-files", "-co", "--exclude-standard"])
        .current_dir(root)
        .output()
        .context("git does not run")?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let list = String::from_utf8(output.stdout).context("a file name is not text")?;
    Ok(list.lines().map(PathBuf::from).filter(|p| root.join(p).is_file()).collect())
}

fn contents(root: &Path, sources: &[PathBuf]) -> anyhow::Result<Vec<String>> {
    let mut findings = Vec::new();
    for path in sources {
        let name = path.to_string_lossy();
        let Ok(text) = std::fs::read_to_string(root.join(path)) else { continue };
        if name.ends_with(".rs") {
            let lines = text.lines().count();
            if lines > LINES_MAX {
                findings.push(format!("{name} has {lines} lines: more than {LINES_MAX}"));
            }
            if name != "xtask/src/tidy.rs" {
                findings.extend(unfinished(&name, &text));
            }
            findings.extend(impure(&name, &text));
        }
        if text.lines().any(|line| line.ends_with([' ', '\t'])) && !name.ends_with(".md") {
            findings.push(format!("{name} has space at a line's end"));
        }
    }
    Ok(findings)
}

fn unfinished(name: &str, text: &str) -> Vec<String> {
    let marks = ["todo!(", "unimplemented!(", "// TODO", "// FIXME", "#[ignore", "dbg!("];
    let found = marks.iter().filter(|mark| text.contains(**mark));
    found.map(|mark| format!("{name} holds '{mark}'")).collect()
}

fn impure(name: &str, text: &str) -> Vec<String> {
    let layer_0 = LAYERS.iter().filter(|(_, layer)| *layer == 0);
    let is_pure = layer_0
        .map(|(member, _)| format!("crates/{member}/src/"))
        .any(|prefix| name.starts_with(&prefix));
    if !is_pure {
        return Vec::new();
    }
    // Tests may do what they need; they come last in a file.
    let code = text.split("#[cfg(test)]").next().unwrap_or_default();
    let lines = code.lines().filter(|line| !line.trim_start().starts_with("//"));
    let code: String = lines.collect::<Vec<_>>().join("\n");
    let found = IMPURE.iter().filter(|word| code.contains(**word));
    found.map(|word| format!("{name} is in a pure crate and uses '{word}'")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn licence_expressions_are_judged() {
        for good in ["MIT", "MIT OR Apache-2.0", "MIT/Apache-2.0", "(MIT OR GPL-3.0) AND ISC"] {
            assert!(allowed(good), "{good}");
        }
        for bad in ["", "GPL-3.0", "MPL-2.0", "MIT AND GPL-2.0", "AGPL-3.0 OR MPL-2.0"] {
            assert!(!allowed(bad), "{bad}");
        }
    }

    #[test]
    fn an_arrow_that_points_up_is_found() {
        let metadata = serde_json::json!({ "packages": [
            { "name": "hebe-store", "source": null,
              "dependencies": [{ "name": "hebe-host", "path": "/x", "kind": null }] },
            { "name": "hebe-host", "source": null,
              "dependencies": [{ "name": "hebe-store", "path": "/x", "kind": null }] },
        ]});
        let findings = layers(&metadata).expect("well formed");
        assert_eq!(findings.len(), 1);
        assert!(findings[0].starts_with("hebe-store (layer 1) must not use hebe-host"));
    }

    #[test]
    fn impurity_is_found_in_pure_crates_alone() {
        let text = "use std::fs;\n#[cfg(test)]\nmod tests { use std::thread; }";
        assert_eq!(impure("crates/hebe-flow/src/x.rs", text).len(), 1);
        assert!(impure("crates/hebe-sys/src/x.rs", text).is_empty());
    }
}
