//! What a group of hosts behind a load balancer can do over one cycle of
//! rejuvenations, by how VMs get over them (T-03): total throughput as an area.
//!
//! ```text
//! throughput
//!   m ┤▔▔▔▔▔╲  ╱▔▔╲  ╱▔▔▔▔▔▔   warm: each host is away for d_w
//!     │      ▔▔    ▔▔
//!   m ┤▔▔▔▔▔╲    ╱╲    ╱▔▔▔▔   cold: for d_c, and slower until caches are full
//!     │      ▔▔▔▔  ▔▔▔▔
//! m-k ┤▁▁▁▁▁▂▁▁▁▂▁▁▁▁▁▁▁▁▁▁▁   migrate + cold: k hosts are spare all the time
//!     └────────────────────►
//! ```
//!
//! Hosts are all alike and worth 1 each, and the balancer uses all that are
//! there. Each host runs what a real one runs: the policy's [`Watcher`], looked
//! at once a minute, and a place of the group ([`Places`]) that it asks for when
//! the policy says go, and is refused if all are taken; then it tries again
//! after the watcher's pause. Nothing here is measured: [`Costs`] are put in.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};

use serde::Serialize;

use crate::calendar::Moment;
use crate::fleet::{Grant, Places};
use crate::policy::watch::{Seen, Watcher};
use crate::policy::{Decision, Policy, PolicyError, Rule};
use crate::usage::model::{Method, Model, ModelError, Usage};

pub mod chart;

/// Between two looks of a host at its policy, in seconds.
const LOOK_S: Moment = 60;
/// Most hosts of a group.
const HOSTS_MAX: u32 = 10_000;

/// How VMs get over the renewal of their host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Way {
    /// Frozen on memory.
    Warm,
    /// Shut down and booted.
    Cold,
    /// Moved to a spare host, which serves from then on; the emptied host is
    /// rebooted cold and is the next spare one.
    Migrate,
}

impl Way {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Warm, Self::Cold, Self::Migrate];

    /// In a reader's words.
    pub fn name(self) -> &'static str {
        match self {
            Self::Warm => "warm",
            Self::Cold => "cold",
            Self::Migrate => "migrate + cold, spare counted",
        }
    }
}

/// What the renewal of one host takes and costs.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Costs {
    /// The host's VMs do not serve in a warm reboot, in seconds.
    pub warm_s: f64,
    /// And in a cold one.
    pub cold_s: f64,
    /// After a cold reboot caches are empty: for so long, in seconds …
    pub refill_s: f64,
    /// … this part of the host's throughput is missing.
    pub refill_part: f64,
    /// How long it takes to move all VMs of a host away, in seconds …
    pub migrate_s: f64,
    /// … in which this part of the host's throughput is missing.
    pub migrate_part: f64,
    /// A cold reboot of a host without VMs, in seconds.
    pub empty_s: f64,
}

impl Costs {
    /// The papers' test bed with n VMs of 1 GB (R-50), as far as their texts
    /// go; the rest is chosen so that migration and cold look good:
    ///
    /// - web throughput is 69 % lower just after a cold reboot (R-49); for how
    ///   long, no text says: for no time at all;
    /// - moving VMs takes what their memory takes on an idle line of 1 Gbit/s,
    ///   nothing sent twice; meanwhile web throughput is 57 % lower (V-02).
    pub fn of_paper(n: u32) -> Result<Self, ModelError> {
        let gib_s = f64::from(1u32 << 30) * 8.0 / 1e9;
        let model = crate::usage::paper::model();
        let mut costs = Self {
            warm_s: 0.0,
            cold_s: 0.0,
            refill_s: 0.0,
            refill_part: 0.69,
            migrate_s: f64::from(n) * gib_s,
            migrate_part: 0.57,
            empty_s: 0.0,
        };
        costs.measured(&model, n)?;
        // A host without VMs (R-50): reset_hw + reboot_vmm(0).
        costs.empty_s = 47.0 + 43.0;
        Ok(costs)
    }

    /// Puts the downtimes in that were measured with n VMs; the rest stays.
    pub fn measured(&mut self, model: &Model, n: u32) -> Result<(), ModelError> {
        let usage = Usage {
            n,
            // Nothing is credited: it is the host's absence that counts.
            alpha: 1e-12,
            os_interval: crate::usage::paper::OS_INTERVAL,
            host_interval: crate::usage::paper::HOST_INTERVAL,
            os_downtime_s: Some(0.0),
            evacuate_pause_s: None,
            moves: 1,
            confidence: 0.95,
        };
        let of = |method: Method, what| {
            let downtime = model.downtime_of(method, &usage)?;
            let seconds = downtime.map_or(f64::NAN, |d| d.value);
            match seconds >= 0.0 {
                true => Ok(seconds),
                false => Err(ModelError::BelowZero { what, n }),
            }
        };
        self.warm_s = of(Method::Warm, "warm")?;
        self.cold_s = of(Method::Cold, "cold")?;
        Ok(())
    }

    /// For how long a host has its place of the group.
    fn away_s(&self, way: Way) -> f64 {
        match way {
            Way::Warm => self.warm_s,
            Way::Cold => self.cold_s,
            Way::Migrate => self.migrate_s + self.empty_s,
        }
    }

    /// What is missing from when to when after the host went, and how much.
    fn missing(&self, way: Way) -> [(f64, f64, f64); 2] {
        match way {
            Way::Warm => [(0.0, self.warm_s, 1.0), (0.0, 0.0, 0.0)],
            Way::Cold => {
                let refilled = self.cold_s + self.refill_s;
                [
                    (0.0, self.cold_s, 1.0),
                    (self.cold_s, refilled, self.refill_part),
                ]
            }
            Way::Migrate => [
                (0.0, self.migrate_s, self.migrate_part),
                // Its VMs serve from the host that was spare.
                (0.0, 0.0, 0.0),
            ],
        }
    }
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error, PartialEq)]
pub enum ClusterError {
    /// Nothing to simulate, or too much.
    #[error("a group has 1 to {HOSTS_MAX} hosts, and more than it renews at once: not {hosts}")]
    Hosts {
        /// As given.
        hosts: u32,
    },
    /// Not a cost.
    #[error("{what} = {value} cannot be: times are 0 or more, parts 0 to 1")]
    Cost {
        /// Which.
        what: &'static str,
        /// As given.
        value: f64,
    },
    /// No cycle.
    #[error("the policy has no calendar rule with two events to come: it has no cycle")]
    NoCycle,
    /// The policy itself.
    #[error(transparent)]
    Policy(#[from] PolicyError),
}

/// Throughput from an instant on, in hosts.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Level {
    /// Seconds from the beginning of the cycle.
    pub from_s: f64,
    /// How many hosts' worth.
    pub hosts: f64,
}

/// One cycle.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Cycle {
    /// How VMs got over it.
    pub way: Way,
    /// Machines of the group, spare ones counted.
    pub hosts: u32,
    /// From one event of the calendar to the next, in seconds.
    pub cycle_s: f64,
    /// Throughput over the cycle, in host-seconds.
    pub area: f64,
    /// What all hosts could do in it, less the area.
    pub lost: f64,
    /// The same as a part.
    pub lost_part: f64,
    /// Least throughput at any moment, in hosts.
    pub least: f64,
    /// Hosts that were renewed, of those that have VMs.
    pub renewed: u32,
    /// From the first that went to the last that was back, in seconds.
    pub roll_s: f64,
    /// Throughput over time.
    pub levels: Vec<Level>,
}

/// Runs one cycle of `policy` from its first event after `from` to the next one.
pub fn simulate(
    way: Way,
    hosts: u32,
    policy: &Policy,
    costs: &Costs,
    from: Moment,
) -> Result<Cycle, ClusterError> {
    policy.check(from)?;
    check(costs)?;
    let spare = match way {
        Way::Migrate => policy.at_most,
        Way::Warm | Way::Cold => 0,
    };
    if hosts == 0 || hosts > HOSTS_MAX || spare >= hosts {
        return Err(ClusterError::Hosts { hosts });
    }
    let (begin, end) = cycle(policy, from).ok_or(ClusterError::NoCycle)?;
    let went = roll(hosts - spare, policy, costs.away_s(way), begin, end);
    Ok(put_together(
        way,
        [hosts, spare],
        costs,
        &went,
        (begin, end),
    ))
}

fn check(costs: &Costs) -> Result<(), ClusterError> {
    let times = [
        ("warm_s", costs.warm_s),
        ("cold_s", costs.cold_s),
        ("refill_s", costs.refill_s),
        ("migrate_s", costs.migrate_s),
        ("empty_s", costs.empty_s),
    ];
    let parts = [
        ("refill_part", costs.refill_part),
        ("migrate_part", costs.migrate_part),
    ];
    let times = times
        .into_iter()
        .map(|(what, v)| (what, v, v >= 0.0 && v.is_finite()));
    let parts = parts
        .into_iter()
        .map(|(what, v)| (what, v, (0.0..=1.0).contains(&v)));
    match times.chain(parts).find(|(_, _, good)| !good) {
        Some((what, value, _)) => Err(ClusterError::Cost { what, value }),
        None => Ok(()),
    }
}

/// The first event after `from`, and the next one, of the first calendar rule.
fn cycle(policy: &Policy, from: Moment) -> Option<(Moment, Moment)> {
    let mut rules = policy.rules.iter();
    let calendar = rules.find_map(|rule| match rule {
        Rule::Calendar { on, .. } => Some(on),
        _ => None,
    })?;
    let begin = calendar.next_after(from)?;
    Some((begin, calendar.next_after(begin)?))
}

/// One host, as its daemon sees it.
struct Host {
    watcher: Watcher,
    booted: Moment,
    /// It has its place since then.
    since: Option<Moment>,
}

/// Lets each host follow the policy through a cycle. Returns when each that
/// went did so.
fn roll(hosts: u32, policy: &Policy, away_s: f64, begin: Moment, end: Moment) -> Vec<Moment> {
    let mut places = Places::new(policy.at_most as usize);
    let long_ago = begin - (end - begin);
    let mut all: Vec<Host> = (0..hosts)
        .map(|index| Host {
            watcher: Watcher::default(),
            // They went one after the other then, too.
            booted: long_ago + Moment::from(index),
            since: None,
        })
        .collect();
    // Daemons began at different times: so do their looks.
    let offset = |index: usize| (index as Moment * 37) % LOOK_S;
    let mut next: BinaryHeap<Reverse<(Moment, usize)>> = (0..all.len())
        .map(|index| Reverse((begin + offset(index), index)))
        .collect();
    let mut went = Vec::new();
    while let Some(Reverse((now, index))) = next.pop() {
        if now >= end {
            break;
        }
        let host = &mut all[index];
        if host.since.take().is_some() {
            places.release(&index.to_string());
            host.booted = now;
            // The new kernel's daemon remembers nothing.
            host.watcher = Watcher::default();
            next.push(Reverse((now + LOOK_S, index)));
            continue;
        }
        let seen = Seen {
            now,
            booted: Some(host.booted),
            up_s: Some(now - host.booted),
            ..Seen::default()
        };
        let (watcher, decision) = std::mem::take(&mut host.watcher).look(policy, &seen);
        host.watcher = watcher;
        let at = match decision {
            Decision::Go { .. } => match places.acquire(&index.to_string()) {
                Grant::Held => {
                    host.since = Some(now);
                    went.push(now);
                    Some(now + (away_s.ceil() as Moment).max(1))
                }
                // Refused for want of a slot: the policy is asked again.
                Grant::Full => Some(now + LOOK_S),
            },
            // The same facts give the same answer until then: looks in between
            // are left out.
            Decision::Wait { until, .. } => until.map(|until| {
                let looks = ((until - now).max(1) + LOOK_S - 1) / LOOK_S;
                now + looks * LOOK_S
            }),
        };
        next.extend(at.map(|at| Reverse((at, index))));
    }
    went
}

fn put_together(
    way: Way,
    [hosts, spare]: [u32; 2],
    costs: &Costs,
    went: &[Moment],
    (begin, end): (Moment, Moment),
) -> Cycle {
    let cycle_s = (end - begin) as f64;
    // Changes by the instant, in microseconds, so that instants have an order.
    let mut changes: BTreeMap<u64, f64> = BTreeMap::from([(0, 0.0)]);
    for at in went {
        let at_s = (at - begin) as f64;
        for (from, to, part) in costs.missing(way) {
            for (instant, sign) in [(from, -1.0), (to, 1.0)] {
                let us = (at_s + instant).clamp(0.0, cycle_s) * 1e6;
                *changes.entry(us as u64).or_default() += sign * part;
            }
        }
    }
    let mut level = f64::from(hosts - spare);
    let mut levels: Vec<Level> = Vec::new();
    for (us, change) in changes {
        level += change;
        // Rounding must not leave a rest.
        let rounded = (level * 1e9).round() / 1e9;
        let from_s = us as f64 / 1e6;
        if levels.last().is_none_or(|last| last.hosts != rounded) {
            levels.push(Level {
                from_s,
                hosts: rounded,
            });
        }
    }
    let ends = levels.iter().skip(1).map(|l| l.from_s).chain([cycle_s]);
    let area: f64 = levels
        .iter()
        .zip(ends)
        .map(|(level, to_s)| level.hosts * (to_s - level.from_s))
        .sum();
    let whole = f64::from(hosts) * cycle_s;
    let last = went.iter().max().map_or(begin, |at| *at);
    let first = went.iter().min().map_or(begin, |at| *at);
    Cycle {
        way,
        hosts,
        cycle_s,
        area,
        lost: whole - area,
        lost_part: 1.0 - area / whole,
        least: levels.iter().map(|l| l.hosts).fold(f64::INFINITY, f64::min),
        renewed: went.len() as u32,
        roll_s: match went.is_empty() {
            true => 0.0,
            false => (last - first) as f64 + costs.away_s(way),
        },
        levels,
    }
}

#[cfg(test)]
mod tests;
