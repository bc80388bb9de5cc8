//! What a service that follows a policy remembers from one look at its host to
//! the next: a value, so that a simulation runs the same.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use super::{Decision, Exhaustion, Facts, Load, Policy, Rule, Why, decide, seconds};
use crate::calendar::Moment;

/// How long after a reboot that did not happen it is tried again, in seconds: on
/// average, and from half of that to one and a half times it. Hosts of a group
/// are due at the same instant, and all but one are refused a slot: if all asked
/// again at the same instant, one more of them would go every ten minutes.
pub const RETRY_S: Moment = 600;
/// The same of a turn in a roll, for which others wait, in seconds.
pub const TURN_RETRY_S: Moment = 60;
/// A longer pause between two looks leaves the load unknown, in seconds.
const GAP_S: Moment = 300;
/// Most load values that are remembered: two days of one a minute.
const LOADS_MAX: usize = 2_880;

/// One look at a host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Seen {
    /// When.
    pub now: Moment,
    /// When its kernel began: every boot rejuvenates.
    pub booted: Option<Moment>,
    /// For how many seconds it has been up, by a clock that nobody sets.
    #[serde(default)]
    pub up_s: Option<Moment>,
    /// When a person, or a package, asked for a reboot. Another value is
    /// another order, whatever it is.
    pub asked: Option<Moment>,
    /// It is the host's turn in a roll through its group.
    #[serde(default)]
    pub turn: bool,
    /// In how many seconds the ageing monitor foretells exhaustion.
    pub exhausted_in_s: Option<f64>,
    /// Load, as the policy measures it.
    pub load: Option<f64>,
    /// A reboot that the policy ordered was undone after VMs were touched, and
    /// no person has said since that it may try again.
    #[serde(default)]
    pub halted: bool,
}

/// What is remembered.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Watcher {
    load: VecDeque<Load>,
    exhaustion: Option<Exhaustion>,
    tried: Option<Tried>,
}

/// A time at which the host was told to go.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Tried {
    at: Moment,
    /// The order by hand that was there then.
    asked: Option<Moment>,
    /// Before then it is not tried again, a turn in a roll aside.
    again: Moment,
}

impl Tried {
    fn at(seen: &Seen) -> Self {
        // Hosts differ in when they booted, and in when they look.
        let host = seen.booted.unwrap_or_default() ^ seen.now.rotate_left(32);
        let mixed = host.cast_unsigned().wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 33;
        let spread = mixed.cast_signed() % RETRY_S;
        Self {
            at: seen.now,
            asked: seen.asked,
            again: seen.now.saturating_add(RETRY_S / 2 + spread),
        }
    }
}

impl Watcher {
    /// Takes a look in, and says what is to be done now. After
    /// [`Decision::Go`] it waits for about [`RETRY_S`] before it says so again, for
    /// whoever still looks was not rebooted; a person's new order does not wait.
    #[must_use]
    pub fn look(mut self, policy: &Policy, seen: &Seen) -> (Self, Decision) {
        self.take_load(seen);
        self.exhaustion = seen.exhausted_in_s.map(|in_s| Exhaustion {
            found: self.exhaustion.map_or(seen.now, |known| known.found),
            // A float that does not fit becomes the largest number.
            at: seen.now.saturating_add(in_s as Moment),
        });
        let facts = Facts {
            last: seen.booted,
            // A clock that was set back since does not put an order off.
            asked: seen.asked.map(|asked| asked.min(seen.now)),
            turn: seen.turn.then_some(seen.now),
            exhaustion: self.exhaustion,
            load: self.load.iter().copied().collect(),
            under_way: 0,
            rested: seen.up_s.map(|up_s| {
                let rest_s = seconds(policy.rest()).saturating_sub(up_s);
                seen.now.saturating_add(rest_s.max(0))
            }),
        };
        let decision = decide(policy, &facts, seen.now);
        let Decision::Go { rule, .. } = decision else {
            return (self, decision);
        };
        let wait = |why, until| Decision::Wait { why, until };
        if seen.halted {
            return (self, wait(Why::Halted, None));
        }
        if let Some(tried) = self.tried.filter(|tried| tried.at <= seen.now) {
            let again = match policy.rules.get(rule) {
                Some(Rule::Roll) => tried.at.saturating_add(TURN_RETRY_S),
                _ => tried.again,
            };
            let same = seen.asked.is_none() || seen.asked == tried.asked;
            if seen.now < again && same {
                return (self, wait(Why::TriedLately, Some(again)));
            }
        }
        self.tried = Some(Tried::at(seen));
        (self, decision)
    }

    fn take_load(&mut self, seen: &Seen) {
        let fits = |last: &Load| (0..=GAP_S).contains(&(seen.now - last.from));
        if !self.load.back().is_none_or(fits) || seen.load.is_none() {
            self.load.clear();
        }
        self.load.extend(seen.load.map(|load| Load {
            from: seen.now,
            load,
        }));
        while self.load.len() > LOADS_MAX {
            self.load.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Moment = 3_600;
    const DAY: Moment = 86_400;
    /// Monday, 23 November 2026, 00:00 UTC.
    const MONDAY: Moment = 1_795_392_000;

    fn policy(text: &str) -> Policy {
        let policy: Policy = toml::from_str(text).expect(text);
        policy.check(MONDAY).expect(text);
        policy
    }

    const NIGHTLY: &str = r#"
[[rule]]
when = "calendar"
on = "Sun 02:00 UTC"
within = "4h"
quiet = { below = 0.2, lasting = "30min", patience = "3h" }
[[rule]]
when = "ageing"
exhausted_within = "1d"
[[rule]]
when = "by-hand"
[[blackout]]
from = "Mon..Fri 08:00 UTC"
length = "10h"
"#;

    /// A host that is busy by day and until three at night, and leaks until it
    /// is rebooted; `reboots` says whether it does what it is told.
    fn simulate(days: Moment, leak_days: Option<f64>, reboots: bool) -> Vec<Moment> {
        let policy = policy(NIGHTLY);
        let (mut booted, mut went) = (MONDAY - 30 * DAY, Vec::new());
        let mut watcher = Watcher::default();
        for minute in 0..days * 24 * 60 {
            let now = MONDAY + minute * 60;
            let hour = (now / HOUR) % 24;
            let left = leak_days.map(|days| days * DAY as f64 - (now - booted.max(MONDAY)) as f64);
            let seen = Seen {
                now,
                booted: Some(booted),
                up_s: Some(now - booted),
                asked: None,
                turn: false,
                exhausted_in_s: left,
                load: Some(if (3..7).contains(&hour) { 0.1 } else { 0.7 }),
                halted: false,
            };
            let (next, decision) = watcher.look(&policy, &seen);
            watcher = next;
            if let Decision::Go { .. } = decision {
                went.push(now);
                if reboots {
                    // The new kernel's daemon remembers nothing.
                    (booted, watcher) = (now, Watcher::default());
                }
            }
        }
        went
    }

    #[test]
    fn weeks_of_minutes_go_as_the_policy_says() {
        let sunday = |week: Moment| MONDAY + (7 * week + 6) * DAY;
        // Quiet from three on, for half an hour.
        let nights: Vec<Moment> = (0..3).map(|w| sunday(w) + 3 * HOUR + HOUR / 2).collect();
        assert_eq!(simulate(21, None, true), nights);
        // A leak of 2.5 days: a day before its end, when no blackout is open.
        let went = simulate(7, Some(2.5), true);
        let first = MONDAY + DAY + 18 * HOUR;
        assert_eq!(went.first(), Some(&first), "after Tuesday's blackout");
        assert!(went.len() >= 3, "{went:?}");
        for at in went {
            let hour = (at / HOUR) % 24;
            let weekday = (at - MONDAY) / DAY;
            assert!(weekday > 4 || !(8..18).contains(&hour), "in a blackout");
        }
    }

    #[test]
    fn a_reboot_that_does_not_happen_is_tried_again_with_pauses_until_it_is_too_late() {
        let went = simulate(7, None, false);
        let begin = MONDAY + 6 * DAY + 3 * HOUR + HOUR / 2;
        let end = MONDAY + 6 * DAY + 6 * HOUR;
        assert_eq!(went.first(), Some(&begin));
        assert!(went.iter().all(|at| *at < end), "{went:?}");
        // Looks are a minute apart.
        let pauses: Vec<Moment> = went.windows(2).map(|w| w[1] - w[0]).collect();
        let fits = |pause: &Moment| (RETRY_S / 2..RETRY_S * 3 / 2 + 60).contains(pause);
        assert!(pauses.iter().all(fits), "{pauses:?}");
        let most = (end - begin) / (RETRY_S / 2);
        assert!((8..=most).contains(&(went.len() as Moment)), "{went:?}");
    }

    /// A thousand hosts that were refused within one minute do not come back
    /// within one.
    #[test]
    fn hosts_that_were_refused_together_ask_again_apart() {
        let mut minutes = [0; 20];
        for host in 0..1000 {
            let seen = Seen {
                now: MONDAY + host % 60,
                booted: Some(MONDAY - 28 * DAY + host / 7),
                ..Seen::default()
            };
            let pause = Tried::at(&seen).again - seen.now;
            assert!((RETRY_S / 2..RETRY_S * 3 / 2).contains(&pause), "{pause}");
            minutes[(pause / 60) as usize] += 1;
        }
        let used = &minutes[5..15];
        assert!(
            used.iter().all(|count| (50..200).contains(count)),
            "{minutes:?}"
        );
    }

    #[test]
    fn a_new_order_does_not_wait_for_the_pause() {
        let policy = policy("[[rule]]\nwhen = \"by-hand\"\n");
        let mut seen = Seen {
            now: MONDAY,
            booted: Some(MONDAY - DAY),
            asked: Some(MONDAY - 5),
            ..Seen::default()
        };
        let (watcher, first) = Watcher::default().look(&policy, &seen);
        assert!(matches!(first, Decision::Go { .. }));
        seen.now += 60;
        let (watcher, pause) = watcher.look(&policy, &seen);
        let Decision::Wait { why, until } = pause else {
            panic!("{pause:?}");
        };
        assert_eq!(why, Why::TriedLately);
        let pause = until.expect("an end") - MONDAY;
        assert!((RETRY_S / 2..RETRY_S * 3 / 2).contains(&pause), "{pause}");
        seen.asked = Some(MONDAY + 30);
        let (_, again) = watcher.look(&policy, &seen);
        assert!(matches!(again, Decision::Go { .. }));
    }

    #[test]
    fn a_turn_in_a_roll_waits_for_a_blackout_and_no_longer() {
        let policy = policy(
            "[[rule]]\nwhen = \"roll\"\n[[blackout]]\nfrom = \"Mon 08:00 UTC\"\nlength = \"1h\"\n",
        );
        let mut seen = Seen {
            now: MONDAY + 8 * HOUR,
            booted: Some(MONDAY),
            up_s: Some(60),
            ..Seen::default()
        };
        let wait = |why, until| Decision::Wait { why, until };
        let (watcher, nothing) = Watcher::default().look(&policy, &seen);
        assert_eq!(nothing, wait(Why::NothingDue, None));
        seen.turn = true;
        let (watcher, closed) = watcher.look(&policy, &seen);
        let open = MONDAY + 9 * HOUR;
        assert_eq!(closed, wait(Why::Blackout, Some(open)));
        seen.now = open;
        let (watcher, go) = watcher.look(&policy, &seen);
        assert!(matches!(go, Decision::Go { rule: 0, .. }), "{go:?}");
        let (watcher, pause) = watcher.look(&policy, &seen);
        let until = Some(open + TURN_RETRY_S);
        assert_eq!(pause, wait(Why::TriedLately, until));
        seen.now = open + TURN_RETRY_S;
        assert!(matches!(
            watcher.look(&policy, &seen).1,
            Decision::Go { .. }
        ));
    }

    #[test]
    fn a_clock_that_steps_back_neither_puts_an_order_off_nor_repeats_it() {
        let policy = policy("[[rule]]\nwhen = \"by-hand\"\n");
        let mut seen = Seen {
            now: MONDAY,
            booted: Some(MONDAY - DAY),
            asked: Some(MONDAY + HOUR),
            ..Seen::default()
        };
        let (mut watcher, go) = Watcher::default().look(&policy, &seen);
        assert!(matches!(go, Decision::Go { .. }), "{go:?}");
        for _ in 1..RETRY_S / 60 {
            seen.now += 60;
            let (next, pause) = watcher.look(&policy, &seen);
            assert!(matches!(pause, Decision::Wait { .. }), "{pause:?}");
            watcher = next;
        }
    }

    #[test]
    fn after_an_undone_reboot_nothing_goes_until_a_person_says_so() {
        let policy = policy("[[rule]]\nwhen = \"by-hand\"\n");
        let mut seen = Seen {
            now: MONDAY,
            asked: Some(MONDAY - 5),
            halted: true,
            ..Seen::default()
        };
        let mut watcher = Watcher::default();
        for _ in 0..100 {
            seen.now += 60;
            let (next, decision) = watcher.look(&policy, &seen);
            let (why, until) = (Why::Halted, None);
            assert_eq!(decision, Decision::Wait { why, until });
            watcher = next;
        }
        seen.halted = false;
        let (_, decision) = watcher.look(&policy, &seen);
        assert!(matches!(decision, Decision::Go { .. }));
    }

    #[test]
    fn a_wall_clock_that_steps_back_reboots_nothing_twice() {
        let mut policy = policy(NIGHTLY);
        for rule in &mut policy.rules {
            if let Rule::Calendar { quiet, .. } = rule {
                *quiet = None;
            }
        }
        let sunday = MONDAY + 6 * DAY + 2 * HOUR;
        let look = |now, up_s| {
            let seen = Seen {
                now,
                booted: Some(now - up_s),
                up_s: Some(up_s),
                exhausted_in_s: Some(60.0),
                ..Seen::default()
            };
            Watcher::default().look(&policy, &seen).1
        };
        assert!(matches!(look(sunday, DAY), Decision::Go { .. }));
        // It went, and was up for a while when its clock was set back.
        for up_s in [0, 60, HOUR, 4 * HOUR - 1] {
            let why = Why::NothingDue;
            let until = Some(sunday + 4 * HOUR - up_s);
            assert_eq!(look(sunday, up_s), Decision::Wait { why, until });
        }
        // A person's order does not wait.
        let seen = Seen {
            now: sunday,
            booted: Some(sunday - 60),
            up_s: Some(60),
            asked: Some(sunday - 30),
            ..Seen::default()
        };
        let (_, decision) = Watcher::default().look(&policy, &seen);
        assert!(matches!(decision, Decision::Go { rule: 2, .. }));
    }

    #[test]
    fn load_that_was_not_watched_is_not_taken_for_quiet() {
        let policy = policy(NIGHTLY);
        let sunday = MONDAY + 6 * DAY + 3 * HOUR;
        let look = |watcher: Watcher, now| {
            let seen = Seen {
                now,
                load: Some(0.1),
                ..Seen::default()
            };
            watcher.look(&policy, &seen)
        };
        let (mut watcher, _) = look(Watcher::default(), sunday);
        for pause in [GAP_S + 1, -120] {
            let at = sunday + 25 * 60 + pause;
            (watcher, _) = look(watcher, sunday + 25 * 60);
            let (next, decision) = look(watcher, at);
            watcher = next;
            let until = Some(at + 30 * 60);
            assert_eq!(
                decision,
                Decision::Wait {
                    why: Why::Load,
                    until
                }
            );
        }
        for minute in 0..2 * LOADS_MAX as Moment {
            (watcher, _) = look(watcher, sunday + HOUR + minute * 60);
        }
        assert_eq!(watcher.load.len(), LOADS_MAX, "memory is bounded");
    }
}
