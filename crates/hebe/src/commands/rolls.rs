//! `fleet roll` and `reboot --roll`: a roll through the group, which hosts take
//! part in by themselves.

use std::collections::BTreeMap;
use std::path::Path;
use std::thread;
use std::time::Duration;

use hebe_fleet::FleetError;
use hebe_fleet::order::{Say, wall_s};
use hebe_fleet::rolls::{Going, Read, Rolls, WishError};
use hebe_host::Host;
use hebe_host::preflight::{RebootOptions, preflight};
use hebe_host::reboot::RebootEnd;
use hebe_policy::fleet::forecast::Inventory;
use hebe_policy::fleet::holder::Stop;
use hebe_policy::fleet::slots::{Found, Phase};
use hebe_policy::fleet::turns::{
    MarkState, Method, Place, RebootOrder, RollState, Rollout, Turn, Wish,
};
use hebe_policy::span::Span;
use hebe_types::RebootMethod;
use serde::Serialize;

use super::reboot::{Ended, not_rebooted, show_verdict, tell, under_a_slot};
use super::slots::{self, Fleet};
use crate::cli::{RebootArgs, RollOrder};
use crate::output::{Exit, Failure, Outcome, Output, table};

/// Between two looks at a roll that is waited for.
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// A host whose turn it is and that says nothing for so long is wondered at,
/// in seconds.
const SILENCE_S: u64 = 120;

fn failed(error: FleetError) -> Failure {
    Failure(error.to_string())
}

/// Who gives an order: a name that says to others whom to ask.
fn person(fleet: &Fleet) -> String {
    let user = ["SUDO_USER", "USER", "LOGNAME"]
        .into_iter()
        .find_map(|name| std::env::var(name).ok().filter(|user| !user.is_empty()));
    let user = user.unwrap_or_else(|| "root".to_owned());
    let fits = |c: &char| c.is_ascii_alphanumeric() || "._-".contains(*c);
    let user: String = user.chars().filter(fits).take(32).collect();
    format!("{user}@{}", fleet.host)
}

/// `hebe fleet roll FILE`.
pub fn begin(
    host: &Host,
    inventory: &Inventory,
    rollout: impl FnOnce(&str) -> Result<Rollout, Failure>,
    wait: bool,
    out: &Output,
) -> Outcome {
    let fleet = Fleet::here(host)?;
    let rollout = rollout(&person(&fleet))?;
    let group = &fleet.config.group;
    if inventory.group != group.as_str() {
        return Err(Failure(format!(
            "the inventory is of group '{}', and this host is in '{group}'",
            inventory.group
        )));
    }
    let rolls = match fleet.rolls() {
        Err(FleetError::NoRolls) => return Ok(by_hand(&rollout, out)),
        rolls => rolls.map_err(failed)?,
    };
    if let Some(there) = rolls.begin(&rollout).map_err(failed)? {
        let by = &there.view.rollout.by;
        let why = format!(
            "{by} began a roll through '{group}' that is not over: `hebe fleet roll status` shows it, `hebe fleet roll abort` ends it"
        );
        out.answer(
            &Refused {
                result: "refused",
                why: &why,
            },
            String::new,
        );
        out.progress(&why);
        return Ok(Exit::CheckFailed);
    }
    if rollout.at_most > fleet.config.at_most {
        out.progress(&format!(
            "fleet.toml here says at_most = {}, and the smaller number counts",
            fleet.config.at_most
        ));
    }
    show(&fleet, &rolls, wait, out)
}

#[derive(Serialize)]
struct Refused<'a> {
    result: &'a str,
    why: &'a str,
}

#[derive(Serialize)]
struct ByHand {
    result: &'static str,
    why: String,
    /// What to order, and on which host, one after the other.
    orders: Vec<HostOrder>,
}

#[derive(Serialize)]
struct HostOrder {
    host: String,
    order: String,
}

/// Where nobody keeps rolls: what to order on each host.
fn by_hand(rollout: &Rollout, out: &Output) -> Exit {
    let order = by_hand_order(&rollout.reboot);
    let orders = rollout.hosts.iter().map(|place| HostOrder {
        host: place.host.to_string(),
        order: order.clone(),
    });
    let answer = ByHand {
        result: "by-hand",
        why: FleetError::NoRolls.to_string(),
        orders: orders.collect(),
    };
    out.answer(&answer, || {
        let lines = answer.orders.iter();
        lines
            .map(|line| format!("on {}: {}\n", line.host, line.order))
            .collect()
    });
    out.progress(&answer.why);
    Exit::CheckFailed
}

fn by_hand_order(reboot: &RebootOrder) -> String {
    let mut order = "hebe reboot --fleet".to_owned();
    for (flag, value) in [("kernel", &reboot.kernel), ("initrd", &reboot.initrd)] {
        if let Some(value) = value {
            order.push_str(&format!(" --{flag} '{}'", value.replace('\'', "'\\''")));
        }
    }
    if let Some(method) = reboot.method {
        order.push_str(&format!(" --method {}", method_name(method)));
    }
    match &reboot.only_if {
        Some(file) => format!("test ! -e '{}' || {order}", file.replace('\'', "'\\''")),
        None => order,
    }
}

fn method_name(method: Method) -> &'static str {
    match method {
        Method::Warm => "warm",
        Method::Saved => "saved",
        Method::Cold => "cold",
    }
}

/// `hebe fleet roll status|pause|…`.
pub fn order(host: &Host, order: &RollOrder, out: &Output) -> Outcome {
    let fleet = Fleet::here(host)?;
    let rolls = fleet.rolls().map_err(failed)?;
    let wish = match order {
        RollOrder::Status { wait } => return show(&fleet, &rolls, *wait, out),
        RollOrder::Pause => Wish::Pause,
        RollOrder::Continue => Wish::Continue,
        RollOrder::Abort => Wish::Abort,
        RollOrder::Skip { host } => Wish::Skip(host.clone()),
        RollOrder::Retry { host } => Wish::Retry(host.clone()),
    };
    match rolls.wish(&fleet, &wish, &person(&fleet)) {
        Ok(_) => {}
        Err(WishError::Denied(why)) => {
            let why = why.to_string();
            out.answer(
                &Refused {
                    result: "refused",
                    why: &why,
                },
                String::new,
            );
            out.progress(&why);
            return Ok(Exit::CheckFailed);
        }
        Err(WishError::Fleet(error)) => return Err(failed(error)),
    }
    show(&fleet, &rolls, false, out).map(|_| Exit::Done)
}

#[derive(Serialize)]
struct Status<'a> {
    group: &'a str,
    id: &'a str,
    by: &'a str,
    began_s: u64,
    at_most: u32,
    reboot: &'a RebootOrder,
    /// `running`, `paused`, `stopped`, `aborted` or `over`.
    state: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    why: Option<String>,
    hosts: Vec<Row>,
    capacity: f64,
    capacity_whole: f64,
}

#[derive(Clone, PartialEq, Serialize)]
struct Row {
    host: String,
    /// `later`, `next`, `verifying`, or as it is marked.
    state: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    why: Option<String>,
}

impl<'a> Status<'a> {
    fn of(fleet: &'a Fleet, read: &'a Read) -> Self {
        let (rollout, now_s) = (&read.view.rollout, wall_s());
        let trouble = read.view.trouble(&read.slots, now_s);
        let (state, why) = match &rollout.state {
            _ if read.view.is_over() && !matches!(rollout.state, RollState::Aborted { .. }) => {
                ("over", None)
            }
            RollState::Running => match trouble {
                Some(why) => ("stopped", Some(why)),
                None => ("running", None),
            },
            RollState::Paused { by } => ("paused", Some(format!("by {by}"))),
            RollState::Stopped { by, why } => ("stopped", Some(format!("{why}, says '{by}'"))),
            RollState::Aborted { by } => ("aborted", Some(format!("by {by}"))),
        };
        Self {
            group: fleet.config.group.as_str(),
            id: &rollout.id,
            by: &rollout.by,
            began_s: rollout.began_s,
            at_most: rollout.at_most,
            reboot: &rollout.reboot,
            state,
            why,
            hosts: rows(read, state == "running", now_s),
            capacity: read.view.capacity(),
            capacity_whole: rollout.hosts.iter().map(|place| place.capacity).sum(),
        }
    }

    /// Whether it needs no person.
    fn is_well(&self) -> bool {
        let bad = |row: &Row| ["refused", "failed"].contains(&row.state);
        !["stopped", "aborted"].contains(&self.state) && !self.hosts.iter().any(bad)
    }

    fn is_at_its_end(&self) -> bool {
        ["over", "stopped", "aborted"].contains(&self.state)
    }
}

fn rows(read: &Read, runs: bool, now_s: u64) -> Vec<Row> {
    let view = &read.view;
    let next: Vec<&Place> = view.at_turn().collect();
    let row = |place: &Place| {
        let mark = view.state(&place.host);
        let verifies = read.slots.iter().any(|found| {
            matches!(found, Found::Slot(slot) if slot.host == place.host && slot.phase == Phase::Verifying)
        });
        let is_next = runs && next.contains(&place);
        let silent = now_s.saturating_sub(view.rollout.began_s) > SILENCE_S;
        let (state, why) = match mark {
            Some(MarkState::Away) if verifies => ("verifying", None),
            Some(mark) => (mark.as_str(), mark.why().map(str::to_owned)),
            None if is_next => (
                "next",
                silent.then(|| {
                    "nothing was heard of it: does hebed run there, and does its policy.toml have a rule with when = \"roll\"?".to_owned()
                }),
            ),
            None => ("later", None),
        };
        Row {
            host: place.host.to_string(),
            state,
            why,
        }
    };
    view.rollout.hosts.iter().map(row).collect()
}

/// Shows the roll; with `wait`, when it is over or stops.
fn show(fleet: &Fleet, rolls: &Rolls, wait: bool, out: &Output) -> Outcome {
    let mut told = BTreeMap::new();
    let (mut said, mut id) = (String::new(), None);
    loop {
        let read = match rolls.read() {
            Ok(read) => read.ok_or(FleetError::NoRoll).map_err(failed)?,
            // What was begun goes on without whoever watches it.
            Err(error) if wait => {
                say_once(&mut said, format!("asking again: {error}"), out);
                thread::sleep(LOOK_EVERY);
                continue;
            }
            Err(error) => return Err(failed(error)),
        };
        let began = id.get_or_insert_with(|| read.view.rollout.id.clone());
        if *began != read.view.rollout.id {
            return Err(Failure("another roll was begun meanwhile".into()));
        }
        let status = Status::of(fleet, &read);
        if wait {
            changes(&status, &mut told, out);
            let line = [Some(status.state.to_owned()), status.why.clone()];
            say_once(
                &mut said,
                line.into_iter().flatten().collect::<Vec<_>>().join(": "),
                out,
            );
        }
        if wait && !status.is_at_its_end() {
            thread::sleep(LOOK_EVERY);
            continue;
        }
        // The last host has nobody behind it that would find out.
        if let Some(why) = read.view.trouble(&read.slots, wall_s())
            && wait
            && read.view.rollout.state == RollState::Running
        {
            rolls.stop(&read, fleet, &why).map_err(failed)?;
        }
        out.answer(&status, || text(&status));
        return Ok(if status.is_well() {
            Exit::Done
        } else {
            Exit::CheckFailed
        });
    }
}

fn say_once(said: &mut String, text: String, out: &Output) {
    if *said != text {
        out.progress(&text);
        *said = text;
    }
}

/// Says what is new of each host.
fn changes(status: &Status<'_>, told: &mut BTreeMap<String, Row>, out: &Output) {
    for row in &status.hosts {
        if row.state != "later" && told.get(&row.host) != Some(row) {
            let why = row.why.as_ref().map(|why| format!(" ({why})"));
            out.progress(&format!(
                "{}: {}{}; capacity {:.1} of {:.1}",
                row.host,
                row.state,
                why.unwrap_or_default(),
                status.capacity,
                status.capacity_whole
            ));
        }
        told.insert(row.host.clone(), row.clone());
    }
}

fn text(status: &Status<'_>) -> String {
    let rows: Vec<Vec<String>> = status
        .hosts
        .iter()
        .map(|row| {
            vec![
                row.host.clone(),
                row.state.to_owned(),
                row.why.clone().unwrap_or_default(),
            ]
        })
        .collect();
    let ago = Span::seconds(wall_s().saturating_sub(status.began_s));
    let why = status.why.as_ref().map(|why| format!(" ({why})"));
    format!(
        "roll through {}: {}{}; {} began it {ago} ago, at most {} at once\n\n{}\ncapacity: {:.1} of {:.1}\n",
        status.group,
        status.state,
        why.unwrap_or_default(),
        status.by,
        status.at_most,
        table(&["HOST", "", ""], &rows),
        status.capacity,
        status.capacity_whole,
    )
}

/// Writes down how this host's last turn ended, where a roll is.
pub fn settle(fleet: &Fleet, say: Say<'_>) {
    let Ok(rolls) = fleet.rolls() else {
        return;
    };
    if let Err(error) = rolls.settle(fleet, false) {
        say(&format!(
            "the roll still says that this host is away, until `hebe fleet release` is asked again: {error}"
        ));
    }
}

/// `hebe reboot --roll`.
pub fn take_turn(host: &Host, args: &RebootArgs, out: &Output) -> Outcome {
    let mut fleet = Fleet::here(host)?;
    let _only_one = slots::only_one(host)?;
    let rolls = fleet.rolls().map_err(failed)?;
    let read = rolls.settle(&fleet, false).map_err(failed)?;
    let read = read.ok_or(FleetError::NoRoll).map_err(failed)?;
    let rollout = &read.view.rollout;
    let why = match read.turn(&fleet.host) {
        Turn::Go => None,
        Turn::NotYet(why) | Turn::Never(why) => Some(why),
        Turn::Away => Some("it is under way, and has its slot".to_owned()),
        Turn::Stop(why) => {
            rolls.stop(&read, &fleet, &why).map_err(failed)?;
            Some(format!("the roll stops, because {why}"))
        }
    };
    if let Some(why) = why {
        return Ok(not_now(FleetError::NoTurn(why), out));
    }
    let mark = |state: MarkState| rolls.mark(&fleet.0, &rollout.id, &state).map_err(failed);
    if let Some(file) = rollout
        .reboot
        .only_if
        .as_ref()
        .filter(|f| !Path::new(f).exists())
    {
        let why = format!("nothing asks for a reboot: there is no {file}");
        mark(MarkState::Done {
            why: Some(why.clone()),
        })?;
        out.answer(
            &Refused {
                result: "done",
                why: &why,
            },
            || format!("{why}\n"),
        );
        return Ok(Exit::Done);
    }
    let options = options(args, &rollout.reboot);
    let (verdict, _) = preflight(host, &options, false);
    if !verdict.passes() {
        mark(MarkState::Refused {
            why: verdict.why_not(),
        })?;
        show_verdict(&verdict, false, out);
        return Ok(Exit::CheckFailed);
    }
    fleet.0.config.at_most = fleet.config.at_most.min(rollout.at_most);
    fleet.0.config.give_up_after = Span::seconds(rollout.give_up_s);
    fleet.0.slots = fleet.slots.going(Going::new(&rolls, &rollout.id));
    let ended = under_a_slot(host, &fleet, &options, args.wait, out)?;
    let state = after(&ended);
    if let Err(error) = rolls.mark(&fleet.0, &rollout.id, &state) {
        out.progress(&format!("the roll does not know of it yet: {error}"));
    }
    Ok(tell(ended, out))
}

fn not_now(error: FleetError, out: &Output) -> Exit {
    let why = error.to_string();
    out.answer(
        &Refused {
            result: "refused",
            why: &why,
        },
        String::new,
    );
    out.progress(&why);
    Exit::CheckFailed
}

/// What the roll says of a host that did not reboot.
fn after(ended: &Ended) -> MarkState {
    if let Some(verdict) = &ended.refused {
        return MarkState::Refused {
            why: verdict.why_not(),
        };
    }
    match &ended.reboot {
        None => MarkState::Waiting {
            why: ended.stop.to_string(),
        },
        Some(RebootEnd::Refused(why)) if !matches!(ended.stop, Stop::Unreleased(_)) => {
            MarkState::Refused { why: why.clone() }
        }
        Some(end) => MarkState::Failed {
            why: not_rebooted(end).why,
        },
    }
}

/// What the roll says goes before what the order says.
fn options(args: &RebootArgs, roll: &RebootOrder) -> RebootOptions {
    let mut options = args.options();
    if let Some(kernel) = &roll.kernel {
        options.kernel = Some(kernel.into());
        // One that was named for another kernel does not fit.
        options.initrd = None;
    }
    if let Some(initrd) = &roll.initrd {
        options.initrd = Some(initrd.into());
    }
    match roll.method {
        Some(Method::Warm) => options.method = RebootMethod::Warm,
        Some(Method::Saved) => options.method = RebootMethod::Saved,
        Some(Method::Cold) => options.method = RebootMethod::Cold,
        None => {}
    }
    options
}
