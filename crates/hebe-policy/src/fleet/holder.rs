//! A host that wants a slot, from the first request to its release.
//!
//! ```text
//!  old kernel                                                          new kernel
//!            granted           ready            pinned
//!  wanted ───────────► held ───────────► pinning ───────► rebooting    verifying
//!    ▲  │ later          │ not ready        │ unknown         │ undone     │ every VM answers
//!    └──┘                ▼                  ▼                 ▼            ▼
//!                    releasing ◄──────── releasing ◄────── releasing   releasing ──► released
//!
//!  stopped: no slot in time, the lease was lost, a VM does not answer in
//!  time or was stranded by a reboot that failed (the slot is kept), or nobody
//!  knows whether the slot was released
//! ```
//!
//! *Held* is a lease: if the holder dies, the slot goes. *Pinned* is for good:
//! between two kernels nobody can keep a lease alive, so a host that does not
//! come back keeps its slot, and all others see that. The two kernels share no
//! memory: the old one's machine ends in `rebooting`, the new one's begins in
//! `verifying`, from what is written down in the slot.
//!
//! Rules, whatever is answered in whatever order:
//!
//! 1. The reboot is ordered once, and only after the slot was pinned.
//! 2. A lease that may be over is not acted on.
//! 3. After the order to reboot the slot is released only because nothing
//!    was rebooted and every VM runs, or by the new kernel, after every VM
//!    answers.
//! 4. No answer means that nothing is known; what is asked again then changes
//!    nothing that was done already. A slot without a lease that may have been
//!    given unheard is given back when the host stops asking.

/// Times of a holder, in milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Times {
    /// How long a lease lasts that nobody renews; `None` where slots are given
    /// for good.
    pub lease_ms: Option<u64>,
    /// How long a slot is waited for.
    pub patience_ms: u64,
    /// Between two requests.
    pub ask_every_ms: u64,
    /// How long it is tried to pin or to release a slot.
    pub insist_ms: u64,
}

/// Where the holder is. Times are of a clock that only goes forward.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    /// It wants a slot, and asks for one at `ask_at_ms`.
    Wanted {
        /// When it asks.
        ask_at_ms: u64,
        /// When it stops asking.
        until_ms: u64,
    },
    /// It asked.
    Asking {
        /// When it stops asking.
        until_ms: u64,
    },
    /// It has a lease.
    Held {
        /// Until then it is sure that nobody else has its slot.
        sure_until_ms: Option<u64>,
        /// When it renews the lease.
        renew_at_ms: Option<u64>,
    },
    /// The slot is to be its own for good.
    Pinning {
        /// When it is tried next.
        try_at_ms: u64,
        /// When it gives up.
        until_ms: u64,
    },
    /// The reboot was ordered.
    Rebooting,
    /// The new kernel waits for VMs.
    Verifying {
        /// When it looks next.
        look_at_ms: u64,
        /// When it stops looking.
        until_ms: u64,
    },
    /// The slot is given back.
    Releasing {
        /// When it is tried next.
        try_at_ms: u64,
        /// When it gives up.
        until_ms: u64,
        /// What is said when it is done; `None` if all went well.
        then: Option<Stop>,
    },
    /// All is over, and the slot is somebody else's to take.
    Released,
    /// It goes no further.
    Stopped(Stop),
}

/// Why a holder goes no further.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Stop {
    /// None was to be had.
    #[error("there is no slot for this host: {0}")]
    NoSlot(String),
    /// It ran out, or somebody freed it; nothing was rebooted.
    #[error("this host's slot was lost before the reboot, and nothing was touched: {0}")]
    Lost(String),
    /// Whether it is this host's for good is not known; nothing was rebooted.
    #[error("it is not known whether this host has its slot, and nothing was touched: {0}")]
    Unsure(String),
    /// The host will not reboot now; nothing was touched.
    #[error("this host does not reboot: {0}")]
    NotReady(String),
    /// A VM does not answer under the new kernel.
    #[error("the slot is kept, and the group waits: {0}")]
    NotAllAnswer(String),
    /// The reboot failed, and some VM does not run.
    #[error(
        "the slot is kept, and the group waits, because not every VM of this host runs: {0}; look after them, then `hebe fleet release` gives it back"
    )]
    Stranded(String),
    /// The slot may still be there.
    #[error(
        "it is not known whether the slot was released: {0}; `hebe fleet release` tries it again"
    )]
    Unreleased(String),
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// Time went on.
    Tick,
    /// The slot was leased by a request sent at this time.
    Granted {
        /// When it was sent: the lease began no earlier.
        sent_ms: u64,
    },
    /// The host has a slot for good already.
    HasOne,
    /// There is none now.
    Full {
        /// Why.
        why: String,
        /// Whether waiting may help.
        may_pass: bool,
    },
    /// No answer came.
    Unknown(String),
    /// The lease was renewed by a request sent at this time.
    Renewed {
        /// When it was sent.
        sent_ms: u64,
    },
    /// The slot is not this host's any more.
    Gone(String),
    /// The pre-flight passed under the slot.
    Ready,
    /// It did not; or, when the slot was to be taken for good, this host must
    /// not go any more, and it was not.
    NotReady(String),
    /// The slot is this host's for good.
    Pinned,
    /// The reboot was undone: the old kernel goes on, and every VM runs.
    Undone(String),
    /// The reboot was undone, and some VM does not run.
    Stranded(String),
    /// Every VM answers.
    AllAnswer,
    /// Not yet.
    NotYet(String),
    /// It was given back, or is not there.
    Released,
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Ask for a slot.
    Ask,
    /// Renew the lease.
    Renew,
    /// Make the slot this host's for good.
    Pin,
    /// Reboot.
    Reboot,
    /// Look whether every VM answers.
    Look,
    /// Give the slot back.
    Release,
}

/// A holder: a value, whose [`Holder::step`] returns the next one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    times: Times,
    state: State,
    /// The slot was there before this order, and stays after it.
    kept: bool,
}

impl Holder {
    /// A host that wants a slot from now on.
    pub fn wants(times: Times, now_ms: u64) -> Self {
        Self {
            times,
            state: State::Wanted {
                ask_at_ms: now_ms,
                until_ms: now_ms.saturating_add(times.patience_ms),
            },
            kept: false,
        }
    }

    /// The new kernel of a host that has a slot; it waits for its VMs for
    /// `wait_ms`.
    pub fn is_back(times: Times, wait_ms: u64, now_ms: u64) -> Self {
        Self {
            times,
            state: State::Verifying {
                look_at_ms: now_ms,
                until_ms: now_ms.saturating_add(wait_ms),
            },
            kept: false,
        }
    }

    /// A host that gives its slot back without having rebooted.
    pub fn gives_up(times: Times, now_ms: u64) -> Self {
        Self {
            times,
            state: State::Releasing {
                try_at_ms: now_ms,
                until_ms: now_ms.saturating_add(times.insist_ms),
                then: None,
            },
            kept: false,
        }
    }

    /// Where it is.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// Whether the slot was there before this order, and stays after it.
    pub fn keeps(&self) -> bool {
        self.kept
    }

    /// When an [`Event::Tick`] is needed next; `None` while only other events
    /// matter.
    pub fn tick_at(&self) -> Option<u64> {
        match self.state {
            State::Wanted { ask_at_ms, .. } => Some(ask_at_ms),
            State::Held {
                sure_until_ms,
                renew_at_ms,
            } => match (sure_until_ms, renew_at_ms) {
                (Some(sure), Some(renew)) => Some(sure.min(renew)),
                (sure, renew) => sure.or(renew),
            },
            State::Pinning { try_at_ms, .. } | State::Releasing { try_at_ms, .. } => {
                Some(try_at_ms)
            }
            State::Verifying { look_at_ms, .. } => Some(look_at_ms),
            State::Asking { .. } | State::Rebooting | State::Released | State::Stopped(_) => None,
        }
    }

    /// Takes an event. Events that do not fit where the holder is change
    /// nothing.
    pub fn step(mut self, event: Event, now_ms: u64) -> (Self, Option<Effect>) {
        self.run_out(now_ms);
        let effect = match self.state {
            State::Wanted { .. } | State::Asking { .. } => self.asking(event, now_ms),
            State::Held { .. } => self.held(event, now_ms),
            State::Pinning { .. } => self.pinning(event, now_ms),
            State::Rebooting => self.rebooting(event, now_ms),
            State::Verifying { .. } => self.verifying(event, now_ms),
            State::Releasing { .. } => self.releasing(event, now_ms),
            State::Released | State::Stopped(_) => None,
        };
        (self, effect)
    }

    /// A lease that may be over is over.
    fn run_out(&mut self, now_ms: u64) {
        if let State::Held { sure_until_ms, .. } = self.state
            && sure_until_ms.is_some_and(|sure| now_ms >= sure)
        {
            let why = "its lease could not be renewed in time".to_owned();
            self.state = State::Stopped(Stop::Lost(why));
        }
    }

    fn leased(&mut self, sent_ms: u64) {
        let lease = self.times.lease_ms;
        self.state = State::Held {
            sure_until_ms: lease.map(|ms| sent_ms.saturating_add(ms)),
            renew_at_ms: lease.map(|ms| sent_ms.saturating_add(ms / 3)),
        };
    }

    fn asking(&mut self, event: Event, now_ms: u64) -> Option<Effect> {
        match (event, &self.state) {
            (
                Event::Tick,
                &State::Wanted {
                    ask_at_ms,
                    until_ms,
                },
            ) if ask_at_ms <= now_ms => {
                self.state = State::Asking { until_ms };
                return Some(Effect::Ask);
            }
            (Event::Granted { sent_ms }, State::Asking { .. }) => {
                self.leased(sent_ms);
                self.run_out(now_ms);
            }
            (Event::HasOne, State::Asking { .. }) => {
                self.kept = true;
                self.state = State::Held {
                    sure_until_ms: None,
                    renew_at_ms: None,
                };
            }
            (Event::Full { why, may_pass }, &State::Asking { until_ms }) => {
                self.ask_later(&why, may_pass, until_ms, now_ms);
            }
            (Event::Unknown(why), &State::Asking { until_ms }) => {
                self.ask_later(&why, true, until_ms, now_ms);
                // The slot may have been given all the same, and without a
                // lease it does not go by itself.
                if matches!(self.state, State::Stopped(_)) && self.times.lease_ms.is_none() {
                    return self.release(now_ms, Some(Stop::NoSlot(why)));
                }
            }
            _ => {}
        }
        None
    }

    fn ask_later(&mut self, why: &str, may_pass: bool, until_ms: u64, now_ms: u64) {
        let ask_at_ms = now_ms.saturating_add(self.times.ask_every_ms);
        self.state = if may_pass && ask_at_ms <= until_ms {
            State::Wanted {
                ask_at_ms,
                until_ms,
            }
        } else {
            State::Stopped(Stop::NoSlot(why.to_owned()))
        };
    }

    fn held(&mut self, event: Event, now_ms: u64) -> Option<Effect> {
        let State::Held {
            sure_until_ms,
            renew_at_ms,
        } = self.state
        else {
            return None;
        };
        match event {
            Event::Tick if renew_at_ms.is_some_and(|at| at <= now_ms) => {
                // If no answer comes, again after a third of the rest.
                let rest = sure_until_ms.map_or(0, |sure| sure.saturating_sub(now_ms));
                self.state = State::Held {
                    sure_until_ms,
                    renew_at_ms: Some(now_ms.saturating_add(rest / 3).max(now_ms + 1)),
                };
                return Some(Effect::Renew);
            }
            Event::Renewed { sent_ms } if sure_until_ms.is_some() => {
                self.leased(sent_ms);
                self.run_out(now_ms);
            }
            Event::Gone(why) => self.state = State::Stopped(Stop::Lost(why)),
            Event::Ready => {
                self.state = State::Pinning {
                    try_at_ms: now_ms.saturating_add(self.times.ask_every_ms),
                    until_ms: now_ms.saturating_add(self.times.insist_ms),
                };
                return Some(Effect::Pin);
            }
            Event::NotReady(why) => return self.release(now_ms, Some(Stop::NotReady(why))),
            _ => {}
        }
        None
    }

    fn pinning(&mut self, event: Event, now_ms: u64) -> Option<Effect> {
        let State::Pinning {
            try_at_ms,
            until_ms,
        } = self.state
        else {
            return None;
        };
        match event {
            Event::Tick if try_at_ms <= now_ms => {
                self.state = State::Pinning {
                    try_at_ms: now_ms.saturating_add(self.times.ask_every_ms),
                    until_ms,
                };
                Some(Effect::Pin)
            }
            Event::Pinned => {
                self.state = State::Rebooting;
                Some(Effect::Reboot)
            }
            Event::Gone(why) => {
                self.state = State::Stopped(Stop::Lost(why));
                None
            }
            // Its turn in a roll is over, and the slot is a lease still.
            Event::NotReady(why) => self.release(now_ms, Some(Stop::NotReady(why))),
            Event::Unknown(why) if now_ms >= until_ms => {
                self.release(now_ms, Some(Stop::Unsure(why)))
            }
            _ => None,
        }
    }

    fn rebooting(&mut self, event: Event, now_ms: u64) -> Option<Effect> {
        match event {
            Event::Undone(why) => self.release(now_ms, Some(Stop::NotReady(why))),
            Event::Stranded(why) => {
                self.state = State::Stopped(Stop::Stranded(why));
                None
            }
            _ => None,
        }
    }

    fn verifying(&mut self, event: Event, now_ms: u64) -> Option<Effect> {
        let State::Verifying {
            look_at_ms,
            until_ms,
        } = self.state
        else {
            return None;
        };
        let later = now_ms.saturating_add(self.times.ask_every_ms);
        match event {
            Event::Tick if look_at_ms <= now_ms => {
                self.state = State::Verifying {
                    look_at_ms: later,
                    until_ms,
                };
                return Some(Effect::Look);
            }
            Event::AllAnswer => return self.release(now_ms, None),
            Event::NotYet(why) if later > until_ms => {
                self.state = State::Stopped(Stop::NotAllAnswer(why));
            }
            Event::Gone(_) => self.state = State::Released,
            _ => {}
        }
        None
    }

    /// Begins to give the slot back, unless it was there before this order.
    fn release(&mut self, now_ms: u64, then: Option<Stop>) -> Option<Effect> {
        if self.kept {
            self.state = then.map_or(State::Released, State::Stopped);
            return None;
        }
        self.state = State::Releasing {
            try_at_ms: now_ms.saturating_add(self.times.ask_every_ms),
            until_ms: now_ms.saturating_add(self.times.insist_ms),
            then,
        };
        Some(Effect::Release)
    }

    fn releasing(&mut self, event: Event, now_ms: u64) -> Option<Effect> {
        let State::Releasing {
            try_at_ms,
            until_ms,
            then,
        } = &mut self.state
        else {
            return None;
        };
        match event {
            Event::Tick if *try_at_ms <= now_ms => {
                *try_at_ms = now_ms.saturating_add(self.times.ask_every_ms);
                return Some(Effect::Release);
            }
            Event::Released | Event::Gone(_) => {
                self.state = then.take().map_or(State::Released, State::Stopped);
            }
            Event::Unknown(why) if now_ms >= *until_ms => {
                self.state = State::Stopped(Stop::Unreleased(why));
            }
            _ => {}
        }
        None
    }
}

#[cfg(test)]
#[path = "holder_tests.rs"]
mod tests;
