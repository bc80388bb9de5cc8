//! Policy as a value: when is a host to be rejuvenated?
//!
//! [`decide`] looks at facts and a clock's reading and says go, or wait until.
//! It keeps nothing: whoever asks again with the same facts gets the same
//! answer, so that the same code serves a service and a simulation, and no
//! restart forgets anything.
//!
//! ```text
//! a rule is due ── blackout? ──► wait for its end
//!      │               │ no
//!      │               ▼
//!      │        quiet enough, or patience gone? ── no ──► wait for either
//!      │               │ yes
//!      │               ▼
//!      │        fewer than k hosts under way? ── no ──► wait until told
//!      │               │ yes
//!      ▼               ▼
//! nothing due:       go
//! wait for the next event
//! ```
//!
//! Rules are alternatives: the first that lets the host go counts. Several
//! policies are joined by [`Policy::join`], so that none can be at odds with
//! another: every rule of each, every blackout of each, and the smallest k.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::calendar::{Calendar, Moment, Window};
use crate::span::Span;

/// Most windows that are followed from one into the next.
const WINDOWS_MAX: usize = 1000;
/// Least uptime that makes a host due without a person, where the policy says
/// nothing.
const UPTIME_LEAST: Span = Span::hours(1);

/// When hosts are to be rejuvenated.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Policy {
    /// k: how many hosts of the group may be under way at once.
    #[serde(default = "one")]
    pub at_most: u32,
    /// What makes a host due.
    #[serde(default, rename = "rule")]
    pub rules: Vec<Rule>,
    /// When no host may begin, whatever a rule says.
    #[serde(default, rename = "blackout")]
    pub blackouts: Vec<Window>,
    /// How long a host must have been up before a calendar or ageing makes it
    /// due; an hour if nothing is said. See [`Policy::rest`].
    #[serde(default)]
    pub least_uptime: Option<Span>,
}

fn one() -> u32 {
    1
}

/// One reason to rejuvenate.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "when", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Rule {
    /// At an event of a calendar (R-30).
    Calendar {
        /// Which.
        on: Calendar,
        /// How long after it the host may still begin; later, the event is
        /// passed over.
        within: Span,
        /// For what load it waits.
        #[serde(default)]
        quiet: Option<Quiet>,
    },
    /// When ageing foretells exhaustion.
    Ageing {
        /// How near it must be.
        exhausted_within: Span,
        /// For what load it waits.
        #[serde(default)]
        quiet: Option<Quiet>,
    },
    /// When a person asks; waits for no load.
    ByHand,
    /// When it is the host's turn in a roll through its group; waits for no
    /// load.
    Roll,
}

/// The quiet window: how little load there must be, and for how long.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Quiet {
    /// Load at or below this is quiet; as the facts measure it.
    pub below: f64,
    /// For so long.
    pub lasting: Span,
    /// After so long the host goes, quiet or not.
    pub patience: Span,
}

/// What is known of one host when a decision is made.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Facts {
    /// When it was rejuvenated last.
    pub last: Option<Moment>,
    /// When a person asked, and it has not been rejuvenated since.
    pub asked: Option<Moment>,
    /// Since when it is the host's turn in a roll through its group.
    #[serde(default)]
    pub turn: Option<Moment>,
    /// Ageing: since when exhaustion is foretold, and for when.
    pub exhaustion: Option<Exhaustion>,
    /// Load over time, the oldest first, each until the next.
    pub load: Vec<Load>,
    /// Hosts of the group that are under way.
    pub under_way: u32,
    /// Before then it has not been up for [`Policy::rest`], and no
    /// calendar and no ageing makes it due; `None` if it has.
    #[serde(default)]
    pub rested: Option<Moment>,
}

/// What the ageing monitor foretells.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Exhaustion {
    /// When it was found.
    pub found: Moment,
    /// When the host is exhausted.
    pub at: Moment,
}

/// Load from an instant on.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Load {
    /// From when.
    pub from: Moment,
    /// How much.
    pub load: f64,
}

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(tag = "decision", rename_all = "kebab-case")]
pub enum Decision {
    /// Rejuvenate now.
    Go {
        /// Which rule says so.
        rule: usize,
        /// Whether it was quiet, where that was waited for.
        quiet: Option<bool>,
    },
    /// Not now.
    Wait {
        /// Why.
        why: Why,
        /// Before then the same facts give the same answer; `None` while
        /// nothing but other facts can change it.
        until: Option<Moment>,
    },
}

/// Why a host waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Why {
    /// Nothing is due.
    NothingDue,
    /// A blackout window is open.
    Blackout,
    /// It is not quiet.
    Load,
    /// As many other hosts as may be are under way.
    OthersUnderWay,
    /// It went a short while ago, and was not rebooted.
    TriedLately,
    /// Its last reboot was undone, and nobody said since that it may go.
    Halted,
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NothingDue => "nothing is due",
            Self::Blackout => "something is due, and a blackout is open",
            Self::Load => "something is due, and the host is busy",
            Self::OthersUnderWay => "something is due, and others are under way",
            Self::TriedLately => "it was tried a short while ago",
            Self::Halted => "its last reboot was undone",
        })
    }
}

/// Why a policy cannot be meant.
#[derive(Debug, thiserror::Error, PartialEq)]
pub enum PolicyError {
    /// No host would ever go.
    #[error("at_most = 0 lets no host go: write 1 or more, or take the policy away")]
    AtMostZero,
    /// Never due.
    #[error("the policy has no rule: add one, such as [[rule]] when = \"by-hand\"")]
    NoRule,
    /// A length that is none.
    #[error("{0} = \"0s\" leaves no time: make it longer")]
    NoTime(&'static str),
    /// Not a load.
    #[error("below = {0} is no load: write a number from 0 on")]
    BadLoad(f64),
    /// A window after a window for ever.
    #[error("the blackouts follow one another without a gap: no host would ever go")]
    NoGap,
}

impl Policy {
    /// Refuses what cannot be meant. `now` is where blackouts are looked at from.
    pub fn check(&self, now: Moment) -> Result<(), PolicyError> {
        if self.at_most == 0 {
            return Err(PolicyError::AtMostZero);
        }
        if self.rules.is_empty() {
            return Err(PolicyError::NoRule);
        }
        let nothing = |span: &Span| span.as_s() == 0;
        if self.blackouts.iter().any(|w| nothing(&w.length)) {
            return Err(PolicyError::NoTime("length"));
        }
        if self.least_uptime.as_ref().is_some_and(nothing) {
            return Err(PolicyError::NoTime("least_uptime"));
        }
        for rule in &self.rules {
            match rule {
                Rule::Calendar { within, .. } if nothing(within) => {
                    return Err(PolicyError::NoTime("within"));
                }
                Rule::Ageing {
                    exhausted_within, ..
                } if nothing(exhausted_within) => {
                    return Err(PolicyError::NoTime("exhausted_within"));
                }
                _ => {}
            }
            if let Some(quiet) = rule.quiet().filter(|q| q.below.is_nan() || q.below < 0.0) {
                return Err(PolicyError::BadLoad(quiet.below));
            }
        }
        self.free_from(now).map(drop).ok_or(PolicyError::NoGap)
    }

    /// One policy that obeys all of them.
    pub fn join(policies: impl IntoIterator<Item = Self>) -> Option<Self> {
        policies.into_iter().reduce(|mut all, one| {
            all.at_most = all.at_most.min(one.at_most);
            all.rules.extend(one.rules);
            all.blackouts.extend(one.blackouts);
            let least = |policy: Option<Span>| policy.unwrap_or(UPTIME_LEAST);
            if all.least_uptime.or(one.least_uptime).is_some() {
                let longest = least(all.least_uptime).max(least(one.least_uptime));
                all.least_uptime = Some(longest);
            }
            all
        })
    }

    /// How long a host must have been up before a calendar or ageing makes it
    /// due, by a clock that nobody sets: as long as the policy says, and at
    /// least as long as the longest `within`, because a wall clock that steps
    /// back has the event at which the host went once more.
    pub fn rest(&self) -> Span {
        let within = self.rules.iter().filter_map(|rule| match rule {
            Rule::Calendar { within, .. } => Some(*within),
            Rule::Ageing { .. } | Rule::ByHand | Rule::Roll => None,
        });
        within.fold(self.least_uptime.unwrap_or(UPTIME_LEAST), Span::max)
    }

    /// The first instant from `now` on that no blackout covers.
    pub fn free_from(&self, now: Moment) -> Option<Moment> {
        let mut at = now;
        for _ in 0..WINDOWS_MAX {
            let ends = self.blackouts.iter().filter_map(|w| w.open_until(at));
            match ends.max() {
                Some(end) => at = end,
                None => return Some(at),
            }
        }
        None
    }
}

impl Rule {
    /// As a policy names it.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Calendar { .. } => "calendar",
            Self::Ageing { .. } => "ageing",
            Self::ByHand => "by-hand",
            Self::Roll => "roll",
        }
    }

    fn quiet(&self) -> Option<Quiet> {
        match self {
            Self::Calendar { quiet, .. } | Self::Ageing { quiet, .. } => *quiet,
            Self::ByHand | Self::Roll => None,
        }
    }

    /// Whether it is due, or when that may be next.
    fn due(&self, facts: &Facts, now: Moment) -> Due {
        if let Some(rested) = facts.rested.filter(|rested| now < *rested)
            && !matches!(self, Self::ByHand | Self::Roll)
        {
            return Due::NotBefore(Some(rested));
        }
        match self {
            Self::Calendar { on, within, .. } => {
                let reach = now.saturating_sub(seconds(*within));
                // An event counts once: not if the host went since.
                let from = facts.last.map_or(reach, |last| reach.max(last));
                match on.next_after(from) {
                    Some(event) if event <= now => Due::Since {
                        since: event,
                        until: Some(event.saturating_add(seconds(*within))),
                    },
                    event => Due::NotBefore(event),
                }
            }
            Self::Ageing {
                exhausted_within, ..
            } => {
                let fresh = |e: &Exhaustion| facts.last.is_none_or(|last| last < e.found);
                match facts.exhaustion.filter(fresh) {
                    Some(foretold) => {
                        let near = foretold.at.saturating_sub(seconds(*exhausted_within));
                        let since = near.max(foretold.found);
                        if since <= now {
                            Due::Since { since, until: None }
                        } else {
                            Due::NotBefore(Some(since))
                        }
                    }
                    None => Due::NotBefore(None),
                }
            }
            Self::ByHand => {
                let fresh = |asked: &Moment| facts.last.is_none_or(|last| last < *asked);
                match facts.asked.filter(fresh) {
                    Some(since) if since <= now => Due::Since { since, until: None },
                    asked => Due::NotBefore(asked),
                }
            }
            Self::Roll => match facts.turn {
                Some(since) if since <= now => Due::Since { since, until: None },
                turn => Due::NotBefore(turn),
            },
        }
    }
}

fn seconds(span: Span) -> Moment {
    // A span is far below what fits.
    span.as_s() as Moment
}

/// Whether a rule is due.
enum Due {
    /// It is.
    Since {
        since: Moment,
        /// When it is too late.
        until: Option<Moment>,
    },
    /// It is not, and not before this, if ever.
    NotBefore(Option<Moment>),
}

/// What to do with a host, given what is known of it. Before [`Policy::check`]
/// accepted the policy, the answer may be to wait for ever.
pub fn decide(policy: &Policy, facts: &Facts, now: Moment) -> Decision {
    let mut waits = Vec::new();
    for (index, rule) in policy.rules.iter().enumerate() {
        match one_rule(policy, rule, facts, now) {
            Ok(quiet) => return Decision::Go { rule: index, quiet },
            Err(wait) => waits.push(wait),
        }
    }
    // The reason that is nearest to going is told, and the first of all
    // instants at which anything may change.
    let why = waits.iter().map(|wait| wait.0).max();
    Decision::Wait {
        why: why.unwrap_or(Why::NothingDue),
        until: waits.iter().filter_map(|wait| wait.1).min(),
    }
}

/// Go, and whether it was quiet; or why not, and until when.
fn one_rule(
    policy: &Policy,
    rule: &Rule,
    facts: &Facts,
    now: Moment,
) -> Result<Option<bool>, (Why, Option<Moment>)> {
    let (since, too_late) = match rule.due(facts, now) {
        Due::NotBefore(at) => return Err((Why::NothingDue, at)),
        Due::Since { since, until } => (since, until),
    };
    let or_too_late = |at: Option<Moment>| match (at, too_late) {
        (Some(at), Some(late)) => Some(at.min(late)),
        (at, late) => at.or(late),
    };
    match policy.free_from(now) {
        Some(free) if free == now => {}
        free => return Err((Why::Blackout, or_too_late(free))),
    }
    let quiet = match rule.quiet() {
        None => None,
        Some(quiet) => {
            let patient_until = since.saturating_add(seconds(quiet.patience));
            let from = quiet_from(&quiet, &facts.load);
            let is_quiet = from.is_some_and(|from| from <= now);
            if !is_quiet && now < patient_until {
                let at = from.map_or(patient_until, |from| from.min(patient_until));
                return Err((Why::Load, or_too_late(Some(at))));
            }
            Some(is_quiet)
        }
    };
    if facts.under_way >= policy.at_most {
        return Err((Why::OthersUnderWay, too_late));
    }
    Ok(quiet)
}

/// When it will have been quiet for long enough, if the load stays as it is;
/// `None` while it is not quiet.
fn quiet_from(quiet: &Quiet, load: &[Load]) -> Option<Moment> {
    let calm = |l: &&Load| l.load <= quiet.below;
    let since = load.iter().rev().take_while(calm).last()?.from;
    Some(since.saturating_add(seconds(quiet.lasting)))
}

pub mod watch;

#[cfg(test)]
mod tests;
