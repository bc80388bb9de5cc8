//! The file that asks for a reboot, and which of its orders are new.
//!
//! An order is the instant at which the file was changed. By the clock alone it
//! cannot be told whether the reboot that it asked for took place: a clock that
//! was set back since makes an old order look younger than the boot, and one
//! whose battery is flat does so at every boot. So what was seen is written
//! down, in a file that outlives the kernel: an order that an earlier boot saw
//! is over, because that boot is; one that appeared while this boot looked is
//! new. The clock decides only about an order that was there when this boot
//! looked for the first time, and that no earlier one saw.

use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use hebe_host::listing::with_cause;
use hebe_host::{Host, files};
use hebe_policy::calendar::Moment;
use hebe_types::VmId;
use serde::{Deserialize, Serialize};

use crate::log;

/// What was seen last.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Noted {
    /// The boot that saw it.
    boot_id: String,
    /// Which file.
    sentinel: PathBuf,
    /// When that was changed, in nanoseconds since 1970; `None` if it was not
    /// there.
    changed_ns: Option<i64>,
    /// When that was an order of this boot: its instant by the clock of then.
    since: Option<Moment>,
}

/// Where it is written down.
pub fn path(host: &Host) -> PathBuf {
    host.layout.state.join("policy").join("sentinel.json")
}

/// The order that stands, if one does. `booted` is when the kernel began, by
/// the clock of `now`.
pub fn asked(host: &Host, sentinel: &Path, now: Moment, booted: Moment) -> Option<Moment> {
    let path = path(host);
    let before = files::read_json::<Noted>(&path).unwrap_or_else(|e| {
        log::warning(format!(
            "{} cannot be read: {}",
            path.display(),
            with_cause(&e)
        ));
        None
    });
    let before = before.filter(|noted| noted.sentinel == sentinel);
    let boot_id = VmId(host.system.boot_id()).to_string();
    let seen = look(
        before.as_ref(),
        &boot_id,
        sentinel,
        changed_ns(sentinel),
        now,
        booted,
    );
    if before.as_ref() != Some(&seen)
        && let Err(e) = files::write_json(&path, &seen)
    {
        log::warning(format!(
            "{} cannot be written, and a clock that is set back may repeat an order: {}",
            path.display(),
            with_cause(&e)
        ));
    }
    seen.since
}

/// When a file was changed, in nanoseconds since 1970; `None` if it is not there.
pub fn changed_ns(file: &Path) -> Option<i64> {
    let changed = file.metadata().and_then(|meta| meta.modified()).ok()?;
    match changed.duration_since(UNIX_EPOCH) {
        Ok(since) => i64::try_from(since.as_nanos()).ok(),
        Err(before) => i64::try_from(before.duration().as_nanos())
            .ok()
            .map(|ns| -ns),
    }
}

fn look(
    before: Option<&Noted>,
    boot_id: &str,
    sentinel: &Path,
    changed_ns: Option<i64>,
    now: Moment,
    booted: Moment,
) -> Noted {
    let at = changed_ns.map(|ns| ns.div_euclid(1_000_000_000));
    // Within this boot, whatever its clock says.
    let clamped =
        |at: Moment| at.clamp(booted.saturating_add(1), now.max(booted.saturating_add(1)));
    let since = match before {
        Some(noted) if noted.changed_ns == changed_ns => {
            noted.since.filter(|_| noted.boot_id == boot_id)
        }
        Some(noted) if noted.boot_id == boot_id => at.map(clamped),
        _ => at.filter(|at| *at > booted).map(clamped),
    };
    Noted {
        boot_id: boot_id.to_owned(),
        sentinel: sentinel.to_owned(),
        changed_ns,
        since,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NS: i64 = 1_000_000_000;

    /// Looks, one after the other: boot, clock at the boot, clock now, when the
    /// file was changed; and the order that stands then.
    fn looks(all: &[(&str, Moment, Moment, Option<i64>)]) -> Vec<Option<Moment>> {
        let mut noted: Option<Noted> = None;
        let mut answers = Vec::new();
        for (boot, booted, now, changed) in all {
            let path = Path::new("/s");
            let ns = changed.map(|s| s * NS);
            let seen = look(noted.as_ref(), boot, path, ns, *now, *booted);
            answers.push(seen.since);
            noted = Some(seen);
        }
        answers
    }

    #[test]
    fn an_order_stands_until_the_boot_that_saw_it_is_over() {
        let all = [
            ("1", 100, 200, None),
            ("1", 100, 260, Some(250)),
            ("1", 100, 320, Some(250)),
            // It rebooted, and the file outlasted that.
            ("2", 330, 340, Some(250)),
            // Somebody asks again.
            ("2", 330, 400, Some(390)),
        ];
        let stands = [None, Some(250), Some(250), None, Some(390)];
        assert_eq!(looks(&all), stands);
    }

    #[test]
    fn a_clock_that_was_set_back_repeats_no_order() {
        let all = [
            ("1", 10_000, 10_100, Some(10_050)),
            // The clock was set back by the reboot: the file is of tomorrow.
            ("2", 9_000, 9_010, Some(10_050)),
            ("2", 9_000, 9_070, Some(10_050)),
            ("3", 8_000, 8_010, Some(10_050)),
            // By a person, while this boot runs.
            ("3", 5_000, 5_020, Some(10_050)),
            // An order of now, by a clock that runs behind, is one.
            ("3", 5_000, 5_080, Some(5_060)),
        ];
        let stands = [Some(10_050), None, None, None, None, Some(5_060)];
        assert_eq!(looks(&all), stands);
    }

    #[test]
    fn a_clock_that_jumps_neither_loses_nor_repeats_an_order_of_this_boot() {
        let all = [
            ("1", 100, 200, None),
            // Forward: the file would be older than the boot.
            ("1", 5_100, 5_300, Some(250)),
            // Back: it would be of tomorrow.
            ("1", 100, 330, Some(250)),
        ];
        assert_eq!(looks(&all), [None, Some(5_101), Some(5_101)]);
        // What was there at the first look, and nobody saw before, goes by
        // the clock.
        assert_eq!(looks(&[("1", 100, 200, Some(150))]), [Some(150)]);
        assert_eq!(looks(&[("1", 100, 200, Some(50))]), [None]);
        assert_eq!(looks(&[("1", 100, 200, Some(999))]), [Some(200)]);
    }
}
