//! Rolling a rejuvenation through a group of hosts, at most k at once: the
//! model, for forecasts and simulations. Hosts that take turns by themselves,
//! from what is written down ([`turns`]), do the same.
//!
//! ```text
//!            lock asked      lock granted          another boot      every VM answers
//! waiting ──────────► asking ────────────► away ────────────► back ────────────► done
//!    ▲                  │ denied, later      │ refused            │                (lock released
//!    └──────────────────┘                    ▼                    │                 by the new kernel)
//!                                         refused      too long   ▼
//!                                                    away, back ──► lost: the roll stops
//! ```
//!
//! The roll is a value; [`Roll::step`] takes an event and returns the next roll
//! and what is to be done. It keeps these rules, whatever happens in whatever
//! order:
//!
//! 1. At most k hosts hold or ask for the lock.
//! 2. A host is told to reboot once, and only while it holds the lock.
//! 3. The lock is released by the new kernel after every VM of the host
//!    answers; or because the host refused and nothing was touched; or because
//!    it came too late and nothing began.
//! 4. A host that does not come back keeps its lock and stops the roll: no
//!    other host begins. Those under way go on to their end. So does a lock
//!    that is lost under way, for then somebody else may count wrongly.

use std::collections::BTreeSet;

use serde::Serialize;

use crate::span::Span;

/// How long after a denied lock it is asked for again, in seconds.
const ASK_AGAIN_S: u64 = 10;

/// Whether there was a place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Grant {
    /// The host has one.
    Held,
    /// All are taken.
    Full,
}

/// The places of one group within one process, for a forecast. Real ones are
/// [`slots`], taken and given back by a [`holder`].
#[derive(Clone, Debug, Default)]
pub struct Places {
    at_most: usize,
    held: BTreeSet<String>,
}

impl Places {
    /// `at_most` places.
    pub fn new(at_most: usize) -> Self {
        Self {
            at_most,
            held: BTreeSet::new(),
        }
    }

    /// Asks for a place for `host`; asking again changes nothing.
    pub fn acquire(&mut self, host: &str) -> Grant {
        if !self.held.contains(host) {
            if self.held.len() >= self.at_most {
                return Grant::Full;
            }
            self.held.insert(host.to_owned());
        }
        Grant::Held
    }

    /// Gives the place of `host` back; nothing if it has none.
    pub fn release(&mut self, host: &str) {
        self.held.remove(host);
    }
}

/// Where one host is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "state", rename_all = "kebab-case")]
pub enum HostState {
    /// Its turn has not come.
    Waiting {
        /// The lock is not asked for before this, in seconds.
        not_before_s: u64,
    },
    /// The lock is asked for.
    Asking,
    /// It has the lock and was told to reboot.
    Away {
        /// Since when.
        since_s: u64,
    },
    /// Another boot of it runs; not all of its VMs answer yet.
    Back {
        /// Since when it is under way.
        since_s: u64,
    },
    /// Every VM answers.
    Done,
    /// It refused; its VMs run on the old kernel.
    Refused {
        /// In one sentence.
        why: String,
    },
    /// It did not come back in time. It still may.
    Lost,
}

/// What happened to the host with this index.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// Time went on.
    Tick,
    /// It has the lock.
    Granted(usize),
    /// It was not given the lock, or nobody knows.
    Denied(usize),
    /// It will not reboot, and nothing was touched.
    Refused(usize, String),
    /// It runs, with another boot id than when it was told to reboot.
    OtherBoot(usize),
    /// Every VM that it had answers. Before [`Event::OtherBoot`] this says
    /// nothing: VMs answer under the old kernel, too.
    AllAnswer(usize),
    /// Its lock is gone although nobody released it.
    LockLost(usize),
}

/// What is to be done for the host with this index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Ask for the lock.
    AskLock(usize),
    /// Tell it to reboot.
    Reboot(usize),
    /// Release the lock; once it rebooted, from its new kernel.
    Release(usize),
}

/// Why no further host begins.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "why", rename_all = "kebab-case")]
pub enum Stop {
    /// A host did not come back.
    NotBack {
        /// Which.
        host: usize,
    },
    /// A host's lock was lost while it was under way.
    LockLost {
        /// Which.
        host: usize,
    },
}

/// A roll.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Roll {
    at_most: usize,
    give_up_s: u64,
    hosts: Vec<HostState>,
    stopped: Option<Stop>,
}

impl Roll {
    /// A roll through hosts 0 to `hosts` − 1, in this order.
    pub fn new(hosts: usize, at_most: usize, give_up_after: Span) -> Self {
        Self {
            at_most,
            give_up_s: give_up_after.as_s(),
            hosts: vec![HostState::Waiting { not_before_s: 0 }; hosts],
            stopped: None,
        }
    }

    /// Where each host is.
    pub fn hosts(&self) -> &[HostState] {
        &self.hosts
    }

    /// Why no further host begins, if so.
    pub fn stopped(&self) -> Option<&Stop> {
        self.stopped.as_ref()
    }

    /// Whether nothing more happens by itself.
    pub fn is_over(&self) -> bool {
        self.hosts.iter().all(|host| match host {
            HostState::Done | HostState::Refused { .. } | HostState::Lost => true,
            HostState::Waiting { .. } => self.stopped.is_some(),
            HostState::Asking | HostState::Away { .. } | HostState::Back { .. } => false,
        })
    }

    /// When a [`Event::Tick`] is needed next, in seconds; `None` while only
    /// other events matter.
    pub fn tick_at(&self) -> Option<u64> {
        let at = |host: &HostState| match host {
            HostState::Away { since_s } | HostState::Back { since_s } => {
                Some(since_s.saturating_add(self.give_up_s))
            }
            HostState::Waiting { not_before_s } if self.may_begin() => Some(*not_before_s),
            _ => None,
        };
        self.hosts.iter().filter_map(at).min()
    }

    /// Takes an event at a time of a clock that only goes forward. Events that
    /// do not fit where a host is change nothing.
    pub fn step(mut self, event: Event, now_s: u64) -> (Self, Vec<Effect>) {
        let mut effects = Vec::new();
        self.take(event, now_s, &mut effects);
        self.give_up(now_s);
        while self.may_begin() {
            let ready = |host: &HostState| matches!(host, HostState::Waiting { not_before_s } if *not_before_s <= now_s);
            let Some(next) = self.hosts.iter().position(ready) else {
                break;
            };
            self.hosts[next] = HostState::Asking;
            effects.push(Effect::AskLock(next));
        }
        (self, effects)
    }

    fn may_begin(&self) -> bool {
        let busy = |host: &&HostState| {
            matches!(
                host,
                HostState::Asking
                    | HostState::Away { .. }
                    | HostState::Back { .. }
                    | HostState::Lost
            )
        };
        self.stopped.is_none() && self.hosts.iter().filter(busy).count() < self.at_most
    }

    fn take(&mut self, event: Event, now_s: u64, effects: &mut Vec<Effect>) {
        let index = match &event {
            Event::Tick => return,
            Event::Granted(i)
            | Event::Denied(i)
            | Event::Refused(i, _)
            | Event::OtherBoot(i)
            | Event::AllAnswer(i)
            | Event::LockLost(i) => *i,
        };
        let stopped = self.stopped.is_some();
        let Some(host) = self.hosts.get_mut(index) else {
            return;
        };
        match (event, &*host) {
            (Event::Granted(_), HostState::Asking) if stopped => {
                *host = HostState::Waiting { not_before_s: 0 };
                effects.push(Effect::Release(index));
            }
            (Event::Granted(_), HostState::Asking) => {
                *host = HostState::Away { since_s: now_s };
                effects.push(Effect::Reboot(index));
            }
            (Event::Denied(_), HostState::Asking) => {
                *host = HostState::Waiting {
                    not_before_s: now_s.saturating_add(ASK_AGAIN_S),
                };
            }
            (Event::Refused(_, why), HostState::Away { .. }) => {
                *host = HostState::Refused { why };
                effects.push(Effect::Release(index));
            }
            (Event::OtherBoot(_), HostState::Away { since_s }) => {
                *host = HostState::Back { since_s: *since_s };
            }
            // It may still come back; the roll stays stopped.
            (Event::OtherBoot(_), HostState::Lost) => {
                *host = HostState::Back { since_s: now_s };
            }
            (Event::AllAnswer(_), HostState::Back { .. }) => {
                *host = HostState::Done;
                effects.push(Effect::Release(index));
            }
            (
                Event::LockLost(_),
                HostState::Away { .. } | HostState::Back { .. } | HostState::Lost,
            ) => {
                self.stopped.get_or_insert(Stop::LockLost { host: index });
            }
            _ => {}
        }
    }

    fn give_up(&mut self, now_s: u64) {
        for (index, host) in self.hosts.iter_mut().enumerate() {
            if let HostState::Away { since_s } | HostState::Back { since_s } = host
                && now_s.saturating_sub(*since_s) >= self.give_up_s
            {
                *host = HostState::Lost;
                self.stopped.get_or_insert(Stop::NotBack { host: index });
            }
        }
    }
}

pub mod forecast;
pub mod holder;
pub mod slots;
pub mod turns;

#[cfg(test)]
mod tests;
