//! The supervisor against a model of a host on which anything may happen, and
//! some of its habits one by one.

use proptest::prelude::*;

use super::*;

fn name(text: &str) -> VmName {
    text.parse().expect("name")
}

fn rule(autostart: bool, restart: RestartPolicy, after: &[&str]) -> Rule {
    Rule {
        autostart,
        restart,
        limit: 3,
        after: after.iter().map(|n| name(n)).collect(),
    }
}

fn looks(vms: &[(&str, &Rule, Seen)]) -> BTreeMap<VmName, Look> {
    let look = |(vm, rule, seen): &(&str, &Rule, Seen)| {
        let (rule, seen) = ((*rule).clone(), *seen);
        (name(vm), Look { rule, seen })
    };
    vms.iter().map(look).collect()
}

fn starts(effects: &[Effect]) -> Vec<&str> {
    let mut started = Vec::new();
    for effect in effects {
        if let Effect::Start(vm) = effect {
            started.push(vm.as_str());
        }
    }
    started
}

#[test]
fn vms_are_started_after_those_they_name_and_a_failure_holds_nobody_up() {
    use Seen::Absent;
    let (db, app) = (
        rule(true, RestartPolicy::Never, &[]),
        rule(true, RestartPolicy::Never, &["db", "elsewhere"]),
    );
    for answer in [
        Answer::Started,
        Answer::Failed {
            why: "no disk".into(),
        },
    ] {
        let all = looks(&[("db", &db, Absent), ("app", &app, Absent)]);
        let mut supervisor = Supervisor::at_host_start(&all);
        assert_eq!(starts(&supervisor.look(0, &all)), ["db"]);
        assert!(starts(&supervisor.look(1, &all)).is_empty());
        let effects = supervisor.answered(2, &name("db"), &db, &answer);
        assert_eq!(effects[0], Effect::Keep);
        let seen = if answer == Answer::Started {
            Seen::Up
        } else {
            Absent
        };
        let all = looks(&[("db", &db, seen), ("app", &app, Absent)]);
        assert_eq!(starts(&supervisor.look(3, &all)), ["app"]);
    }
}

#[test]
fn a_cycle_is_told_of_once_and_keeps_nobody_down() {
    let (a, b) = (
        rule(true, RestartPolicy::Never, &["b"]),
        rule(true, RestartPolicy::Never, &["a"]),
    );
    let behind = rule(true, RestartPolicy::Never, &["a"]);
    let all = looks(&[
        ("a", &a, Seen::Absent),
        ("b", &b, Seen::Absent),
        ("c", &behind, Seen::Absent),
    ]);
    let mut supervisor = Supervisor::at_host_start(&all);
    let effects = supervisor.look(0, &all);
    assert_eq!(starts(&effects), ["a", "b"], "c waits for a alone");
    let told = |effects: &[Effect]| {
        let said = |e: &&Effect| matches!(e, Effect::Say { trouble: true, .. });
        effects.iter().filter(said).count()
    };
    assert_eq!(told(&effects), 2);
    assert_eq!(told(&supervisor.look(1, &all)), 0);
}

#[test]
fn restarts_wait_longer_each_time_and_end_at_the_limit() {
    let always = rule(false, RestartPolicy::OnFailure, &[]);
    let failed = looks(&[("web", &always, Seen::Failed)]);
    let mut supervisor = Supervisor::default();
    let mut now_ms = 0;
    let mut waits = Vec::new();
    for _ in 0..3 {
        assert!(starts(&supervisor.look(now_ms, &failed)).is_empty());
        let (_, until_ms) = supervisor.waiting().next().expect("waits");
        waits.push(until_ms - now_ms);
        assert!(starts(&supervisor.look(until_ms - 1, &failed)).is_empty());
        now_ms = until_ms;
        let effects = supervisor.look(now_ms, &failed);
        assert_eq!(starts(&effects), ["web"]);
        supervisor.answered(now_ms, &name("web"), &always, &Answer::Started);
    }
    assert_eq!(waits, [1_000, 2_000, 4_000]);
    let last = supervisor.look(now_ms, &failed);
    assert!(starts(&last).is_empty());
    assert_eq!(supervisor.given_up().count(), 1);
    // Another supervisor of this boot knows.
    let mut next = Supervisor::with(supervisor.memory().clone());
    next.look(now_ms, &failed);
    assert_eq!(next.given_up().count(), 1);
    // A person starts it: all is forgotten.
    supervisor.ordered(&name("web"));
    assert_eq!(supervisor.memory(), &Memory::default());
    assert_eq!(backoff_ms(200), BACKOFF_MAX_MS);
}

#[test]
fn who_was_up_long_enough_failed_for_the_first_time() {
    let always = rule(false, RestartPolicy::Always, &[]);
    let up = looks(&[("web", &always, Seen::Up)]);
    let off = looks(&[("web", &always, Seen::OffByItself)]);
    let mut supervisor = Supervisor::default();
    supervisor.look(0, &off);
    supervisor.look(1_000, &off);
    supervisor.answered(1_000, &name("web"), &always, &Answer::Started);
    supervisor.look(1_000 + SETTLED_MS - 1, &up);
    assert_eq!(supervisor.memory().restarts[&name("web")], 1);
    supervisor.look(1_000 + SETTLED_MS, &up);
    assert!(supervisor.memory().restarts.is_empty());
}

#[test]
fn a_start_that_a_death_broke_off_is_tried_again() {
    let always = rule(false, RestartPolicy::OnFailure, &[]);
    let failed = looks(&[("web", &always, Seen::Failed)]);
    let mut supervisor = Supervisor::default();
    supervisor.look(0, &failed);
    assert_eq!(starts(&supervisor.look(1_000, &failed)), ["web"]);
    // The supervisor dies; what its start had made by then is cleaned away.
    let nothing = looks(&[("web", &always, Seen::Absent)]);
    let mut next = Supervisor::with(supervisor.memory().clone());
    assert!(starts(&next.look(2_000, &nothing)).is_empty());
    assert_eq!(starts(&next.look(4_000, &nothing)), ["web"]);
    // It was up: now nothing of it is there because somebody stopped it.
    next.look(5_000, &looks(&[("web", &always, Seen::Up)]));
    next.answered(5_000, &name("web"), &always, &Answer::Started);
    assert_eq!(next.memory().restarts[&name("web")], 2);
    assert_eq!(next.look(6_000, &nothing), [Effect::Keep]);
    assert_eq!(next.memory(), &Memory::default());
    assert!(next.look(99_000, &nothing).is_empty());
}

/// What may happen to the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Happens {
    Pass {
        ms: u64,
    },
    Look,
    GuestOff(usize),
    Crash(usize),
    Suspend(usize),
    Resume(usize),
    /// With `hebe`, which the supervisor is not told of.
    Stop(usize),
    Start(usize),
    /// The supervisor dies, and another one begins.
    Kill,
}

fn happens() -> impl Strategy<Value = Happens> {
    let vm = 0..4usize;
    prop_oneof![
        2 => (0..90_000u64).prop_map(|ms| Happens::Pass { ms }),
        6 => Just(Happens::Look),
        2 => vm.clone().prop_map(Happens::GuestOff),
        2 => vm.clone().prop_map(Happens::Crash),
        1 => vm.clone().prop_map(Happens::Suspend),
        1 => vm.clone().prop_map(Happens::Resume),
        1 => vm.clone().prop_map(Happens::Stop),
        1 => vm.prop_map(Happens::Start),
        1 => Just(Happens::Kill),
    ]
}

fn rules() -> impl Strategy<Value = Vec<Rule>> {
    let policy = prop_oneof![
        Just(RestartPolicy::Never),
        Just(RestartPolicy::OnFailure),
        Just(RestartPolicy::Always)
    ];
    let one =
        (any::<bool>(), policy, 1..4u32, 0..16u8).prop_map(|(autostart, restart, limit, after)| {
            Rule {
                autostart,
                restart,
                limit,
                after: (0..4).filter(|i| after & (1 << i) != 0).map(vm).collect(),
            }
        });
    prop::collection::vec(one, 4).prop_map(|mut rules| {
        for (index, rule) in rules.iter_mut().enumerate() {
            rule.after.retain(|n| *n != vm(index));
        }
        rules
    })
}

fn vm(index: usize) -> VmName {
    name(&format!("vm{index}"))
}

struct World {
    rules: Vec<Rule>,
    seen: Vec<Seen>,
    /// Starts by the supervisor since each was settled or ordered.
    in_a_row: Vec<u32>,
    up_since: Vec<u64>,
    /// It was ordered down, and nobody started it since.
    ordered_down: Vec<bool>,
    now_ms: u64,
    kept: Memory,
    supervisor: Supervisor,
}

impl World {
    fn new(rules: Vec<Rule>) -> Self {
        let mut world = Self {
            seen: vec![Seen::Absent; 4],
            in_a_row: vec![0; 4],
            up_since: vec![0; 4],
            ordered_down: vec![false; 4],
            now_ms: 0,
            kept: Memory::default(),
            supervisor: Supervisor::default(),
            rules,
        };
        world.supervisor = Supervisor::at_host_start(&world.looks());
        world.kept = world.supervisor.memory().clone();
        world
    }

    fn looks(&self) -> BTreeMap<VmName, Look> {
        let look = |i: usize| Look {
            rule: self.rules[i].clone(),
            seen: self.seen[i],
        };
        (0..4).map(|i| (vm(i), look(i))).collect()
    }

    fn is_in_cycle(&self, index: usize) -> bool {
        let mut open = self.rules[index].after.clone();
        let mut seen = BTreeSet::new();
        while let Some(next) = open.pop() {
            if next == vm(index) {
                return true;
            }
            if seen.insert(next.clone()) {
                let at = (0..4).find(|&i| vm(i) == next).expect("one of four");
                open.extend(self.rules[at].after.clone());
            }
        }
        false
    }

    /// A look, and what it leads to; `luck` says how starts end.
    fn look(&mut self, luck: &mut impl FnMut() -> u8) {
        let looks = self.looks();
        let effects = self.supervisor.look(self.now_ms, &looks);
        self.act(effects, luck);
    }

    fn act(&mut self, effects: Vec<Effect>, luck: &mut impl FnMut() -> u8) {
        for effect in effects {
            match effect {
                Effect::Keep => self.kept = self.supervisor.memory().clone(),
                Effect::Say { .. } => {}
                Effect::Start(name) => {
                    let index = (0..4).find(|&i| vm(i) == name).expect("one of four");
                    self.start(index, luck());
                }
            }
        }
    }

    fn start(&mut self, index: usize, luck: u8) {
        let rule = self.rules[index].clone();
        let seen = self.seen[index];
        assert!(!matches!(seen, Seen::Up | Seen::Kept), "{seen:?}");
        assert!(!self.ordered_down[index], "it was ordered down");
        let due = self.kept.due.contains(&vm(index));
        assert!(due || rule.restart != RestartPolicy::Never);
        if due {
            let waits = rule.after.iter().any(|n| self.kept.due.contains(n));
            assert!(!waits || self.is_in_cycle(index), "out of turn");
        } else {
            assert_eq!(
                self.kept,
                *self.supervisor.memory(),
                "kept before it is done"
            );
            self.in_a_row[index] += 1;
            assert!(self.in_a_row[index] <= rule.limit, "too often in a row");
        }
        let answer = match luck % 6 {
            0 => Answer::Failed {
                why: "bad luck".into(),
            },
            1 => {
                if !due {
                    self.in_a_row[index] -= 1;
                }
                Answer::Busy
            }
            // Nobody waits for the answer: the supervisor dies.
            2 => {
                self.seen[index] = Seen::Up;
                self.up_since[index] = self.now_ms;
                self.supervisor = Supervisor::with(self.kept.clone());
                return;
            }
            _ => Answer::Started,
        };
        match answer {
            Answer::Started => {
                self.seen[index] = Seen::Up;
                self.up_since[index] = self.now_ms;
            }
            // What a failed start leaves: nothing.
            Answer::Failed { .. } => self.seen[index] = Seen::Absent,
            Answer::Busy => {}
        }
        let effects = self
            .supervisor
            .answered(self.now_ms, &vm(index), &rule, &answer);
        self.act(effects, &mut || 3);
    }

    fn happen(&mut self, what: Happens, luck: &mut impl FnMut() -> u8) {
        let up = |world: &Self, i: usize| world.seen[i] == Seen::Up;
        match what {
            Happens::Pass { ms } => self.now_ms += ms,
            Happens::Look => self.look(luck),
            Happens::GuestOff(i) if up(self, i) => self.end(i, Seen::OffByItself),
            Happens::Crash(i) if up(self, i) => self.end(i, Seen::Failed),
            Happens::Suspend(i) if up(self, i) => self.end(i, Seen::Kept),
            Happens::Resume(i) if self.seen[i] == Seen::Kept => self.up(i),
            Happens::Stop(i) if up(self, i) => {
                self.end(i, Seen::Absent);
                self.ordered_down[i] = true;
                // Long enough to be seen: it was up, and was seen so or not.
                self.look(luck);
            }
            Happens::Start(i) if !matches!(self.seen[i], Seen::Up | Seen::Kept) => self.up(i),
            Happens::Kill => self.supervisor = Supervisor::with(self.kept.clone()),
            _ => {}
        }
    }

    fn up(&mut self, index: usize) {
        self.seen[index] = Seen::Up;
        self.up_since[index] = self.now_ms;
        self.ordered_down[index] = false;
        self.in_a_row[index] = 0;
        // The daemon is told of orders that it carries out.
        let effects = self.supervisor.ordered(&vm(index));
        self.act(effects, &mut || 3);
        let looks = self.looks();
        let effects = self.supervisor.look(self.now_ms, &looks);
        self.act(effects, &mut || 3);
    }

    fn end(&mut self, index: usize, how: Seen) {
        // A look every now and then: it was seen while it was up.
        let looks = self.looks();
        let effects = self.supervisor.look(self.now_ms, &looks);
        self.act(effects, &mut || 3);
        if self.now_ms - self.up_since[index] >= SETTLED_MS || how == Seen::Kept {
            self.in_a_row[index] = 0;
        }
        self.seen[index] = how;
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Nothing is started that must not be, nothing out of its turn, nothing
    /// too often; and when luck holds, everything that should be up is.
    #[test]
    fn the_rules_hold_whatever_happens(
        rules in rules(),
        history in prop::collection::vec(happens(), 0..60),
        luck in prop::collection::vec(any::<u8>(), 1..40),
    ) {
        let mut world = World::new(rules);
        let mut drawn = luck.into_iter().cycle();
        let mut draw = || drawn.next().unwrap_or(3);
        for what in history {
            world.happen(what, &mut draw);
        }
        for _ in 0..200 {
            world.now_ms += 1_000;
            world.look(&mut || 3);
        }
        prop_assert!(world.kept.due.is_empty(), "{:?}", world.kept);
        let given_up: Vec<VmName> = world.supervisor.given_up().cloned().collect();
        for index in 0..4 {
            let down = match world.seen[index] {
                Seen::Failed => world.rules[index].restart != RestartPolicy::Never,
                Seen::OffByItself => world.rules[index].restart == RestartPolicy::Always,
                _ => false,
            };
            prop_assert!(!down || given_up.contains(&vm(index)), "vm{index} stays down");
        }
    }
}
