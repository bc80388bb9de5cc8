//! A client of the FleetLock protocol (zincati's): two requests, `pre-reboot`
//! and `steady-state`, to a server that counts.
//!
//! A FleetLock slot is for good from the beginning, and the server keeps
//! nothing of it but the host's name. What the new kernel has to know is
//! written down in a file of the host ([`Note`]).

use std::path::PathBuf;
use std::time::Duration;

use hebe_policy::fleet::slots::{FleetName, Full, Slot};
use serde_json::json;

use crate::config::FleetLockConfig;
use crate::http::{Client, shown};
use crate::note::Note;
use crate::slots::{FleetError, Taken};

/// A host's slot at a FleetLock server.
#[derive(Clone, Debug)]
pub struct FleetLock {
    client: Client,
    url: String,
    group: FleetName,
    host: FleetName,
    note: Note,
}

impl FleetLock {
    /// For `host` of `group`, at the server that `config` names.
    ///
    /// # Errors
    /// When a file that it names cannot be used.
    pub fn new(
        config: &FleetLockConfig,
        group: &FleetName,
        host: &FleetName,
        timeout: Duration,
        note: PathBuf,
    ) -> Result<Self, FleetError> {
        Ok(Self {
            client: Client::new(timeout, &config.tls())?,
            url: config.url.trim_end_matches('/').to_owned(),
            group: group.clone(),
            host: host.clone(),
            note: Note::at(note),
        })
    }

    /// `Ok(None)` for yes, else what the server says.
    fn post(&self, path: &str, host: &FleetName) -> Result<Option<String>, FleetError> {
        let url = format!("{}/v1/{path}", self.url);
        let body = json!({"client_params": {"id": host, "group": self.group}});
        let headers = [("fleet-lock-protocol", "true")];
        let answer = self.client.post(&url, &headers, &body);
        let answer = answer.map_err(|silent| FleetError::Silent(silent.to_string()))?;
        if (200..300).contains(&answer.status) {
            return Ok(None);
        }
        let word = |key: &str| answer.body[key].as_str().map(shown);
        match (word("kind"), word("value")) {
            (Some(kind), Some(value)) => Ok(Some(format!("{value} ({kind})"))),
            (Some(kind), None) => Ok(Some(kind)),
            _ => Err(FleetError::Silent(format!(
                "{url} answers with status {}, which is not how a FleetLock server does",
                answer.status
            ))),
        }
    }

    /// See [`crate::Slots::take`].
    ///
    /// # Errors
    /// When nothing is known.
    pub fn take(&self, slot: &Slot) -> Result<Taken, FleetError> {
        match self.note.read()? {
            // A copy of another machine's disk.
            Some(own) if own.machine != slot.machine => {
                return Ok(Taken::Not(Full::SameName(slot.host.to_string())));
            }
            Some(own) if own.boot_id != slot.boot_id => return Ok(Taken::Not(Full::Unreleased)),
            // The server is asked all the same: somebody may have freed it.
            Some(own) => {
                return Ok(match self.post("pre-reboot", &slot.host)? {
                    None => Taken::Mine(own),
                    Some(why) => Taken::Denied(why),
                });
            }
            None => {}
        }
        Ok(match self.post("pre-reboot", &slot.host)? {
            None => Taken::Leased,
            Some(why) => Taken::Denied(why),
        })
    }

    /// See [`crate::Slots::pin`].
    ///
    /// # Errors
    /// When it cannot be written down.
    pub fn pin(&self, slot: &Slot) -> Result<bool, FleetError> {
        self.note.write(slot).map(|()| true)
    }

    /// This host's slot, as it is written down here.
    ///
    /// # Errors
    /// When the record cannot be read.
    pub fn own(&self) -> Result<Option<Slot>, FleetError> {
        self.note.read()
    }

    /// See [`crate::Slots::release`].
    ///
    /// # Errors
    /// When nothing is known.
    pub fn release(&self, slot: &Slot) -> Result<(), FleetError> {
        // What another order wrote down is that one's: the server knows one
        // slot for a host, and cannot tell.
        if self.note.read()?.is_some_and(|own| own.claim != slot.claim) {
            return Ok(());
        }
        self.steady(&self.host)?;
        self.note.remove()
    }

    /// See [`crate::Slots::unlock`].
    ///
    /// # Errors
    /// When nothing is known.
    pub fn unlock(&self, host: &FleetName) -> Result<(), FleetError> {
        self.steady(host)?;
        if *host == self.host {
            self.note.remove()?;
        }
        Ok(())
    }

    fn steady(&self, host: &FleetName) -> Result<(), FleetError> {
        match self.post("steady-state", host)? {
            None => Ok(()),
            Some(why) => Err(FleetError::Silent(format!(
                "{} did not take the slot back: {why}",
                self.url
            ))),
        }
    }
}
