//! `host`: its commands, and `host check`.

use hebe_host::Host;
use hebe_host::check::host_check;
use hebe_host::launch;
use hebe_host::luo::{asking, keeper};
use hebe_host::preflight::{Check, Level};
use hebe_host::stopping;
use hebe_sys::fdstore;
use serde::Serialize;

use super::reboot::checks_table;
use crate::cli::{HostCommand, KeeperArgs};
use crate::output::{Exit, Failure, Outcome, Output};

#[derive(Serialize)]
struct Answer<'a> {
    ready: bool,
    checks: &'a [Check],
}

/// `hebe host`.
pub fn host(host: &Host, command: &HostCommand, out: &Output) -> Outcome {
    match command {
        HostCommand::Check => check(host, out),
        HostCommand::Starting => starting(host),
        HostCommand::Setup(args) => super::setup::setup(host, args, out),
        HostCommand::Stopping { rest } => stopping(host, *rest, out),
        HostCommand::Sample => super::age::sample(host, out),
        HostCommand::Age(args) => super::age::age(host, args, out),
    }
}

fn check(host: &Host, out: &Output) -> Outcome {
    let checks = host_check(host);
    let ready = checks.iter().all(|c| c.level != Level::Fail);
    let answer = Answer {
        ready,
        checks: &checks,
    };
    out.answer(&answer, || {
        let mut text = checks_table(&checks);
        let remedies = checks
            .iter()
            .filter_map(|c| Some((c, c.remedy.as_deref()?)));
        for (check, remedy) in remedies {
            text.push_str(&format!("\n{}: {remedy}", check.id));
        }
        text
    });
    Ok(if ready { Exit::Done } else { Exit::CheckFailed })
}

/// `hebe host starting`.
fn starting(host: &Host) -> Outcome {
    launch::read_ahead(host);
    asking::take_handed(host).map_err(|why| {
        Failure(format!(
            "what systemd holds of the kernel before cannot be taken, and stays with it: {why}"
        ))
    })?;
    Ok(Exit::Done)
}

/// `hebe host stopping`. With `rest` it comes after another one, of which
/// systemd says how it ended (systemd.exec(5)).
fn stopping(host: &Host, rest: bool, out: &Output) -> Outcome {
    let result = std::env::var("SERVICE_RESULT").unwrap_or_default();
    if rest && result == "success" {
        return Ok(Exit::Done);
    }
    if rest {
        out.progress(&format!(
            "the one before did not come to its end ({result})"
        ));
    }
    let say = |text: &str| out.progress(text);
    let stopped = stopping::stopping(host, &say)?;
    out.answer(&stopped, || {
        let sentences = stopped.vms.iter().map(|vm| format!("{}\n", vm.sentence));
        sentences.collect()
    });
    Ok(if stopped.loses() {
        Exit::Attention
    } else {
        Exit::Done
    })
}

/// `hebe keeper`.
pub fn keeper(host: &Host, args: KeeperArgs) -> Outcome {
    let said = std::io::stdout();
    // SAFETY: whoever starts a keeper names descriptors that it leaves to it, and
    // this process has not looked at them yet.
    let inherited = |word: &String| unsafe { fdstore::inherited(word) };
    let start = keeper::Start {
        sessions: args.session.iter().filter_map(inherited).collect(),
        notify: args.notify,
    };
    let kept = keeper::run(host, start, said);
    kept.map_err(|e| Failure(format!("the keeper ends: {e}")))?;
    Ok(Exit::Done)
}

/// `hebe net-helper`.
pub fn net_helper(host: &Host) -> Outcome {
    let served = hebe_host::network::run_helper(host);
    served.map_err(|e| Failure(format!("the network's helper ends: {e}")))?;
    Ok(Exit::Done)
}
