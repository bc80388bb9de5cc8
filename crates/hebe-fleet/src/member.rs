//! This host as a member of its group.

use std::path::Path;

use hebe_policy::fleet::slots::{FleetName, Found, Slot};

use crate::config::{ConfigError, FleetConfig};
use crate::order::new_slot;
use crate::rolls::Rolls;
use crate::slots::{FleetError, Slots};

/// This host in its group.
#[derive(Clone, Debug)]
pub struct Member {
    /// `fleet.toml`, sound.
    pub config: FleetConfig,
    /// Its name in the group.
    pub host: FleetName,
    /// What tells it from another one of the same name; empty where it has no
    /// id.
    pub machine: String,
    /// The running boot.
    pub boot_id: String,
    /// Whoever keeps the slots.
    pub slots: Slots,
}

/// Why this host is no member.
#[derive(Debug, thiserror::Error)]
pub enum MemberError {
    /// `fleet.toml` cannot be meant.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// What it names cannot be used.
    #[error(transparent)]
    Fleet(#[from] FleetError),
}

impl Member {
    /// As `config` says, in boot `boot_id`; `state` is the directory whose
    /// content outlives the kernel.
    ///
    /// # Errors
    /// When `config` cannot be meant, or a file that it names cannot be used.
    pub fn new(config: FleetConfig, boot_id: String, state: &Path) -> Result<Self, MemberError> {
        config.check()?;
        let uname = rustix::system::uname();
        let host = config.host_name(&uname.nodename().to_string_lossy())?;
        let note = state.join("fleet").join("slot.json");
        let machine = std::fs::read_to_string("/etc/machine-id").unwrap_or_default();
        Ok(Self {
            slots: Slots::open(&config, &host, note)?,
            machine: machine.trim().to_owned(),
            host,
            boot_id,
            config,
        })
    }

    /// A slot as an order of this host asks for it.
    ///
    /// # Errors
    /// When the kernel gives no random numbers.
    pub fn new_slot(&self) -> Result<Slot, std::io::Error> {
        new_slot(&self.config, &self.host, &self.machine, &self.boot_id)
    }

    /// Rolls through the group.
    ///
    /// # Errors
    /// [`FleetError::NoRolls`] with a FleetLock server.
    pub fn rolls(&self) -> Result<Rolls, FleetError> {
        match &self.slots {
            Slots::Etcd(slots) => Ok(Rolls::new(slots, &self.config.group)),
            Slots::FleetLock(_) => Err(FleetError::NoRolls),
        }
    }

    /// Whether this host has a slot among these.
    pub fn has_slot(&self, slots: &[Found]) -> bool {
        slots.iter().any(|found| found.host() == self.host.as_str())
    }
}
