//! This host's slot: taken before a reboot, given back after it.

use std::collections::BTreeSet;

use hebe_api::VmStatus;
use hebe_fleet::order::{self, NotRebooted, Order, wall_s};
use hebe_fleet::{FleetConfig, Member, Slots};
use hebe_host::listing::{Survey, VmState, with_cause};
use hebe_host::lock::VmLock;
use hebe_host::{Host, HostError, definitions, listing};
use hebe_policy::fleet::holder::{Stop, Times};
use hebe_policy::fleet::slots::{FleetName, Found, Full, Phase, Slot, Take, may_take};
use hebe_policy::span::Span;
use hebe_types::VmId;
use serde::Serialize;

use crate::output::{Exit, Failure, Outcome, Output, table};

/// Shortest time that the new kernel waits for its VMs, unless it is told.
const WAIT_MIN_S: u64 = 60;

/// This host in its group.
pub struct Fleet(pub Member);

impl std::ops::Deref for Fleet {
    type Target = Member;

    fn deref(&self) -> &Member {
        &self.0
    }
}

impl Fleet {
    /// As `fleet.toml` says; `None` where there is none.
    fn find(host: &Host) -> Result<Option<Self>, Failure> {
        let path = host.layout.config.join("fleet.toml");
        if !path.exists() {
            return Ok(None);
        }
        let config: FleetConfig =
            definitions::read_toml(&path).map_err(|e| Failure(with_cause(&e)))?;
        let boot_id = VmId(host.system.boot_id()).to_string();
        let member = Member::new(config, boot_id, &host.layout.state);
        let member = member.map_err(|e| Failure(format!("{}: {e}", path.display())))?;
        Ok(Some(Self(member)))
    }

    /// [`Fleet::find`], where it has to be there.
    pub fn here(host: &Host) -> Result<Self, Failure> {
        Self::find(host)?.ok_or_else(|| {
            let path = host.layout.config.join("fleet.toml");
            Failure(format!(
                "this host belongs to no group: there is no {}; `hebe fleet status --help` shows one",
                path.display()
            ))
        })
    }

    /// For `hebe reboot`: `None` where no slot is to be taken.
    pub fn for_reboot(host: &Host, fleet: bool, no_fleet: bool) -> Result<Option<Self>, Failure> {
        if fleet {
            return Self::here(host).map(Some);
        }
        if no_fleet {
            return Ok(None);
        }
        Ok(Self::find(host)?.filter(|found| found.config.always))
    }

    fn times(&self, patience: Option<Span>) -> Times {
        self.config.times(patience.unwrap_or(self.config.patience))
    }

    fn new_slot(&self) -> Result<Slot, Failure> {
        self.0
            .new_slot()
            .map_err(|e| Failure(format!("no random number is to be had: {}", with_cause(&e))))
    }

    /// Waits for a slot.
    pub fn take<'a>(
        &'a self,
        patience: Option<Span>,
        say: order::Say<'a>,
    ) -> Result<Result<Order<'a>, Stop>, Failure> {
        let slot = self.new_slot()?;
        Ok(Order::take(&self.slots, slot, self.times(patience), say))
    }

    /// Makes the slot this host's for good.
    pub fn pin(&self, order: &mut Order<'_>, survey: &Survey) -> Result<(), Stop> {
        order.pin(answering(survey), self.config.give_up_after.as_s())
    }

    /// See [`order::in_turn`].
    pub fn in_turn(
        &self,
        patience: Option<Span>,
        say: order::Say<'_>,
        check: impl FnOnce() -> Result<BTreeSet<String>, String>,
        reboot: impl FnOnce() -> NotRebooted,
    ) -> Result<Stop, Failure> {
        let (slot, times) = (self.new_slot()?, self.times(patience));
        let give_up_s = self.config.give_up_after.as_s();
        let slots = &self.slots;
        Ok(order::in_turn(
            slots, slot, times, give_up_s, say, check, reboot,
        ))
    }

    /// Whether there would be a slot now; if not, a sentence.
    pub fn would_have(&self) -> Result<(), String> {
        let all = match self.slots.all() {
            Err(hebe_fleet::FleetError::NotTold) => return Ok(()),
            all => all.map_err(|e| e.to_string())?,
        };
        let (host, at_most) = (&self.host, self.config.at_most);
        match may_take(&all, host, &self.machine, &self.boot_id, at_most, wall_s()) {
            Take::Free | Take::Mine(_) => Ok(()),
            Take::Not(full) => Err(full.to_string()),
        }
    }
}

/// The VMs that are up: whose VMM did not fail, and whose guest did not panic.
pub fn answering(survey: &Survey) -> BTreeSet<String> {
    let up = |state| matches!(state, VmState::Running | VmState::Paused);
    let sound = |status: &VmStatus| status.failed.is_none() && !status.guest_panicked;
    let rows = survey
        .rows
        .values()
        .filter(|row| up(row.state) && row.status.as_ref().is_some_and(sound));
    rows.map(|row| row.name.to_string()).collect()
}

/// Whether all these VMs are up; if not, a sentence.
fn all_answer(host: &Host, vms: &BTreeSet<String>) -> Result<(), String> {
    if vms.is_empty() {
        return Ok(());
    }
    all_up(&listing::survey(host), vms)
}

fn all_up(survey: &Survey, vms: &BTreeSet<String>) -> Result<(), String> {
    let up = answering(survey);
    let state = |name: &str| {
        let mut rows = survey.rows.values();
        let row = rows.find(|row| row.name.as_str() == name);
        row.map_or("not there".to_owned(), |row| match &row.detail {
            Some(detail) => format!("{} ({detail})", row.state.as_str()),
            None => row.state.as_str().to_owned(),
        })
    };
    let missing: Vec<String> = vms
        .difference(&up)
        .map(|name| format!("VM '{name}' is {}", state(name)))
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    Err(missing.join(", "))
}

/// The lock under which one command at a time changes this host's slot.
pub fn only_one(host: &Host) -> Result<VmLock, Failure> {
    let dir = host.layout.run.join("fleet");
    let taken = VmLock::take(&dir).map_err(HostError::file("lock", &dir))?;
    taken.ok_or_else(|| {
        Failure(
            "another command is at work on this host's slot: wait until it is done, or stop it"
                .into(),
        )
    })
}

#[derive(Serialize)]
struct Answer<'a> {
    result: &'a str,
    group: &'a FleetName,
    host: &'a FleetName,
    #[serde(skip_serializing_if = "Option::is_none")]
    why: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    slot: Option<&'a Slot>,
}

impl Fleet {
    fn answer<'a>(&'a self, result: &'a str) -> Answer<'a> {
        Answer {
            result,
            group: &self.config.group,
            host: &self.host,
            why: None,
            slot: None,
        }
    }

    /// A holder that went no further.
    fn stopped(&self, stop: &Stop, out: &Output) -> Exit {
        let (result, exit) = match stop {
            Stop::NotAllAnswer(_) | Stop::Stranded(_) => ("kept", Exit::Attention),
            Stop::Unreleased(_) => ("unknown", Exit::Attention),
            _ => ("refused", Exit::CheckFailed),
        };
        let answer = Answer {
            why: Some(stop.to_string()),
            ..self.answer(result)
        };
        out.answer(&answer, String::new);
        out.progress(&stop.to_string());
        exit
    }
}

/// `hebe fleet lock`.
pub fn lock(host: &Host, wait: Option<Span>, out: &Output) -> Outcome {
    let fleet = Fleet::here(host)?;
    let _only_one = only_one(host)?;
    let say = |text: &str| out.progress(text);
    let mut order = match fleet.take(wait, &say)? {
        Ok(order) => order,
        Err(stop) => return Ok(fleet.stopped(&stop, out)),
    };
    let pinned = order
        .while_held(|| listing::survey(host))
        .and_then(|survey| fleet.pin(&mut order, &survey));
    if let Err(stop) = pinned {
        return Ok(fleet.stopped(&stop, out));
    }
    let answer = Answer {
        slot: Some(order.slot()),
        ..fleet.answer("locked")
    };
    out.answer(&answer, || {
        format!(
            "'{}' has a slot of '{}' until `hebe fleet release`; it is to be back in {}\n",
            fleet.host, fleet.config.group, fleet.config.give_up_after
        )
    });
    Ok(Exit::Done)
}

/// `hebe fleet release`.
pub fn release(host: &Host, wait: Option<Span>, out: &Output) -> Outcome {
    let fleet = Fleet::here(host)?;
    let _only_one = only_one(host)?;
    let say = |text: &str| out.progress(text);
    let times = fleet.times(None);
    let found = order::own(&fleet.slots, &fleet.host, times, &say)
        .map_err(|e| Failure(format!("the slot is not released: {e}")))?;
    let released = match found {
        Some(Found::Unreadable { host, why }) => {
            return Err(Failure(format!(
                "the slot cannot be read ({why}): `hebe fleet unlock {host} --yes` frees it"
            )));
        }
        Some(Found::Slot(slot)) if slot.machine != fleet.machine => {
            let why = Full::SameName(fleet.host.to_string());
            return Err(Failure(format!("the slot is not released: {why}")));
        }
        Some(Found::Slot(slot)) if slot.phase == Phase::Held => {
            return Err(Failure(
                "an order that ended just now still holds this host's slot, which goes by itself when its lease is over: ask again then".into(),
            ));
        }
        Some(Found::Slot(slot)) if slot.boot_id == fleet.boot_id => {
            // Nothing may be about to reboot.
            let _no_reboot = host.lock_all()?;
            order::give_up(&fleet.slots, slot, times, &say)
        }
        Some(Found::Slot(slot)) => {
            let rest_s = slot.deadline_s.saturating_sub(wall_s()).max(WAIT_MIN_S);
            let wait_s = wait.map_or(rest_s, Span::as_s);
            let mut look = |vms: &BTreeSet<String>| all_answer(host, vms);
            order::release_after_boot(&fleet.slots, slot, times, wait_s, &mut look, &say)
        }
        // Such a server may know of a slot that nobody wrote down here.
        None if matches!(fleet.slots, Slots::FleetLock(_)) => {
            order::give_up(&fleet.slots, fleet.new_slot()?, times, &say)
        }
        None => {
            super::rolls::settle(&fleet, &say);
            out.answer(&fleet.answer("none"), || {
                format!("'{}' has no slot to release\n", fleet.host)
            });
            return Ok(Exit::Done);
        }
    };
    match released {
        Err(stop) => Ok(fleet.stopped(&stop, out)),
        Ok(()) => {
            super::rolls::settle(&fleet, &say);
            out.answer(&fleet.answer("released"), || {
                format!(
                    "'{}' gave its slot of '{}' back\n",
                    fleet.host, fleet.config.group
                )
            });
            Ok(Exit::Done)
        }
    }
}

/// `hebe fleet unlock`.
pub fn unlock(host: &Host, name: &FleetName, yes: bool, out: &Output) -> Outcome {
    let fleet = Fleet::here(host)?;
    if !yes {
        return Err(Failure(format!(
            "host '{name}' may be between two kernels, with its VMs frozen: if you know how it is and want the others to go on, say `hebe fleet unlock {name} --yes`"
        )));
    }
    let failed = |e: hebe_fleet::FleetError| Failure(format!("nothing was freed: {e}"));
    let had = fleet.slots.unlock(name).map_err(failed)?;
    let answer = Answer {
        host: name,
        ..fleet.answer(if had == Some(false) { "none" } else { "freed" })
    };
    out.answer(&answer, || match had {
        Some(false) => format!("'{name}' has no slot\n"),
        _ => format!("the slot of '{name}' is free\n"),
    });
    Ok(Exit::Done)
}

#[derive(Serialize)]
struct Status<'a> {
    group: &'a FleetName,
    host: &'a FleetName,
    at_most: u32,
    slots: Vec<Row<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    stopped: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    note: Option<String>,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Row<'a> {
    Slot {
        #[serde(flatten)]
        slot: &'a Slot,
        overdue: bool,
    },
    Unreadable {
        host: &'a str,
        unreadable: &'a str,
    },
}

/// `hebe fleet status`.
pub fn status(host: &Host, out: &Output) -> Outcome {
    let fleet = Fleet::here(host)?;
    let failed = |e: hebe_fleet::FleetError| Failure(e.to_string());
    let (found, note) = match fleet.slots.all() {
        Err(untold @ hebe_fleet::FleetError::NotTold) => {
            let own = fleet.slots.own(&fleet.host).map_err(failed)?;
            (own.into_iter().collect(), Some(untold.to_string()))
        }
        all => (all.map_err(failed)?, None),
    };
    let now_s = wall_s();
    let late = found.iter().find_map(|f| match f {
        Found::Slot(slot) if slot.is_overdue(now_s) => Some(slot),
        _ => None,
    });
    let status = Status {
        group: &fleet.config.group,
        host: &fleet.host,
        at_most: fleet.config.at_most,
        slots: found.iter().map(|f| row(f, now_s)).collect(),
        stopped: late.map(|slot| {
            format!(
                "host '{0}' did not come back, and no host of the group begins: look after it, then let it release its slot, or say `hebe fleet unlock {0} --yes`",
                slot.host
            )
        }),
        note,
    };
    out.answer(&status, || status_text(&status, &found, now_s));
    Ok(if status.stopped.is_some() {
        Exit::CheckFailed
    } else {
        Exit::Done
    })
}

fn row(found: &Found, now_s: u64) -> Row<'_> {
    match found {
        Found::Slot(slot) => Row::Slot {
            overdue: slot.is_overdue(now_s),
            slot,
        },
        Found::Unreadable { host, why } => Row::Unreadable {
            host,
            unreadable: why,
        },
    }
}

fn status_text(status: &Status<'_>, found: &[Found], now_s: u64) -> String {
    let ago = |at_s: u64| format!("{} ago", Span::seconds(now_s.saturating_sub(at_s)));
    let rows: Vec<Vec<String>> = found
        .iter()
        .map(|f| match f {
            Found::Slot(slot) => vec![
                slot.host.to_string(),
                slot.phase.as_str().to_owned(),
                ago(slot.since_s),
                if slot.phase == Phase::Held {
                    String::new()
                } else if slot.is_overdue(now_s) {
                    format!("NOT BACK, due {}", ago(slot.deadline_s))
                } else {
                    let left_s = slot.deadline_s.saturating_sub(now_s);
                    format!("due in {}", Span::seconds(left_s))
                },
            ],
            Found::Unreadable { host, why } => vec![
                host.clone(),
                "unreadable".to_owned(),
                String::new(),
                why.clone(),
            ],
        })
        .collect();
    let mut text = format!(
        "group {}: {} under way, at most {} at once; this is '{}'\n",
        status.group,
        found.len(),
        status.at_most,
        status.host
    );
    if let Some(note) = &status.note {
        text = format!(
            "group {}; this is '{}'; {note}\n",
            status.group, status.host
        );
    }
    if !rows.is_empty() {
        text.push('\n');
        text.push_str(&table(&["HOST", "SLOT", "TAKEN", ""], &rows));
    }
    if let Some(stopped) = &status.stopped {
        text.push_str(&format!("\n{stopped}\n"));
    }
    text
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use hebe_api::{RamMeter, VmmState};
    use hebe_flow::life::Life;
    use hebe_host::listing::VmRow;

    use super::*;

    fn survey(failed: Option<&str>, guest_panicked: bool) -> Survey {
        let name: hebe_types::VmName = "web".parse().expect("name");
        let row = VmRow {
            name: name.clone(),
            state: VmState::Paused,
            detail: Some("not well".into()),
            memory: None,
            store: None,
            segment: None,
            pid: None,
            id: None,
            life: Life::Paused,
            status: Some(VmStatus {
                name: name.clone(),
                id: VmId([7; 16]),
                state: VmmState::Paused,
                pid: 1,
                version: String::new(),
                resumes: 1,
                failed: failed.map(str::to_owned),
                guest_panicked,
                stopped_devices: Vec::new(),
                ram_meter: RamMeter::default(),
                disk_request_ns: None,
                disk_rings: Vec::new(),
                first_tx: None,
                resume: None,
                cage: None,
                balloon: None,
            }),
        };
        Survey {
            store: None,
            store_trouble: None,
            rows: BTreeMap::from([(name, row)]),
            definitions: BTreeMap::new(),
        }
    }

    #[test]
    fn a_failed_vm_and_a_panicked_guest_do_not_answer() {
        let vms = BTreeSet::from(["web".to_owned()]);
        assert_eq!(answering(&survey(None, false)), vms);
        assert_eq!(all_up(&survey(None, false), &vms), Ok(()));
        for survey in [survey(Some("KVM gave up"), false), survey(None, true)] {
            assert_eq!(answering(&survey), BTreeSet::new());
            let why = all_up(&survey, &vms).expect_err("it does not answer");
            assert_eq!(why, "VM 'web' is paused (not well)");
        }
    }
}
