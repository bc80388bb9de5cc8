//! Which guests' agents answer, and when each was last heard.
//!
//! Each VM that runs and has a socket for programs of the host is asked every
//! [`agent_every`](crate::cli::Args::agent_every), by the hello that its agent says to
//! whoever connects: nothing is kept open. A question ends in time, whatever
//! the guest does (`LOOK_MAX`, twice at most); `ASKED_MAX` are under way at
//! a time, one for each VM, and nobody waits for them. A VM that stands still
//! is not asked.
//!
//! ```text
//!             heard                 MISSES_MAX in a row unanswered
//!  Never ─────────────► Answers ──────────────────────────────────► Silent
//!                          ▲                  heard                    │
//!                          └───────────────────────────────────────────┘
//! ```
//! What is known of an agent is of one life of its VM, by its id, and this
//! daemon's alone.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use hebe_agent::Facts;
use hebe_host::agent::{look, socket_path};
use hebe_host::listing::{Survey, VmState};
use hebe_types::VmName;
use serde::Serialize;
use tokio::sync::Semaphore;

use crate::app::App;
use crate::events::Event;
use crate::log;

/// How long an agent has to be reached, and again to say hello.
const LOOK_MAX: Duration = Duration::from_secs(1);
/// Agents that are asked at a time.
const ASKED_MAX: usize = 8;
/// An agent that did not answer so often in a row has fallen silent: a guest
/// may be busy for a moment, or boot.
const MISSES_MAX: u32 = 3;

/// How an agent is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum AgentState {
    /// It was heard, and not long ago.
    Answers,
    /// It was heard, and is not any more.
    Silent,
    /// None was heard in this life of the VM: there may be none.
    Never,
    /// It is not asked, because its VM does not run.
    Unasked,
}

/// What is told of a VM's agent.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Agent {
    /// How it is.
    pub state: AgentState,
    /// When it was last heard, in seconds since 1970.
    pub heard_at: Option<f64>,
    /// What it said then, made plain; the guest's word.
    pub facts: Option<Facts>,
}

/// What is known of the agents in VMs.
#[derive(Debug, Default)]
pub struct Agents(BTreeMap<VmName, Known>);

#[derive(Debug, Default)]
struct Known {
    /// The life of the VM that this is of.
    vm: Option<String>,
    /// A question is under way.
    asked: bool,
    /// Some question was answered, or was not.
    told: bool,
    /// Questions in a row that were not answered.
    misses: u32,
    silent: bool,
    heard: Option<(f64, Facts)>,
}

impl Agents {
    /// Forgets agents whose VM is gone or another one by now; says which are to
    /// be asked, each with the life of its VM.
    fn due(&mut self, survey: &Survey, with_socket: impl Fn(&VmName) -> bool) -> Vec<Question> {
        self.0.retain(|name, known| {
            let row = survey.rows.get(name);
            row.is_some_and(|row| row.id == known.vm && row.state != VmState::Stopped)
        });
        let mut due = Vec::new();
        for row in survey.rows.values() {
            if row.state != VmState::Running {
                if let Some(known) = self.0.get_mut(&row.name) {
                    known.misses = 0;
                }
                continue;
            }
            if !with_socket(&row.name) {
                continue;
            }
            let known = self.0.entry(row.name.clone()).or_default();
            if !known.asked {
                (known.asked, known.vm) = (true, row.id.clone());
                due.push((row.name.clone(), row.id.clone()));
            }
        }
        due
    }

    /// Takes note of what came of a question; gives what changed by it.
    fn answered(
        &mut self,
        (name, vm): Question,
        now_s: f64,
        facts: Option<Facts>,
    ) -> Option<Event> {
        let known = self.0.get_mut(&name).filter(|known| known.vm == vm)?;
        (known.asked, known.told) = (false, true);
        let was = known.state();
        match facts {
            Some(facts) => {
                known.heard = Some((now_s, facts));
                (known.misses, known.silent) = (0, false);
            }
            None => {
                known.misses = known.misses.saturating_add(1);
                known.silent |= known.heard.is_some() && known.misses >= MISSES_MAX;
            }
        }
        (was != known.state()).then(|| Event::Agent {
            name,
            state: known.state(),
            heard_at: known.heard.as_ref().map(|(at, _)| *at),
        })
    }

    /// The question was not asked after all.
    fn left_out(&mut self, (name, vm): &Question) {
        if let Some(known) = self.0.get_mut(name).filter(|known| known.vm == *vm) {
            known.asked = false;
        }
    }

    /// What is told of the agent of a VM in this state; none where nothing is
    /// known, as of a VM without sockets.
    pub fn of(&self, name: &VmName, state: VmState) -> Option<Agent> {
        let known = self.0.get(name).filter(|known| known.told)?;
        let (heard_at, facts) = known.heard.clone().unzip();
        Some(Agent {
            state: match state {
                VmState::Running => known.state(),
                _ => AgentState::Unasked,
            },
            heard_at,
            facts,
        })
    }
}

#[cfg(test)]
impl Agents {
    /// Every agent is heard.
    pub fn hear_all(&mut self, survey: &Survey) {
        for question in self.due(survey, |_| true) {
            self.answered(question, 7.0, Some(Facts::default()));
        }
    }
}

impl Known {
    fn state(&self) -> AgentState {
        match self.heard {
            None => AgentState::Never,
            Some(_) if self.silent => AgentState::Silent,
            Some(_) => AgentState::Answers,
        }
    }
}

/// A VM whose agent is asked, and which life of it.
type Question = (VmName, Option<String>);

/// Asks agents every now and then.
#[derive(Debug)]
pub struct Asking {
    /// Never, where there is none.
    every: Option<Duration>,
    last: Option<Instant>,
    turns: Arc<Semaphore>,
}

impl Asking {
    /// Asks each agent every so often; none never.
    pub fn new(every: Option<Duration>) -> Self {
        Self {
            every,
            last: None,
            turns: Arc::new(Semaphore::new(ASKED_MAX)),
        }
    }

    /// Begins what is due, by a look at the VMs; waits for nothing.
    pub fn turn(&mut self, app: &App, survey: &Survey) {
        let Some(every) = self.every else { return };
        if self.last.is_some_and(|last| last.elapsed() < every) {
            return;
        }
        self.last = Some(Instant::now());
        let layout = &app.engine.host().layout;
        let due = app
            .agents()
            .due(survey, |name| socket_path(layout, name).exists());
        for question in due {
            let (app, turns) = (app.clone(), Arc::clone(&self.turns));
            tokio::spawn(ask(app, turns, question));
        }
    }
}

async fn ask(app: App, turns: Arc<Semaphore>, question: Question) {
    let _turn = turns.acquire().await;
    let socket = socket_path(&app.engine.host().layout, &question.0);
    // In the midst of an order for all VMs nobody is asked.
    if app.engine.is_quiet() {
        return app.agents().left_out(&question);
    }
    let heard = tokio::task::spawn_blocking(move || look(&socket, LOOK_MAX)).await;
    let facts = heard.ok().and_then(Result::ok);
    let event = app.agents().answered(question, now_s(), facts);
    if let Some(event) = event {
        tell(&app, &event);
    }
}

fn tell(app: &App, event: &Event) {
    if let Event::Agent { name, state, .. } = event {
        match state {
            AgentState::Silent => log::warning(format!(
                "{name}: the agent in its guest does not answer any more"
            )),
            _ => log::info(format!("{name}: the agent in its guest answers")),
        }
    }
    app.bus.tell(event);
}

fn now_s() -> f64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0.0, |d| d.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use hebe_flow::life::Life;
    use hebe_host::listing::VmRow;

    use super::*;

    fn name() -> VmName {
        "web".parse().expect("name")
    }

    fn survey(state: VmState, id: &str) -> Survey {
        let row = VmRow {
            name: name(),
            state,
            detail: None,
            memory: None,
            store: None,
            segment: None,
            pid: None,
            id: Some(id.into()),
            life: Life::Running,
            status: None,
        };
        Survey {
            store: None,
            store_trouble: None,
            rows: BTreeMap::from([(name(), row)]),
            definitions: BTreeMap::new(),
        }
    }

    /// Asks once, where it is due, and gets this answer; the state that was told of.
    fn once(agents: &mut Agents, survey: &Survey, heard: bool) -> Option<AgentState> {
        let question = agents.due(survey, |_| true).pop()?;
        let facts = heard.then(Facts::default);
        match agents.answered(question, 7.0, facts)? {
            Event::Agent { state, .. } => Some(state),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn an_agent_falls_silent_after_three_misses_and_is_back_at_once() {
        let (mut agents, runs) = (Agents::default(), survey(VmState::Running, "1"));
        assert_eq!(agents.of(&name(), VmState::Running), None);
        for _ in 0..5 {
            assert_eq!(once(&mut agents, &runs, false), None, "none was there");
        }
        let told = |agents: &Agents| agents.of(&name(), VmState::Running).map(|a| a.state);
        assert_eq!(told(&agents), Some(AgentState::Never));
        let answers = Some(AgentState::Answers);
        assert_eq!(once(&mut agents, &runs, true), answers);
        assert_eq!(once(&mut agents, &runs, true), None, "no news");
        for wanted in [None, None, Some(AgentState::Silent), None] {
            assert_eq!(once(&mut agents, &runs, false), wanted);
        }
        let silent = agents.of(&name(), VmState::Running).expect("known");
        assert_eq!(
            (silent.state, silent.heard_at),
            (AgentState::Silent, Some(7.0))
        );
        assert_eq!(once(&mut agents, &runs, true), answers);
        // What is counted is in a row.
        for heard in [false, false, true, false, false] {
            assert_eq!(once(&mut agents, &runs, heard), None);
        }
    }

    #[test]
    fn who_stands_still_is_not_asked_and_another_life_begins_anew() {
        let (mut agents, runs) = (Agents::default(), survey(VmState::Running, "1"));
        once(&mut agents, &runs, true);
        once(&mut agents, &runs, false);
        once(&mut agents, &runs, false);
        for state in [VmState::Paused, VmState::Frozen, VmState::Unresponsive] {
            let still = survey(state, "1");
            assert_eq!(agents.due(&still, |_| true), Vec::new());
            let told = agents.of(&name(), state).expect("known");
            assert_eq!(
                (told.state, told.heard_at),
                (AgentState::Unasked, Some(7.0))
            );
        }
        // What went before that does not count against it.
        assert_eq!(once(&mut agents, &runs, false), None);
        // Nobody is asked twice at a time, and a late answer is another life's.
        let late = agents.due(&runs, |_| true).pop().expect("due");
        assert_eq!(agents.due(&runs, |_| true), Vec::new());
        let reborn = survey(VmState::Running, "2");
        let asked = agents.due(&reborn, |_| true);
        assert_eq!(asked.len(), 1);
        assert!(agents.answered(late, 9.0, Some(Facts::default())).is_none());
        assert_eq!(agents.of(&name(), VmState::Running), None, "nothing yet");
        // No socket, no agent; stopped, nothing is known.
        agents.due(&survey(VmState::Stopped, "2"), |_| true);
        assert_eq!(agents.due(&reborn, |_| false), Vec::new());
        assert!(agents.0.is_empty());
    }
}
