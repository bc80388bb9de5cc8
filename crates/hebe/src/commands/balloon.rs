//! `balloon`.

use hebe_api::{BalloonStatus, GuestMemory};
use hebe_host::{Host, balloon as host_balloon};
use hebe_types::{ByteSize, VmName};
use serde::Serialize;

use crate::cli::BalloonArgs;
use crate::output::{Exit, Outcome, Output};

#[derive(Serialize)]
struct Answer<'a> {
    name: &'a VmName,
    #[serde(flatten)]
    balloon: &'a BalloonStatus,
}

/// `hebe balloon`.
pub fn balloon(host: &Host, args: &BalloonArgs, out: &Output) -> Outcome {
    let status = host_balloon::balloon(host, &args.name, args.target)?;
    let answer = Answer {
        name: &args.name,
        balloon: &status,
    };
    out.answer(&answer, || text(&status));
    Ok(Exit::Done)
}

/// One line, for `hebe show`.
pub fn line(status: &BalloonStatus) -> String {
    let driver = if status.active {
        ""
    } else {
        "; the guest has no driver for it"
    };
    format!(
        "{} of {} left to the guest, {} wanted{driver}",
        rounded(status.actual),
        status.memory,
        status.target
    )
}

fn text(status: &BalloonStatus) -> String {
    let yes_no = |flag: bool| if flag { "yes" } else { "no" };
    let mut lines = vec![
        ("memory", status.memory.to_string()),
        ("target", status.target.to_string()),
        ("left to the guest", rounded(status.actual)),
        ("driver in the guest", yes_no(status.active).into()),
        ("reports free memory", yes_no(status.reporting).into()),
    ];
    if !status.gives_back {
        lines.push((
            "given back",
            "nothing: a reserved range stays with its VM".into(),
        ));
    } else {
        lines.push(("given back: balloon", rounded(status.inflated)));
        lines.push(("given back: reports", rounded(status.reported)));
        lines.push(("offered and kept", rounded(status.kept)));
    }
    if let Some(resident) = status.resident {
        lines.push(("memory in use here", rounded(resident)));
    }
    lines.extend(guest_lines(&status.guest));
    let line = |(key, value): (&str, String)| format!("{key:22} {value}\n");
    lines.into_iter().map(line).collect()
}

/// What the guest said of itself.
fn guest_lines(guest: &GuestMemory) -> Vec<(&'static str, String)> {
    let bytes = [
        ("guest: total", guest.total),
        ("guest: free", guest.free),
        ("guest: available", guest.available),
        ("guest: page cache", guest.caches),
        ("guest: swapped in", guest.swapped_in),
        ("guest: swapped out", guest.swapped_out),
    ];
    let counts = [
        ("guest: major faults", guest.major_faults),
        ("guest: minor faults", guest.minor_faults),
        ("guest: ended for memory", guest.oom_kills),
    ];
    let bytes = bytes
        .into_iter()
        .filter_map(|(key, value)| Some((key, rounded(ByteSize(value?)))));
    let counts = counts
        .into_iter()
        .filter_map(|(key, value)| Some((key, value?.to_string())));
    bytes.chain(counts).collect()
}

/// In MiB, as a person reads it.
fn rounded(size: ByteSize) -> String {
    format!("{:.1} MiB", size.bytes() as f64 / f64::from(1 << 20))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_known_is_shown() {
        let mut status = BalloonStatus {
            memory: ByteSize::mib(256),
            target: ByteSize::mib(128),
            actual: ByteSize(130 << 20),
            ..BalloonStatus::default()
        };
        let shown = text(&status);
        assert!(shown.contains("130.0 MiB") && !shown.contains("guest: free"));
        assert!(shown.contains("a reserved range stays"), "{shown}");
        assert_eq!(
            line(&status),
            "130.0 MiB of 256MiB left to the guest, 128MiB wanted; the guest has no driver for it"
        );
        status.gives_back = true;
        status.active = true;
        status.guest.free = Some(3 << 20);
        status.resident = Some(ByteSize::mib(140));
        let shown = text(&status);
        assert!(shown.contains("140.0 MiB") && shown.contains("guest: free"));
        assert!(!line(&status).contains("driver"));
    }
}
