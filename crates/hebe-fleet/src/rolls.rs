//! Rolls in etcd.
//!
//! A group has one roll at a time, the key `/hebe/roll/1/GROUP/roll`, and for
//! each host a mark, `/hebe/roll/1/GROUP/host/HOST`; both are JSON. What they
//! mean is [`hebe_policy::fleet::turns`]. As with slots, every change is one
//! transaction under a condition on what it was decided from. A host goes in
//! the transaction that makes its slot its own for good, and that fails if the
//! roll or its mark was written since: so who was told that the roll is paused
//! knows that nobody begins any more.

use std::collections::BTreeMap;

use hebe_policy::fleet::slots::{FleetName, Found, Slot};
use hebe_policy::fleet::turns::{
    Granted, Mark, MarkState, ROLL_VERSION, RollState, Rollout, Turn, View, Wish, grant, settled,
};
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::etcd::{Change, Condition, Entry, Etcd, Range};
use crate::etcd_slots::EtcdSlots;
use crate::member::Member;
use crate::order::wall_s;
use crate::slots::FleetError;

/// How often a change is tried that others keep crossing.
const CROSSED_MAX: usize = 20;

/// Rolls of one group.
#[derive(Clone, Debug)]
pub struct Rolls {
    etcd: Etcd,
    prefix: String,
    slots: EtcdSlots,
}

/// A roll as it was read, and the group's slots.
#[derive(Clone, Debug)]
pub struct Read {
    /// The roll and its marks.
    pub view: View,
    /// The group's slots, read after it.
    pub slots: Vec<Found>,
    /// Revision of the roll.
    revision: i64,
    /// Revisions of all marks, those of other rolls too.
    marks: BTreeMap<String, i64>,
}

impl Read {
    /// Whether it is the turn of `me`.
    pub fn turn(&self, me: &FleetName) -> Turn {
        self.view.turn(&self.slots, me, wall_s())
    }

    fn mark_revision(&self, host: &FleetName) -> i64 {
        self.marks.get(host.as_str()).copied().unwrap_or(0)
    }
}

/// Why a wish of a person's came to nothing.
#[derive(Debug, thiserror::Error)]
pub enum WishError {
    /// It makes no sense where the roll is.
    #[error(transparent)]
    Denied(#[from] hebe_policy::fleet::turns::Denied),
    /// Nothing is known.
    #[error(transparent)]
    Fleet(#[from] FleetError),
}

fn parse<T: DeserializeOwned>(entry: &Entry) -> Result<T, FleetError> {
    let odd = |why: String| FleetError::Unreadable {
        key: entry.key.clone(),
        why,
    };
    let value: Value = serde_json::from_slice(&entry.value).map_err(|_| odd("no JSON".into()))?;
    if value["version"] != ROLL_VERSION {
        return Err(odd(format!(
            "its version is {}, and this Hebe reads {ROLL_VERSION}",
            value["version"]
        )));
    }
    serde_json::from_value(value).map_err(|e| odd(e.to_string()))
}

/// What cannot be read may say that its host is under way: it holds a place
/// until the host writes anew, or a person passes it over.
fn unreadable(host: &str, rollout: &Rollout, why: &FleetError) -> Result<Mark, FleetError> {
    let host = host
        .parse()
        .map_err(|_| FleetError::Odd(format!("a mark of '{host}'")))?;
    Ok(Mark {
        version: ROLL_VERSION,
        roll: rollout.id.clone(),
        host,
        machine: String::new(),
        boot_id: String::new(),
        at_s: 0,
        state: MarkState::Waiting {
            why: why.to_string(),
        },
    })
}

impl Rolls {
    /// Those of the group whose slots these are.
    pub fn new(slots: &EtcdSlots, group: &FleetName) -> Self {
        Self {
            etcd: slots.etcd().clone(),
            prefix: format!("/hebe/roll/1/{group}/"),
            slots: slots.clone(),
        }
    }

    fn roll_key(&self) -> String {
        format!("{}roll", self.prefix)
    }

    fn mark_key(&self, host: &FleetName) -> String {
        format!("{}host/{host}", self.prefix)
    }

    /// The group's roll, if there was one; over or not.
    ///
    /// # Errors
    /// When nothing is known, or what is there cannot be read.
    pub fn read(&self) -> Result<Option<Read>, FleetError> {
        let range = self.etcd.range(&self.prefix)?;
        let slots = self.slots.all()?;
        self.view(&range, slots)
    }

    fn view(&self, range: &Range, slots: Vec<Found>) -> Result<Option<Read>, FleetError> {
        let key = self.roll_key();
        let Some(entry) = range.entries.iter().find(|entry| entry.key == key) else {
            return Ok(None);
        };
        let rollout: Rollout = parse(entry)?;
        let (mut marks, mut revisions) = (BTreeMap::new(), BTreeMap::new());
        let hosts = format!("{}host/", self.prefix);
        for entry in &range.entries {
            let Some(host) = entry.key.strip_prefix(&hosts) else {
                continue;
            };
            revisions.insert(host.to_owned(), entry.mod_revision);
            let mark = parse(entry).or_else(|e| unreadable(host, &rollout, &e));
            if let Some(mark) = mark
                .ok()
                .filter(|m| m.roll == rollout.id && m.host.as_str() == host)
            {
                marks.insert(host.to_owned(), mark);
            }
        }
        Ok(Some(Read {
            view: View { rollout, marks },
            slots,
            revision: entry.mod_revision,
            marks: revisions,
        }))
    }

    /// Writes a new roll down; what is there instead if one is not over yet.
    ///
    /// # Errors
    /// When nobody answers; it may have been written.
    pub fn begin(&self, rollout: &Rollout) -> Result<Option<Read>, FleetError> {
        for _ in 0..CROSSED_MAX {
            let read = self.read()?;
            let revision = match &read {
                // Ours: an earlier request was carried out, unheard.
                Some(there) if there.view.rollout.id == rollout.id => return Ok(None),
                Some(there) if !there.view.is_over() => return Ok(read),
                Some(there) => there.revision,
                None => 0,
            };
            let as_read = Condition::WrittenAt(self.roll_key(), revision);
            let put = Change::Put(self.roll_key(), json(rollout), 0);
            if self.etcd.change(&[as_read], &[put])? {
                return Ok(None);
            }
        }
        Err(FleetError::Changed)
    }

    /// Grants a person's wish. When this comes back, nobody begins who decided
    /// from what was there before.
    ///
    /// # Errors
    /// When it is denied, or nobody answers.
    pub fn wish(&self, member: &Member, wish: &Wish, by: &str) -> Result<Rollout, WishError> {
        for _ in 0..CROSSED_MAX {
            let read = self.read()?.ok_or(FleetError::NoRoll)?;
            let granted = grant(&read.view, &read.slots, wish.clone(), by, wall_s())?;
            if self.write(&read, member, &granted)? {
                return Ok(granted.rollout);
            }
        }
        Err(FleetError::Changed.into())
    }

    fn write(&self, read: &Read, member: &Member, granted: &Granted) -> Result<bool, FleetError> {
        let mut conditions = vec![Condition::WrittenAt(self.roll_key(), read.revision)];
        let mut changes = vec![Change::Put(self.roll_key(), json(&granted.rollout), 0)];
        if let Some((host, state)) = &granted.mark {
            let key = self.mark_key(host);
            conditions.push(Condition::WrittenAt(key.clone(), read.mark_revision(host)));
            changes.push(match state {
                Some(state) => {
                    let mut mark = new_mark(member, &granted.rollout.id, state.clone());
                    mark.host = host.clone();
                    Change::Put(key, json(&mark), 0)
                }
                None => Change::Delete(key),
            });
        }
        self.etcd.change(&conditions, &changes)
    }

    /// Writes down that the roll stops, because of what `member` found in
    /// `read`; nothing if it was written since.
    ///
    /// # Errors
    /// When nobody answers.
    pub fn stop(&self, read: &Read, member: &Member, why: &str) -> Result<(), FleetError> {
        let mut rollout = read.view.rollout.clone();
        rollout.state = RollState::Stopped {
            by: member.host.to_string(),
            why: why.to_owned(),
        };
        let as_read = Condition::WrittenAt(self.roll_key(), read.revision);
        let put = Change::Put(self.roll_key(), json(&rollout), 0);
        self.etcd.change(&[as_read], &[put]).map(drop)
    }

    /// Writes down how far this host is in roll `id`, unless a person passed
    /// it over meanwhile, or its turn is over and this says that it waits.
    ///
    /// # Errors
    /// When nobody answers.
    pub fn mark(&self, member: &Member, id: &str, state: &MarkState) -> Result<(), FleetError> {
        for _ in 0..CROSSED_MAX {
            let Some(read) = self.read()?.filter(|read| read.view.rollout.id == id) else {
                return Ok(());
            };
            let waits = matches!(state, MarkState::Waiting { .. });
            match read.view.state(&member.host) {
                Some(there) if there == state => return Ok(()),
                Some(MarkState::Skipped { .. }) => return Ok(()),
                Some(MarkState::Away) if waits => return Ok(()),
                Some(there) if waits && there.is_through() => return Ok(()),
                _ => {}
            }
            if self.put_mark(&read, member, state)? {
                return Ok(());
            }
        }
        Err(FleetError::Changed)
    }

    fn put_mark(
        &self,
        read: &Read,
        member: &Member,
        state: &MarkState,
    ) -> Result<bool, FleetError> {
        let (key, revision) = (
            self.mark_key(&member.host),
            read.mark_revision(&member.host),
        );
        let mark = new_mark(member, &read.view.rollout.id, state.clone());
        let as_read = Condition::WrittenAt(key.clone(), revision);
        self.etcd
            .change(&[as_read], &[Change::Put(key, json(&mark), 0)])
    }

    /// Writes down how this host's turn ended, where that can be told by now;
    /// `busy` says whether an order of this boot is at work on its slot. Gives
    /// back what is there then.
    ///
    /// # Errors
    /// When nobody answers.
    pub fn settle(&self, member: &Member, busy: bool) -> Result<Option<Read>, FleetError> {
        for _ in 0..CROSSED_MAX {
            let Some(read) = self.read()? else {
                return Ok(None);
            };
            let has_slot = member.has_slot(&read.slots);
            let mark = read.view.marks.get(member.host.as_str());
            let end = mark
                .and_then(|mark| settled(mark, &member.machine, &member.boot_id, has_slot, busy));
            let Some(state) = end else {
                return Ok(Some(read));
            };
            // The next one shows what it came to.
            self.put_mark(&read, member, &state)?;
        }
        Err(FleetError::Changed)
    }

    /// Whether `slot` was taken for good in roll `id`, its host being away.
    pub(crate) fn is_away(&self, going: &Going, slot: &Slot) -> Result<bool, FleetError> {
        let read = self.read()?;
        let view = read
            .map(|read| read.view)
            .filter(|view| view.rollout.id == going.id);
        let state = view.as_ref().and_then(|view| view.state(&slot.host));
        Ok(state == Some(&MarkState::Away))
    }

    /// What has to hold, and what is written beside the slot, when this host
    /// goes in roll `id`; why it must not.
    pub(crate) fn claim(
        &self,
        going: &Going,
        slot: &Slot,
    ) -> Result<(Vec<Condition>, Change), FleetError> {
        let read = self.read()?.ok_or(FleetError::NoRoll)?;
        if read.view.rollout.id != going.id {
            return Err(FleetError::NoTurn("another roll was begun".into()));
        }
        match read.turn(&slot.host) {
            Turn::Go => {}
            Turn::NotYet(why) | Turn::Never(why) | Turn::Stop(why) => {
                return Err(FleetError::NoTurn(why));
            }
            Turn::Away => return Err(FleetError::NoTurn("this host is away already".into())),
        }
        let key = self.mark_key(&slot.host);
        let mark = Mark {
            version: ROLL_VERSION,
            roll: going.id.clone(),
            host: slot.host.clone(),
            machine: slot.machine.clone(),
            boot_id: slot.boot_id.clone(),
            at_s: wall_s(),
            state: MarkState::Away,
        };
        let conditions = vec![
            Condition::WrittenAt(self.roll_key(), read.revision),
            Condition::WrittenAt(key.clone(), read.mark_revision(&slot.host)),
        ];
        Ok((conditions, Change::Put(key, json(&mark), 0)))
    }
}

/// A slot that is taken for a turn in a roll.
#[derive(Clone, Debug)]
pub struct Going {
    /// Which roll.
    pub(crate) id: String,
    pub(crate) rolls: Box<Rolls>,
}

impl Going {
    /// In roll `id`.
    pub fn new(rolls: &Rolls, id: &str) -> Self {
        Self {
            id: id.to_owned(),
            rolls: Box::new(rolls.clone()),
        }
    }
}

fn new_mark(member: &Member, id: &str, state: MarkState) -> Mark {
    Mark {
        version: ROLL_VERSION,
        roll: id.to_owned(),
        host: member.host.clone(),
        machine: member.machine.clone(),
        boot_id: member.boot_id.clone(),
        at_s: wall_s(),
        state,
    }
}

fn json(value: &impl serde::Serialize) -> Vec<u8> {
    // Numbers are finite, and all else is text.
    serde_json::to_vec(value).unwrap_or_default()
}
