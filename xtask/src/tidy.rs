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
const LAYERS: [(&str, u32); 25] = [
    ("hebe-types", 0),
    ("hebe-state", 0),
    ("hebe-flow", 0),
    ("hebe-policy", 0),
    ("hebe-sys", 1),
    ("hebe-store", 1),
    ("hebe-kvm", 1),
    ("hebe-boot", 2),
    ("hebe-block", 2),
    ("hebe-image", 2),
    ("hebe-devices", 2),
    ("hebe-snapshot", 2),
    ("hebe-agent", 2),
    ("hebe-api", 2),
    ("hebe-fleet", 2),
    ("hebe-net", 2),
    ("hebe-vmm", 3),
    ("hebe-migrate", 3),
    ("hebe-host", 3),
    ("hebe", 4),
    ("hebed", 4),
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

/// What code of layer 0 does without: it decides, and others do the I/O, read
/// the clock and run threads.
const IMPURE: [&str; 8] = [
    "unsafe ",
    "std::fs",
    "std::net",
    "std::os",
    "std::process",
    "std::thread",
    "Instant",
    "SystemTime",
];

fn sources(root: &Path) -> Result<Vec<String>> {
    let words = forbidden();
    let mut findings = Vec::new();
    for file in tracked(root)? {
        let Ok(text) = fs::read_to_string(root.join(&file)) else {
            continue;
        };
        findings.extend(untidy_lines(&file, &text, &words));
        findings.extend(impure_lines(&file, &text));
        if file == Path::new("README.md") {
            let missing = docs_paths(&text).filter(|path| !root.join(path).exists());
            findings.extend(missing.map(|path| format!("README.md: there is no {path}")));
        }
    }
    Ok(findings)
}

fn untidy_lines(file: &Path, text: &str, words: &[String]) -> Vec<String> {
    let shown = file.display();
    let extension = file.extension().and_then(|e| e.to_str());
    let mut findings = Vec::new();
    if extension == Some("rs") && text.lines().count() > LINES_MAX {
        findings.push(format!("{shown}: more than {LINES_MAX} lines"));
    }
    if file.ends_with("Cargo.lock") {
        return findings;
    }
    // In Markdown two spaces at the end of a line mean something.
    let bare_ends = matches!(extension, Some("rs" | "toml"));
    for (number, line) in (1..).zip(text.lines()) {
        for word in words.iter().filter(|w| line.contains(w.as_str())) {
            findings.push(format!("{shown}:{number}: holds '{word}'"));
        }
        if bare_ends && line.ends_with([' ', '\t']) {
            findings.push(format!("{shown}:{number}: ends in a blank"));
        }
    }
    findings
}

fn impure_lines(file: &Path, text: &str) -> Vec<String> {
    let pure = LAYERS.iter().filter(|(_, layer)| *layer == 0);
    let is_pure = pure
        .map(|(name, _)| Path::new("crates").join(name).join("src"))
        .any(|source| file.starts_with(source));
    if !is_pure {
        return Vec::new();
    }
    // A module's tests stand at its end.
    let code = text.split("\n#[cfg(test)]\nmod tests").next();
    let lines = (1..).zip(code.unwrap_or(text).lines());
    lines
        .filter(|(_, line)| !line.trim_start().starts_with("//"))
        .flat_map(|(number, line)| {
            let held = IMPURE.iter().filter(move |word| line.contains(**word));
            held.map(move |word| (number, word.trim_end()))
        })
        .map(|(number, word)| {
            let file = file.display();
            format!("{file}:{number}: layer 0 is pure and does without '{word}'")
        })
        .collect()
}

/// The paths under `docs/` that a text mentions.
fn docs_paths(text: &str) -> impl Iterator<Item = &str> {
    text.match_indices("docs/").map(|(start, _)| {
        let rest = &text[start..];
        let in_path = |c: char| c.is_ascii_alphanumeric() || "/._-".contains(c);
        let end = rest.find(|c| !in_path(c)).unwrap_or(rest.len());
        rest[..end].trim_end_matches('.')
    })
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
    #[test]
    fn layer_0_is_pure_but_for_comments_and_tests() {
        let clean = "//! No Instant.\nlet x = 1;\n\n#[cfg(test)]\nmod tests { use std::fs; }\n";
        let file = Path::new("crates/hebe-flow/src/life.rs");
        assert_eq!(impure_lines(file, clean), [""; 0]);
        for word in IMPURE {
            let text = format!("fn one() {{}}\n    {word}{{}}\n");
            let findings = impure_lines(file, &text);
            assert_eq!(findings.len(), 1, "{word}");
            assert!(findings[0].contains(":2:"), "{findings:?}");
            let other = Path::new("crates/hebe-sys/src/proc.rs");
            assert_eq!(impure_lines(other, &text), [""; 0]);
        }
    }

    #[test]
    fn blanks_at_the_ends_of_lines_are_found_where_they_mean_nothing() {
        let found = |file: &str| untidy_lines(Path::new(file), "a \nb\t\nc\n", &[]).len();
        assert_eq!((found("x.rs"), found("x.toml"), found("x.md")), (2, 2, 0));
    }

    #[test]
    fn paths_of_documents_end_where_the_path_does() {
        let text = "see [it](docs/lab.md), docs/a-b_c/d.svg. Or docs/words.md.";
        let paths: Vec<&str> = docs_paths(text).collect();
        assert_eq!(paths, ["docs/lab.md", "docs/a-b_c/d.svg", "docs/words.md"]);
    }
}
