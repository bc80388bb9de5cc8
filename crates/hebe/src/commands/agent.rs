//! `agent`: speaks with the agent in a guest, which is not trusted: it may say
//! anything, or nothing, and its words are made plain before they are shown.

mod exec;
mod wait;

use std::time::Duration;

use hebe_agent::{Done, Facts, Order};
use hebe_host::agent::{Answer, look as ask, order as tell, socket_path};
use hebe_host::{Host, listing};
use hebe_types::{VmName, counted};

use crate::cli::{AgentArgs, AgentOrder};
use crate::output::{Exit, Outcome, Output};

/// For a look in passing.
const LOOK_MAX: Duration = Duration::from_millis(500);

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
    let survey = listing::survey(host);
    let done = tell(host, survey.row(host, name)?, order)?;
    let text = shown(&done);
    out.answer(&Answer { name, done }, || format!("{name}: {text}"));
    Ok(Exit::Done)
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
    ask(&socket_path(&host.layout, name), LOOK_MAX).ok()
}

/// [`look`]'s line for people.
pub fn look_text(facts: Option<&Facts>) -> String {
    facts.map_or_else(|| "none answers".into(), facts_text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_is_told_with_its_direction() {
        let text = shown(&Done::WasAhead { ns: -1_500_000 });
        assert_eq!(text, "clock set; it was 1.5 ms behind");
        assert!(shown(&Done::WasAhead { ns: 2 }).ends_with("ahead"));
        assert_eq!(look_text(None), "none answers");
    }
}
