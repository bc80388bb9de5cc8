use super::*;
use crate::fleet::forecast::Inventory;
use crate::fleet::slots::{Phase, SLOT_VERSION, Slot, Take, may_take};
use proptest::prelude::*;
use std::collections::BTreeSet;

const NAMES: [&str; 4] = ["a", "b", "c", "d"];

fn name(text: &str) -> FleetName {
    text.parse().expect("name")
}

fn rollout(at_most: u32) -> Rollout {
    let place = |host: &str| Place {
        host: name(host),
        capacity: 1.0,
        expected_s: 60,
    };
    Rollout {
        version: ROLL_VERSION,
        id: "1".into(),
        by: "root@a".into(),
        began_s: 0,
        at_most,
        give_up_s: 100,
        reboot: RebootOrder::default(),
        hosts: NAMES.map(place).into(),
        state: RollState::Running,
    }
}

fn mark(host: &str, state: MarkState) -> Mark {
    Mark {
        version: ROLL_VERSION,
        roll: "1".into(),
        host: name(host),
        machine: format!("machine-{host}"),
        boot_id: "boot-1".into(),
        at_s: 0,
        state,
    }
}

fn done() -> MarkState {
    MarkState::Done { why: None }
}

fn failed() -> MarkState {
    MarkState::Failed {
        why: "kexec failed".into(),
    }
}

fn view(at_most: u32, marks: &[(&str, MarkState)]) -> View {
    let marks = marks.iter();
    View {
        rollout: rollout(at_most),
        marks: marks
            .map(|(host, state)| ((*host).to_owned(), mark(host, state.clone())))
            .collect(),
    }
}

fn slot(host: &str, phase: Phase, deadline_s: u64) -> Slot {
    Slot {
        version: SLOT_VERSION,
        host: name(host),
        machine: format!("machine-{host}"),
        phase,
        claim: host.into(),
        boot_id: "boot-1".into(),
        since_s: 0,
        deadline_s,
        at_most: 9,
        vms: BTreeSet::new(),
    }
}

fn turns(view: &View) -> [bool; 4] {
    NAMES.map(|host| view.turn(&[], &name(host), 10) == Turn::Go)
}

#[test]
fn the_first_k_that_are_not_through_have_their_turn() {
    assert_eq!(turns(&view(1, &[])), [true, false, false, false]);
    let one = view(2, &[("a", done()), ("b", MarkState::Away)]);
    assert_eq!(turns(&one), [false, false, true, false]);
    let at_turn: Vec<&str> = one.at_turn().map(|place| place.host.as_str()).collect();
    assert_eq!(at_turn, ["b", "c"]);
    assert_eq!(one.capacity(), 3.0, "b is away");
    let Turn::NotYet(why) = one.turn(&[], &name("d"), 10) else {
        panic!("d comes after b and c");
    };
    assert!(why.starts_with("b, c before it"), "{why}");
    // Whoever refused or was passed over holds nobody up.
    let refused = MarkState::Refused {
        why: "no kernel".into(),
    };
    let skipped = MarkState::Skipped { by: "me".into() };
    let rest = view(1, &[("a", refused), ("b", skipped)]);
    assert_eq!(turns(&rest), [false, false, true, false]);
    assert!(!rest.is_over());
    let Turn::Never(why) = rest.turn(&[], &name("elsewhere"), 10) else {
        panic!("it is not on the list");
    };
    assert!(why.contains("no part"), "{why}");
}

#[test]
fn a_person_or_a_fault_holds_everybody() {
    let by = || "root@b".to_owned();
    let mut view = view(4, &[("a", MarkState::Away)]);
    for state in [
        RollState::Paused { by: by() },
        RollState::Stopped {
            by: by(),
            why: "x".into(),
        },
        RollState::Aborted { by: by() },
    ] {
        view.rollout.state = state;
        assert_eq!(turns(&view), [false; 4]);
    }
    assert!(!view.is_over(), "a is under way");
    view.marks.insert("a".into(), mark("a", done()));
    assert!(view.is_over());
    view.rollout.state = RollState::Running;
    assert_eq!(turns(&view), [false, true, true, true]);
    // Late, by a slot of any host of the group; a lease is not.
    let found = |phase| [Found::Slot(slot("z", phase, 5))];
    assert_eq!(view.trouble(&found(Phase::Held), 10), None);
    let late = found(Phase::Rebooting);
    let Turn::Stop(why) = view.turn(&late, &name("b"), 610) else {
        panic!("z is late");
    };
    assert_eq!(why, "host 'z' was to be back 10min5s ago and is not");
    view.marks.insert("b".into(), mark("b", failed()));
    assert!(matches!(view.turn(&[], &name("c"), 10), Turn::Stop(_)));
    let Turn::Never(why) = view.turn(&[], &name("b"), 10) else {
        panic!("b does not try again by itself");
    };
    assert!(why.contains("failed"), "{why}");
}

#[test]
fn wishes_are_granted_where_they_make_sense() {
    let grants = |view: &View, slots: &[Found], wish: Wish| grant(view, slots, wish, "root@d", 10);
    let new = view(1, &[]);
    let paused = grants(&new, &[], Wish::Pause).expect("granted").rollout;
    assert_eq!(
        paused.state,
        RollState::Paused {
            by: "root@d".into()
        }
    );
    assert_eq!(grants(&new, &[], Wish::Continue), Err(Denied::Running));
    let stopped = |marks: &[(&str, MarkState)]| {
        let mut view = view(1, marks);
        view.rollout.state = RollState::Stopped {
            by: "b".into(),
            why: "a is not back".into(),
        };
        view
    };
    // It would stop again at once: the person is told what to do first.
    let bad = stopped(&[("a", failed())]);
    let denied = grants(&bad, &[], Wish::Continue).expect_err("a failed");
    assert!(denied.to_string().contains("roll retry HOST"), "{denied}");
    let late = [Found::Slot(slot("a", Phase::Rebooting, 5))];
    let away = stopped(&[("a", MarkState::Away)]);
    assert!(matches!(
        grants(&away, &late, Wish::Continue),
        Err(Denied::Trouble(_))
    ));
    for wish in [Wish::Skip(name("a")), Wish::Retry(name("a"))] {
        assert_eq!(
            grants(&away, &late, wish.clone()),
            Err(Denied::UnderWay(name("a")))
        );
        let freed = grants(&away, &[], wish).expect("its slot was freed");
        assert_eq!(freed.mark.expect("changed").0, name("a"));
    }
    let again = grants(&bad, &[], Wish::Retry(name("a"))).expect("granted");
    assert_eq!(again.mark, Some((name("a"), None)));
    let free = stopped(&[("a", done())]);
    let on = grants(&free, &[], Wish::Continue).expect("granted");
    assert_eq!(on.rollout.state, RollState::Running);
    for (wish, denied) in [
        (Wish::Skip(name("a")), Denied::Had(name("a"))),
        (Wish::Retry(name("b")), Denied::NotYet(name("b"))),
        (Wish::Skip(name("z")), Denied::NoPart(name("z"))),
    ] {
        assert_eq!(grants(&free, &[], wish), Err(denied));
    }
    let all = view(1, &NAMES.map(|host| (host, done())));
    assert_eq!(grants(&all, &[], Wish::Pause), Err(Denied::Over));
    assert!(grants(&all, &[], Wish::Retry(name("b"))).is_ok());
    let mut aborted = new;
    aborted.rollout.state = RollState::Aborted { by: "x".into() };
    assert_eq!(grants(&aborted, &[], Wish::Continue), Err(Denied::Over));
}

#[test]
fn an_away_host_knows_by_its_slot_and_its_boot_how_it_ended() {
    let away = mark("a", MarkState::Away);
    let ends = |boot, has_slot, busy| settled(&away, "machine-a", boot, has_slot, busy);
    assert_eq!(ends("boot-2", false, false), Some(done()));
    assert_eq!(ends("boot-2", true, false), None, "a VM does not answer");
    assert_eq!(ends("boot-1", false, true), None, "it is being undone");
    assert!(matches!(
        ends("boot-1", false, false),
        Some(MarkState::Failed { .. })
    ));
    assert_eq!(settled(&away, "machine-b", "boot-2", false, false), None);
    assert_eq!(
        settled(&mark("a", done()), "machine-a", "boot-2", false, false),
        None
    );
}

#[test]
fn what_is_written_down_is_read_again_and_frozen() {
    let mut all = view(2, &[("a", failed()), ("b", MarkState::Away)]).rollout;
    all.reboot = RebootOrder {
        kernel: Some("/boot/vmlinuz".into()),
        method: Some(Method::Warm),
        ..RebootOrder::default()
    };
    all.hosts.truncate(1);
    all.state = RollState::Stopped {
        by: "b".into(),
        why: "w".into(),
    };
    let text = serde_json::to_string(&all).expect("JSON");
    let frozen = r#"{"version":1,"id":"1","by":"root@a","began_s":0,"at_most":2,"give_up_s":100,"reboot":{"kernel":"/boot/vmlinuz","method":"warm"},"hosts":[{"host":"a","capacity":1.0,"expected_s":60}],"state":{"state":"stopped","by":"b","why":"w"}}"#;
    assert_eq!(text, frozen);
    assert_eq!(serde_json::from_str::<Rollout>(&text).expect("read"), all);
    let one = mark("a", failed());
    let text = serde_json::to_string(&one).expect("JSON");
    let frozen = r#"{"version":1,"roll":"1","host":"a","machine":"machine-a","boot_id":"boot-1","at_s":0,"state":{"state":"failed","why":"kexec failed"}}"#;
    assert_eq!(text, frozen);
    assert_eq!(serde_json::from_str::<Mark>(&text).expect("read"), one);
}

/// The store, and what hosts and persons do to it.
struct World {
    view: View,
    roll_revision: u64,
    mark_revisions: BTreeMap<String, u64>,
    slots: BTreeMap<String, Slot>,
    /// What a host found when it was its turn: revisions of the roll and of
    /// its own mark. It may be long ago.
    found: BTreeMap<String, (u64, u64)>,
    away: BTreeSet<String>,
    boots: BTreeMap<String, u32>,
    went: BTreeMap<String, u32>,
    retries: BTreeMap<String, u32>,
    now_s: u64,
}

impl World {
    fn new(at_most: u32) -> Self {
        Self {
            view: view(at_most, &[]),
            roll_revision: 1,
            mark_revisions: BTreeMap::new(),
            slots: BTreeMap::new(),
            found: BTreeMap::new(),
            away: BTreeSet::new(),
            boots: BTreeMap::new(),
            went: BTreeMap::new(),
            retries: BTreeMap::new(),
            now_s: 0,
        }
    }

    fn boot(&self, host: &str) -> String {
        format!("boot-{}", self.boots.get(host).copied().unwrap_or(1))
    }

    fn revision(&self, host: &str) -> u64 {
        self.mark_revisions.get(host).copied().unwrap_or(0)
    }

    fn found_slots(&self) -> Vec<Found> {
        self.slots.values().cloned().map(Found::Slot).collect()
    }

    fn write(&mut self, host: &str, state: MarkState) {
        let mut written = mark(host, state);
        written.boot_id = self.boot(host);
        self.view.marks.insert(host.to_owned(), written);
        *self.mark_revisions.entry(host.to_owned()).or_default() += 1;
    }

    /// A host looks whether it is its turn, and takes a lease if it is.
    fn look(&mut self, host: &str) {
        let (me, slots) = (name(host), self.found_slots());
        match self.view.turn(&slots, &me, self.now_s) {
            Turn::Go => {
                let boot = self.boot(host);
                let machine = format!("machine-{host}");
                let at_most = self.view.rollout.at_most;
                let take = may_take(&slots, &me, &machine, &boot, at_most, self.now_s);
                if take == Take::Free {
                    let mut held = slot(host, Phase::Held, 0);
                    (held.boot_id, held.at_most) = (boot, at_most);
                    self.slots.insert(host.to_owned(), held);
                    let revisions = (self.roll_revision, self.revision(host));
                    self.found.insert(host.to_owned(), revisions);
                }
            }
            Turn::Stop(why) => {
                let by = host.to_owned();
                self.view.rollout.state = RollState::Stopped { by, why };
                self.roll_revision += 1;
            }
            _ => {}
        }
    }

    /// The transaction in which it goes; whether it did.
    fn pin(&mut self, host: &str) -> bool {
        let Some(found) = self.found.remove(host) else {
            return false;
        };
        let as_found = found == (self.roll_revision, self.revision(host));
        match self.slots.get_mut(host) {
            Some(slot) if slot.phase == Phase::Held && as_found => {
                slot.phase = Phase::Rebooting;
                slot.deadline_s = self.now_s + self.view.rollout.give_up_s;
            }
            Some(slot) if slot.phase == Phase::Held => {
                self.slots.remove(host);
                return false;
            }
            _ => return false,
        }
        self.write(host, MarkState::Away);
        self.away.insert(host.to_owned());
        *self.went.entry(host.to_owned()).or_default() += 1;
        true
    }

    /// What is known of a host that was away: written by whoever looks.
    fn settle(&mut self, host: &str) {
        let Some(there) = self.view.marks.get(host) else {
            return;
        };
        let (machine, has_slot) = (format!("machine-{host}"), self.slots.contains_key(host));
        let end = settled(there, &machine, &self.boot(host), has_slot, false);
        if let Some(state) = end {
            self.write(host, state);
        }
    }

    /// Its kernel ends; the new one gives the slot back, or the old one after
    /// it undid all.
    fn ends(&mut self, host: &str, reboots: bool) {
        if !self.away.remove(host) {
            return;
        }
        if reboots {
            *self.boots.entry(host.to_owned()).or_insert(1) += 1;
        }
        self.slots.remove(host);
    }

    fn wish(&mut self, wish: Wish) {
        let granted = grant(
            &self.view,
            &self.found_slots(),
            wish.clone(),
            "me",
            self.now_s,
        );
        let Ok(granted) = granted else {
            return;
        };
        self.view.rollout = granted.rollout;
        self.roll_revision += 1;
        match granted.mark {
            Some((host, Some(state))) => self.write(host.as_str(), state),
            Some((host, None)) => {
                self.view.marks.remove(host.as_str());
                // A key that comes anew has a new revision.
                *self.mark_revisions.entry(host.to_string()).or_default() += 1;
                *self.retries.entry(host.to_string()).or_default() += 1;
            }
            None => {}
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// The rules, whatever hosts and persons do in whatever order: k, nobody
    /// begins where nobody may, each host once for each time it is wanted.
    #[test]
    fn a_roll_keeps_its_rules_whatever_happens(
        at_most in 1u32..4,
        steps in prop::collection::vec((0usize..4, 0u8..16, 0u64..40), 1..150),
    ) {
        let mut world = World::new(at_most);
        for (host, kind, passes_s) in steps {
            world.now_s += passes_s;
            let host = NAMES[host];
            match kind {
                0..=3 => world.look(host),
                4..=6 => {
                    let runs = world.view.rollout.state == RollState::Running;
                    let went = world.pin(host);
                    prop_assert!(!went || runs, "{host} began where nobody may");
                }
                7 | 8 => world.ends(host, true),
                9 => world.ends(host, false),
                10 | 11 => world.settle(host),
                // Its order dies, and its lease runs out; what it sent may
                // still arrive.
                12 => world.slots.retain(|of, slot| of != host || slot.phase != Phase::Held),
                13 => world.wish(if passes_s < 15 { Wish::Pause } else { Wish::Continue }),
                14 => world.wish(Wish::Skip(name(host))),
                _ if passes_s < 3 => world.wish(Wish::Abort),
                _ => world.wish(Wish::Retry(name(host))),
            }
            prop_assert!(world.away.len() <= at_most as usize, "{:?} are away", world.away);
            for (host, went) in &world.went {
                let wanted = 1 + world.retries.get(host).copied().unwrap_or(0);
                prop_assert!(*went <= wanted, "{host} went {went} times");
            }
        }
    }

}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// What `hebe fleet roll --dry-run` says is what hosts do that take as
    /// long as expected.
    #[test]
    fn hosts_that_take_turns_do_what_the_forecast_says(
        at_most in 1u32..5,
        hosts in prop::collection::vec((0.0..50.0f64, 1u64..600), 1..20),
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
        let rollout = inventory.rollout("1", "me", 0).expect("rollout");
        let mut view = View { rollout, marks: BTreeMap::new() };
        let (mut now_s, mut ends) = (0, BTreeMap::new());
        let mut steps = BTreeSet::new();
        while !view.is_over() {
            let turns: Vec<Place> = view.at_turn().cloned().collect();
            for place in turns {
                if view.turn(&[], &place.host, now_s) == Turn::Go {
                    view.marks.insert(place.host.to_string(), mark(place.host.as_str(), MarkState::Away));
                    ends.insert(place.host.to_string(), now_s + place.expected_s);
                    steps.insert((place.host.to_string(), now_s, now_s + place.expected_s));
                }
            }
            now_s = ends.values().copied().min().expect("somebody is away");
            for host in ends.extract_if(.., |_, at_s| *at_s == now_s) {
                view.marks.insert(host.0.clone(), mark(&host.0, done()));
            }
        }
        let told: BTreeSet<_> = forecast.steps.iter().map(|s| (s.host.clone(), s.from_s, s.to_s)).collect();
        prop_assert_eq!(steps, told);
        prop_assert_eq!(now_s, forecast.duration_s);
    }
}
