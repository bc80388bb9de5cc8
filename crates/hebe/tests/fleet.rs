//! `hebe fleet roll --dry-run`.

use std::fs;
use std::process::{Command, Output};

use serde_json::Value;

fn roll(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_hebe"))
        .args(arguments)
        .output()
        .expect("hebe runs")
}

const THREE: &str = "\
group = \"rack1\"
at_most = 2
expected = \"60s\"
[[host]]
name = \"a\"
[[host]]
name = \"b\"
expected = \"90s\"
[[host]]
name = \"c\"
capacity = 2
";

#[test]
fn a_dry_run_tells_order_duration_and_capacity() {
    let dir = tempfile::tempdir().expect("dir");
    let path = dir.path().join("fleet.toml");
    fs::write(&path, THREE).expect("write");
    let file = path.display().to_string();
    let output = roll(&["fleet", "roll", "--dry-run", &file]);
    let text = String::from_utf8(output.stdout).expect("text");
    for line in [
        "c     0:01:00     0:02:00",
        "0:01:00  1.0       25 %",
        "0:02:00 if all goes",
    ] {
        assert!(text.contains(line), "{line} is missing:\n{text}");
    }
    let output = roll(&["--json", "fleet", "roll", "--dry-run", &file]);
    let value: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(value["duration_s"], 120);
    assert_eq!(value["capacity_least"], 1.0);
    let wet = roll(&["fleet", "roll", &file]);
    let text = String::from_utf8(wet.stderr).expect("text");
    assert_eq!(wet.status.code(), Some(1), "{text}");
    assert!(text.contains("belongs to no group"), "{text}");
}

#[test]
fn bad_inventories_are_one_sentence() {
    let dir = tempfile::tempdir().expect("dir");
    let path = dir.path().join("fleet.toml");
    let file = path.display().to_string();
    let missing = roll(&["fleet", "roll", "--dry-run", &file]);
    assert_eq!(missing.status.code(), Some(1));
    for (text, word) in [
        (THREE.replace("at_most = 2", "at_most = 0"), "at_most = 0"),
        (THREE.replace("\"b\"", "\"a\""), "there twice"),
        (THREE.replace("\"90s\"", "\"soon\""), "line 8"),
        (THREE.replace("at_most", "at_least"), "at_least"),
        (THREE.replace("group", "grou"), "grou"),
        ("[[host]".to_owned(), "line 1"),
    ] {
        fs::write(&path, &text).expect("write");
        let output = roll(&["fleet", "roll", "--dry-run", &file]);
        let stderr = String::from_utf8(output.stderr).expect("text");
        assert_eq!(output.status.code(), Some(1), "{text}");
        assert!(stderr.contains(word), "{word}: {stderr}");
        assert_eq!(stderr.lines().count(), 1, "{stderr}");
    }
}
