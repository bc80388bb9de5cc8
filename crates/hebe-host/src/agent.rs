//! The agents in guests, as `hebe agent` and `hebed` speak with them.
//!
//! A guest is not trusted: its agent may say anything, or nothing. Everything
//! here ends in time, and its words are made plain before anybody gets to see
//! them.

use std::fmt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use hebe_agent::{Client, ClientError, Done, Facts, Order};
use hebe_api::plain;
use hebe_types::VmName;
use serde::Serialize;

use crate::host::{Host, Layout};
use crate::listing::{VmRow, VmState, with_cause};

/// How long an order may take; freezing writes everything to the guest's disks
/// first. A program has its own time besides.
pub const ORDER_MAX: Duration = Duration::from_secs(30);
/// Most characters of each of a guest's words that are kept; an agent's own are
/// shorter.
const FACT_LEN_MAX: usize = 128;

/// What an agent did.
#[derive(Debug, Serialize)]
pub struct Answer<'a> {
    /// The VM.
    pub name: &'a VmName,
    /// What came of the order.
    #[serde(flatten)]
    pub done: Done,
}

/// Why an agent did not do what it was told, as one sentence that is safe to show.
#[derive(Debug)]
pub enum AgentError {
    /// The VM is not up.
    NotUp {
        /// The VM.
        name: VmName,
        /// How it is.
        state: VmState,
    },
    /// It cannot be reached, makes no sense, or says no.
    Agent {
        /// The VM.
        name: VmName,
        /// Why.
        error: ClientError,
    },
    /// A program may have begun, and nobody knows what came of it.
    EndUnknown {
        /// The VM.
        name: VmName,
        /// How long the program may run, in seconds.
        for_s: u32,
    },
}

impl fmt::Display for AgentError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotUp { name, state } => {
                let state = state.as_str();
                write!(
                    f,
                    "VM '{name}' is {state}: no agent answers while it does not run"
                )
            }
            Self::Agent { name, error } => {
                write!(f, "'{name}': {}", plain(&with_cause(error)))
            }
            Self::EndUnknown { name, for_s } => write!(
                f,
                "'{name}': the word of the program's end did not come, as where the VM is suspended or boots meanwhile: it may have run, and may run on, for {for_s} s at most"
            ),
        }
    }
}

impl std::error::Error for AgentError {}

/// The socket of a VM, whether or not it has one.
pub fn socket_path(layout: &Layout, name: &VmName) -> PathBuf {
    layout.vm_dir(name).join("vsock.sock")
}

/// The socket that leads to the agent of a VM that is up.
///
/// # Errors
/// [`AgentError::NotUp`].
pub fn socket(host: &Host, row: &VmRow) -> Result<PathBuf, AgentError> {
    if !row.life.has_vmm() {
        return Err(AgentError::NotUp {
            name: row.name.clone(),
            state: row.state,
        });
    }
    Ok(socket_path(&host.layout, &row.name))
}

/// Orders something of the agent in a VM. `order` is made when the agent is
/// reached: what that takes is no part of a time to set.
///
/// Ends within [`ORDER_MAX`] twice, for reaching and for answering, and for a
/// program also its own time.
///
/// # Errors
/// See [`AgentError`].
pub fn order(host: &Host, row: &VmRow, order: impl FnOnce() -> Order) -> Result<Done, AgentError> {
    let name = &row.name;
    let failed = |error| AgentError::Agent {
        name: name.clone(),
        error,
    };
    let mut client: Client<UnixStream> =
        Client::connect(&socket(host, row)?, ORDER_MAX).map_err(failed)?;
    let order = order();
    let Order::Exec { for_s, .. } = order else {
        return Ok(made_plain(client.order(order).map_err(failed)?));
    };
    client.give(ORDER_MAX + Duration::from_secs(for_s.into()));
    client.order(order).map_err(|error| match error {
        // What was ordered may have begun.
        ClientError::NoAgent | ClientError::Line(_) => AgentError::EndUnknown {
            name: name.clone(),
            for_s,
        },
        error => failed(error),
    })
}

/// How a guest is by its agent's word, if one answers within `limit`, twice
/// that at most.
///
/// # Errors
/// See [`ClientError`]; its text is not made plain.
pub fn look(socket: &Path, limit: Duration) -> Result<Facts, ClientError> {
    Client::connect(socket, limit).map(|client| plain_facts(client.hello()))
}

/// Made safe to show, but for what a program wrote: whoever shows that makes
/// its lines plain.
fn made_plain(done: Done) -> Done {
    match done {
        Done::Facts(facts) => Done::Facts(plain_facts(&facts)),
        other => other,
    }
}

/// Made safe to show, and short.
pub fn plain_facts(facts: &Facts) -> Facts {
    let short = |text: &str| {
        let end = text.char_indices().nth(FACT_LEN_MAX);
        plain(end.map_or(text, |(end, _)| &text[..end]))
    };
    Facts {
        agent: short(&facts.agent),
        phase: short(&facts.phase),
        boot_id: short(&facts.boot_id),
        ..*facts
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_guest_says_cannot_steer_a_terminal() {
        let hostile = Facts {
            phase: "\x1b[2Jready".into(),
            agent: "\u{202e}1".into(),
            boot_id: "b\n".repeat(100_000),
            ..Facts::default()
        };
        let Done::Facts(facts) = made_plain(Done::Facts(hostile)) else {
            panic!("facts stay facts");
        };
        let shown = format!("{}{}{}", facts.phase, facts.agent, facts.boot_id);
        assert!(!shown.contains(['\x1b', '\u{202e}', '\n']), "{shown:?}");
        assert!(shown.contains("ready") && shown.chars().count() <= 3 * FACT_LEN_MAX);
        let error = AgentError::Agent {
            name: "web".parse().expect("name"),
            error: ClientError::Refused("\x07no".into()),
        };
        assert!(!error.to_string().contains('\x07'));
    }
}
