use super::*;
use crate::fleet::slots::{FleetName, Found, Phase, SLOT_VERSION, Slot, Take, may_take};
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet};

const TIMES: Times = Times {
    lease_ms: Some(3_000),
    patience_ms: 20_000,
    ask_every_ms: 500,
    insist_ms: 2_000,
};

fn drive(mut holder: Holder, events: &[(Event, u64)]) -> (Holder, Vec<Effect>) {
    let mut effects = Vec::new();
    for (event, now_ms) in events {
        let (next, effect) = holder.step(event.clone(), *now_ms);
        holder = next;
        effects.extend(effect);
    }
    (holder, effects)
}

#[test]
fn the_whole_way_over_both_kernels() {
    use Effect::{Ask, Look, Pin, Reboot, Release, Renew};
    let old = [
        (Event::Tick, 0),
        (Event::Granted { sent_ms: 0 }, 40),
        (Event::Tick, 1_000),
        (Event::Renewed { sent_ms: 1_000 }, 1_020),
        (Event::Ready, 3_500),
        (Event::Pinned, 3_520),
    ];
    let (holder, effects) = drive(Holder::wants(TIMES, 0), &old);
    assert_eq!(effects, [Ask, Renew, Pin, Reboot]);
    assert_eq!(holder.state(), &State::Rebooting);
    let new = [
        (Event::Tick, 0),
        (Event::NotYet("web is frozen".into()), 1),
        (Event::Tick, 500),
        (Event::AllAnswer, 501),
        (Event::Unknown("no answer".into()), 600),
        (Event::Tick, 1_001),
        (Event::Released, 1_002),
    ];
    let (holder, effects) = drive(Holder::is_back(TIMES, 9_000, 0), &new);
    assert_eq!(effects, [Look, Look, Release, Release]);
    assert_eq!(holder.state(), &State::Released);
}

#[test]
fn a_lease_that_may_be_over_is_not_acted_on() {
    let events = [
        (Event::Tick, 0),
        (Event::Granted { sent_ms: 0 }, 10),
        (Event::Tick, 1_000),
        (Event::Unknown("timeout".into()), 1_900),
        (Event::Ready, 3_000),
    ];
    let (holder, effects) = drive(Holder::wants(TIMES, 0), &events);
    assert_eq!(effects, [Effect::Ask, Effect::Renew]);
    let State::Stopped(stop) = holder.state() else {
        panic!("{:?}", holder.state());
    };
    assert!(stop.to_string().contains("nothing was touched"), "{stop}");
    // An answer that took longer than the lease is none.
    let late = [(Event::Tick, 0), (Event::Granted { sent_ms: 0 }, 3_000)];
    let (holder, _) = drive(Holder::wants(TIMES, 0), &late);
    assert!(matches!(holder.state(), State::Stopped(Stop::Lost(_))));
}

#[test]
fn a_slot_that_was_there_before_stays_after_an_undone_reboot() {
    let events = [
        (Event::Tick, 0),
        (Event::HasOne, 1),
        (Event::Ready, 60_000),
        (Event::Pinned, 60_001),
        (Event::Undone("a VM did not freeze".into()), 60_002),
    ];
    let (holder, effects) = drive(Holder::wants(TIMES, 0), &events);
    assert_eq!(effects, [Effect::Ask, Effect::Pin, Effect::Reboot]);
    assert!(holder.keeps() && matches!(holder.state(), State::Stopped(Stop::NotReady(_))));
}

#[test]
fn a_reboot_that_strands_a_vm_keeps_the_slot() {
    let events = [
        (Event::Tick, 0),
        (Event::Granted { sent_ms: 0 }, 1),
        (Event::Ready, 2),
        (Event::Pinned, 3),
        (Event::Stranded("web is frozen".into()), 4),
        (Event::Tick, 9_000),
    ];
    let (holder, effects) = drive(Holder::wants(TIMES, 0), &events);
    assert_eq!(effects, [Effect::Ask, Effect::Pin, Effect::Reboot]);
    let State::Stopped(stop) = holder.state() else {
        panic!("{:?}", holder.state());
    };
    assert!(stop.to_string().contains("web is frozen"), "{stop}");
    assert!(stop.to_string().contains("hebe fleet release"), "{stop}");
}

#[test]
fn patience_ends_and_what_cannot_pass_is_not_waited_for() {
    let full = |may_pass| Event::Full {
        why: "taken".into(),
        may_pass,
    };
    let (holder, _) = drive(
        Holder::wants(TIMES, 0),
        &[(Event::Tick, 0), (full(false), 1)],
    );
    assert_eq!(
        holder.state(),
        &State::Stopped(Stop::NoSlot("taken".into()))
    );
    let waiting = [(Event::Tick, 0), (full(true), 1), (Event::Tick, 501)];
    let (holder, effects) = drive(Holder::wants(TIMES, 0), &waiting);
    assert_eq!(effects, [Effect::Ask, Effect::Ask]);
    let (holder, _) = holder.step(Event::Unknown("silence".into()), 19_900);
    assert_eq!(
        holder.state(),
        &State::Stopped(Stop::NoSlot("silence".into()))
    );
}

#[test]
fn a_slot_without_a_lease_that_may_have_been_given_unheard_is_given_back() {
    let times = Times {
        lease_ms: None,
        ..TIMES
    };
    let unheard = [
        (Event::Tick, 0),
        (Event::Unknown("silence".into()), 1_000),
        (Event::Tick, 19_600),
        (Event::Unknown("silence".into()), 19_900),
    ];
    let (holder, effects) = drive(Holder::wants(times, 0), &unheard);
    assert_eq!(effects, [Effect::Ask, Effect::Ask, Effect::Release]);
    let (released, _) = holder.clone().step(Event::Released, 20_000);
    let no_slot = State::Stopped(Stop::NoSlot("silence".into()));
    assert_eq!(released.state(), &no_slot);
    let (silent, _) = holder.step(Event::Unknown("silence".into()), 30_000);
    let unknown = matches!(silent.state(), State::Stopped(Stop::Unreleased(_)));
    assert!(unknown, "{:?}", silent.state());
    // A server that says no gave nothing; a lease ends by itself.
    let full = Event::Full {
        why: "taken".into(),
        may_pass: false,
    };
    let denied = [(Event::Tick, 0), (full, 1)];
    let (_, effects) = drive(Holder::wants(times, 0), &denied);
    assert_eq!(effects, [Effect::Ask]);
    let (_, effects) = drive(Holder::wants(TIMES, 0), &unheard);
    assert_eq!(effects, [Effect::Ask, Effect::Ask]);
}

#[test]
fn nobody_insists_for_ever() {
    let unknown = || Event::Unknown("silence".into());
    let pinning = [
        (Event::Tick, 0),
        (Event::Granted { sent_ms: 0 }, 1),
        (Event::Ready, 2),
        (unknown(), 100),
        (Event::Tick, 502),
        (unknown(), 2_002),
        (unknown(), 3_000),
        (unknown(), 4_002),
    ];
    let (holder, effects) = drive(Holder::wants(TIMES, 0), &pinning);
    assert_eq!(
        effects,
        [Effect::Ask, Effect::Pin, Effect::Pin, Effect::Release]
    );
    assert!(matches!(
        holder.state(),
        State::Stopped(Stop::Unreleased(_))
    ));
    let back = [(Event::Tick, 0), (Event::NotYet("web".into()), 8_700)];
    let (holder, _) = drive(Holder::is_back(TIMES, 9_000, 0), &back);
    assert!(matches!(
        holder.state(),
        State::Stopped(Stop::NotAllAnswer(_))
    ));
}

fn any_event() -> impl Strategy<Value = Event> {
    prop_oneof![
        4 => Just(Event::Tick),
        1 => (0..9_000u64).prop_map(|sent_ms| Event::Granted { sent_ms }),
        1 => Just(Event::HasOne),
        1 => any::<bool>().prop_map(|may_pass| Event::Full {
            why: "f".into(),
            may_pass
        }),
        1 => Just(Event::Unknown("u".into())),
        1 => (0..9_000u64).prop_map(|sent_ms| Event::Renewed { sent_ms }),
        1 => Just(Event::Gone("g".into())),
        2 => Just(Event::Ready),
        1 => Just(Event::NotReady("n".into())),
        2 => Just(Event::Pinned),
        1 => Just(Event::Undone("r".into())),
        1 => Just(Event::Stranded("s".into())),
        1 => Just(Event::AllAnswer),
        1 => Just(Event::NotYet("y".into())),
        1 => Just(Event::Released),
    ]
}

proptest! {
    /// Rules 1 to 3, for one holder and any answers.
    #[test]
    fn any_answers_in_any_order(
        events in proptest::collection::vec((any_event(), 0..700u64), 0..60),
        back in any::<bool>(),
    ) {
        let mut now_ms = 0;
        let mut holder = if back {
            Holder::is_back(TIMES, 5_000, 0)
        } else {
            Holder::wants(TIMES, 0)
        };
        let mut ordered = 0;
        for (event, dt) in events {
            now_ms += dt;
            let before = holder.clone();
            let (next, effect) = holder.step(event.clone(), now_ms);
            if let State::Held { sure_until_ms: Some(sure), .. } = before.state {
                prop_assert!(effect != Some(Effect::Pin) || now_ms < sure);
            }
            if effect == Some(Effect::Reboot) {
                ordered += 1;
                prop_assert_eq!(&event, &Event::Pinned);
                let pinning = matches!(before.state, State::Pinning { .. });
                prop_assert!(pinning);
            }
            if effect == Some(Effect::Release) {
                match before.state {
                    State::Rebooting => {
                        let undone = matches!(event, Event::Undone(_));
                        prop_assert!(undone);
                    }
                    State::Verifying { .. } => prop_assert_eq!(&event, &Event::AllAnswer),
                    _ => {}
                }
            }
            if matches!(before.state, State::Released | State::Stopped(_)) {
                prop_assert_eq!(&before, &next);
                prop_assert_eq!(effect, None);
            }
            if let (Event::Tick, Some(at)) = (&event, next.tick_at()) {
                prop_assert!(at > now_ms, "{:?} spins at {}", next, now_ms);
            }
            holder = next;
        }
        prop_assert!(ordered <= 1);
    }
}

/// What happens to a request.
#[derive(Clone, Copy, Debug)]
enum Fate {
    Answered,
    DoneAndLost,
    Lost,
    Late,
}

/// What happens next in the world.
#[derive(Clone, Copy, Debug)]
enum Turn {
    Time(u64),
    Tick(usize, Fate),
    LateArrives(usize),
    Begin(usize),
    Ready(usize, bool, Fate),
    ProcessDies(usize),
    Undone(usize, Fate),
    Boot(usize),
    Answers(usize, Fate),
    GiveUp(usize, Fate),
}

/// A change that is made only if nothing that it was decided from changed.
#[derive(Clone, Debug)]
enum Change {
    Put(Slot, Option<u64>),
    Delete(FleetName),
}

#[derive(Clone, Debug)]
struct Request {
    seen: u64,
    whole_group: bool,
    change: Change,
}

struct Kept {
    slot: Slot,
    revision: u64,
    ends_ms: Option<u64>,
}

#[derive(Default)]
struct Machine {
    boot: u32,
    orders: u32,
    claim: String,
    holder: Option<Holder>,
    /// From the order to reboot until all its VMs answer again.
    away: bool,
}

/// Hosts, and a store that does what etcd does: one change after the other,
/// each under a condition.
struct World {
    now_ms: u64,
    at_most: u32,
    revision: u64,
    slots: BTreeMap<FleetName, Kept>,
    machines: Vec<Machine>,
    late: Vec<Request>,
}

impl World {
    fn new(hosts: usize, at_most: u32) -> Self {
        Self {
            now_ms: 0,
            at_most,
            revision: 1,
            slots: BTreeMap::new(),
            machines: (0..hosts).map(|_| Machine::default()).collect(),
            late: Vec::new(),
        }
    }

    fn name(host: usize) -> FleetName {
        format!("h{host}").parse().expect("name")
    }

    fn apply(&mut self, request: &Request) -> bool {
        let name = match &request.change {
            Change::Put(slot, _) => slot.host.clone(),
            Change::Delete(name) => name.clone(),
        };
        let fresh = if request.whole_group {
            self.slots.values().all(|k| k.revision <= request.seen)
        } else {
            self.slots
                .get(&name)
                .is_some_and(|k| k.revision == request.seen)
        };
        if !fresh {
            return false;
        }
        self.revision += 1;
        match &request.change {
            Change::Put(slot, lease_ms) => {
                let kept = Kept {
                    slot: slot.clone(),
                    revision: self.revision,
                    ends_ms: lease_ms.map(|ms| self.now_ms + ms),
                };
                self.slots.insert(name, kept);
            }
            Change::Delete(_) => {
                self.slots.remove(&name);
            }
        }
        true
    }

    /// The event that the outcome of `request` is; `done` if it was answered.
    fn send(&mut self, request: Request, fate: Fate, done: Event) -> Event {
        let silence = Event::Unknown("no answer".into());
        match fate {
            Fate::Answered if self.apply(&request) => done,
            Fate::Answered => Event::Unknown("it changed meanwhile".into()),
            Fate::DoneAndLost => {
                self.apply(&request);
                silence
            }
            Fate::Lost => silence,
            Fate::Late => {
                self.late.push(request);
                silence
            }
        }
    }

    fn own(&self, host: usize) -> Option<(Slot, u64)> {
        let kept = self.slots.get(&Self::name(host))?;
        Some((kept.slot.clone(), kept.revision))
    }

    fn act(&mut self, host: usize, effect: Effect, fate: Fate) -> Option<Event> {
        let name = Self::name(host);
        let claim = self.machines[host].claim.clone();
        let boot_id = format!("boot-{}", self.machines[host].boot);
        let mine = self.own(host).filter(|(slot, _)| slot.claim == claim);
        Some(match effect {
            Effect::Ask => {
                let found: Vec<Found> = self
                    .slots
                    .values()
                    .map(|k| Found::Slot(k.slot.clone()))
                    .collect();
                // No deadline: that they stop others is tested elsewhere.
                match may_take(&found, &name, name.as_str(), &boot_id, self.at_most, 0) {
                    Take::Not(full) => Event::Full {
                        why: full.to_string(),
                        may_pass: full.may_pass(),
                    },
                    Take::Mine(slot) => {
                        self.machines[host].claim = slot.claim;
                        Event::HasOne
                    }
                    Take::Free => {
                        let slot = Slot {
                            version: SLOT_VERSION,
                            machine: name.to_string(),
                            host: name,
                            phase: Phase::Held,
                            claim,
                            boot_id,
                            since_s: 0,
                            deadline_s: 0,
                            at_most: self.at_most,
                            vms: BTreeSet::new(),
                        };
                        let request = Request {
                            seen: self.revision,
                            whole_group: true,
                            change: Change::Put(slot, TIMES.lease_ms),
                        };
                        let sent_ms = self.now_ms;
                        self.send(request, fate, Event::Granted { sent_ms })
                    }
                }
            }
            Effect::Renew => match mine {
                None => Event::Gone("it ran out".into()),
                Some((slot, _)) => match fate {
                    Fate::Lost | Fate::Late => Event::Unknown("no answer".into()),
                    Fate::Answered | Fate::DoneAndLost => {
                        if let Some(kept) = self.slots.get_mut(&slot.host) {
                            kept.ends_ms = kept.ends_ms.map(|_| self.now_ms + 3_000);
                        }
                        let sent_ms = self.now_ms;
                        Event::Renewed { sent_ms }
                    }
                },
            },
            Effect::Pin => match mine {
                None => Event::Gone("it ran out".into()),
                Some((mut slot, revision)) => {
                    slot.phase = Phase::Rebooting;
                    let request = Request {
                        seen: revision,
                        whole_group: false,
                        change: Change::Put(slot, None),
                    };
                    self.send(request, fate, Event::Pinned)
                }
            },
            Effect::Release => match mine {
                None => Event::Released,
                Some((slot, revision)) => {
                    let request = Request {
                        seen: revision,
                        whole_group: false,
                        change: Change::Delete(slot.host),
                    };
                    self.send(request, fate, Event::Released)
                }
            },
            Effect::Reboot => {
                self.machines[host].away = true;
                return None;
            }
            Effect::Look => return None,
        })
    }

    fn event(&mut self, host: usize, event: Event, fate: Fate) {
        let mut next = Some(event);
        while let Some(event) = next.take() {
            let Some(holder) = self.machines[host].holder.take() else {
                return;
            };
            let (holder, effect) = holder.step(event, self.now_ms);
            self.machines[host].holder = Some(holder);
            next = effect.and_then(|effect| self.act(host, effect, fate));
        }
    }

    fn begin(&mut self, host: usize) {
        let now_ms = self.now_ms;
        let machine = &mut self.machines[host];
        let busy = machine
            .holder
            .as_ref()
            .is_some_and(|h| !matches!(h.state(), State::Released | State::Stopped(_)));
        if !busy && !machine.away {
            machine.orders += 1;
            machine.claim = format!("{host}-{}", machine.orders);
            machine.holder = Some(Holder::wants(TIMES, now_ms));
        }
    }

    fn is(&self, host: usize, wanted: impl Fn(&State) -> bool) -> bool {
        let holder = self.machines[host].holder.as_ref();
        holder.is_some_and(|h| wanted(h.state()))
    }

    fn turn(&mut self, turn: Turn) {
        match turn {
            Turn::Time(ms) => {
                self.now_ms += ms;
                let now_ms = self.now_ms;
                self.slots
                    .retain(|_, kept| kept.ends_ms.is_none_or(|end| end > now_ms));
            }
            Turn::Tick(host, fate) => self.event(host, Event::Tick, fate),
            Turn::LateArrives(index) => {
                if !self.late.is_empty() {
                    let request = self.late.remove(index % self.late.len());
                    self.apply(&request);
                }
            }
            Turn::Begin(host) => self.begin(host),
            Turn::Ready(host, true, fate) => self.event(host, Event::Ready, fate),
            Turn::Ready(host, false, fate) => self.event(host, Event::NotReady("x".into()), fate),
            Turn::ProcessDies(host) => self.machines[host].holder = None,
            Turn::Undone(host, fate) => {
                if self.is(host, |s| matches!(s, State::Rebooting)) {
                    self.machines[host].away = false;
                    self.event(host, Event::Undone("x".into()), fate);
                }
            }
            Turn::Boot(host) => {
                self.machines[host].boot += 1;
                self.machines[host].holder = None;
                let here = format!("boot-{}", self.machines[host].boot);
                if let Some((slot, _)) = self.own(host)
                    && slot.boot_id != here
                {
                    self.machines[host].claim = slot.claim;
                    self.machines[host].holder = Some(Holder::is_back(TIMES, 9_000, self.now_ms));
                }
            }
            Turn::Answers(host, fate) => {
                if self.is(host, |s| matches!(s, State::Verifying { .. })) {
                    self.machines[host].away = false;
                    self.event(host, Event::AllAnswer, fate);
                }
            }
            // `hebe fleet release` in the same boot, with nothing under way.
            Turn::GiveUp(host, fate) => {
                if self.machines[host].holder.is_none()
                    && !self.machines[host].away
                    && let Some((slot, _)) = self.own(host)
                {
                    self.machines[host].claim = slot.claim;
                    self.machines[host].holder = Some(Holder::gives_up(TIMES, self.now_ms));
                    self.event(host, Event::Tick, fate);
                }
            }
        }
    }

    fn check(&self) -> Result<(), TestCaseError> {
        let away: Vec<usize> = (0..self.machines.len())
            .filter(|&host| self.machines[host].away)
            .collect();
        prop_assert!(away.len() <= self.at_most as usize, "{:?} are away", away);
        prop_assert!(self.slots.len() <= self.at_most as usize);
        for host in away {
            let own = self.own(host);
            prop_assert!(
                own.is_some_and(|(slot, _)| slot.phase != Phase::Held),
                "h{host} is away without a slot"
            );
        }
        Ok(())
    }
}

const HOSTS: usize = 4;

fn any_fate() -> impl Strategy<Value = Fate> {
    prop_oneof![
        4 => Just(Fate::Answered),
        1 => Just(Fate::DoneAndLost),
        1 => Just(Fate::Lost),
        1 => Just(Fate::Late),
    ]
}

fn any_turn() -> impl Strategy<Value = Turn> {
    let host = || 0..HOSTS;
    prop_oneof![
        3 => (1..2_500u64).prop_map(Turn::Time),
        8 => (host(), any_fate()).prop_map(|(h, f)| Turn::Tick(h, f)),
        2 => (0..16usize).prop_map(Turn::LateArrives),
        3 => host().prop_map(Turn::Begin),
        4 => (host(), prop::bool::weighted(0.8), any_fate())
            .prop_map(|(h, good, f)| Turn::Ready(h, good, f)),
        1 => host().prop_map(Turn::ProcessDies),
        1 => (host(), any_fate()).prop_map(|(h, f)| Turn::Undone(h, f)),
        2 => host().prop_map(Turn::Boot),
        3 => (host(), any_fate()).prop_map(|(h, f)| Turn::Answers(h, f)),
        1 => (host(), any_fate()).prop_map(|(h, f)| Turn::GiveUp(h, f)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    /// Whatever is lost, late or dead: at most k hosts are away, and each of
    /// them has its slot.
    #[test]
    fn a_group_never_has_more_than_k_away(
        at_most in 1..4u32,
        turns in proptest::collection::vec(any_turn(), 0..250),
    ) {
        let mut world = World::new(HOSTS, at_most);
        for turn in turns {
            world.turn(turn);
            world.check()?;
        }
    }
}

/// The world above is no empty one: hosts do get through it.
#[test]
fn hosts_get_through_that_world() {
    use Fate::Answered;
    let mut world = World::new(2, 1);
    for turn in [
        Turn::Begin(0),
        Turn::Tick(0, Answered),
        Turn::Ready(0, true, Answered),
        Turn::Begin(1),
        Turn::Tick(1, Answered),
    ] {
        world.turn(turn);
    }
    assert!(world.machines[0].away && !world.machines[1].away);
    world.turn(Turn::Boot(0));
    world.turn(Turn::Answers(0, Answered));
    assert!(world.slots.is_empty() && !world.machines[0].away);
    world.turn(Turn::Time(600));
    world.turn(Turn::Tick(1, Answered));
    world.turn(Turn::Ready(1, true, Answered));
    assert!(world.machines[1].away);
}
