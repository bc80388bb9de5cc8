//! The report as a Gantt chart in SVG: a row for the host and one per VM.
//!
//! Deterministic: the same report gives the same bytes. Text is text, so that
//! it can be read, searched and scaled.

use std::collections::BTreeSet;
use std::fmt::Write;

use hebe_types::VmName;

use crate::timeline::{EventKind, Row, Timeline};

const LEFT: f64 = 150.0;
const PLOT: f64 = 800.0;
const ROW: f64 = 34.0;
const TOP: f64 = 64.0;

/// One bar: from one event to the next that is there.
struct Span {
    from: EventKind,
    to: &'static [EventKind],
    label: &'static str,
    colour: &'static str,
}

const HOST_SPANS: [Span; 8] = [
    Span {
        from: EventKind::Asked,
        to: &[EventKind::ImageLoaded, EventKind::Checked],
        label: "check and load the next kernel",
        colour: "#9db8d2",
    },
    Span {
        from: EventKind::Checked,
        to: &[EventKind::ServicesStopped],
        label: "stop services",
        colour: "#7d9cbf",
    },
    Span {
        from: EventKind::ServicesStopped,
        to: &[EventKind::Prepared],
        label: "prepare, flush disks",
        colour: "#5f81ab",
    },
    Span {
        from: EventKind::Prepared,
        to: &[EventKind::AllSuspended],
        label: "suspend VMs",
        colour: "#d98c3f",
    },
    Span {
        from: EventKind::AllSuspended,
        to: &[EventKind::Jump],
        label: "flush last writes, keep report",
        colour: "#c06c2c",
    },
    Span {
        from: EventKind::Jump,
        to: &[EventKind::KernelEntry],
        label: "leave the old kernel",
        colour: "#a84b4b",
    },
    Span {
        from: EventKind::KernelEntry,
        to: &[EventKind::UserSpace],
        label: "new kernel starts",
        colour: "#8a5a9e",
    },
    Span {
        from: EventKind::UserSpace,
        to: &[EventKind::AllResumed],
        label: "resume VMs",
        colour: "#5b9e6f",
    },
];

const VM_SPANS: [Span; 5] = [
    Span {
        from: EventKind::PreserveBegan,
        to: &[EventKind::Preserved],
        label: "preserve memory",
        colour: "#5f81ab",
    },
    Span {
        from: EventKind::VcpusStopped,
        to: &[EventKind::Committed, EventKind::Saved],
        label: "save state",
        colour: "#d98c3f",
    },
    Span {
        from: EventKind::Retrieving,
        to: &[EventKind::Arrived],
        label: "retrieve memory",
        colour: "#8a5a9e",
    },
    Span {
        from: EventKind::VmmStarted,
        to: &[EventKind::Running],
        label: "construct the VM",
        colour: "#5b9e6f",
    },
    Span {
        from: EventKind::Running,
        to: &[EventKind::FirstReply],
        label: "first frame",
        colour: "#a7cfae",
    },
];

/// When a VM stops and when it runs again.
const DOWN: [(&[EventKind], &[EventKind]); 1] = [(
    &[EventKind::VcpusStopped, EventKind::PoweredOff],
    &[EventKind::Running, EventKind::Booted],
)];

/// Draws the report.
pub fn svg(timeline: &Timeline) -> String {
    let rows = timeline.rows();
    let vms: BTreeSet<&VmName> = rows.iter().filter_map(|r| r.vm.as_ref()).collect();
    let last_ms = rows.last().map_or(1.0, |r| r.at_ms).max(1.0);
    let legend_top = TOP + ROW * (vms.len() + 1) as f64 + 34.0;
    // And one entry for the downtime.
    let legend_lines = (HOST_SPANS.len() + VM_SPANS.len() + 1).div_ceil(2);
    let height = legend_top + 20.0 * legend_lines as f64 + 10.0;
    let mut out = String::new();
    let width = LEFT + PLOT + 40.0;
    let _ = writeln!(
        out,
        r##"<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0}" height="{height:.0}" viewBox="0 0 {width:.0} {height:.0}" font-family="sans-serif" font-size="13">"##
    );
    let _ = writeln!(
        out,
        r##"<rect width="100%" height="100%" fill="#ffffff"/>"##
    );
    title(&mut out, timeline);
    let scale = |ms: f64| LEFT + ms / last_ms * PLOT;
    axis(&mut out, last_ms, vms.len(), &scale);
    lane(
        &mut out,
        0,
        "host",
        &host_events(&rows),
        &HOST_SPANS,
        &scale,
    );
    for (i, vm) in vms.iter().enumerate() {
        let own: Vec<&Row> = rows.iter().filter(|r| r.vm.as_ref() == Some(*vm)).collect();
        downtime(&mut out, i + 1, &own, &scale);
        lane(&mut out, i + 1, vm.as_str(), &own, &VM_SPANS, &scale);
    }
    legend(&mut out, legend_top);
    out.push_str("</svg>\n");
    out
}

fn host_events(rows: &[Row]) -> Vec<&Row> {
    rows.iter().filter(|r| r.vm.is_none()).collect()
}

fn title(out: &mut String, timeline: &Timeline) {
    let after = timeline.after.as_ref();
    let to = after.map_or("not yet entered", |k| k.release.as_str());
    let text = format!(
        "{:?} reboot: {} to {to}",
        timeline.method, timeline.before.release
    );
    let _ = writeln!(
        out,
        r##"<text x="16" y="26" font-size="17">{}</text>"##,
        escape(&text)
    );
}

/// A round step that gives at most ten marks.
fn step_ms(last_ms: f64) -> f64 {
    let mut step = 1.0;
    loop {
        for factor in [1.0, 2.0, 5.0] {
            if last_ms / (step * factor) <= 10.0 {
                return step * factor;
            }
        }
        step *= 10.0;
    }
}

fn axis(out: &mut String, last_ms: f64, vms: usize, scale: &impl Fn(f64) -> f64) {
    let bottom = TOP + ROW * (vms + 1) as f64;
    let step = step_ms(last_ms);
    let mut at = 0.0;
    while at <= last_ms {
        let x = scale(at);
        let _ = writeln!(
            out,
            r##"<line x1="{x:.1}" y1="{TOP:.0}" x2="{x:.1}" y2="{bottom:.0}" stroke="#dddddd"/>"##
        );
        let _ = writeln!(
            out,
            r##"<text x="{x:.1}" y="{:.0}" text-anchor="middle" fill="#555555">{:.*}</text>"##,
            bottom + 16.0,
            usize::from(step < 1000.0),
            at / 1000.0,
        );
        at += step;
    }
    let _ = writeln!(
        out,
        r##"<text x="16" y="{:.0}" fill="#555555">seconds</text>"##,
        bottom + 16.0
    );
}

fn find(events: &[&Row], kinds: &[EventKind]) -> Option<f64> {
    let at = |kind: &EventKind| events.iter().find(|r| r.kind == *kind).map(|r| r.at_ms);
    kinds.iter().find_map(at)
}

fn lane(
    out: &mut String,
    index: usize,
    name: &str,
    events: &[&Row],
    spans: &[Span],
    scale: &impl Fn(f64) -> f64,
) {
    let y = TOP + ROW * index as f64;
    let _ = writeln!(
        out,
        r##"<text x="16" y="{:.0}">{}</text>"##,
        y + 21.0,
        escape(name)
    );
    for span in spans {
        let ends = (find(events, &[span.from]), find(events, span.to));
        if let (Some(from), Some(to)) = ends {
            bar(
                out,
                y + 6.0,
                20.0,
                (from, to),
                span.colour,
                span.label,
                scale,
            );
        }
    }
}

/// A pale bar under the others, with its length written in it.
fn downtime(out: &mut String, index: usize, events: &[&Row], scale: &impl Fn(f64) -> f64) {
    let y = TOP + ROW * index as f64;
    for (begins, ends) in DOWN {
        if let (Some(from), Some(to)) = (find(events, begins), find(events, ends)) {
            bar(out, y + 2.0, 28.0, (from, to), "#f4dcc8", "down", scale);
            let middle = scale((from + to) / 2.0);
            let _ = writeln!(
                out,
                r##"<text x="{middle:.1}" y="{:.0}" text-anchor="middle" fill="#804515">{:.2} s</text>"##,
                y + 21.0,
                (to - from) / 1000.0
            );
        }
    }
}

fn bar(
    out: &mut String,
    y: f64,
    height: f64,
    (from, to): (f64, f64),
    colour: &str,
    label: &str,
    scale: &impl Fn(f64) -> f64,
) {
    let (x, end) = (scale(from), scale(to));
    // What took no visible time is still there to be seen.
    let width = (end - x).max(1.5);
    let _ = writeln!(
        out,
        r##"<rect x="{x:.1}" y="{y:.0}" width="{width:.1}" height="{height:.0}" fill="{colour}"><title>{}: {:.1} ms</title></rect>"##,
        escape(label),
        to - from
    );
}

fn legend(out: &mut String, top: f64) {
    let all = HOST_SPANS.iter().chain(&VM_SPANS);
    let mut entries: Vec<(&str, &str)> = all.map(|s| (s.colour, s.label)).collect();
    entries.push(("#f4dcc8", "VM is down"));
    for (i, (colour, label)) in entries.iter().enumerate() {
        let x = LEFT + (i % 2) as f64 * 320.0;
        let y = top + (i / 2) as f64 * 20.0;
        let _ = writeln!(
            out,
            r##"<rect x="{x:.0}" y="{y:.0}" width="14" height="14" fill="{colour}"/><text x="{:.0}" y="{:.0}">{}</text>"##,
            x + 20.0,
            y + 12.0,
            escape(label)
        );
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::timeline::tests::sample;

    #[test]
    fn the_chart_has_a_row_per_vm_and_its_downtime_in_words() {
        let chart = svg(&sample());
        for text in ["host", "db", "web", "2.19 s", "6.1.0 to 7.3.0", "seconds"] {
            assert!(chart.contains(text), "{text} is missing");
        }
        assert_eq!(chart.matches("<svg").count(), 1);
        assert!(chart.trim_end().ends_with("</svg>"));
        let opened = chart.matches("<rect").count();
        let closed = chart.matches("</rect>").count() + chart.matches("/>").count();
        let lines = chart.matches("<line").count();
        assert_eq!(opened + lines, closed);
        assert_eq!(chart, svg(&sample()), "the same report, the same bytes");
    }

    /// What is drawn below the end is not seen.
    #[test]
    fn everything_lies_within_the_chart() {
        let chart = svg(&sample());
        let numbers = |key: &str| -> Vec<f64> {
            let values = chart.split(key).skip(1);
            values
                .filter_map(|rest| rest.split('"').next()?.parse().ok())
                .collect()
        };
        let height = numbers(" height=\"")[0];
        assert!(numbers(" y=\"").into_iter().all(|y| y <= height - 10.0));
    }

    #[test]
    fn an_empty_report_is_still_a_chart_and_text_is_escaped() {
        let mut empty = sample();
        empty.events.clear();
        empty.before.release = "<&>".into();
        let chart = svg(&empty);
        assert!(chart.contains("&lt;&amp;&gt;"));
        assert!(!chart.contains("NaN"));
    }

    #[test]
    fn the_axis_has_few_round_marks() {
        for last in [1.0, 3.0, 999.0, 3300.0, 120_000.0] {
            let marks = last / step_ms(last);
            assert!((1.0..=10.0).contains(&marks), "{last}: {marks}");
        }
    }
}
