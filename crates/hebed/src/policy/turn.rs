//! This host's turn in a roll through its group.

use hebe_fleet::rolls::Rolls;
use hebe_fleet::{FleetConfig, FleetError, Member};
use hebe_host::Host;
use hebe_host::definitions::read_toml;
use hebe_host::listing::with_cause;
use hebe_host::lock::VmLock;
use hebe_policy::fleet::turns::{MarkState, Turn};
use hebe_types::VmId;

/// A turn that has come.
pub struct Mine {
    member: Member,
    rolls: Rolls,
    id: String,
}

/// Asks whether it is this host's turn, and writes down how the last one ended
/// if that is not known yet. `None` where there is no group, or no roll, or it
/// is not its turn.
///
/// # Errors
/// One sentence, when nothing is known.
pub fn ask(host: &Host) -> Result<Option<Mine>, String> {
    let path = host.layout.config.join("fleet.toml");
    if !path.exists() {
        return Ok(None);
    }
    let config: FleetConfig = read_toml(&path).map_err(|e| with_cause(&e))?;
    let boot_id = VmId(host.system.boot_id()).to_string();
    let member = Member::new(config, boot_id, &host.layout.state);
    let member = member.map_err(|e| format!("{}: {e}", path.display()))?;
    let rolls = match member.rolls() {
        Err(FleetError::NoRolls) => return Ok(None),
        rolls => rolls.map_err(|e| e.to_string())?,
    };
    let busy = VmLock::is_held(&host.layout.run.join("fleet"));
    let read = rolls.settle(&member, busy).map_err(|e| e.to_string())?;
    let Some(read) = read else {
        return Ok(None);
    };
    match read.turn(&member.host) {
        Turn::Go => Ok(Some(Mine {
            id: read.view.rollout.id.clone(),
            member,
            rolls,
        })),
        Turn::Stop(why) => {
            let stopped = rolls.stop(&read, &member, &why);
            stopped.map(|()| None).map_err(|e| e.to_string())
        }
        Turn::NotYet(_) | Turn::Away | Turn::Never(_) => Ok(None),
    }
}

impl Mine {
    /// Writes down why the turn is not taken yet.
    pub fn waits(&self, why: String) -> Result<(), String> {
        let waiting = MarkState::Waiting { why };
        let marked = self.rolls.mark(&self.member, &self.id, &waiting);
        marked.map_err(|e| e.to_string())
    }
}
