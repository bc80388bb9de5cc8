//! Slots in etcd.
//!
//! Each is one key, `/hebe/fleet/1/GROUP/HOST`, whose value is a
//! [`Slot`] as JSON. While the holder looks whether it can reboot, the key
//! hangs on a lease; before the reboot it is written again without one. Every
//! change is one transaction under a condition on what it was decided from:
//! taking a slot, that no slot of the group was written since all were read
//! (slots that went meanwhile do no harm); everything else, that the host's
//! own key is as it was read. So a request that arrives late, twice or after
//! its sender died changes nothing that it should not.

use hebe_policy::fleet::slots::{FleetName, Found, Phase, SLOT_VERSION, Slot, Take, may_take};
use hebe_policy::span::Span;
use serde_json::Value;

use crate::etcd::{Change, Condition, Entry, Etcd};
use crate::rolls::Going;
use crate::slots::{FleetError, Taken};

/// The slots of one group.
#[derive(Clone, Debug)]
pub struct EtcdSlots {
    etcd: Etcd,
    prefix: String,
    lease_s: u64,
    going: Option<Going>,
}

impl EtcdSlots {
    /// Those of `group`; a slot outlives a holder that died before its reboot
    /// by `lease`.
    pub fn new(etcd: Etcd, group: &FleetName, lease: Span) -> Self {
        Self {
            etcd,
            prefix: format!("/hebe/fleet/1/{group}/"),
            lease_s: lease.as_s(),
            going: None,
        }
    }

    pub(crate) fn etcd(&self) -> &Etcd {
        &self.etcd
    }

    /// The same slots, for a turn in a roll: a slot becomes a host's own for
    /// good only if it is its turn then.
    #[must_use]
    pub fn going(&self, going: Going) -> Self {
        Self {
            going: Some(going),
            ..self.clone()
        }
    }

    fn key(&self, host: &FleetName) -> String {
        format!("{}{host}", self.prefix)
    }

    fn found(&self, entry: &Entry) -> Found {
        let host = entry.key.strip_prefix(&self.prefix).unwrap_or(&entry.key);
        let odd = |why: String| Found::Unreadable {
            host: host.to_owned(),
            why,
        };
        let value: Value = match serde_json::from_slice(&entry.value) {
            Ok(value) => value,
            Err(_) => return odd("it is no JSON".into()),
        };
        if value["version"] != SLOT_VERSION {
            return odd(format!(
                "its version is {}, and this Hebe reads {SLOT_VERSION}",
                value["version"]
            ));
        }
        match serde_json::from_value::<Slot>(value) {
            Ok(slot) if slot.host.as_str() == host => Found::Slot(slot),
            Ok(slot) => odd(format!("it says that it is the slot of '{}'", slot.host)),
            Err(error) => odd(error.to_string()),
        }
    }

    /// The key of a host, with what it says.
    fn entry(&self, host: &FleetName) -> Result<Option<(Entry, Found)>, FleetError> {
        let key = self.key(host);
        let range = self.etcd.range(&self.prefix)?;
        let entry = range.entries.into_iter().find(|entry| entry.key == key);
        Ok(entry.map(|entry| {
            let found = self.found(&entry);
            (entry, found)
        }))
    }

    /// The key of an order's own slot.
    fn mine(&self, slot: &Slot) -> Result<Option<(Entry, Slot)>, FleetError> {
        Ok(match self.entry(&slot.host)? {
            Some((entry, Found::Slot(there))) if there.claim == slot.claim => Some((entry, there)),
            _ => None,
        })
    }

    /// See [`crate::Slots::take`].
    ///
    /// # Errors
    /// When nothing is known.
    pub fn take(&self, slot: &Slot, now_s: u64) -> Result<Taken, FleetError> {
        let range = self.etcd.range(&self.prefix)?;
        let found: Vec<Found> = range.entries.iter().map(|e| self.found(e)).collect();
        for (entry, there) in range.entries.iter().zip(&found) {
            // An earlier request of this order was carried out, unheard.
            if let Found::Slot(there) = there
                && there.claim == slot.claim
                && there.phase == Phase::Held
                && self.etcd.renew(entry.lease)?
            {
                return Ok(Taken::Leased);
            }
        }
        let (me, machine) = (&slot.host, &slot.machine);
        match may_take(&found, me, machine, &slot.boot_id, slot.at_most, now_s) {
            Take::Mine(mine) => return Ok(Taken::Mine(mine)),
            Take::Not(full) => return Ok(Taken::Not(full)),
            Take::Free => {}
        }
        let lease = self.etcd.lease(self.lease_s)?;
        let condition = Condition::QuietSince(self.prefix.clone(), range.revision);
        let put = Change::Put(self.key(&slot.host), json(slot), lease);
        if self.etcd.change(&[condition], &[put])? {
            return Ok(Taken::Leased);
        }
        // Left alone it would end by itself.
        let _ = self.etcd.revoke(lease);
        Err(FleetError::Changed)
    }

    /// See [`crate::Slots::renew`].
    ///
    /// # Errors
    /// When nothing is known.
    pub fn renew(&self, slot: &Slot) -> Result<bool, FleetError> {
        match self.mine(slot)? {
            Some((entry, _)) if entry.lease != 0 => self.etcd.renew(entry.lease),
            Some(_) => Ok(true),
            None => Ok(false),
        }
    }

    /// See [`crate::Slots::pin`].
    ///
    /// # Errors
    /// When nothing is known.
    pub fn pin(&self, slot: &Slot) -> Result<bool, FleetError> {
        let Some((entry, there)) = self.mine(slot)? else {
            return Ok(false);
        };
        // An earlier request was carried out, unheard.
        if there == *slot && entry.lease == 0 {
            let is_whole = |going: &Going| going.rolls.is_away(going, slot);
            if self.going.as_ref().map_or(Ok(true), is_whole)? {
                return Ok(true);
            }
        }
        let mut conditions = vec![Condition::WrittenAt(entry.key.clone(), entry.mod_revision)];
        let mut changes = vec![Change::Put(entry.key, json(slot), 0)];
        if let Some(going) = &self.going {
            let (more, mark) = going.rolls.claim(going, slot)?;
            conditions.extend(more);
            changes.push(mark);
        }
        if self.etcd.change(&conditions, &changes)? {
            return Ok(true);
        }
        Err(FleetError::Changed)
    }

    /// See [`crate::Slots::own`].
    ///
    /// # Errors
    /// When nothing is known.
    pub fn own(&self, host: &FleetName) -> Result<Option<Found>, FleetError> {
        Ok(self.entry(host)?.map(|(_, found)| found))
    }

    /// See [`crate::Slots::release`].
    ///
    /// # Errors
    /// When nothing is known.
    pub fn release(&self, slot: &Slot) -> Result<(), FleetError> {
        match self.mine(slot)? {
            Some((entry, _)) => self.delete(entry),
            None => Ok(()),
        }
    }

    /// See [`crate::Slots::all`].
    ///
    /// # Errors
    /// When nothing is known.
    pub fn all(&self) -> Result<Vec<Found>, FleetError> {
        let range = self.etcd.range(&self.prefix)?;
        Ok(range.entries.iter().map(|e| self.found(e)).collect())
    }

    /// See [`crate::Slots::unlock`].
    ///
    /// # Errors
    /// When nothing is known.
    pub fn unlock(&self, host: &FleetName) -> Result<bool, FleetError> {
        match self.entry(host)? {
            Some((entry, _)) => self.delete(entry).map(|()| true),
            None => Ok(false),
        }
    }

    fn delete(&self, entry: Entry) -> Result<(), FleetError> {
        let condition = Condition::WrittenAt(entry.key.clone(), entry.mod_revision);
        if !self
            .etcd
            .change(&[condition], &[Change::Delete(entry.key)])?
        {
            return Err(FleetError::Changed);
        }
        if entry.lease != 0 {
            let _ = self.etcd.revoke(entry.lease);
        }
        Ok(())
    }
}

fn json(slot: &Slot) -> Vec<u8> {
    // A slot holds nothing that JSON could not.
    serde_json::to_vec(slot).unwrap_or_default()
}
