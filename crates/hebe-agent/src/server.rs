//! The agent's side of a connection.

use std::time::{Duration, Instant};

use serde::Serialize;

use crate::guest::Guest;
use crate::lines::{LineError, Lines, Wire};
use crate::protocol::{Done, Facts, Order, REQUEST_LEN_MAX, Request, Said};
use crate::{PROTOCOL, exec};

/// What a connection may take.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// A host that says nothing for so long is hung up on, unless it watches.
    pub silence: Duration,
    /// How long the host may take to read an answer.
    pub write: Duration,
    /// How often the phase is looked at while the host watches.
    pub look: Duration,
    /// Whether programs are run for the host.
    pub exec: bool,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            silence: Duration::from_secs(60),
            write: Duration::from_secs(10),
            look: Duration::from_secs(1),
            exec: false,
        }
    }
}

/// When the host is to hear of us unasked.
struct Watch {
    every: Duration,
    next: Instant,
    phase: String,
}

/// Serves one connection to its end.
///
/// # Errors
/// Why it ended, if not by its other end.
pub fn converse<W: Wire>(wire: W, guest: &dyn Guest, limits: Limits) -> Result<(), LineError> {
    let mut lines = Lines::new(wire, REQUEST_LEN_MAX);
    say(&mut lines, limits, &Said::Hello(facts(guest)))?;
    let mut watch: Option<Watch> = None;
    let mut silent_since = Instant::now();
    loop {
        let until = match &watch {
            Some(watch) => watch.next.min(Instant::now() + limits.look),
            None => silent_since + limits.silence,
        };
        match lines.next(until) {
            Ok(None) => return Ok(()),
            Ok(Some(line)) => {
                silent_since = Instant::now();
                let said = answer(&line, guest, limits, &mut watch);
                say(&mut lines, limits, &said)?;
            }
            Err(LineError::Late) if watch.is_some() => {}
            Err(error) => return Err(error),
        }
        if let Some(watch) = &mut watch {
            let facts = facts(guest);
            let now = Instant::now();
            if now >= watch.next || facts.phase != watch.phase {
                watch.next = now + watch.every;
                watch.phase.clone_from(&facts.phase);
                say(&mut lines, limits, &Said::Beat(facts))?;
            }
        }
    }
}

fn say<W: Wire>(
    lines: &mut Lines<W>,
    limits: Limits,
    said: &impl Serialize,
) -> Result<(), LineError> {
    let text = serde_json::to_string(said).map_err(std::io::Error::other)?;
    lines.say(&text, limits.write)
}

fn facts(guest: &dyn Guest) -> Facts {
    Facts {
        protocol: PROTOCOL,
        agent: env!("CARGO_PKG_VERSION").to_owned(),
        ..guest.facts()
    }
}

fn answer(line: &str, guest: &dyn Guest, limits: Limits, watch: &mut Option<Watch>) -> Said {
    let request: Request = match serde_json::from_str(line) {
        Ok(request) => request,
        Err(error) => {
            return Said::Failed {
                id: 0,
                why: format!("this is no request: {error}"),
            };
        }
    };
    let id = request.id;
    let result = request
        .order
        .check()
        .and_then(|()| carry_out(&request.order, guest, limits, watch));
    match result {
        Ok(result) => Said::Done { id, result },
        Err(why) => Said::Failed { id, why },
    }
}

fn carry_out(
    order: &Order,
    guest: &dyn Guest,
    limits: Limits,
    watch: &mut Option<Watch>,
) -> Result<Done, String> {
    match order {
        Order::Ping => Ok(Done::Facts(facts(guest))),
        Order::Time { realtime_ns } => guest
            .set_time(*realtime_ns)
            .map(|ns| Done::WasAhead { ns })
            .map_err(|e| format!("the clock cannot be set: {e}")),
        Order::Freeze { for_s } => {
            let time = Duration::from_secs(u64::from(*for_s));
            let count = guest.freeze(time)?;
            Ok(Done::FileSystems { count })
        }
        Order::Thaw => Ok(Done::FileSystems {
            count: guest.thaw()?,
        }),
        Order::Shutdown { reboot } => {
            // Nothing can be written to frozen file systems on the way down.
            if guest.facts().frozen {
                guest.thaw()?;
            }
            guest
                .shut_down(*reboot)
                .map(|()| Done::Ok)
                .map_err(|e| format!("the guest cannot be shut down: {e}"))
        }
        Order::Exec { .. } if !limits.exec => {
            Err("programs are not run for the host: start the agent with --allow-exec".into())
        }
        Order::Exec { .. } if guest.facts().frozen => {
            Err("file systems are frozen, and a program could wait for them: thaw them".into())
        }
        Order::Exec { words, for_s } => exec::run(words, Duration::from_secs(u64::from(*for_s)))
            .map_err(|e| format!("the program cannot be run: {e}")),
        Order::Watch { every_s } => {
            let every = Duration::from_secs(u64::from(*every_s));
            *watch = Some(Watch {
                every,
                next: Instant::now() + every,
                phase: guest.facts().phase,
            });
            Ok(Done::Ok)
        }
    }
}
