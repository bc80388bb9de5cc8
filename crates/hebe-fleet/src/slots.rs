//! One interface over both kinds of servers.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use hebe_policy::fleet::slots::{FleetName, Found, Full, Slot};

use crate::config::FleetConfig;
use crate::etcd::Etcd;
use crate::etcd_slots::EtcdSlots;
use crate::fleetlock::FleetLock;
use crate::rolls::Going;

/// Why nothing is known, or nothing could be done.
#[derive(Debug, thiserror::Error)]
pub enum FleetError {
    /// No answer. What was asked may have been done.
    #[error("nobody keeps the slots of this group just now: {0}")]
    Silent(String),
    /// What was asked about is not there.
    #[error("the lease is over")]
    NotThere,
    /// The slots changed while this was decided; nothing was done.
    #[error("the group's slots changed meanwhile")]
    Changed,
    /// etcd knows this host, and lets it do nothing; or does not know it.
    #[error(
        "etcd does not let this host in: {0}; see user and password_file in fleet.toml, and the user's roles in etcd"
    )]
    NotAllowed(String),
    /// A file that shows who this host or the server is.
    #[error("{path}, which fleet.toml names, cannot be used: {why}")]
    Credentials {
        /// Where it is.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// An answer that makes no sense.
    #[error("the lock server answers with {0}: is it one?")]
    Odd(String),
    /// The FleetLock protocol has no such question.
    #[error("a FleetLock server does not tell who holds slots: ask it in its own way")]
    NotTold,
    /// Nobody ordered a roll.
    #[error("there is no roll: `hebe fleet roll FILE` begins one")]
    NoRoll,
    /// It is not this host's turn in the roll.
    #[error("it is not this host's turn: {0}")]
    NoTurn(String),
    /// The FleetLock protocol has no place for a roll.
    #[error(
        "a FleetLock server keeps slots and no rolls: order `hebe reboot --fleet` on each host, one after the other, and it sees to it that at most as many as may are under way"
    )]
    NoRolls,
    /// Something of a roll that this Hebe does not read.
    #[error("what etcd has under {key} cannot be read: {why}")]
    Unreadable {
        /// Where.
        key: String,
        /// What is wrong.
        why: String,
    },
    /// This host's record of its slot.
    #[error("the record of this host's slot, {path}, cannot be used: {source}")]
    Note {
        /// Where it is.
        path: PathBuf,
        /// What is wrong.
        source: io::Error,
    },
}

/// What came of asking for a slot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Taken {
    /// This order has one.
    Leased,
    /// This host has one for good already.
    Mine(Slot),
    /// There is none now.
    Not(Full),
    /// There is none now, in the server's words.
    Denied(String),
}

/// Whoever keeps the slots of a group.
///
/// What holds for both: a slot belongs to a host and an order, not to a
/// connection; asking again changes nothing that was done; an error means that
/// nothing is known, unless it says more.
#[derive(Clone, Debug)]
pub enum Slots {
    /// etcd.
    Etcd(EtcdSlots),
    /// A FleetLock server.
    FleetLock(FleetLock),
}

impl Slots {
    /// Whoever `config` names, which was checked; `note` is where this host
    /// writes down what a FleetLock server does not.
    ///
    /// # Errors
    /// When a file that it names cannot be used.
    pub fn open(config: &FleetConfig, host: &FleetName, note: PathBuf) -> Result<Self, FleetError> {
        let timeout = Duration::from_secs(config.request_timeout.as_s());
        if let Some(server) = &config.fleetlock {
            let slots = FleetLock::new(server, &config.group, host, timeout, note)?;
            return Ok(Self::FleetLock(slots));
        }
        let etcd = Etcd::new(&config.etcd.clone().unwrap_or_default(), timeout)?;
        let slots = EtcdSlots::new(etcd, &config.group, config.lease);
        Ok(Self::Etcd(slots))
    }

    /// The same slots, for a turn in a roll; as they are where there are none.
    #[must_use]
    pub fn going(&self, going: Going) -> Self {
        match self {
            Self::Etcd(slots) => Self::Etcd(slots.going(going)),
            Self::FleetLock(_) => self.clone(),
        }
    }

    /// Asks for `slot`, in phase held.
    ///
    /// # Errors
    /// When nothing is known.
    pub fn take(&self, slot: &Slot, now_s: u64) -> Result<Taken, FleetError> {
        match self {
            Self::Etcd(slots) => slots.take(slot, now_s),
            Self::FleetLock(slots) => slots.take(slot),
        }
    }

    /// Renews the lease of an order's slot; false if it has none any more.
    ///
    /// # Errors
    /// When nothing is known.
    pub fn renew(&self, slot: &Slot) -> Result<bool, FleetError> {
        match self {
            Self::Etcd(slots) => slots.renew(slot),
            Self::FleetLock(_) => Ok(true),
        }
    }

    /// Writes `slot` down for good, in place of what the same order wrote
    /// before; false if that is gone.
    ///
    /// # Errors
    /// When nothing is known.
    pub fn pin(&self, slot: &Slot) -> Result<bool, FleetError> {
        match self {
            Self::Etcd(slots) => slots.pin(slot),
            Self::FleetLock(slots) => slots.pin(slot),
        }
    }

    /// The slot of a host, if it has one.
    ///
    /// # Errors
    /// When nothing is known.
    pub fn own(&self, host: &FleetName) -> Result<Option<Found>, FleetError> {
        match self {
            Self::Etcd(slots) => slots.own(host),
            Self::FleetLock(slots) => Ok(slots.own()?.map(Found::Slot)),
        }
    }

    /// Gives the slot of an order back; nothing if it has none.
    ///
    /// # Errors
    /// When nothing is known.
    pub fn release(&self, slot: &Slot) -> Result<(), FleetError> {
        match self {
            Self::Etcd(slots) => slots.release(slot),
            Self::FleetLock(slots) => slots.release(slot),
        }
    }

    /// All slots of the group.
    ///
    /// # Errors
    /// When nothing is known, or a server does not tell.
    pub fn all(&self) -> Result<Vec<Found>, FleetError> {
        match self {
            Self::Etcd(slots) => slots.all(),
            Self::FleetLock(_) => Err(FleetError::NotTold),
        }
    }

    /// Frees the slot of a host that cannot do so itself; whether it had one,
    /// if the server tells.
    ///
    /// # Errors
    /// When nothing is known.
    pub fn unlock(&self, host: &FleetName) -> Result<Option<bool>, FleetError> {
        match self {
            Self::Etcd(slots) => slots.unlock(host).map(Some),
            Self::FleetLock(slots) => slots.unlock(host).map(|()| None),
        }
    }
}
