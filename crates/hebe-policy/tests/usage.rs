//! The usage model against the papers' figures, and against bad input.

use hebe_policy::span::Span;
use hebe_policy::usage::data::{Quantity, Table, read_csv};
use hebe_policy::usage::line::Line;
use hebe_policy::usage::model::{Method, Model, ModelError, Sign, Usage, in_step};
use hebe_policy::usage::{chart, paper, report, text};
use proptest::prelude::*;

fn usage(n: u32) -> Usage {
    Usage {
        n,
        alpha: 0.5,
        os_interval: Span::weeks(1),
        host_interval: Span::weeks(4),
        os_downtime_s: None,
        evacuate_pause_s: None,
        moves: 2,
        confidence: 0.95,
    }
}

/// the formulas follow from the functions, to every digit.
#[test]
fn the_papers_formulas_come_out() {
    let report = report::of_paper(usage(11)).expect("report");
    assert_eq!(report.formulas.warm, "d_w(n) = −0.12n + 42.93");
    assert_eq!(report.formulas.cold, "d_c(n) = 3.8n + 103 − 16.8α");
    assert_eq!(report.formulas.gain, "r(n) = 3.92n + 60.07 − 16.8α");
    // As R-51 rounds: two figures each.
    let rounded = (
        (report.gain.slope.value * 10.0).round() / 10.0,
        report.gain.constant.value.round(),
        report.gain.alpha.value.round(),
    );
    assert_eq!(rounded, (3.9, 60.0, 17.0));
    for row in &report.rows {
        assert_eq!(row.sign, Sign::Positive { certain: None }, "n = {}", row.n);
    }
}

/// R-47 with D1: the three figures to every digit that the paper prints, and
/// the labels of the last two the other way round.
#[test]
fn the_papers_availabilities_come_out_with_the_labels_put_right() {
    let published = paper::published(0.95).expect("published");
    let by = |method: Method| {
        let found = published.iter().find(|p| p.method == method);
        let found = found.expect("method");
        let percent = found.computed.availability.value * 100.0;
        (
            format!("{percent:.3}"),
            format!("{percent:.4}"),
            found.printed_percent,
        )
    };
    assert_eq!(
        by(Method::Warm),
        ("99.993".into(), "99.9927".into(), 99.993)
    );
    assert_eq!(
        by(Method::Saved),
        ("99.977".into(), "99.9767".into(), 99.985)
    );
    assert_eq!(
        by(Method::Cold),
        ("99.985".into(), "99.9852".into(), 99.977)
    );
    let text = text::report(&report::of_paper(usage(11)).expect("report"));
    for word in [
        "r(n) = 3.92n + 60.07 − 16.8α",
        "3.9n + 60 − 17α",
        "99.993 %",
        "99.977 %",
        "99.985 %",
        "swapped",
        "D1",
    ] {
        assert!(text.contains(word), "{word} is missing:\n{text}");
    }
}

/// Nothing of the papers' case is built in: other intervals, other figures.
#[test]
fn intervals_and_alpha_are_free() {
    let model = paper::model();
    let monthly = Usage {
        alpha: 1.0,
        os_interval: Span::days(2),
        host_interval: Span::days(10),
        os_downtime_s: Some(20.0),
        ..usage(4)
    };
    let cold = model.availability(Method::Cold, &monthly).expect("model");
    // 47 + 43 + 3.8·4 + 13 = 118.2; 5 − 1 OS rejuvenations of 20 s.
    let expected = 1.0 - (118.2 + 80.0) / 864_000.0;
    let found = cold.expect("known").availability.value;
    assert!((found - expected).abs() < 1e-12, "{found} {expected}");
    let evacuate = model.availability(Method::Evacuate, &monthly);
    let found = evacuate.expect("model").expect("known").downtime_s.value;
    assert!((found - 0.8).abs() < 1e-12);
    assert_eq!(model.availability(Method::Saved, &monthly), Ok(None));
}

#[test]
fn alpha_in_step_is_what_a_schedule_that_starts_again_gives() {
    assert_eq!(in_step(Span::weeks(1), Span::weeks(4)), 1.0);
    assert_eq!(in_step(Span::days(7), Span::days(10)), 3.0 / 7.0);
    assert_eq!(in_step(Span::days(7), Span::days(3)), 3.0 / 7.0);
}

/// Counts OS rejuvenations one after the other and compares with T/t − α.
#[test]
fn the_formula_agrees_with_a_schedule_played_through() {
    for (os, host) in [(7, 28), (7, 30), (2, 9), (5, 3), (1, 365)] {
        let mut at = os;
        let mut count = 0;
        while at < host {
            count += 1;
            at += os;
        }
        let alpha = in_step(Span::days(os), Span::days(host));
        let formula = host as f64 / os as f64 - alpha;
        assert!((formula - f64::from(count)).abs() < 1e-9, "{os} {host}");
    }
}

#[test]
fn what_cannot_be_meant_is_refused_with_a_sentence() {
    let base = usage(4);
    for (bad, word) in [
        (Usage { alpha: 0.0, ..base }, "α = 0"),
        (Usage { alpha: 1.5, ..base }, "α = 1.5"),
        (
            Usage {
                alpha: f64::NAN,
                ..base
            },
            "α = NaN",
        ),
        (
            Usage {
                os_interval: Span::seconds(0),
                ..base
            },
            "longer than 0s",
        ),
        (
            Usage {
                host_interval: Span::days(2),
                ..base
            },
            "at most 0.2857",
        ),
        (
            Usage {
                confidence: 1.0,
                ..base
            },
            "confidence",
        ),
        (
            Usage {
                os_downtime_s: Some(-1.0),
                ..base
            },
            "--os-downtime",
        ),
        (
            Usage {
                evacuate_pause_s: Some(f64::NAN),
                ..base
            },
            "--evacuate-pause",
        ),
        (
            Usage {
                os_interval: Span::seconds(10),
                ..base
            },
            "longer",
        ),
    ] {
        let error = report::of_paper(bad).expect_err(word).to_string();
        assert!(error.contains(word), "{error}");
        assert_eq!(error.lines().count(), 1, "{error}");
    }
}

fn table(rows: &str) -> Table {
    read_csv(
        format!("method,n,repeat,downtime_ms\n{rows}").as_bytes(),
        None,
    )
    .expect("table")
}

#[test]
fn too_little_data_is_refused_with_a_sentence() {
    let one = Model::fit(&table("warm,4,0,1000\n"));
    assert_eq!(one, Err(ModelError::OneSample(Quantity::Warm)));
    let same = Model::fit(&table("warm,4,0,1000\nwarm,4,1,1100\n"));
    assert!(matches!(same, Err(ModelError::OneN { n: 4.0, .. })));
    let only_warm = table("warm,1,0,1000\nwarm,2,0,1100\n");
    let usage_os = Usage {
        os_downtime_s: Some(5.0),
        ..usage(2)
    };
    let error = report::of_table(&only_warm, usage_os, "a file".into()).expect_err("no cold");
    assert!(
        error.to_string().contains("nothing is known of 'cold'"),
        "{error}"
    );
    let both = table("warm,1,0,1000\nwarm,2,0,1100\ncold,1,0,9000\ncold,2,0,9900\n");
    let error = report::of_table(&both, usage(2), "a file".into()).expect_err("no OS");
    assert_eq!(error, ModelError::NoOsDowntime);
    let report = report::of_table(&both, usage_os, "a file".into()).expect("report");
    assert!(report.notes.iter().any(|note| note.contains("no interval")));
    assert_eq!(report.formulas.gain, "r(n) = 0.8n + 7.2 − 5α");
    assert!(!text::report(&report).contains("NaN"));
}

#[test]
fn constant_downtimes_have_no_interval_and_a_line_below_zero_is_refused() {
    let constant = table(
        "warm,1,0,1000\nwarm,2,0,1000\nwarm,3,0,1000\ncold,1,0,9000\ncold,2,0,9000\ncold,3,0,9000\n",
    );
    let usage_os = Usage {
        os_downtime_s: Some(5.0),
        ..usage(2)
    };
    let report = report::of_table(&constant, usage_os, "a file".into()).expect("report");
    assert_eq!(report.formulas.warm, "d_w(n) = 1");
    assert!(report.warm.constant.interval.is_none());
    let falling = table("warm,1,0,9000\nwarm,2,0,1000\ncold,1,0,9000\ncold,2,0,9900\n");
    let far = Usage { n: 5, ..usage_os };
    let error = report::of_table(&falling, far, "a file".into()).expect_err("below zero");
    assert_eq!(error, ModelError::BelowZero { what: "warm", n: 5 });
}

/// With noise the intervals are there, hold the truth, and the chart shows them.
#[test]
fn measurements_with_noise_get_intervals_everywhere() {
    let mut rows = String::new();
    for n in [1, 2, 4, 8] {
        for repeat in 0..4 {
            let wobble = f64::from((n * 7 + repeat * 13) % 5) * 40.0 - 80.0;
            let (warm, cold) = (f64::from(10_000 + 50 * n), f64::from(20_000 + 4_000 * n));
            rows += &format!("warm,{n},{repeat},{}\n", warm + wobble);
            rows += &format!("cold,{n},{repeat},{}\n", cold - wobble);
            rows += &format!("saved,{n},{repeat},{}\n", 2.0 * cold + wobble);
            rows += &format!("reboot-os,{n},{repeat},{}\n", cold / 2.0 + wobble);
        }
    }
    let report = report::of_table(&table(&rows), usage(4), "a file".into()).expect("report");
    let (low, high) = report.gain.slope.interval.expect("interval");
    assert!(low < 3.95 && 3.95 < high, "{low} {high}");
    assert_eq!(report.availability.len(), 3);
    for a in &report.availability {
        let (low, high) = a.availability.interval.expect("interval");
        assert!(low < a.availability.value && a.availability.value < high);
    }
    assert!(report.rows.iter().all(|r| r.sign
        == Sign::Positive {
            certain: Some(true)
        }));
    let chart = chart::svg(&report);
    assert_eq!(chart.matches("<polygon").count(), 4);
    assert!(!chart.contains("NaN") && chart.ends_with("</svg>\n"));
    assert_eq!(chart, chart::svg(&report));
    let json = serde_json::to_value(&report).expect("JSON");
    assert_eq!(json["formulas"]["gain"], report.formulas.gain);
    assert!(json["gain"]["slope"]["interval"][0].is_number());
}

#[test]
fn the_sign_changes_where_an_os_rejuvenation_is_dear() {
    let mut model = paper::model();
    model.lines.insert(Quantity::ResetHw, Line::constant(-50.0));
    let usage = Usage {
        os_downtime_s: Some(16.8),
        ..usage(1)
    };
    // r(1) = 3.92 + 13.07 − 50 − … : below zero for every α.
    assert_eq!(model.sign(1, &usage), Ok(Sign::NotPositive));
    model.lines.insert(Quantity::ResetHw, Line::constant(-8.59));
    let Ok(Sign::Changes { at_alpha }) = model.sign(1, &usage) else {
        panic!("no change of sign");
    };
    assert!((at_alpha - 0.5).abs() < 1e-9, "{at_alpha}");
}

proptest! {
    /// r is d_c − d_w at every n and α, whatever the lines are.
    #[test]
    fn gain_is_the_difference(n in 0u32..100, alpha in 0.01..1.0f64,
                              slopes in prop::array::uniform4(0.0..9.0f64)) {
        let mut model = paper::model();
        for (quantity, slope) in [Quantity::RebootVmm, Quantity::Resume, Quantity::RebootOs]
            .into_iter().zip(slopes) {
            model.lines.insert(quantity, Line::published(slope, 40.0));
        }
        let usage = Usage { alpha, ..usage(n) };
        let value = |m| model.downtime_of(m, &usage).expect("model").expect("known").value;
        let gain = model.gain(n, alpha, &usage).expect("gain").value;
        prop_assert!((gain - (value(Method::Cold) - value(Method::Warm))).abs() < 1e-9);
    }

    /// No bytes bring the reader down, and what it takes can be fitted or is
    /// refused with a sentence.
    #[test]
    fn any_table_is_read_or_refused(rows in "(warm|cold|x|),(-?[0-9]{1,3}|),(-?[0-9]{1,4}|)\n(warm,1,2\n)?") {
        let text = format!("method,n,seconds\n{rows}");
        if let Ok(table) = read_csv(text.as_bytes(), None) {
            let _ = Model::fit(&table);
        }
    }
}
