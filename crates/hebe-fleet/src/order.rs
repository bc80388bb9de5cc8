//! One order of a host: the holder's machine, driven against a server and a
//! clock.

use std::collections::BTreeSet;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;

use hebe_policy::fleet::holder::{Effect, Event, Holder, State, Stop, Times};
use hebe_policy::fleet::slots::{FleetName, Found, Phase, SLOT_VERSION, Slot};
use rustix::time::{ClockId, clock_gettime};

use crate::config::FleetConfig;
use crate::slots::{FleetError, Slots, Taken};

/// Says what happens, in sentences.
pub type Say<'a> = &'a (dyn Fn(&str) + Sync);
/// Whether every one of these VMs answers; if not, a sentence.
pub type Look<'a> = &'a mut dyn FnMut(&BTreeSet<String>) -> Result<(), String>;

/// A reboot that was ordered and did not happen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NotRebooted {
    /// One sentence.
    pub why: String,
    /// Every VM runs as before; if not, the slot is kept.
    pub all_run: bool,
}

/// Wall clock, in seconds since 1970.
pub fn wall_s() -> u64 {
    u64::try_from(clock_gettime(ClockId::Realtime).tv_sec).unwrap_or(0)
}

/// A clock that only goes forward, and that goes on while the machine sleeps:
/// a lease does so, too. In milliseconds.
fn now_ms() -> u64 {
    let now = clock_gettime(ClockId::Boottime);
    u64::try_from(now.tv_sec).unwrap_or(0) * 1_000
        + u64::try_from(now.tv_nsec).unwrap_or(0) / 1_000_000
}

/// Sixteen random bytes, in hexadecimal.
///
/// # Errors
/// When the kernel gives no random numbers.
pub fn random_id() -> Result<String, std::io::Error> {
    let mut random = [0; 16];
    rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())?;
    Ok(random.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// A slot as an order of `machine` asks for it in boot `boot_id`.
///
/// # Errors
/// When the kernel gives no random numbers.
pub fn new_slot(
    config: &FleetConfig,
    host: &FleetName,
    machine: &str,
    boot_id: &str,
) -> Result<Slot, std::io::Error> {
    let now_s = wall_s();
    Ok(Slot {
        version: SLOT_VERSION,
        host: host.clone(),
        machine: machine.to_owned(),
        phase: Phase::Held,
        claim: random_id()?,
        boot_id: boot_id.to_owned(),
        since_s: now_s,
        deadline_s: now_s.saturating_add(config.give_up_after.as_s()),
        at_most: config.at_most,
        vms: BTreeSet::new(),
    })
}

/// An order under way.
pub struct Order<'a> {
    slots: &'a Slots,
    holder: Option<Holder>,
    slot: Slot,
    say: Say<'a>,
    said: String,
}

impl<'a> Order<'a> {
    fn new(slots: &'a Slots, holder: Holder, slot: Slot, say: Say<'a>) -> Self {
        Self {
            slots,
            holder: Some(holder),
            slot,
            say,
            said: String::new(),
        }
    }

    /// Waits until this host has a slot, which then is leased.
    ///
    /// # Errors
    /// When there is none in time.
    pub fn take(slots: &'a Slots, slot: Slot, times: Times, say: Say<'a>) -> Result<Self, Stop> {
        let mut order = Self::new(slots, Holder::wants(times, now_ms()), slot, say);
        order.run(|state| matches!(state, State::Held { .. }), None);
        order.stopped().map_or(Ok(order), Err)
    }

    /// Whether this host had the slot before this order, which then keeps it
    /// if nothing is rebooted.
    pub fn keeps(&self) -> bool {
        self.holder.as_ref().is_some_and(Holder::keeps)
    }

    /// The slot as it is written down.
    pub fn slot(&self) -> &Slot {
        &self.slot
    }

    /// Does `work` while the lease is renewed.
    ///
    /// # Errors
    /// When the slot was lost meanwhile; `work` was done to its end.
    pub fn while_held<T>(&mut self, work: impl FnOnce() -> T) -> Result<T, Stop> {
        let done = thread::scope(|scope| {
            let (sender, receiver) = channel::<()>();
            scope.spawn(|| {
                // Ends when the sender is dropped.
                while let Some(at_ms) = self.tick_at() {
                    let wait = Duration::from_millis(at_ms.saturating_sub(now_ms()));
                    if receiver.recv_timeout(wait) != Err(RecvTimeoutError::Timeout) {
                        break;
                    }
                    self.event(Event::Tick, None);
                }
                drop(receiver);
            });
            let done = work();
            drop(sender);
            done
        });
        self.event(Event::Tick, None);
        self.stopped().map_or(Ok(done), Err)
    }

    /// Makes the slot this host's for good: from now on it may reboot, and its
    /// new kernel finds that these VMs have to answer.
    ///
    /// # Errors
    /// When the slot is lost, or it is not known whether it is: nothing may be
    /// rebooted.
    pub fn pin(&mut self, vms: BTreeSet<String>, give_up_s: u64) -> Result<(), Stop> {
        let now_s = wall_s();
        self.slot.phase = Phase::Rebooting;
        self.slot.vms = vms;
        self.slot.since_s = now_s;
        self.slot.deadline_s = now_s.saturating_add(give_up_s);
        self.event(Event::Ready, None);
        self.run(|state| matches!(state, State::Rebooting), None);
        self.stopped().map_or(Ok(()), Err)
    }

    /// Nothing was rebooted, because of `why`: gives the slot back, unless it
    /// was there before this order. What is returned says how that went.
    pub fn undo(mut self, why: &str) -> Stop {
        self.event(Event::NotReady(why.to_owned()), None);
        self.event(Event::Undone(why.to_owned()), None);
        self.run(|_| false, None);
        self.stopped()
            .unwrap_or_else(|| Stop::NotReady(why.to_owned()))
    }

    /// The reboot failed, because of `why`, and not every VM runs: the slot is
    /// kept, so that no other host does the same.
    fn strand(mut self, why: &str) -> Stop {
        self.event(Event::Stranded(why.to_owned()), None);
        self.stopped()
            .unwrap_or_else(|| Stop::Stranded(why.to_owned()))
    }

    fn stopped(&self) -> Option<Stop> {
        match self.holder.as_ref().map(Holder::state) {
            Some(State::Stopped(stop)) => Some(stop.clone()),
            _ => None,
        }
    }

    fn tick_at(&self) -> Option<u64> {
        self.holder.as_ref().and_then(Holder::tick_at)
    }

    /// Lets time go on until the holder is where it should be, or nowhere.
    fn run(&mut self, until: impl Fn(&State) -> bool, mut look: Option<Look<'_>>) {
        loop {
            if self.holder.as_ref().is_none_or(|h| until(h.state())) {
                return;
            }
            let Some(at_ms) = self.tick_at() else {
                return;
            };
            thread::sleep(Duration::from_millis(at_ms.saturating_sub(now_ms())));
            let look = look.as_mut().map(|look| &mut **look as Look<'_>);
            self.event(Event::Tick, look);
        }
    }

    /// One event, and what follows from it at once.
    fn event(&mut self, event: Event, mut look: Option<Look<'_>>) {
        let mut next = Some(event);
        while let Some(event) = next.take() {
            self.tell(&event);
            let Some(holder) = self.holder.take() else {
                return;
            };
            let (holder, effect) = holder.step(event, now_ms());
            self.holder = Some(holder);
            let look = look.as_mut().map(|look| &mut **look as Look<'_>);
            next = effect.and_then(|effect| self.act(effect, look));
        }
    }

    /// Says why it takes longer, once for each reason.
    fn tell(&mut self, event: &Event) {
        let text = match event {
            Event::Full {
                why,
                may_pass: true,
            } => format!("waiting for a slot: {why}"),
            Event::Unknown(why) => format!("asking again: {why}"),
            Event::NotYet(why) => format!("waiting: {why}"),
            _ => return,
        };
        if text != self.said {
            (self.say)(&text);
            self.said = text;
        }
    }

    fn act(&mut self, effect: Effect, look: Option<Look<'_>>) -> Option<Event> {
        let sent_ms = now_ms();
        let unknown = |error: FleetError| Event::Unknown(error.to_string());
        Some(match effect {
            Effect::Ask => match self.slots.take(&self.slot, wall_s()) {
                Ok(Taken::Leased) => Event::Granted { sent_ms },
                Ok(Taken::Mine(mine)) => {
                    self.slot.claim = mine.claim;
                    Event::HasOne
                }
                Ok(Taken::Not(full)) => Event::Full {
                    why: full.to_string(),
                    may_pass: full.may_pass(),
                },
                Ok(Taken::Denied(why)) => Event::Full {
                    why,
                    may_pass: true,
                },
                // Nothing was given, and waiting mends nothing.
                Err(error @ (FleetError::Note { .. } | FleetError::NotAllowed(_))) => Event::Full {
                    why: error.to_string(),
                    may_pass: false,
                },
                Err(error) => unknown(error),
            },
            Effect::Renew => match self.slots.renew(&self.slot) {
                Ok(true) => Event::Renewed { sent_ms },
                Ok(false) => Event::Gone("its lease ran out, or somebody freed it".into()),
                Err(error) => unknown(error),
            },
            Effect::Pin => match self.slots.pin(&self.slot) {
                Ok(true) => Event::Pinned,
                Ok(false) => Event::Gone("its lease ran out, or somebody freed it".into()),
                Err(error @ (FleetError::NoTurn(_) | FleetError::NoRoll)) => {
                    Event::NotReady(error.to_string())
                }
                Err(error) => unknown(error),
            },
            Effect::Release => match self.slots.release(&self.slot) {
                Ok(()) => Event::Released,
                Err(error) => unknown(error),
            },
            Effect::Look => match look?(&self.slot.vms) {
                Ok(()) => Event::AllAnswer,
                Err(why) => Event::NotYet(why),
            },
            // Whoever pinned the slot does it next.
            Effect::Reboot => return None,
        })
    }
}

/// The whole turn of a host under its old kernel: waits for a slot; while that
/// is leased, lets `check` look at everything, which gives the VMs that have to
/// answer later, or why the host is not ready; takes the slot for good; and
/// lets `reboot` reboot. Comes back only if that did not happen (`reboot` says
/// why), with the slot given back, unless the host had it before or not every
/// VM runs.
pub fn in_turn(
    slots: &Slots,
    slot: Slot,
    times: Times,
    give_up_s: u64,
    say: Say<'_>,
    check: impl FnOnce() -> Result<BTreeSet<String>, String>,
    reboot: impl FnOnce() -> NotRebooted,
) -> Stop {
    let mut order = match Order::take(slots, slot, times, say) {
        Ok(order) => order,
        Err(stop) => return stop,
    };
    let vms = match order.while_held(check) {
        Ok(Ok(vms)) => vms,
        Ok(Err(why)) => return order.undo(&why),
        Err(stop) => return stop,
    };
    if let Err(stop) = order.pin(vms, give_up_s) {
        return stop;
    }
    if order.keeps() {
        say("this host had its slot before, and keeps it: `hebe fleet release` gives it back");
    }
    let NotRebooted { why, all_run } = reboot();
    if all_run {
        order.undo(&why)
    } else {
        order.strand(&why)
    }
}

/// Gives back, under the new kernel, the slot that the old one took: waits up
/// to `wait_s` until every VM answers. `slot` is what was found written down.
///
/// # Errors
/// When the slot is kept, or nobody knows.
pub fn release_after_boot(
    slots: &Slots,
    mut slot: Slot,
    times: Times,
    wait_s: u64,
    look: Look<'_>,
    say: Say<'_>,
) -> Result<(), Stop> {
    if slot.phase != Phase::Verifying {
        slot.phase = Phase::Verifying;
        // For others to see; the slot is as good without it.
        if let Err(error) = slots.pin(&slot) {
            say(&format!(
                "the slot still says that this host reboots: {error}"
            ));
        }
    }
    let holder = Holder::is_back(times, wait_s.saturating_mul(1_000), now_ms());
    let mut order = Order::new(slots, holder, slot, say);
    order.run(|_| false, Some(look));
    order.stopped().map_or(Ok(()), Err)
}

/// Gives a slot back although nothing was rebooted.
///
/// # Errors
/// When nobody knows whether that happened.
pub fn give_up(slots: &Slots, slot: Slot, times: Times, say: Say<'_>) -> Result<(), Stop> {
    let mut order = Order::new(slots, Holder::gives_up(times, now_ms()), slot, say);
    order.run(|_| false, None);
    order.stopped().map_or(Ok(()), Err)
}

/// This host's slot; asks again for as long as `times` insists.
///
/// # Errors
/// When nothing is known, even then.
pub fn own(
    slots: &Slots,
    host: &FleetName,
    times: Times,
    say: Say<'_>,
) -> Result<Option<Found>, FleetError> {
    let until_ms = now_ms().saturating_add(times.insist_ms);
    let mut said = false;
    loop {
        match slots.own(host) {
            Err(error) if now_ms() < until_ms => {
                if !said {
                    say(&format!("asking again: {error}"));
                    said = true;
                }
                thread::sleep(Duration::from_millis(times.ask_every_ms));
            }
            answer => return answer,
        }
    }
}
