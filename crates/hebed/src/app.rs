//! What all requests share, and how orders become jobs.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use axum::http::StatusCode;
use hebe_host::{Host, HostError};
use hebe_policy::ageing::Indicator;
use hebe_types::VmName;
use serde_json::Value;
use tokio::sync::{Notify, Semaphore};

use crate::agents::Agents;
use crate::answers::{Problem, Supervision};
use crate::engine::{Broken, Engine};
use crate::events::{Bus, Event};
use crate::jobs::{Job, JobKind, Jobs};
use crate::watch::Watched;

/// Listeners to events at a time.
pub const LISTENERS_MAX: usize = 64;

/// What all requests share; cheap to clone.
#[derive(Clone)]
pub struct App(Arc<Inner>);

/// What there is of it once.
pub struct Inner {
    /// Runs what blocks.
    pub engine: Engine,
    /// What takes long.
    pub jobs: Jobs,
    /// What is told.
    pub bus: Arc<Bus>,
    /// Turns of those who listen.
    pub listeners: Arc<Semaphore>,
    /// When this daemon began.
    pub began: Instant,
    /// All who may give orders may run programs in guests.
    pub allow_exec: bool,
    /// Names this run of the daemon.
    pub id: String,
    /// What the supervisor thinks.
    watched: Mutex<Watched>,
    /// What is known of the agents in VMs.
    agents: Mutex<Agents>,
    /// Whose turn it is to write that down: what is older is never written last.
    keeping: Mutex<()>,
    /// What tends to its limit, and in how many seconds it reaches it.
    exhaustions: Mutex<Vec<(Indicator, f64)>>,
    /// Something changed that the supervisor should look at now.
    pub look_now: Notify,
}

impl std::ops::Deref for App {
    type Target = Inner;

    fn deref(&self) -> &Inner {
        &self.0
    }
}

impl App {
    /// For this host.
    pub fn new(host: Host, allow_exec: bool) -> Self {
        let bus: Arc<Bus> = Arc::default();
        let began = hebe_sys::clock::stamp_now().realtime_ns;
        Self(Arc::new(Inner {
            engine: Engine::new(host),
            jobs: Jobs::new(Arc::clone(&bus)),
            bus,
            listeners: Arc::new(Semaphore::new(LISTENERS_MAX)),
            began: Instant::now(),
            allow_exec,
            id: format!("{:x}-{:x}", std::process::id(), began),
            watched: Mutex::default(),
            agents: Mutex::default(),
            keeping: Mutex::default(),
            exhaustions: Mutex::default(),
            look_now: Notify::new(),
        }))
    }

    /// What the supervisor thinks.
    pub fn watched(&self) -> MutexGuard<'_, Watched> {
        self.watched.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is known of the agents in VMs.
    pub fn agents(&self) -> MutexGuard<'_, Agents> {
        self.agents.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The turn to write down what the supervisor thinks; taken before [`Self::watched`].
    pub fn keeping(&self) -> MutexGuard<'_, ()> {
        self.keeping.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What tends to its limit, and in how many seconds it reaches it.
    pub fn exhaustions(&self) -> Vec<(Indicator, f64)> {
        let all = self.exhaustions.lock();
        all.unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Takes note of it, for whoever asks.
    pub fn note_exhaustions(&self, found: Vec<(Indicator, f64)>) {
        let mut all = self
            .exhaustions
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        *all = found;
    }

    /// Tells the log, and all who listen, how the host is ageing.
    pub fn tell_ageing(&self, text: String, trouble: bool) {
        match trouble {
            true => crate::log::warning(text.clone()),
            false => crate::log::info(text.clone()),
        }
        self.bus.tell(&Event::Ageing { text, trouble });
    }

    /// What the supervisor has in mind with one VM.
    pub fn supervision(&self, name: &VmName) -> Supervision {
        self.watched().of(name, self.now_ms())
    }

    /// The supervisor's clock: milliseconds since the daemon began.
    pub fn now_ms(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// Makes a job of an order. `order` is told how to say how it gets on.
    pub fn order<T, F>(
        &self,
        kind: JobKind,
        vm: Option<&VmName>,
        supervisor: bool,
        order: F,
    ) -> Result<(Job, tokio::task::JoinHandle<Result<T, Failed>>), Problem>
    where
        T: serde::Serialize + Send + 'static,
        F: FnOnce(&Host, &(dyn Fn(&str) + Sync)) -> Result<T, Failed> + Send + 'static,
    {
        let begun = self.jobs.begin(kind, vm, supervisor);
        let job = begun.ok_or_else(|| {
            let text = "too many jobs are under way: wait until some have ended";
            Problem::for_now(StatusCode::TOO_MANY_REQUESTS, text, 5)
        })?;
        let (app, id) = (self.clone(), job.id);
        let task = tokio::spawn(async move {
            let sayer = app.clone();
            let work = move |host: &Host| order(host, &|line| sayer.jobs.say(id, line));
            let result = match app.engine.order(work).await {
                Ok(result) => result,
                Err(broken) => Err(broken.into()),
            };
            let told = match &result {
                Ok(value) => Ok(serde_json::to_value(value).unwrap_or(Value::Null)),
                Err(failed) => Err(failed.text.clone()),
            };
            if let Err(text) = &told {
                let vm = app.jobs.get(id).and_then(|job| job.vm);
                let vm = vm.map_or(String::new(), |vm| format!(" of '{vm}'"));
                crate::log::warning(format!("job {id}{vm}: {text}"));
            }
            app.jobs.end(id, told);
            app.look_now.notify_one();
            result
        });
        Ok((job, task))
    }
}

/// Why an order failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failed {
    /// One sentence.
    pub text: String,
    /// Somebody else was at work: the same may be tried later.
    pub busy: bool,
}

impl From<HostError> for Failed {
    fn from(error: HostError) -> Self {
        Self {
            busy: matches!(
                error,
                HostError::Busy(_) | HostError::HostBusy | HostError::OrdersBusy
            ),
            text: hebe_host::listing::with_cause(&error),
        }
    }
}

impl From<Broken> for Failed {
    fn from(error: Broken) -> Self {
        Self {
            text: error.to_string(),
            busy: false,
        }
    }
}
