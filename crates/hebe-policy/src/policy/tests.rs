use super::*;
use proptest::prelude::*;

const HOUR: Moment = 3600;
const DAY: Moment = 86_400;
/// Monday, 23 November 2026, 00:00 UTC.
const MONDAY: Moment = 1_795_392_000;

fn policy(text: &str) -> Policy {
    let policy: Policy = toml::from_str(text).expect(text);
    policy.check(MONDAY).expect(text);
    policy
}

const WEEKLY: &str = r#"
at_most = 2
[[rule]]
when = "calendar"
on = "Sun 03:00 UTC"
within = "4h"
quiet = { below = 0.2, lasting = "10min", patience = "2h" }
[[rule]]
when = "ageing"
exhausted_within = "2d"
[[rule]]
when = "by-hand"
[[blackout]]
from = "Mon..Fri 08:00 UTC"
length = "10h"
"#;

fn quiet_since(from: Moment) -> Vec<Load> {
    vec![Load { from: 0, load: 0.9 }, Load { from, load: 0.1 }]
}

fn wait(why: Why, until: impl Into<Option<Moment>>) -> Decision {
    Decision::Wait {
        why,
        until: until.into(),
    }
}

#[test]
fn the_calendar_rule_goes_once_in_its_window_and_when_it_is_quiet() {
    let policy = policy(WEEKLY);
    let event = MONDAY + 6 * DAY + 3 * HOUR;
    let mut facts = Facts {
        load: quiet_since(0),
        ..Facts::default()
    };
    assert_eq!(
        decide(&policy, &facts, event - 1),
        wait(Why::NothingDue, event)
    );
    let go = |quiet| Decision::Go {
        rule: 0,
        quiet: Some(quiet),
    };
    assert_eq!(decide(&policy, &facts, event), go(true));
    facts.load = quiet_since(event);
    let calm = event + 600;
    assert_eq!(decide(&policy, &facts, event), wait(Why::Load, calm));
    assert_eq!(decide(&policy, &facts, calm), go(true));
    facts.load = vec![Load { from: 0, load: 0.9 }];
    let patient = event + 2 * HOUR;
    assert_eq!(decide(&policy, &facts, calm), wait(Why::Load, patient));
    assert_eq!(decide(&policy, &facts, patient), go(false));
    let next = event + 7 * DAY;
    let late = event + 4 * HOUR;
    assert_eq!(decide(&policy, &facts, late), wait(Why::NothingDue, next));
    facts.last = Some(calm);
    assert_eq!(
        decide(&policy, &facts, patient),
        wait(Why::NothingDue, next)
    );
}

#[test]
fn blackouts_hold_for_every_rule_and_k_for_every_host() {
    let policy = policy(WEEKLY);
    let noon = MONDAY + 12 * HOUR;
    let mut facts = Facts {
        asked: Some(noon),
        ..Facts::default()
    };
    let evening = MONDAY + 18 * HOUR;
    assert_eq!(decide(&policy, &facts, noon), wait(Why::Blackout, evening));
    let go = Decision::Go {
        rule: 2,
        quiet: None,
    };
    assert_eq!(decide(&policy, &facts, evening), go);
    facts.under_way = 2;
    let event = MONDAY + 6 * DAY + 3 * HOUR;
    assert_eq!(
        decide(&policy, &facts, evening),
        wait(Why::OthersUnderWay, event)
    );
    facts.under_way = 1;
    assert_eq!(decide(&policy, &facts, evening), go);
    facts.last = Some(evening);
    assert_eq!(
        decide(&policy, &facts, evening + 1),
        wait(Why::NothingDue, event)
    );
}

#[test]
fn ageing_goes_when_exhaustion_is_near_and_is_cured_by_going() {
    let policy = policy(WEEKLY);
    let found = MONDAY + 20 * HOUR;
    let mut facts = Facts {
        exhaustion: Some(Exhaustion {
            found,
            at: found + 3 * DAY,
        }),
        ..Facts::default()
    };
    let near = found + DAY;
    assert_eq!(decide(&policy, &facts, found), wait(Why::NothingDue, near));
    let go = Decision::Go {
        rule: 1,
        quiet: None,
    };
    assert_eq!(decide(&policy, &facts, near), go);
    facts.last = Some(near);
    assert!(matches!(
        decide(&policy, &facts, near + 1),
        Decision::Wait { .. }
    ));
}

#[test]
fn policies_at_odds_are_joined_to_the_stricter_one() {
    let first = policy(WEEKLY);
    let second = policy(
        "at_most = 1\n[[rule]]\nwhen = \"by-hand\"\n[[blackout]]\nfrom = \"daily UTC\"\nlength = \"6h\"\n",
    );
    let both = Policy::join([first.clone(), second]).expect("two");
    assert_eq!(
        (both.at_most, both.rules.len(), both.blackouts.len()),
        (1, 4, 2)
    );
    let facts = Facts {
        asked: Some(MONDAY),
        ..Facts::default()
    };
    assert_eq!(
        decide(&both, &facts, MONDAY),
        wait(Why::Blackout, MONDAY + 6 * HOUR)
    );
    assert_eq!(Policy::join([]), None);
    assert_eq!(Policy::join([first.clone()]), Some(first));
    // Where both speak of uptime, or one does and the other means an hour, the
    // longer one counts.
    let rests = |least: &str| policy(&format!("{least}\n[[rule]]\nwhen = \"by-hand\"\n"));
    let (short, long) = (
        rests("least_uptime = \"5min\""),
        rests("least_uptime = \"2h\""),
    );
    for (pair, minutes) in [
        ([&short, &long], 120),
        ([&short, &rests("")], 60),
        ([&short, &short], 5),
        ([&rests(""), &rests("")], 60),
    ] {
        let both = Policy::join(pair.map(Clone::clone)).expect("two");
        assert_eq!(both.rest(), Span::minutes(minutes));
    }
}

#[test]
fn how_long_a_host_rests_is_said_and_never_less_than_a_calendar_needs() {
    let ageing = "[[rule]]\nwhen = \"ageing\"\nexhausted_within = \"1d\"\n";
    assert_eq!(policy(ageing).rest(), Span::hours(1));
    let quick = policy(&format!("least_uptime = \"2min\"\n{ageing}"));
    assert_eq!(quick.rest(), Span::minutes(2));
    let weekly = policy(&format!("least_uptime = \"2min\"\n{WEEKLY}"));
    assert_eq!(weekly.rest(), Span::hours(4));
    let at = MONDAY + DAY;
    let facts = |up: Moment| Facts {
        exhaustion: Some(Exhaustion {
            found: at,
            at: at + HOUR,
        }),
        rested: Some(at - up + 120),
        ..Facts::default()
    };
    let early = decide(&quick, &facts(90), at);
    assert_eq!(early, wait(Why::NothingDue, at + 30));
    assert!(matches!(
        decide(&quick, &facts(120), at),
        Decision::Go { .. }
    ));
}

#[test]
fn what_cannot_be_meant_is_refused_with_a_sentence() {
    for (text, word) in [
        ("at_most = 0\n[[rule]]\nwhen = \"by-hand\"", "at_most = 0"),
        ("at_most = 1", "no rule"),
        (
            "least_uptime = \"0s\"\n[[rule]]\nwhen = \"by-hand\"",
            "least_uptime",
        ),
        (
            "[[rule]]\nwhen = \"calendar\"\non = \"daily UTC\"\nwithin = \"0s\"",
            "within",
        ),
        (
            "[[rule]]\nwhen = \"ageing\"\nexhausted_within = \"0s\"",
            "exhausted_within",
        ),
        (
            "[[rule]]\nwhen = \"ageing\"\nexhausted_within = \"1d\"\nquiet = { below = -1.0, lasting = \"1h\", patience = \"1h\" }",
            "below = -1",
        ),
        (
            "[[rule]]\nwhen = \"by-hand\"\n[[blackout]]\nfrom = \"daily UTC\"\nlength = \"1d\"",
            "without a gap",
        ),
    ] {
        let policy: Policy = toml::from_str(text).expect(text);
        let error = policy.check(MONDAY).expect_err(text).to_string();
        assert!(error.contains(word), "{error}");
    }
    for text in [
        "[[rule]]\nwhen = \"moon\"",
        "[[rule]]\nwhen = \"calendar\"\non = \"Sun 03:00\"\nwithin = \"1h\"",
        "k = 2",
    ] {
        assert!(toml::from_str::<Policy>(text).is_err(), "{text}");
    }
}

fn facts() -> impl Strategy<Value = Facts> {
    let instant = || MONDAY - 14 * DAY..MONDAY + 14 * DAY;
    let load = prop::collection::vec((instant(), 0.0..1.0f64), 0..6);
    (
        prop::option::of(instant()),
        prop::option::of(instant()),
        prop::option::of((instant(), instant())),
        load,
        0u32..4,
        prop::option::weighted(0.3, instant()),
    )
        .prop_map(|(last, asked, exhaustion, mut load, under_way, rested)| {
            load.sort_by_key(|l| l.0);
            Facts {
                last,
                asked,
                turn: None,
                exhaustion: exhaustion.map(|(found, at)| Exhaustion { found, at }),
                load: load
                    .into_iter()
                    .map(|(from, load)| Load { from, load })
                    .collect(),
                under_way,
                rested,
            }
        })
}

proptest! {
    /// The contract of `until`: before it, the same facts never say go; and it
    /// lies ahead, so that whoever sleeps until then gets on.
    #[test]
    fn nobody_who_sleeps_until_told_misses_a_go(
        facts in facts(),
        now in MONDAY - 10 * DAY..MONDAY + 10 * DAY,
        part in prop::collection::vec(0.0..1.0f64, 8),
    ) {
        let policy = policy(WEEKLY);
        if let Decision::Wait { until, .. } = decide(&policy, &facts, now) {
            prop_assert!(until.is_none_or(|until| until > now));
            // Load that lies ahead is no fact yet.
            let ahead = facts.load.iter().any(|l| l.from > now);
            let end = until.unwrap_or(now + 30 * DAY);
            for part in part {
                let between = now + ((end - now) as f64 * part) as Moment;
                if between < end && !ahead {
                    let decision = decide(&policy, &facts, between);
                    let waits = matches!(decision, Decision::Wait { .. });
                    prop_assert!(waits, "at {between}: {decision:?}");
                }
            }
        }
    }

    /// Whatever the facts are, nothing goes in a blackout, nor beyond k.
    #[test]
    fn nothing_goes_that_must_not(facts in facts(), now in MONDAY - 10 * DAY..MONDAY + 10 * DAY) {
        let policy = policy(WEEKLY);
        if let Decision::Go { .. } = decide(&policy, &facts, now) {
            prop_assert!(policy.blackouts[0].open_until(now).is_none());
            prop_assert!(facts.under_way < policy.at_most);
        }
    }
}

/// Twelve weeks of a group of three, every ten minutes as a service would run
/// it and from `until` to `until` as a simulation does: the same instants. Two
/// of the twelve Sundays, 20 and 27 December, are blacked out.
#[test]
fn a_simulation_and_a_service_decide_alike() {
    let policy = policy(
        "[[rule]]\nwhen = \"calendar\"\non = \"Sun 03:00 Europe/Berlin\"\nwithin = \"4h\"\n\
         [[blackout]]\nfrom = \"*-12-20 00:00 UTC\"\nlength = \"2w\"\n",
    );
    let (begin, end) = (MONDAY, MONDAY + 12 * 7 * DAY);
    let slept = group(&policy, begin, end, None);
    assert_eq!(slept, group(&policy, begin, end, Some(600)));
    assert_eq!(slept.len(), 30);
    assert!(slept.windows(2).all(|w| w[1] - w[0] >= 600), "two at once");
}

/// Instants at which hosts of a group of three began; each takes ten minutes.
fn group(policy: &Policy, begin: Moment, end: Moment, poll: Option<Moment>) -> Vec<Moment> {
    let mut last = [begin; 3];
    let mut starts = Vec::new();
    let mut now = begin;
    while now < end {
        let mut next = end;
        for host in 0..3 {
            let busy_until = last
                .iter()
                .map(|l| l + 600)
                .filter(|l| *l > now && *l > begin + 600);
            let facts = Facts {
                last: Some(last[host]),
                under_way: busy_until.clone().count() as u32,
                ..Facts::default()
            };
            match decide(policy, &facts, now) {
                Decision::Go { .. } => {
                    last[host] = now;
                    starts.push(now);
                    next = next.min(now + 600);
                }
                Decision::Wait { why, until } => {
                    next = next.min(until.unwrap_or(end));
                    if why == Why::OthersUnderWay {
                        next = next.min(busy_until.min().unwrap_or(end));
                    }
                }
            }
        }
        now = poll.map_or(next, |step| now + step);
    }
    starts
}
