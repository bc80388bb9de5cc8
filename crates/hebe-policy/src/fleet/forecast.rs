//! What a roll would be: its order, its duration, and the capacity at each
//! moment, by running [`Roll`] itself on a list of hosts and the times that
//! they are expected to take.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use serde::{Deserialize, Serialize};

use super::slots::FleetName;
use super::turns::{Place, ROLL_HOSTS_MAX, ROLL_VERSION, RebootOrder, RollState, Rollout};
use super::{Effect, Event, Grant, Places, Roll};
use crate::span::Span;

/// Most hosts of an inventory.
const HOSTS_MAX: usize = 10_000;

/// A group of hosts.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Inventory {
    /// Its name.
    pub group: String,
    /// k: how many may be under way at once.
    #[serde(default = "one")]
    pub at_most: usize,
    /// After how long a host counts as not coming back.
    #[serde(default = "quarter_of_an_hour")]
    pub give_up_after: Span,
    /// How long a host is expected to take, if it does not say so itself.
    pub expected: Option<Span>,
    /// In which order.
    #[serde(default)]
    pub order: Order,
    /// Into what they reboot.
    #[serde(default)]
    pub reboot: RebootOrder,
    /// The hosts.
    #[serde(default, rename = "host")]
    pub hosts: Vec<HostEntry>,
}

fn one() -> usize {
    1
}

fn quarter_of_an_hour() -> Span {
    Span::minutes(15)
}

/// In which order hosts go.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Order {
    /// As in the list.
    #[default]
    Listed,
    /// The least capacity first, so that a bad kernel costs little.
    SmallestFirst,
}

/// One host.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HostEntry {
    /// Its name.
    pub name: String,
    /// What it contributes, in any unit: VMs, requests per second.
    #[serde(default = "unit")]
    pub capacity: f64,
    /// How long from the order to reboot until all its VMs answer.
    pub expected: Option<Span>,
}

fn unit() -> f64 {
    1.0
}

/// Why an inventory cannot be meant.
#[derive(Debug, thiserror::Error, PartialEq)]
pub enum InventoryError {
    /// Nobody may go.
    #[error("at_most = 0 lets no host go: write 1 or more")]
    AtMostZero,
    /// Nothing to do.
    #[error("the inventory has no [[host]]")]
    NoHost,
    /// Too many.
    #[error("the inventory has more than {HOSTS_MAX} hosts: split it into groups")]
    TooMany,
    /// Too many for one roll.
    #[error(
        "the inventory has more than {ROLL_HOSTS_MAX} hosts, which is as many as one roll takes: split it into groups"
    )]
    TooManyToRoll,
    /// Nothing that could stand in a key.
    #[error(
        "'{0}' is no name of a host: write 1 to 64 letters, digits, dots, dashes or underscores, a letter or digit first"
    )]
    BadName(String),
    /// Nothing that is the same file whoever looks.
    #[error("'{0}' is no whole path: write it from the root, such as /boot/vmlinuz-7.3.0")]
    NoPath(String),
    /// Twice.
    #[error("host '{0}' is there twice")]
    Twice(String),
    /// Not a capacity.
    #[error("host '{0}' has capacity = {1}: write a number from 0 on")]
    BadCapacity(String, f64),
    /// Not said.
    #[error(
        "host '{0}' does not say how long it takes: give it expected = \"60s\", or the whole group"
    )]
    NoExpectation(String),
    /// Would be given up although all is well.
    #[error(
        "host '{host}' is expected to take {expected}, and counts as lost after {give_up}: make give_up_after longer"
    )]
    GivenUpTooEarly {
        /// Which.
        host: String,
        /// How long.
        expected: Span,
        /// How long at most.
        give_up: Span,
    },
}

/// One host of a roll to come.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Step {
    /// Which.
    pub host: String,
    /// When it is told to reboot, in seconds from the roll's beginning.
    pub from_s: u64,
    /// When all its VMs answer.
    pub to_s: u64,
}

/// Capacity from an instant on.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Capacity {
    /// From when, in seconds from the roll's beginning.
    pub from_s: u64,
    /// How much serves.
    pub capacity: f64,
}

/// A roll to come, if every host takes as long as expected.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Forecast {
    /// Name of the group.
    pub group: String,
    /// k.
    pub at_most: usize,
    /// Hosts in the order in which they go.
    pub steps: Vec<Step>,
    /// Capacity at each moment.
    pub capacity: Vec<Capacity>,
    /// All hosts together.
    pub capacity_whole: f64,
    /// The least at any moment.
    pub capacity_least: f64,
    /// How long the roll takes, in seconds.
    pub duration_s: u64,
}

impl Inventory {
    /// How long each host takes, in order of the list; or why it cannot be
    /// rolled.
    fn expectations(&self) -> Result<Vec<u64>, InventoryError> {
        if self.at_most == 0 {
            return Err(InventoryError::AtMostZero);
        }
        if self.hosts.is_empty() {
            return Err(InventoryError::NoHost);
        }
        if self.hosts.len() > HOSTS_MAX {
            return Err(InventoryError::TooMany);
        }
        let mut names = BTreeSet::new();
        let one = |host: &HostEntry| {
            let name = || host.name.clone();
            if !(host.capacity >= 0.0 && host.capacity.is_finite()) {
                return Err(InventoryError::BadCapacity(name(), host.capacity));
            }
            let expected = host.expected.or(self.expected);
            let expected = expected.ok_or_else(|| InventoryError::NoExpectation(name()))?;
            if expected >= self.give_up_after {
                return Err(InventoryError::GivenUpTooEarly {
                    host: name(),
                    expected,
                    give_up: self.give_up_after,
                });
            }
            Ok(expected.as_s())
        };
        for host in &self.hosts {
            if !names.insert(&host.name) {
                return Err(InventoryError::Twice(host.name.clone()));
            }
        }
        self.hosts.iter().map(one).collect()
    }

    /// Indices of the hosts, as they go.
    fn turns(&self) -> Vec<usize> {
        let mut order: Vec<usize> = (0..self.hosts.len()).collect();
        if self.order == Order::SmallestFirst {
            let capacity = |i: &usize| self.hosts[*i].capacity;
            order.sort_by(|a, b| capacity(a).total_cmp(&capacity(b)));
        }
        order
    }

    /// The roll itself, as `by` orders it at `now_s`.
    ///
    /// # Errors
    /// When it cannot be meant.
    pub fn rollout(&self, id: &str, by: &str, now_s: u64) -> Result<Rollout, InventoryError> {
        let expected = self.expectations()?;
        if self.hosts.len() > ROLL_HOSTS_MAX {
            return Err(InventoryError::TooManyToRoll);
        }
        let (reboot, paths) = (&self.reboot, [&self.reboot.kernel, &self.reboot.initrd]);
        for path in paths.into_iter().chain([&reboot.only_if]).flatten() {
            if !path.starts_with('/') || path.contains('\0') {
                return Err(InventoryError::NoPath(path.clone()));
            }
        }
        let place = |i: usize| {
            let entry = &self.hosts[i];
            let host: Result<FleetName, _> = entry.name.parse();
            Ok(Place {
                host: host.map_err(|_| InventoryError::BadName(entry.name.clone()))?,
                capacity: entry.capacity,
                expected_s: expected[i],
            })
        };
        Ok(Rollout {
            version: ROLL_VERSION,
            id: id.to_owned(),
            by: by.to_owned(),
            began_s: now_s,
            at_most: u32::try_from(self.at_most).unwrap_or(u32::MAX),
            give_up_s: self.give_up_after.as_s(),
            reboot: reboot.clone(),
            hosts: self
                .turns()
                .into_iter()
                .map(place)
                .collect::<Result<_, _>>()?,
            state: RollState::Running,
        })
    }

    /// Runs a roll in which everything goes well.
    pub fn forecast(&self) -> Result<Forecast, InventoryError> {
        let expected = self.expectations()?;
        let order = self.turns();
        let mut steps = Vec::new();
        let mut roll = Roll::new(order.len(), self.at_most, self.give_up_after);
        let mut lock = Places::new(self.at_most);
        // Ends of those under way, in order of time and then of turn.
        let mut ends = BTreeSet::new();
        let mut queue = VecDeque::from([Event::Tick]);
        let mut now_s = 0;
        loop {
            while let Some(event) = queue.pop_front() {
                let (next, effects) = roll.step(event, now_s);
                roll = next;
                for effect in effects {
                    match effect {
                        Effect::AskLock(turn) => {
                            let name = &self.hosts[order[turn]].name;
                            queue.push_back(match lock.acquire(name) {
                                Grant::Held => Event::Granted(turn),
                                Grant::Full => Event::Denied(turn),
                            });
                        }
                        Effect::Reboot(turn) => {
                            let to_s = now_s + expected[order[turn]];
                            ends.insert((to_s, turn));
                            steps.push(Step {
                                host: self.hosts[order[turn]].name.clone(),
                                from_s: now_s,
                                to_s,
                            });
                        }
                        Effect::Release(turn) => {
                            let name = &self.hosts[order[turn]].name;
                            lock.release(name);
                        }
                    }
                }
            }
            let Some((at_s, turn)) = ends.pop_first() else {
                break;
            };
            now_s = at_s;
            queue.extend([Event::OtherBoot(turn), Event::AllAnswer(turn)]);
        }
        Ok(self.put_together(steps, now_s))
    }

    fn put_together(&self, mut steps: Vec<Step>, duration_s: u64) -> Forecast {
        steps.sort_by_key(|step| step.from_s);
        let of: BTreeMap<&str, f64> = self
            .hosts
            .iter()
            .map(|host| (host.name.as_str(), host.capacity))
            .collect();
        let whole: f64 = of.values().sum();
        // Hosts that leave and come at each moment, and what they are worth.
        let mut changes: BTreeMap<u64, (i64, f64)> = BTreeMap::from([(0, (0, 0.0))]);
        for step in &steps {
            let worth = of.get(step.host.as_str()).copied().unwrap_or(0.0);
            for (at_s, sign) in [(step.from_s, 1), (step.to_s, -1)] {
                let change = changes.entry(at_s).or_default();
                *change = (change.0 + sign, change.1 + sign as f64 * worth);
            }
        }
        let mut away = (0, 0.0);
        let mut capacity = Vec::new();
        for (from_s, (count, worth)) in changes {
            away = (away.0 + count, away.1 + worth);
            // Rounding must not leave a rest where nobody is away.
            let there = if away.0 == 0 { whole } else { whole - away.1 };
            capacity.push(Capacity {
                from_s,
                capacity: there.max(0.0),
            });
        }
        let least = capacity.iter().map(|c| c.capacity).fold(whole, f64::min);
        Forecast {
            group: self.group.clone(),
            at_most: self.at_most,
            steps,
            capacity,
            capacity_whole: whole,
            capacity_least: least,
            duration_s,
        }
    }
}
