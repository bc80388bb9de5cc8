//! Looks at the VMs every now and then: tells what changed, carries out what
//! the supervisor decides, and takes samples of the host.
//!
//! What the supervisor remembers ([`Memory`]) lies in the run directory, which
//! ends with the kernel: without it this is the first daemon since the host's
//! start, and everything with `autostart` is due.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use hebe_flow::supervise::{Answer, Effect, Look, Memory, Rule, Seen, Supervisor};
use hebe_host::ageing::{self, SLOTS, SampleStore, path_below};
use hebe_host::launch::ExitRecord;
use hebe_host::listing::{Survey, VmRow, VmState, with_cause};
use hebe_host::{Host, files, network, ops, overlays};
use hebe_types::VmName;
use tokio::task::JoinHandle;

use crate::agents::Asking;
use crate::answers::Supervision;
use crate::app::{App, Failed};
use crate::events::Event;
use crate::jobs::JobKind;
use crate::log;
use crate::systemd::Systemd;

/// What was seen last, and what the supervisor thinks of it.
#[derive(Debug, Default)]
pub struct Watched {
    supervisor: Supervisor,
    rules: BTreeMap<VmName, Rule>,
    states: BTreeMap<VmName, VmState>,
}

impl Watched {
    /// What the supervisor has in mind with a VM.
    pub fn of(&self, name: &VmName, now_ms: u64) -> Supervision {
        let memory = self.supervisor.memory();
        let mut waiting = self.supervisor.waiting();
        let until = waiting.find(|(vm, _)| *vm == name);
        Supervision {
            due: memory.due.contains(name),
            restarts: memory.restarts.get(name).copied().unwrap_or(0),
            starts_in_s: until.map(|(_, until)| until.saturating_sub(now_ms) as f64 / 1e3),
            given_up: self.supervisor.given_up().any(|vm| vm == name),
        }
    }

    /// Starts in a row, of all VMs that were started again.
    pub fn restarts(&self) -> &BTreeMap<VmName, u32> {
        &self.supervisor.memory().restarts
    }
}

/// Where the supervisor's memory lies.
pub fn memory_path(host: &Host) -> PathBuf {
    host.layout.run.join("hebed").join("supervisor.json")
}

/// Looks at the VMs every `poll`, for ever; then it is the turn of their `agents`. Systemd hears of each look, so one
/// that hangs is told of by silence.
pub async fn watch(app: App, poll: Duration, mut agents: Asking, systemd: Arc<Systemd>) {
    let mut began = false;
    let mut told: Option<tokio::time::Instant> = None;
    let mut tending = Tending::default();
    loop {
        match app.engine.survey().await {
            Ok(survey) => {
                began |= begin(&app, &survey, began);
                look(&app, &survey);
                agents.turn(&app, &survey);
            }
            // Somebody else is at work on all VMs.
            Err(_) if app.engine.is_quiet() => {}
            Err(error) => log::error(format!("the VMs could not be looked at: {error}")),
        }
        app.engine.bury();
        app.engine.host().system.let_go_of_ended();
        tending.turn(&app).await;
        if let Some(every) = systemd.watchdog()
            && told.is_none_or(|at| at.elapsed() * 2 >= every)
        {
            systemd.say("WATCHDOG=1");
            told = Some(tokio::time::Instant::now());
        }
        let wait = systemd.watchdog().map_or(poll, |every| poll.min(every / 2));
        let _ = tokio::time::timeout(wait, app.look_now.notified()).await;
    }
}

/// Looks after the process that serves VMs' network. Beside the other looks: what
/// it is waited for keeps none of them up.
#[derive(Debug, Default)]
struct Tending {
    task: Option<JoinHandle<Result<bool, String>>>,
    trouble: Option<String>,
}

impl Tending {
    async fn turn(&mut self, app: &App) {
        if self.task.as_ref().is_some_and(|task| !task.is_finished()) {
            return;
        }
        if let Some(task) = self.task.take() {
            let ended = task.await;
            self.tell(ended.unwrap_or_else(|error| Err(error.to_string())));
        }
        // A reboot brings back what it needs by itself.
        if !app.engine.is_quiet() {
            let engine = app.engine.clone();
            self.task = Some(tokio::spawn(async move {
                match engine.read(network::tend).await {
                    Ok(tended) => tended.map_err(|error| with_cause(&error)),
                    Err(broken) => Err(broken.to_string()),
                }
            }));
        }
    }

    /// The same trouble is told once.
    fn tell(&mut self, tended: Result<bool, String>) {
        match tended {
            Ok(started) => {
                self.trouble = None;
                if started {
                    log::warning(
                        "the process that serves network = \"nat\" was gone, and was started again",
                    );
                }
            }
            Err(why) if self.trouble.as_ref() == Some(&why) => {}
            Err(why) => {
                log::warning(format!("the network of VMs is not served: {why}"));
                self.trouble = Some(why);
            }
        }
    }
}

/// Takes up what an earlier daemon of this boot left; true when done.
fn begin(app: &App, survey: &Survey, began: bool) -> bool {
    if began {
        return true;
    }
    let host = app.engine.host();
    let path = memory_path(host);
    let left: Option<Memory> = files::read_json(&path).unwrap_or_else(|error| {
        // Damaged: whatever was due was most likely started.
        log::warning(format!(
            "what the daemon before remembered is lost: {error}"
        ));
        Some(Memory::default())
    });
    let supervisor = match left {
        Some(memory) => Supervisor::with(memory),
        None => Supervisor::at_host_start(&looks(app, survey)),
    };
    app.watched().supervisor = supervisor;
    keep(app);
    true
}

fn keep(app: &App) {
    if let Err(error) = keep_latest(app) {
        log::error(format!(
            "the supervisor cannot write down what it began: {error}"
        ));
    }
}

/// One at a time: clients' orders, jobs that end and looks come at once.
fn keep_latest(app: &App) -> io::Result<()> {
    let _turn = app.keeping();
    let memory = app.watched().supervisor.memory().clone();
    files::write_json(&memory_path(app.engine.host()), &memory)
}

/// Every VM with a readable definition, as the supervisor sees it.
fn looks(app: &App, survey: &Survey) -> BTreeMap<VmName, Look> {
    let host = app.engine.host();
    let defined = survey.definitions.iter();
    defined
        .filter_map(|(name, config)| {
            let rule = Rule::from(config.as_ref().ok()?);
            let row = survey.rows.get(name)?;
            let busy = app.jobs.busy_with(name);
            let seen = if busy { Seen::Up } else { seen(host, row) };
            Some((name.clone(), Look { rule, seen }))
        })
        .collect()
}

/// How a VM is, from its row and from how its VMM said that it ended.
fn seen(host: &Host, row: &VmRow) -> Seen {
    match row.state {
        VmState::Running | VmState::Paused | VmState::Unresponsive => Seen::Up,
        VmState::Frozen | VmState::Saved | VmState::Lost | VmState::Damaged => Seen::Kept,
        VmState::Crashed => Seen::Failed,
        VmState::Stopped => {
            let record = ExitRecord::read(&host.layout.vm_dir(&row.name));
            // What was ordered down has no record any more.
            match record.as_ref().map(|record| record.reason.as_str()) {
                Some("power-off") => Seen::OffByItself,
                Some("triple-fault" | "error") => Seen::Failed,
                _ => Seen::Absent,
            }
        }
    }
}

/// One look: events, then the supervisor's decisions.
fn look(app: &App, survey: &Survey) {
    let looks = looks(app, survey);
    let mut events = Vec::new();
    let effects = {
        let mut watched = app.watched();
        let now: BTreeMap<VmName, VmState> = survey
            .rows
            .values()
            .map(|row| (row.name.clone(), row.state))
            .collect();
        for (name, state) in &now {
            let before = watched.states.get(name).copied();
            if before != Some(*state) {
                let detail = survey.rows.get(name).and_then(|row| row.detail.clone());
                events.push(changed(name, before, Some(*state), detail));
            }
        }
        for (name, before) in &watched.states {
            if !now.contains_key(name) {
                events.push(changed(name, Some(*before), None, None));
            }
        }
        let stopped = |event: &Event| {
            matches!(
                event,
                Event::Vm {
                    state: Some(VmState::Stopped),
                    ..
                }
            )
        };
        if events.iter().any(stopped) {
            let host = app.engine.host().clone();
            tokio::task::spawn_blocking(move || overlays::sweep(&host));
        }
        watched.states = now;
        watched.rules = looks
            .iter()
            .map(|(name, look)| (name.clone(), look.rule.clone()))
            .collect();
        watched.supervisor.look(app.now_ms(), &looks)
    };
    for event in events {
        app.bus.tell(&event);
    }
    act(app, effects);
}

fn changed(
    name: &VmName,
    before: Option<VmState>,
    state: Option<VmState>,
    detail: Option<String>,
) -> Event {
    Event::Vm {
        name: name.clone(),
        before,
        state,
        detail,
    }
}

/// A client ordered something of this VM: what the supervisor had in mind with
/// it is over.
pub fn ordered(app: &App, name: &VmName) {
    let effects = app.watched().supervisor.ordered(name);
    act(app, effects);
}

fn act(app: &App, effects: Vec<Effect>) {
    for effect in effects {
        match effect {
            Effect::Keep => keep(app),
            Effect::Say { vm, text, trouble } => say(app, vm, text, trouble),
            Effect::Start(vm) => start(app, vm),
        }
    }
}

fn say(app: &App, name: VmName, text: String, trouble: bool) {
    let line = format!("{name}: {text}");
    if trouble {
        log::warning(line);
    } else {
        log::info(line);
    }
    app.bus.tell(&Event::Supervisor {
        name,
        text,
        trouble,
    });
}

fn start(app: &App, vm: VmName) {
    let name = vm.clone();
    let order = move |host: &Host, _: &(dyn Fn(&str) + Sync)| {
        ops::start(host, &name).map(|_| ()).map_err(Failed::from)
    };
    let job = app.order(JobKind::Start, Some(&vm), true, order);
    let app = app.clone();
    tokio::spawn(async move {
        let answer = match job {
            // No turn was to be had.
            Err(_) => Answer::Busy,
            Ok((_, task)) => match task.await {
                Ok(Ok(())) => Answer::Started,
                Ok(Err(failed)) if failed.busy => Answer::Busy,
                Ok(Err(failed)) => Answer::Failed { why: failed.text },
                Err(_) => Answer::Failed {
                    why: "the daemon failed at it".to_owned(),
                },
            },
        };
        let effects = {
            let mut watched = app.watched();
            let rule = watched.rules.get(&vm).cloned().unwrap_or_default();
            let now_ms = app.now_ms();
            watched.supervisor.answered(now_ms, &vm, &rule, &answer)
        };
        if answer == Answer::Started {
            log::info(format!("{vm}: started"));
        }
        act(&app, effects);
        app.look_now.notify_one();
    });
}

/// Takes a sample of the host every `every`, for ever.
pub async fn sample(app: App, every: Duration) {
    loop {
        if !app.engine.is_quiet() {
            let taken = app.engine.read(take_sample).await;
            if let Ok(Err(text)) = taken {
                log::warning(format!("no sample of the host: {text}"));
            }
        }
        tokio::time::sleep(every).await;
    }
}

fn take_sample(host: &Host) -> Result<(), String> {
    let sample = ageing::sample(host).map_err(|error| with_cause(&error))?;
    SampleStore::open(&path_below(&host.layout.state), SLOTS)
        .and_then(|mut store| store.append(&sample))
        .map_err(|error| with_cause(&error))
}

#[cfg(test)]
mod tests {
    use hebe_host::host::Layout;

    use super::*;

    /// At the host's start many VMs answer at the same instant.
    #[test]
    fn what_is_written_down_at_once_is_written_by_turns() {
        let dir = tempfile::tempdir().expect("dir");
        let mut host = Host::here();
        host.layout = Layout::below(dir.path());
        let app = App::new(host, false);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..50 {
                        keep_latest(&app).expect("written");
                    }
                });
            }
        });
        let path = memory_path(app.engine.host());
        let kept: Option<Memory> = files::read_json(&path).expect("whole");
        assert!(kept.is_some());
    }
}
