//! What a VMM says, as far as it can be shown: its guest may have taken it
//! over, and its words end up on an operator's terminal, its instants in the
//! report of a reboot.

use hebe_sys::clock::stamp_now;
use hebe_types::Stamp;

use crate::{CageReport, FreezeReport, Response, ResumeReport, ResumeSteps, SaveReport, VmStatus};

/// Longest text that is taken over, in characters.
const TEXT_LEN_MAX: usize = 4096;
/// Most devices and parts of a cage that are listed.
const LIST_LEN_MAX: usize = 256;

/// `text` without what steers a terminal, and no longer than a long sentence.
pub fn plain(text: &str) -> String {
    let shown = |c: char| if steers(c) { '\u{fffd}' } else { c };
    let mut chars = text.chars();
    let mut text: String = chars.by_ref().take(TEXT_LEN_MAX).map(shown).collect();
    if chars.next().is_some() {
        text.push('…');
    }
    text
}

/// Control characters, and those that turn the direction of what follows.
fn steers(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// How far a wall clock may have been set since an instant was noted.
const WALL_CLOCK_MAX_NS: u64 = 366 * 24 * 3_600 * 1_000_000_000;

/// Whether that can have been before `now`.
fn is_past(stamp: Stamp, now: Stamp) -> bool {
    stamp.tsc <= now.tsc && stamp.realtime_ns.abs_diff(now.realtime_ns) <= WALL_CLOCK_MAX_NS
}

/// Instants of the future become now.
fn bound(stamps: &mut [&mut Stamp], now: Stamp) {
    for stamp in stamps {
        if !is_past(**stamp, now) {
            **stamp = now;
        }
    }
}

impl Response {
    /// The answer with [`plain`] texts, and with instants that can have been.
    pub(crate) fn made_plain(mut self) -> Self {
        let now = stamp_now();
        match &mut self {
            Self::Failed { message } => *message = plain(message),
            Self::Status(status) => status.make_plain(now),
            Self::Frozen(FreezeReport {
                asked,
                vcpus_stopped,
                devices_drained,
                saved,
                committed,
                state_bytes: _,
                ram_touched: _,
            }) => bound(
                &mut [asked, vcpus_stopped, devices_drained, saved, committed],
                now,
            ),
            Self::Saved(SaveReport {
                asked,
                vcpus_stopped,
                durable,
                bytes_written: _,
            }) => bound(&mut [asked, vcpus_stopped, durable], now),
            Self::Done | Self::SegmentFiles { .. } | Self::Balloon(_) => {}
        }
        self
    }
}

impl ResumeReport {
    fn is_past(&self, now: Stamp) -> bool {
        let Self {
            process_started,
            state_read,
            constructed,
            running,
            ram_touched: _,
            ref steps,
        } = *self;
        let mut stamps = vec![process_started, state_read, constructed, running];
        if let Some(steps) = steps {
            let ResumeSteps {
                caged,
                machine_made,
                ram_known,
                vcpus_restored,
            } = **steps;
            stamps.extend([caged, machine_made, ram_known, vcpus_restored]);
        }
        stamps.iter().all(|stamp| is_past(*stamp, now))
    }
}

impl VmStatus {
    fn make_plain(&mut self, now: Stamp) {
        self.first_tx = self.first_tx.filter(|stamp| is_past(*stamp, now));
        self.resume = self.resume.take().filter(|report| report.is_past(now));
        self.version = plain(&self.version);
        self.failed = self.failed.as_deref().map(plain);
        self.stopped_devices.truncate(LIST_LEN_MAX);
        self.disk_rings.truncate(LIST_LEN_MAX);
        for device in &mut self.stopped_devices {
            *device = plain(device);
        }
        if let Some(CageReport { parts }) = &mut self.cage {
            parts.truncate(LIST_LEN_MAX);
            for part in parts {
                part.name = plain(&part.name);
                part.detail = plain(&part.detail);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instants_of_the_future_are_none() {
        let now = stamp_now();
        let future = Stamp {
            tsc: u64::MAX,
            ..now
        };
        let far = Stamp {
            realtime_ns: u64::MAX,
            ..now
        };
        for wrong in [future, far] {
            let report = SaveReport {
                asked: now,
                vcpus_stopped: wrong,
                durable: now,
                bytes_written: 1,
            };
            let Response::Saved(report) = Response::Saved(report).made_plain() else {
                panic!("another answer")
            };
            assert_eq!(report.asked, now);
            assert!(is_past(report.vcpus_stopped, stamp_now()));
            let resume = ResumeReport {
                process_started: now,
                state_read: now,
                constructed: now,
                running: wrong,
                ram_touched: crate::RamMeter::default(),
                steps: None,
            };
            assert!(!resume.is_past(now));
            let steps = ResumeSteps {
                caged: now,
                machine_made: now,
                ram_known: wrong,
                vcpus_restored: now,
            };
            let good = ResumeReport {
                running: now,
                ..resume
            };
            assert!(good.is_past(now));
            let bad = ResumeReport {
                steps: Some(Box::new(steps)),
                ..good
            };
            assert!(!bad.is_past(now));
        }
    }

    #[test]
    fn nothing_that_steers_a_terminal_is_left_and_length_is_bounded() {
        let text = "a\x1b]0;owned\x07b\r\n\u{9b}31mü\u{202e}c";
        let shown = plain(text);
        assert!(!shown.chars().any(steers), "{shown:?}");
        assert!(shown.starts_with('a') && shown.contains('ü') && shown.ends_with('c'));
        assert_eq!(plain("web stands still: why?"), "web stands still: why?");
        let long = plain(&"ä".repeat(1 << 20));
        assert_eq!(long.chars().count(), TEXT_LEN_MAX + 1);
    }
}
