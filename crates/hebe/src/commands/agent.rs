//! `agent`: speaks with the agent in a guest, which is not trusted: it may say
//! anything, or nothing, and its words are made plain before they are shown.

mod exec;
mod wait;

use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use hebe_agent::{Client, ClientError, Done, Facts, Order};
use hebe_api::plain;
use hebe_host::{Host, listing};
use hebe_types::{VmName, counted};
use serde::Serialize;

use crate::cli::{AgentArgs, AgentOrder};
use crate::output::{Exit, Failure, Outcome, Output};

/// For an order; freezing writes everything to the guest's disks first.
const ORDER_MAX: Duration = Duration::from_secs(30);
/// For a look in passing.
const LOOK_MAX: Duration = Duration::from_millis(500);

#[derive(Serialize)]
struct Answer<'a> {
    name: &'a VmName,
    #[serde(flatten)]
    done: Done,
}

/// `hebe agent`.
pub fn agent(host: &Host, args: &AgentArgs, out: &Output) -> Outcome {
    let name = &args.name;
    if let AgentOrder::Wait { phase, timeout } = &args.order {
        return wait::wait(host, name, phase, *timeout, out);
    }
    let order = || match args.order {
        // `wait` asks by itself, for as long as it takes.
        AgentOrder::Wait { .. } => Order::Ping,
        AgentOrder::Ping => Order::Ping,
        AgentOrder::Time => Order::Time {
            realtime_ns: hebe_sys::clock::stamp_now().realtime_ns,
        },
        AgentOrder::Freeze { seconds } => Order::Freeze { for_s: seconds },
        AgentOrder::Thaw => Order::Thaw,
        AgentOrder::Shutdown { reboot } => Order::Shutdown { reboot },
        AgentOrder::Exec { timeout, ref words } => Order::Exec {
            words: words.clone(),
            for_s: timeout,
        },
    };
    if let AgentOrder::Exec { timeout, .. } = args.order {
        return Ok(exec::exec(host, name, (order(), timeout), out));
    }
    let mut client = reach(host, name)?;
    // Made last: what it takes to reach the agent is no part of the time it sets.
    let done = client.order(order());
    let done = made_plain(done.map_err(|e| failed(name, &e))?);
    let text = shown(&done);
    out.answer(&Answer { name, done }, || format!("{name}: {text}"));
    Ok(Exit::Done)
}

/// The agent of a VM that is up.
fn reach(host: &Host, name: &VmName) -> Result<Client<UnixStream>, Failure> {
    Client::connect(&socket(host, name)?, ORDER_MAX).map_err(|e| failed(name, &e))
}

/// The socket that leads to the agent of a VM that is up.
fn socket(host: &Host, name: &VmName) -> Result<PathBuf, Failure> {
    let survey = listing::survey(host);
    let row = survey.row(host, name)?;
    if !row.life.has_vmm() {
        let state = row.state.as_str();
        return Err(Failure(format!(
            "VM '{name}' is {state}: no agent answers while it does not run"
        )));
    }
    Ok(host.layout.vm_dir(name).join("vsock.sock"))
}

fn failed(name: &VmName, error: &ClientError) -> Failure {
    Failure(format!("'{name}': {}", told(error)))
}

/// An error and its cause, made plain.
fn told(error: &ClientError) -> String {
    let cause = std::error::Error::source(error).map(|cause| format!(" ({cause})"));
    plain(&format!("{error}{}", cause.unwrap_or_default()))
}

fn made_plain(done: Done) -> Done {
    match done {
        Done::Facts(facts) => Done::Facts(plain_facts(&facts)),
        // What a program writes is shown by `exec`, with its lines.
        other => other,
    }
}

fn plain_facts(facts: &Facts) -> Facts {
    Facts {
        agent: plain(&facts.agent),
        phase: plain(&facts.phase),
        boot_id: plain(&facts.boot_id),
        ..*facts
    }
}

fn shown(done: &Done) -> String {
    match done {
        Done::Ok => "done".into(),
        Done::Facts(facts) => facts_text(facts),
        Done::WasAhead { ns } => {
            let way = if *ns < 0 { "behind" } else { "ahead" };
            let ms = ns.unsigned_abs() as f64 / 1e6;
            format!("clock set; it was {ms:.1} ms {way}")
        }
        Done::FileSystems { count } => counted(*count, "file system"),
        Done::Ended { status, .. } => format!("ended with {status:?}"),
    }
}

fn facts_text(facts: &Facts) -> String {
    let frozen = if facts.frozen {
        ", file systems frozen"
    } else {
        ""
    };
    format!(
        "{}, up {} s{frozen} (agent {})",
        facts.phase, facts.uptime_s, facts.agent
    )
}

/// How the guest is by its agent's word, if one answers at once.
pub fn look(host: &Host, name: &VmName) -> Option<Facts> {
    let socket = host.layout.vm_dir(name).join("vsock.sock");
    let client = Client::connect(&socket, LOOK_MAX).ok()?;
    Some(plain_facts(client.hello()))
}

/// [`look`]'s line for people.
pub fn look_text(facts: Option<&Facts>) -> String {
    facts.map_or_else(|| "none answers".into(), facts_text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_guest_says_cannot_steer_a_terminal() {
        let hostile = Facts {
            phase: "\x1b[2Jready".into(),
            agent: "\u{202e}1".into(),
            boot_id: "b\n".into(),
            ..Facts::default()
        };
        let shown = shown(&made_plain(Done::Facts(hostile)));
        assert!(!shown.contains(['\x1b', '\u{202e}', '\n']), "{shown:?}");
        assert!(shown.contains("ready"));
        let refused = ClientError::Refused("\x07no".into());
        assert!(!told(&refused).contains('\x07'));
    }

    #[test]
    fn a_clock_is_told_with_its_direction() {
        let text = shown(&Done::WasAhead { ns: -1_500_000 });
        assert_eq!(text, "clock set; it was 1.5 ms behind");
        assert!(shown(&Done::WasAhead { ns: 2 }).ends_with("ahead"));
        assert_eq!(look_text(None), "none answers");
    }
}
