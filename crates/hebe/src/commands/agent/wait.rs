//! `agent wait`: until the guest says that it has come to a phase.
//!
//! Its agent tells of each phase by itself, and is connected to anew whenever the
//! connection breaks: the guest may boot, or be suspended meanwhile.

use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use hebe_agent::{Client, ClientError, Done, Facts, LineError, Order, Said};
use hebe_api::plain;
use hebe_host::agent::{AgentError, Answer, ORDER_MAX, plain_facts, socket};
use hebe_host::{Host, listing};
use hebe_types::VmName;

use super::facts_text;
use crate::bar::Bar;
use crate::output::{Exit, Failure, Outcome, Output};

/// Between two tries to reach an agent.
const TRY_EVERY: Duration = Duration::from_millis(500);
/// A phase that began while the agent was being asked to tell of it is heard by then.
const BEAT_EVERY_S: u32 = 2;

/// `hebe agent NAME wait`.
pub fn wait(host: &Host, name: &VmName, phase: &str, limit_s: u32, out: &Output) -> Outcome {
    let until = Instant::now() + Duration::from_secs(limit_s.into());
    let bar = Bar::busy(out, &format!("waiting until '{name}' is at '{phase}'"));
    let mut last = None;
    while Instant::now() < until {
        match come(&reached(host, name)?, phase, until, &mut last) {
            Ok(facts) => {
                drop(bar);
                let text = format!("{name}: {}", facts_text(&facts));
                let done = Done::Facts(facts);
                out.answer(&Answer { name, done }, || text);
                return Ok(Exit::Done);
            }
            Err(error) if may_pass(&error) => {
                let left = until.saturating_duration_since(Instant::now());
                thread::sleep(TRY_EVERY.min(left));
            }
            Err(error) => {
                let name = name.clone();
                return Err(AgentError::Agent { name, error }.into());
            }
        }
    }
    Err(Failure(match last {
        Some(last) => format!(
            "'{name}' is not at '{phase}' after {limit_s} s (--timeout): it was at '{last}' when it was last heard of"
        ),
        None => format!(
            "'{name}' is not at '{phase}': no agent answered in it for {limit_s} s (--timeout); `hebe logs {name} --console` shows how far its guest came"
        ),
    }))
}

/// The socket of the VM, looked for anew: it may be another life's by now.
fn reached(host: &Host, name: &VmName) -> Result<PathBuf, Failure> {
    let survey = listing::survey(host);
    Ok(socket(host, survey.row(host, name)?)?)
}

/// Nobody answers yet, or any more.
fn may_pass(error: &ClientError) -> bool {
    matches!(
        error,
        ClientError::NoAgent | ClientError::Line(LineError::Late | LineError::Io(_))
    )
}

/// How the guest is when it is at `phase`; what it said before is left in `last`.
fn come(
    socket: &Path,
    phase: &str,
    until: Instant,
    last: &mut Option<String>,
) -> Result<Facts, ClientError> {
    let left = || until.saturating_duration_since(Instant::now());
    let mut client = Client::connect(socket, left().min(ORDER_MAX))?;
    client.give(left());
    let mut facts = client.hello().clone();
    if facts.phase != phase {
        client.order(Order::Watch {
            every_s: BEAT_EVERY_S,
        })?;
    }
    loop {
        *last = Some(plain(&facts.phase));
        if facts.phase == phase {
            return Ok(plain_facts(&facts));
        }
        facts = match client.hear()? {
            Said::Beat(facts) => facts,
            _ => {
                let why = "it tells of something else than its guest".to_owned();
                return Err(ClientError::Senseless(why));
            }
        };
    }
}
