//! Which VMs a supervisor starts, and when.
//!
//! ```text
//!            due at the host's start, those before it settled
//!   Due ───────────────────────────────────────────────┐
//!    │ seen up, or something of it is there            ▼   refused
//!    ▼               ended, policy says so          Starting ────▶ Waiting
//!   Rest ──────────────────────────▶ Waiting ──────────▶ │            │
//!    ▲ ▲                               │  time is up     │ started    │
//!    │ └── seen up, or ordered down ───┘                 │            │
//!    ├───────────────────────────────────────────────────┘            │
//!    └── GivenUp ◀── as often in a row as it may ─────────────────────┘
//! ```
//!
//! The machine holds no truth. What a VM is, is looked at each time; of the
//! past it needs which VMs are still due since the host's start, which are to be
//! tried again though nothing of them is there, and how often in a row each was
//! started again. That is [`Memory`], a value that whoever runs the machine
//! keeps where it ends with the host's kernel, and before the next start.
//!
//! A VM with a state that can be continued (frozen, saved, lost) is never
//! started: that would give the state up.

use std::collections::{BTreeMap, BTreeSet};

use hebe_types::{RestartPolicy, VmConfig, VmName, counted};
use serde::{Deserialize, Serialize};

/// Restarts in a row where the definition names no limit.
pub const RESTART_LIMIT: u32 = 5;
/// The wait before the first restart, in milliseconds; it doubles each time.
pub const BACKOFF_MIN_MS: u64 = 1_000;
/// The longest wait, in milliseconds.
pub const BACKOFF_MAX_MS: u64 = 60_000;
/// A VM that was up for so long failed for the first time when it fails, in
/// milliseconds.
pub const SETTLED_MS: u64 = 600_000;

/// What a VM's definition says of its supervision.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rule {
    /// Start it with the host.
    pub autostart: bool,
    /// What happens when it ends.
    pub restart: RestartPolicy,
    /// How often in a row.
    pub limit: u32,
    /// Start it after these.
    pub after: Vec<VmName>,
}

impl From<&VmConfig> for Rule {
    fn from(config: &VmConfig) -> Self {
        Self {
            autostart: config.autostart,
            restart: config.restart,
            limit: config.restart_limit.unwrap_or(RESTART_LIMIT),
            after: config.after.clone(),
        }
    }
}

/// How a VM was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Seen {
    /// A VMM has it; what it does with it is somebody's order.
    Up,
    /// Nothing of it is there: it never ran, or it was ordered down.
    Absent,
    /// Its guest powered itself off.
    OffByItself,
    /// Its VMM or its guest failed.
    Failed,
    /// There is a state that can be continued, or something that nobody can
    /// read: a person's affair.
    Kept,
}

/// One VM at one look.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Look {
    /// Its rule.
    pub rule: Rule,
    /// How it was found.
    pub seen: Seen,
}

/// What outlives the supervisor, though not the host's kernel.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Memory {
    /// VMs that are still to be started since the host's start.
    pub due: BTreeSet<VmName>,
    /// VMs whose start is under way or failed, and is tried again.
    #[serde(default)]
    pub retry: BTreeSet<VmName>,
    /// Starts in a row since each VM was settled.
    pub restarts: BTreeMap<VmName, u32>,
}

/// Where one VM stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Stand {
    /// Nothing is to be done.
    #[default]
    Rest,
    /// Up since this instant.
    Up { since_ms: u64 },
    /// To be started at this instant.
    Waiting { until_ms: u64 },
    /// Its start was ordered, and there is no answer yet.
    Starting,
    /// As often in a row as it may.
    GivenUp,
}

/// What the supervisor's owner is to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Start this VM, and say what came of it with [`Supervisor::answered`].
    Start(VmName),
    /// Something that a person may want to know.
    Say {
        /// Which VM.
        vm: VmName,
        /// A sentence.
        text: String,
        /// Somebody should look.
        trouble: bool,
    },
    /// The memory changed: keep it.
    Keep,
}

/// What came of a start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// It runs.
    Started,
    /// Somebody else was at work on it or on the whole host: nothing is to be
    /// said of it, and nothing counted.
    Busy,
    /// It does not run.
    Failed {
        /// Why.
        why: String,
    },
}

/// The machine; one owner steps it.
#[derive(Clone, Debug, Default)]
pub struct Supervisor {
    memory: Memory,
    stands: BTreeMap<VmName, Stand>,
    /// Cycles that were told of.
    told: BTreeSet<VmName>,
}

impl Supervisor {
    /// At the host's start: everything with `autostart` is due.
    pub fn at_host_start(looks: &BTreeMap<VmName, Look>) -> Self {
        let due = looks.iter().filter(|(_, look)| look.rule.autostart);
        Self::with(Memory {
            due: due.map(|(name, _)| name.clone()).collect(),
            ..Memory::default()
        })
    }

    /// With what an earlier supervisor of this boot left.
    pub fn with(memory: Memory) -> Self {
        Self {
            memory,
            ..Self::default()
        }
    }

    /// What is to be kept.
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// VMs that wait for their next start, and until when, in milliseconds.
    pub fn waiting(&self) -> impl Iterator<Item = (&VmName, u64)> {
        self.stands.iter().filter_map(|(name, stand)| match stand {
            Stand::Waiting { until_ms } => Some((name, *until_ms)),
            _ => None,
        })
    }

    /// VMs that are not started again, because they were too often.
    pub fn given_up(&self) -> impl Iterator<Item = &VmName> {
        let given_up = |(_, stand): &(&VmName, &Stand)| **stand == Stand::GivenUp;
        self.stands.iter().filter(given_up).map(|(name, _)| name)
    }

    /// A person started or stopped this VM: what was counted is over, and
    /// nothing is due any more.
    pub fn ordered(&mut self, name: &VmName) -> Vec<Effect> {
        let before = self.memory.clone();
        self.forget(name);
        self.stands.remove(name);
        self.kept(&before, Vec::new())
    }

    fn forget(&mut self, name: &VmName) {
        self.memory.due.remove(name);
        self.memory.retry.remove(name);
        self.memory.restarts.remove(name);
    }

    /// What changed is kept before anything is done.
    fn kept(&self, before: &Memory, mut effects: Vec<Effect>) -> Vec<Effect> {
        if self.memory != *before {
            effects.insert(0, Effect::Keep);
        }
        effects
    }

    /// Everything as it is at `now_ms`, on a clock that never goes back.
    pub fn look(&mut self, now_ms: u64, looks: &BTreeMap<VmName, Look>) -> Vec<Effect> {
        let mut effects = Vec::new();
        let before = self.memory.clone();
        self.stands.retain(|name, _| looks.contains_key(name));
        self.memory.due.retain(|name| looks.contains_key(name));
        self.memory.retry.retain(|name| looks.contains_key(name));
        self.memory
            .restarts
            .retain(|name, _| looks.contains_key(name));
        for (name, look) in looks {
            let stand = self.stands.get(name).copied().unwrap_or_default();
            let next = self.one(now_ms, name, look, stand, &mut effects);
            self.stands.insert(name.clone(), next);
        }
        self.start_due(looks, &mut effects);
        self.kept(&before, effects)
    }

    fn one(
        &mut self,
        now_ms: u64,
        name: &VmName,
        look: &Look,
        stand: Stand,
        effects: &mut Vec<Effect>,
    ) -> Stand {
        let again = match look.seen {
            Seen::Failed => look.rule.restart != RestartPolicy::Never,
            Seen::OffByItself => look.rule.restart == RestartPolicy::Always,
            Seen::Absent => self.memory.retry.contains(name),
            Seen::Up | Seen::Kept => false,
        };
        match (look.seen, stand) {
            // Its answer comes.
            (_, Stand::Starting) => Stand::Starting,
            (Seen::Up, Stand::Up { since_ms }) => {
                if now_ms.saturating_sub(since_ms) >= SETTLED_MS {
                    self.memory.restarts.remove(name);
                }
                stand
            }
            (Seen::Up, _) => {
                self.memory.due.remove(name);
                self.memory.retry.remove(name);
                Stand::Up { since_ms: now_ms }
            }
            (Seen::Kept, _) => {
                self.forget(name);
                Stand::Rest
            }
            // It is started anyway, in its turn.
            _ if self.memory.due.contains(name) => Stand::Rest,
            _ if !again => {
                self.forget(name);
                Stand::Rest
            }
            (_, Stand::Waiting { until_ms }) if until_ms <= now_ms => {
                self.memory.retry.insert(name.clone());
                effects.push(Effect::Start(name.clone()));
                Stand::Starting
            }
            (_, Stand::Waiting { .. } | Stand::GivenUp) => stand,
            (_, Stand::Rest | Stand::Up { .. }) => {
                let what = match look.seen {
                    Seen::OffByItself => "powered itself off",
                    Seen::Absent => "did not start",
                    _ => "failed",
                };
                self.again(now_ms, name, &look.rule, what, effects)
            }
        }
    }

    /// Puts a VM up for another start, or gives up.
    fn again(
        &mut self,
        now_ms: u64,
        name: &VmName,
        rule: &Rule,
        what: &str,
        effects: &mut Vec<Effect>,
    ) -> Stand {
        let count = self.memory.restarts.entry(name.clone()).or_default();
        let limit = rule.limit;
        if *count >= limit {
            effects.push(Effect::Say {
                vm: name.clone(),
                text: format!(
                    "it {what}, and was started {} in a row: it stays down until `hebe start {name}`",
                    counted(limit, "time")
                ),
                trouble: true,
            });
            return Stand::GivenUp;
        }
        let wait_ms = backoff_ms(*count);
        *count += 1;
        effects.push(Effect::Say {
            vm: name.clone(),
            text: format!(
                "it {what}: start {count} of {limit} in a row follows in {} s",
                wait_ms / 1000,
            ),
            trouble: false,
        });
        Stand::Waiting {
            until_ms: now_ms.saturating_add(wait_ms),
        }
    }

    /// Starts everything that is due and waits for nobody any more.
    fn start_due(&mut self, looks: &BTreeMap<VmName, Look>, effects: &mut Vec<Effect>) {
        let rest = |stands: &BTreeMap<VmName, Stand>, name: &VmName| {
            matches!(stands.get(name), None | Some(Stand::Rest))
        };
        let ready: Vec<VmName> = self
            .memory
            .due
            .iter()
            .filter(|name| rest(&self.stands, name))
            .filter(|name| {
                let after = &looks[*name].rule.after;
                !after.iter().any(|first| self.memory.due.contains(first))
            })
            .cloned()
            .collect();
        let start = |name: &VmName| Effect::Start(name.clone());
        effects.extend(ready.iter().map(start));
        for name in ready {
            self.stands.insert(name, Stand::Starting);
        }
        for name in self.in_cycles(looks) {
            if self.told.insert(name.clone()) {
                effects.push(Effect::Say {
                    text: format!(
                        "it is to start after itself, by way of others: it is started without that order; take a VM out of `after` in {name}.toml"
                    ),
                    vm: name.clone(),
                    trouble: true,
                });
            }
            if rest(&self.stands, &name) {
                effects.push(Effect::Start(name.clone()));
                self.stands.insert(name, Stand::Starting);
            }
        }
    }

    /// VMs that are due and wait, at the end of a chain, for themselves.
    fn in_cycles(&self, looks: &BTreeMap<VmName, Look>) -> Vec<VmName> {
        let reaches_itself = |start: &VmName| {
            let mut seen = BTreeSet::new();
            let mut open = vec![start];
            while let Some(name) = open.pop() {
                let after = looks.get(name).map(|look| &look.rule.after);
                for first in after.into_iter().flatten() {
                    if first == start {
                        return true;
                    }
                    if self.memory.due.contains(first) && seen.insert(first) {
                        open.push(first);
                    }
                }
            }
            false
        };
        let due = self.memory.due.iter();
        due.filter(|name| reaches_itself(name)).cloned().collect()
    }

    /// What came of an [`Effect::Start`].
    pub fn answered(
        &mut self,
        now_ms: u64,
        name: &VmName,
        rule: &Rule,
        answer: &Answer,
    ) -> Vec<Effect> {
        if self.stands.get(name) != Some(&Stand::Starting) {
            // Somebody ordered otherwise meanwhile.
            return Vec::new();
        }
        let mut effects = Vec::new();
        let before = self.memory.clone();
        let stand = match answer {
            Answer::Started => {
                self.memory.due.remove(name);
                self.memory.retry.remove(name);
                Stand::Up { since_ms: now_ms }
            }
            Answer::Busy if self.memory.due.contains(name) => Stand::Rest,
            Answer::Busy => Stand::Waiting {
                until_ms: now_ms.saturating_add(BACKOFF_MIN_MS),
            },
            Answer::Failed { why } => {
                self.memory.due.remove(name);
                effects.push(Effect::Say {
                    vm: name.clone(),
                    text: format!("it was not started: {why}"),
                    trouble: true,
                });
                if rule.restart == RestartPolicy::Never {
                    self.memory.retry.remove(name);
                    Stand::Rest
                } else {
                    self.memory.retry.insert(name.clone());
                    self.again(now_ms, name, rule, "did not start", &mut effects)
                }
            }
        };
        self.stands.insert(name.clone(), stand);
        self.kept(&before, effects)
    }
}

/// The wait before the start after `count` others in a row, in milliseconds.
fn backoff_ms(count: u32) -> u64 {
    let factor = 1u64.checked_shl(count).unwrap_or(u64::MAX);
    BACKOFF_MIN_MS.saturating_mul(factor).min(BACKOFF_MAX_MS)
}

#[cfg(test)]
#[path = "supervise_tests.rs"]
mod tests;
