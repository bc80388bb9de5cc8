use super::*;
use proptest::prelude::*;

/// Thursday, 15 January 2026, 00:00 UTC.
const JANUARY: Moment = 1_768_435_200;

fn monthly(at_most: u32) -> Policy {
    let text = format!(
        "at_most = {at_most}\n[[rule]]\nwhen = \"calendar\"\non = \"*-*-01 03:00 UTC\"\nwithin = \"1w\"\n"
    );
    toml::from_str(&text).expect("policy")
}

fn paper() -> Costs {
    Costs::of_paper(11).expect("costs")
}

fn cycle(way: Way, hosts: u32) -> Cycle {
    simulate(way, hosts, &monthly(1), &paper(), JANUARY).expect("cycle")
}

#[test]
fn the_papers_costs_are_those_of_their_functions() {
    let costs = paper();
    // −0.55·11 + 43 + 0.43·11 − 0.07, and 47 + 43 + 3.8·11 + 13.
    assert!((costs.warm_s - 41.61).abs() < 1e-9, "{costs:?}");
    assert!((costs.cold_s - 144.8).abs() < 1e-9, "{costs:?}");
    assert_eq!(costs.empty_s, 90.0);
    assert!((costs.migrate_s - 94.49).abs() < 0.01, "{costs:?}");
}

/// February 2026 has four weeks. Every host is renewed once, and what that
/// costs is known without any simulation.
#[test]
fn areas_are_what_they_must_be() {
    let costs = paper();
    for hosts in [3, 10, 100, 300] {
        let m = f64::from(hosts);
        let [warm, cold, migrate] = Way::ALL.map(|way| cycle(way, hosts));
        assert_eq!(warm.cycle_s, 28.0 * 86_400.0);
        assert_eq!(
            [warm.renewed, cold.renewed, migrate.renewed],
            [hosts, hosts, hosts - 1]
        );
        let near = |found: f64, expected: f64| {
            assert!((found / expected - 1.0).abs() < 1e-6, "{found} {expected}");
        };
        near(warm.lost, m * costs.warm_s);
        near(cold.lost, m * costs.cold_s);
        let moved = (m - 1.0) * costs.migrate_s * costs.migrate_part;
        near(migrate.lost, migrate.cycle_s + moved);
        // T-03.
        assert!(warm.area > cold.area && warm.area > migrate.area);
        for found in [&warm, &cold] {
            assert_eq!(found.least, m - 1.0);
            assert_eq!(found.levels.first().map(|l| l.hosts), Some(m - 1.0));
            assert_eq!(found.levels.last().map(|l| l.hosts), Some(m));
        }
    }
}

/// As long as no more hosts are away at once than would be spare, being away
/// costs less than being spare, however long it takes. What may cost more is
/// what comes after a cold reboot.
#[test]
fn a_spare_host_pays_only_where_what_follows_a_cold_reboot_is_worse() {
    let lost = |way, cold_s, refill_s| {
        let costs = Costs {
            cold_s,
            refill_s,
            ..paper()
        };
        let found = simulate(way, 100, &monthly(1), &costs, JANUARY);
        found.expect("cycle").lost
    };
    for cold_s in [10.0, 500.0, 5_000.0] {
        assert!(lost(Way::Cold, cold_s, 0.0) < lost(Way::Migrate, cold_s, 0.0));
    }
    let two_days = 2.0 * 86_400.0;
    assert!(lost(Way::Cold, 500.0, two_days) > lost(Way::Migrate, 500.0, two_days));
}

#[test]
fn empty_caches_cost_what_they_cost() {
    let costs = Costs {
        refill_s: 60.0,
        ..paper()
    };
    let cold = |costs: &Costs| simulate(Way::Cold, 3, &monthly(1), costs, JANUARY).expect("cold");
    let (with, without) = (cold(&costs), cold(&paper()));
    let more = 3.0 * 60.0 * 0.69;
    assert!(
        (with.lost - without.lost - more).abs() < 1e-3,
        "{}",
        with.lost
    );
    let levels: Vec<f64> = with.levels.iter().map(|l| l.hosts).collect();
    assert!(levels.contains(&2.31), "{levels:?}");
}

#[test]
fn no_more_hosts_are_away_than_the_policy_says() {
    for k in [1, 2, 7] {
        let found = simulate(Way::Cold, 40, &monthly(k), &paper(), JANUARY).expect("cycle");
        assert!(found.least >= f64::from(40 - k), "{k}: {}", found.least);
        assert_eq!(found.renewed, 40);
    }
    let (one, seven) = (monthly(1), monthly(7));
    let roll = |policy| {
        simulate(Way::Cold, 40, policy, &paper(), JANUARY)
            .expect("cycle")
            .roll_s
    };
    assert!(roll(&seven) < roll(&one));
}

/// Blackouts and the width of the window count here as on a host.
#[test]
fn what_the_policy_does_not_let_go_is_not_renewed() {
    let mut policy = monthly(1);
    let text = "from = \"*-*-01 03:00 UTC\"\nlength = \"2h\"\n";
    policy.blackouts.push(toml::from_str(text).expect("window"));
    let found = simulate(Way::Warm, 5, &policy, &paper(), JANUARY).expect("cycle");
    assert_eq!((found.levels[0].from_s, found.levels[0].hosts), (0.0, 5.0));
    assert!(found.levels[1].from_s >= 7_200.0, "{:?}", found.levels[1]);
    assert_eq!(found.renewed, 5);
    let short: Policy = toml::from_str(
        "[[rule]]\nwhen = \"calendar\"\non = \"*-*-01 03:00 UTC\"\nwithin = \"1h\"\n",
    )
    .expect("policy");
    let found = simulate(Way::Cold, 300, &short, &paper(), JANUARY).expect("cycle");
    // 24 fit one after the other into an hour and the last one's absence.
    assert!((15..=25).contains(&found.renewed), "{}", found.renewed);
}

#[test]
fn what_cannot_be_meant_is_refused() {
    let refused = |hosts, policy: &Policy, costs: &Costs| {
        let error = simulate(Way::Migrate, hosts, policy, costs, JANUARY);
        error.expect_err("refused").to_string()
    };
    let (policy, costs) = (monthly(3), paper());
    for hosts in [0, 3, 10_001] {
        assert!(refused(hosts, &policy, &costs).contains("1 to 10000"));
    }
    let by_hand: Policy = toml::from_str("[[rule]]\nwhen = \"by-hand\"\n").expect("policy");
    assert!(refused(9, &by_hand, &costs).contains("no cycle"));
    assert!(refused(9, &monthly(0), &costs).contains("at_most"));
    for (what, bad) in [
        (
            "warm_s",
            Costs {
                warm_s: -1.0,
                ..costs
            },
        ),
        (
            "empty_s",
            Costs {
                empty_s: f64::NAN,
                ..costs
            },
        ),
        (
            "migrate_part",
            Costs {
                migrate_part: 1.5,
                ..costs
            },
        ),
    ] {
        assert!(refused(9, &policy, &bad).contains(what), "{what}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    /// The area lies between nothing and everything, the roll keeps k, and the
    /// same is found twice.
    #[test]
    fn any_group_can_be_simulated(
        hosts in 2u32..60,
        k in 1u32..5,
        warm_s in 0.0..5_000.0f64,
        cold_s in 0.0..5_000.0f64,
        refill_s in 0.0..5_000.0f64,
        way in prop::sample::select(Way::ALL.to_vec()),
    ) {
        prop_assume!(k < hosts);
        let costs = Costs { warm_s, cold_s, refill_s, ..paper() };
        let run = || simulate(way, hosts, &monthly(k), &costs, JANUARY).expect("cycle");
        let found = run();
        prop_assert!(found.area > 0.0 && found.lost >= -1e-6, "{found:?}");
        let floor = f64::from(hosts) - f64::from(k) * match way {
            Way::Warm => 1.0,
            // The next goes while the last one's caches fill.
            Way::Cold => f64::from(hosts) / f64::from(k),
            Way::Migrate => 2.0,
        };
        prop_assert!(found.least >= floor - 1e-6, "{} {floor}", found.least);
        prop_assert_eq!(&found, &run());
    }
}
