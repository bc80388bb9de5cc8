use super::forecast::{Inventory, InventoryError};
use super::*;
use proptest::prelude::*;

fn drive(mut roll: Roll, events: &[(Event, u64)]) -> (Roll, Vec<Effect>) {
    let mut all = Vec::new();
    for (event, now_s) in events {
        let (next, effects) = roll.step(event.clone(), *now_s);
        roll = next;
        all.extend(effects);
    }
    (roll, all)
}

#[test]
fn hosts_go_one_after_the_other() {
    let roll = Roll::new(2, 1, Span::seconds(100));
    let (roll, effects) = drive(
        roll,
        &[
            (Event::Tick, 0),
            (Event::Granted(0), 1),
            (Event::AllAnswer(0), 2),
            (Event::OtherBoot(0), 50),
            (Event::AllAnswer(0), 60),
            (Event::Granted(1), 61),
            (Event::OtherBoot(1), 90),
            (Event::AllAnswer(1), 91),
        ],
    );
    use Effect::{AskLock, Reboot, Release};
    let expected = [
        AskLock(0),
        Reboot(0),
        Release(0),
        AskLock(1),
        Reboot(1),
        Release(1),
    ];
    assert_eq!(effects, expected);
    assert!(roll.is_over() && roll.stopped().is_none());
}

#[test]
fn a_host_that_does_not_come_back_stops_the_roll_and_keeps_its_lock() {
    let roll = Roll::new(3, 2, Span::seconds(100));
    let begun = [
        (Event::Tick, 0),
        (Event::Granted(0), 0),
        (Event::Granted(1), 50),
        (Event::OtherBoot(1), 60),
    ];
    let (roll, _) = drive(roll, &begun);
    assert_eq!(roll.tick_at(), Some(100));
    let (roll, effects) = drive(roll, &[(Event::Tick, 100), (Event::AllAnswer(1), 110)]);
    assert_eq!(roll.stopped(), Some(&Stop::NotBack { host: 0 }));
    assert_eq!(effects, [Effect::Release(1)], "the other one ends well");
    assert!(roll.is_over());
    // Late, but there: its lock is free again, and still nobody begins.
    let late = [(Event::OtherBoot(0), 900), (Event::AllAnswer(0), 910)];
    let (roll, effects) = drive(roll, &late);
    assert_eq!(effects, [Effect::Release(0)]);
    assert_eq!(roll.hosts()[2], HostState::Waiting { not_before_s: 0 });
    assert!(roll.is_over());
}

#[test]
fn a_refusal_lets_the_next_one_go_and_a_denied_lock_is_asked_for_later() {
    let roll = Roll::new(2, 1, Span::seconds(100));
    let why = "it is not ready".to_owned();
    let events = [
        (Event::Tick, 0),
        (Event::Denied(0), 0),
        (Event::Tick, 5),
        (Event::Granted(1), 6),
        (Event::Refused(1, why.clone()), 7),
        (Event::Tick, 10),
        (Event::Granted(0), 11),
    ];
    let (roll, effects) = drive(roll, &events);
    use Effect::{AskLock, Reboot, Release};
    let expected = [
        AskLock(0),
        AskLock(1),
        Reboot(1),
        Release(1),
        AskLock(0),
        Reboot(0),
    ];
    assert_eq!(effects, expected);
    assert_eq!(roll.hosts()[1], HostState::Refused { why });
}

#[test]
fn a_lock_that_is_lost_under_way_stops_the_roll() {
    let roll = Roll::new(2, 1, Span::seconds(100));
    let events = [
        (Event::Tick, 0),
        (Event::Granted(0), 1),
        (Event::LockLost(0), 2),
        (Event::OtherBoot(0), 3),
        (Event::AllAnswer(0), 4),
        (Event::Tick, 5),
    ];
    let (roll, effects) = drive(roll, &events);
    assert_eq!(roll.stopped(), Some(&Stop::LockLost { host: 0 }));
    assert!(!effects.contains(&Effect::AskLock(1)), "{effects:?}");
    assert!(roll.is_over());
}

/// The model: who holds the lock, who was rebooted, whose new kernel runs.
#[derive(Default)]
struct World {
    holders: BTreeSet<usize>,
    asked: BTreeSet<usize>,
    rebooted: BTreeSet<usize>,
    back: BTreeSet<usize>,
    answered: BTreeSet<usize>,
    refused: BTreeSet<usize>,
}

fn any_event(hosts: usize) -> impl Strategy<Value = (Event, u64)> {
    let host = 0..hosts;
    let event = (host, 0u8..7).prop_map(|(i, kind)| match kind {
        0 => Event::Tick,
        1 => Event::Granted(i),
        2 => Event::Denied(i),
        3 => Event::Refused(i, "no".into()),
        4 => Event::OtherBoot(i),
        5 => Event::AllAnswer(i),
        _ => Event::LockLost(i),
    });
    (event, prop_oneof![9 => 0u64..20, 1 => 50u64..200])
}

/// Whether an event can happen at all: nobody gets a lock that is not asked
/// for, and no host comes back that was not sent away.
fn possible(world: &mut World, event: &Event) -> bool {
    match event {
        Event::Granted(i) => world.asked.remove(i) && world.holders.insert(*i),
        Event::Denied(i) => world.asked.remove(i),
        Event::Refused(i, _) => {
            let can = world.rebooted.contains(i) && !world.back.contains(i);
            can && world.refused.insert(*i)
        }
        Event::OtherBoot(i) => {
            world.rebooted.contains(i) && !world.refused.contains(i) && world.back.insert(*i)
        }
        Event::AllAnswer(i) => {
            // Under the old kernel, too: then it must mean nothing.
            world.back.contains(i).then(|| world.answered.insert(*i));
            true
        }
        Event::LockLost(i) => world.holders.contains(i),
        Event::Tick => true,
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// The four rules, against the model, for any order of events.
    #[test]
    fn the_rules_hold_whatever_happens(
        at_most in 1usize..4,
        events in prop::collection::vec(any_event(5), 1..120),
    ) {
        let mut roll = Roll::new(5, at_most, Span::seconds(100));
        let mut world = World::default();
        let mut now_s = 0;
        for (event, passes_s) in events {
            now_s += passes_s;
            if !possible(&mut world, &event) {
                continue;
            }
            let was_stopped = roll.stopped().is_some();
            let (next, effects) = roll.step(event, now_s);
            roll = next;
            for effect in effects {
                match effect {
                    Effect::AskLock(i) => {
                        prop_assert!(!was_stopped && roll.stopped().is_none());
                        prop_assert!(!world.rebooted.contains(&i));
                        world.asked.insert(i);
                    }
                    Effect::Reboot(i) => {
                        prop_assert!(!was_stopped);
                        prop_assert!(world.holders.contains(&i), "without the lock");
                        prop_assert!(world.rebooted.insert(i), "twice");
                    }
                    Effect::Release(i) => {
                        let well = world.answered.contains(&i);
                        let untouched = world.refused.contains(&i) || !world.rebooted.contains(&i);
                        prop_assert!(well || untouched, "released too early");
                        prop_assert!(world.holders.remove(&i));
                    }
                }
            }
            prop_assert!(world.holders.len() + world.asked.len() <= at_most);
        }
    }

    /// A forecast has every host once, never more than k away, and ends when
    /// the last one does.
    #[test]
    fn a_forecast_keeps_the_rules(
        at_most in 1usize..5,
        hosts in prop::collection::vec((0.0..50.0f64, 1u64..600), 1..30),
        smallest in any::<bool>(),
    ) {
        let mut text = format!("group = \"g\"\nat_most = {at_most}\n");
        if smallest {
            text += "order = \"smallest-first\"\n";
        }
        for (i, (capacity, seconds)) in hosts.iter().enumerate() {
            text += &format!("[[host]]\nname = \"h{i}\"\ncapacity = {capacity:?}\nexpected = \"{seconds}s\"\n");
        }
        let inventory: Inventory = toml::from_str(&text).expect("inventory");
        let forecast = inventory.forecast().expect("forecast");
        prop_assert_eq!(forecast.steps.len(), hosts.len());
        let ends = forecast.steps.iter().map(|s| s.to_s).max();
        prop_assert_eq!(Some(forecast.duration_s), ends);
        for moment in &forecast.capacity {
            let away = |s: &&super::forecast::Step| (s.from_s..s.to_s).contains(&moment.from_s);
            prop_assert!(forecast.steps.iter().filter(away).count() <= at_most);
        }
        let last = forecast.capacity.last().map(|c| c.capacity);
        prop_assert!(last.is_some_and(|c| (c - forecast.capacity_whole).abs() < 1e-9));
        if smallest {
            let capacity = |name: &str| inventory.hosts.iter().find(|h| h.name == name).map(|h| h.capacity);
            let sorted = forecast.steps.windows(2).all(|w| capacity(&w[0].host) <= capacity(&w[1].host));
            prop_assert!(sorted);
        }
    }
}

#[test]
fn a_forecast_of_three_hosts_by_hand() {
    let text = r#"
        group = "rack1"
        at_most = 2
        expected = "60s"
        [[host]]
        name = "a"
        capacity = 10
        [[host]]
        name = "b"
        capacity = 20
        expected = "90s"
        [[host]]
        name = "c"
        capacity = 30
    "#;
    let inventory: Inventory = toml::from_str(text).expect("inventory");
    let forecast = inventory.forecast().expect("forecast");
    let steps: Vec<(&str, u64, u64)> = forecast
        .steps
        .iter()
        .map(|s| (s.host.as_str(), s.from_s, s.to_s))
        .collect();
    assert_eq!(steps, [("a", 0, 60), ("b", 0, 90), ("c", 60, 120)]);
    let capacity: Vec<(u64, f64)> = forecast
        .capacity
        .iter()
        .map(|c| (c.from_s, c.capacity))
        .collect();
    assert_eq!(capacity, [(0, 30.0), (60, 10.0), (90, 30.0), (120, 60.0)]);
    assert_eq!((forecast.capacity_least, forecast.duration_s), (10.0, 120));
}

#[test]
fn inventories_that_cannot_be_meant_are_refused() {
    let host = "[[host]]\nname = \"a\"\nexpected = \"60s\"\n";
    for (text, word) in [
        (format!("at_most = 0\n{host}"), "at_most = 0"),
        (String::new(), "no [[host]]"),
        (format!("{host}{host}"), "there twice"),
        ("[[host]]\nname = \"a\"\n".into(), "expected ="),
        (format!("{host}capacity = -1\n"), "capacity = -1"),
        (format!("{host}capacity = nan\n"), "capacity = NaN"),
        (format!("give_up_after = \"1min\"\n{host}"), "give_up_after"),
    ] {
        let inventory: Inventory = toml::from_str(&format!("group = \"g\"\n{text}")).expect("TOML");
        let error = inventory.forecast().expect_err(&text).to_string();
        assert!(error.contains(word), "{error}");
    }
    for (text, word) in [
        (host.replace("\"a\"", "\"a/b\""), "'a/b' is no name"),
        (
            format!("{host}[reboot]\nkernel = \"vmlinuz\"\n"),
            "'vmlinuz' is no whole path",
        ),
    ] {
        let inventory: Inventory = toml::from_str(&format!("group = \"g\"\n{text}")).expect("TOML");
        let error = inventory
            .rollout("1", "me", 0)
            .expect_err(&text)
            .to_string();
        assert!(error.contains(word), "{error}");
    }
    assert!(toml::from_str::<Inventory>("group = \"g\"\nat_mos = 2").is_err());
    let many = Inventory {
        group: "g".into(),
        at_most: 1,
        give_up_after: Span::hours(1),
        expected: Some(Span::minutes(1)),
        order: super::forecast::Order::Listed,
        reboot: super::turns::RebootOrder::default(),
        hosts: vec![
            super::forecast::HostEntry {
                name: "a".into(),
                capacity: 1.0,
                expected: None,
            };
            10_001
        ],
    };
    assert_eq!(many.forecast(), Err(InventoryError::TooMany));
}
