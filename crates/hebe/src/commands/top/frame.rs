//! What `top` shows, as lines of text; nothing here knows of a terminal.

use hebe_api::plain;
use hebe_types::{ByteSize, VmName, counted};
use serde::Serialize;

/// What is known at one instant.
#[derive(Clone, Debug, Serialize)]
pub struct Snapshot {
    /// The host.
    pub host: HostLook,
    /// The VMs, by name.
    pub vms: Vec<VmLook>,
}

/// The host and its age.
#[derive(Clone, Debug, Serialize)]
pub struct HostLook {
    /// The running kernel.
    pub kernel: String,
    /// Since the host booted, in seconds.
    pub up_s: f64,
    /// Whether it is ageing.
    pub age: Age,
    /// Memory that programs could still get, and all there is, in bytes.
    pub memory: Option<Part>,
    /// What of the store is given to segments, and its size, in bytes.
    pub store: Option<Part>,
    /// Why the store cannot be read, if so.
    pub store_trouble: Option<String>,
}

/// A part of a whole, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Part {
    /// The part.
    pub part: u64,
    /// The whole.
    pub whole: u64,
}

/// Whether the host is ageing, as `hebe host age` says it.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "verdict", rename_all = "kebab-case")]
pub enum Age {
    /// Nobody takes samples.
    NoSamples,
    /// No indicator has enough samples yet.
    TooEarly,
    /// Nothing gets worse.
    None,
    /// Something is exhausted.
    Ageing {
        /// What is first.
        indicator: &'static str,
        /// In how many seconds.
        exhausted_in_s: f64,
    },
    /// The samples cannot be read or judged.
    Unknown {
        /// Why.
        reason: String,
    },
}

/// One VM.
#[derive(Clone, Debug, Serialize)]
pub struct VmLook {
    /// Its name.
    pub name: VmName,
    /// Its state, as `hebe list` says it.
    pub state: &'static str,
    /// More about the state.
    pub detail: Option<String>,
    /// What its VMM takes of one processor, in per cent.
    pub cpu_percent: Option<f64>,
    /// Its RAM.
    pub memory: Option<ByteSize>,
    /// Where that is.
    pub store: Option<&'static str>,
    /// How long it stood still at the last reboot of the host, in milliseconds.
    pub downtime_ms: Option<f64>,
}

const HEADING: [&str; 7] = ["NAME", "STATE", "CPU %", "MEMORY", "STORE", "DOWNTIME", ""];
/// Columns of figures, which stand at the right.
const FIGURES: [usize; 3] = [2, 3, 5];

/// At most `height` lines of at most `width` characters, each with its end.
pub fn frame(snapshot: &Snapshot, width: usize, height: usize) -> String {
    let host = &snapshot.host;
    let running = snapshot.vms.iter().filter(|vm| vm.state == "running");
    let frozen = snapshot.vms.iter().filter(|vm| vm.state == "frozen");
    let mut lines = vec![
        format!(
            "hebe: {}, {} running, {} frozen    {}, up {}",
            counted(snapshot.vms.len(), "VM"),
            running.count(),
            frozen.count(),
            plain(&host.kernel),
            span(host.up_s)
        ),
        memory_line(host),
        age_line(&host.age),
        String::new(),
    ];
    let rows = rows(&snapshot.vms);
    let room = height.saturating_sub(lines.len() + 1);
    let shown = match rows.len() <= room {
        true => rows.len(),
        // One line says that there are more.
        false => room.saturating_sub(1),
    };
    let widths = widths(&rows);
    lines.push(row_text(&HEADING.map(str::to_owned), &widths));
    lines.extend(rows[..shown].iter().map(|row| row_text(row, &widths)));
    if shown < rows.len() {
        let more = rows.len() - shown;
        lines.push(format!("and {more} more: make the window higher"));
    }
    if rows.is_empty() {
        lines.push("there is no VM".to_owned());
    }
    lines.truncate(height);
    let cut = |line: String| line.chars().take(width).collect::<String>() + "\n";
    lines.into_iter().map(cut).collect()
}

fn memory_line(host: &HostLook) -> String {
    let memory = host.memory.map_or("unknown".to_owned(), |m| {
        format!("{} of {} available", size(m.part), size(m.whole))
    });
    let store = match (&host.store, &host.store_trouble) {
        (_, Some(trouble)) => plain(trouble),
        (None, None) => "none".to_owned(),
        (Some(s), None) => format!(
            "{} used, {} free",
            size(s.part),
            size(s.whole.saturating_sub(s.part))
        ),
    };
    format!("memory: {memory}    store: {store}")
}

fn age_line(age: &Age) -> String {
    let text = match age {
        Age::NoSamples => "no samples: run hebed, or `hebe host sample` from a timer".to_owned(),
        Age::TooEarly => "too early to tell".to_owned(),
        Age::None => "no trend towards exhaustion".to_owned(),
        Age::Ageing {
            indicator,
            exhausted_in_s,
        } => format!(
            "AGEING: {indicator} is exhausted in {}",
            span(*exhausted_in_s)
        ),
        Age::Unknown { reason } => plain(reason),
    };
    format!("age: {text}")
}

fn rows(vms: &[VmLook]) -> Vec<[String; 7]> {
    let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
    let row = |vm: &VmLook| {
        [
            vm.name.to_string(),
            vm.state.to_owned(),
            or_dash(vm.cpu_percent.map(|cpu| format!("{cpu:.1}"))),
            or_dash(vm.memory.map(|memory| memory.to_string())),
            or_dash(vm.store.map(str::to_owned)),
            or_dash(vm.downtime_ms.map(downtime)),
            plain(vm.detail.as_deref().unwrap_or_default()),
        ]
    };
    vms.iter().map(row).collect()
}

fn widths(rows: &[[String; 7]]) -> [usize; 7] {
    let mut widths = HEADING.map(|word| word.chars().count());
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    // What comes last is as long as it is.
    widths[6] = 0;
    widths
}

fn row_text(row: &[String; 7], widths: &[usize; 7]) -> String {
    let cells = row.iter().zip(widths).enumerate();
    let cell = |(column, (cell, &width)): (usize, (&String, &usize))| {
        if FIGURES.contains(&column) {
            format!("{cell:>width$}")
        } else {
            format!("{cell:width$}")
        }
    };
    let cells: Vec<String> = cells.map(cell).collect();
    cells.join("  ").trim_end().to_owned()
}

fn downtime(ms: f64) -> String {
    if ms < 1000.0 {
        format!("{ms:.0} ms")
    } else {
        format!("{:.1} s", ms / 1000.0)
    }
}

fn size(bytes: u64) -> String {
    let units = [("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)];
    match units.iter().find(|(_, shift)| bytes >> shift > 0) {
        Some((unit, shift)) => format!("{:.1} {unit}", bytes as f64 / 2f64.powi(*shift)),
        None => format!("{bytes} B"),
    }
}

fn span(seconds: f64) -> String {
    let minutes = (seconds / 60.0) as u64;
    match (minutes / 1440, minutes / 60) {
        (0, 0) => format!("{minutes} min"),
        (0, hours) => format!("{hours} h {} min", minutes % 60),
        (days, hours) => format!("{} {} h", counted(days, "day"), hours % 24),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vm(name: &str, state: &'static str) -> VmLook {
        VmLook {
            name: name.parse().expect("name"),
            state,
            detail: None,
            cpu_percent: None,
            memory: Some(ByteSize::mib(512)),
            store: Some("devdax"),
            downtime_ms: None,
        }
    }

    fn snapshot(vms: Vec<VmLook>) -> Snapshot {
        Snapshot {
            host: HostLook {
                kernel: "7.3.0-cloud".into(),
                up_s: 93_784.0,
                age: Age::Ageing {
                    indicator: "kernel memory",
                    exhausted_in_s: 3.0 * 86_400.0,
                },
                memory: Some(Part {
                    part: 6 << 30,
                    whole: 8 << 30,
                }),
                store: Some(Part {
                    part: 1536 << 20,
                    whole: 4 << 30,
                }),
                store_trouble: None,
            },
            vms,
        }
    }

    #[test]
    fn a_frame_shows_the_host_and_each_vm() {
        let mut web = vm("web", "running");
        (web.cpu_percent, web.downtime_ms) = (Some(12.34), Some(842.4));
        let mut db = vm("database", "frozen");
        db.downtime_ms = Some(61_000.0);
        let text = frame(&snapshot(vec![db, web]), 100, 24);
        assert_eq!(
            text,
            "\
hebe: 2 VMs, 1 running, 1 frozen    7.3.0-cloud, up 1 day 2 h
memory: 6.0 GiB of 8.0 GiB available    store: 1.5 GiB used, 2.5 GiB free
age: AGEING: kernel memory is exhausted in 3 days 0 h

NAME      STATE    CPU %  MEMORY  STORE   DOWNTIME
database  frozen       -  512MiB  devdax    61.0 s
web       running   12.3  512MiB  devdax    842 ms
"
        );
    }

    /// Every size that a window may have, also while it is being drawn smaller.
    #[test]
    fn a_frame_fits_into_every_window() {
        let mut vms: Vec<VmLook> = (0..9).map(|i| vm(&format!("vm{i}"), "running")).collect();
        vms[3].detail = Some("its guest's kernel panicked \u{1b}[2J äöü".into());
        let many = snapshot(vms);
        for width in 0..130 {
            for height in 0..20 {
                let text = frame(&many, width, height);
                assert!(text.lines().count() <= height, "{width}x{height}: {text}");
                assert!(text.lines().all(|line| line.chars().count() <= width));
                assert!(!text.chars().any(|c| c.is_control() && c != '\n'));
            }
        }
        assert!(frame(&many, 80, 14).contains("vm8"));
        let cut = frame(&many, 80, 13);
        assert!(cut.contains("vm6") && cut.contains("and 2 more"), "{cut}");
    }

    #[test]
    fn what_is_not_known_is_said() {
        let mut bare = snapshot(Vec::new());
        bare.host.memory = None;
        bare.host.store = None;
        bare.host.age = Age::NoSamples;
        let text = frame(&bare, 80, 24);
        for wanted in [
            "memory: unknown",
            "store: none",
            "no samples",
            "there is no VM",
        ] {
            assert!(text.contains(wanted), "{wanted}: {text}");
        }
        bare.host.store_trouble = Some("cannot be read".into());
        assert!(frame(&bare, 80, 24).contains("store: cannot be read"));
    }
}
