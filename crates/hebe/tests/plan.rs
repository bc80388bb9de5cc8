//! `hebe plan`: the papers' figures, measured ones, and bad input.

use std::fs;
use std::process::{Command, Output};

use serde_json::Value;

fn plan(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_hebe"))
        .arg("plan")
        .args(arguments)
        .output()
        .expect("hebe runs")
}

fn text(arguments: &[&str]) -> String {
    let output = plan(arguments);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments:?}: {stderr}");
    String::from_utf8(output.stdout).expect("text")
}

/// and D1.
#[test]
fn the_papers_figures_are_printed_to_every_digit() {
    let text = text(&["--data", "paper"]);
    assert!(text.contains("r(n) = 3.92n + 60.07 − 16.8α"), "{text}");
    let of = |method: &str| {
        let after = text.split("R-47").nth(1).expect("R-47");
        let line = after.lines().find(|l| l.trim().starts_with(method));
        line.expect(method)
            .split_whitespace()
            .nth(2)
            .map(str::to_owned)
    };
    assert_eq!(of("warm").as_deref(), Some("99.993"));
    assert_eq!(of("saved").as_deref(), Some("99.977"));
    assert_eq!(of("cold").as_deref(), Some("99.985"));
    assert!(text.contains("swapped"), "{text}");
}

#[test]
fn json_and_chart_say_the_same() {
    let dir = tempfile::tempdir().expect("dir");
    let svg = dir.path().join("plan.svg").display().to_string();
    let output = plan(&["--json", "--data", "paper", "--svg", &svg]);
    let value: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let gain = value["formulas"]["gain"].as_str().expect("gain");
    assert!(fs::read_to_string(&svg).expect("chart").contains(gain));
    assert_eq!(value["rows"].as_array().map(Vec::len), Some(11));
}

#[test]
fn a_measured_table_is_planned_with() {
    let dir = tempfile::tempdir().expect("dir");
    let csv = dir.path().join("reboot.csv");
    let mut rows = String::from("method,n,repeat,vm,service,downtime_ms\n");
    for (n, repeat, off) in [(1, 0, 90), (1, 1, -80), (4, 0, 20), (4, 1, -60), (8, 0, 30)] {
        for (method, base, slope) in [("warm", 10_000, 200), ("cold", 20_000, 3_000)] {
            let ms = base + slope * n + off;
            rows += &format!("{method},{n},{repeat},vm1,light,{ms}.0\n");
            rows += &format!("{method},{n},{repeat},vm1,slow,{}.0\n", 2 * ms);
        }
    }
    fs::write(&csv, rows).expect("write");
    let csv = csv.display().to_string();
    let light = text(&["--data", &csv, "--os-downtime", "12"]);
    assert!(light.contains("95 %: per VM ["), "{light}");
    assert!(
        light.contains("the warm reboot is the shorter one"),
        "{light}"
    );
    assert!(light.contains("there are slow besides"), "{light}");
    let slow = text(&["--data", &csv, "--os-downtime", "12", "--service", "slow"]);
    assert_ne!(light, slow);
}

/// Each is refused with exit status 1 or 2 and one sentence on stderr.
#[test]
fn bad_input_is_one_sentence() {
    let dir = tempfile::tempdir().expect("dir");
    let file = |name: &str, content: &str| {
        let path = dir.path().join(name);
        fs::write(&path, content).expect("write");
        path.display().to_string()
    };
    let one = file("one.csv", "method,n,seconds\nwarm,1,9\n");
    let gap = file("gap.csv", "method,n,seconds\nwarm,1,\n");
    let same = file("same.csv", "method,n,seconds\nwarm,4,9\nwarm,4,8\n");
    let minus = file("minus.csv", "method,n,seconds\nwarm,4,-9\n");
    let json = file("r.json", "{}");
    let bytes = file("b", "\u{1}\u{2}");
    let none = dir.path().join("none").display().to_string();
    for (arguments, word) in [
        (vec!["--data", &one], "one sample"),
        (vec!["--data", &gap], "fill the gap"),
        (vec!["--data", &same], "second number of VMs"),
        (vec!["--data", &minus], "'-9'"),
        (vec!["--data", &json], "cannot be read"),
        (vec!["--data", &json, "--service", "web"], "no services"),
        (vec!["--data", &bytes], "no column"),
        (vec!["--data", &none], "none"),
        (vec!["--data", "paper", "--data", &one], "stands alone"),
        (vec!["--data", "paper", "--alpha", "2"], "α = 2"),
        (vec!["--data", "paper", "--os-interval", "soon"], "'soon'"),
        (
            vec!["--data", "paper", "--svg", "/no/such/dir/x.svg"],
            "cannot write",
        ),
        (vec![], "--data"),
    ] {
        let output = plan(&arguments);
        let code = output.status.code().expect("exited");
        let stderr = String::from_utf8(output.stderr).expect("text");
        assert!([1, 2].contains(&code), "{arguments:?}: {code}");
        assert!(stderr.contains(word), "{arguments:?}: {stderr}");
        assert!(code == 2 || stderr.lines().count() == 1, "{stderr}");
    }
}
