//! What takes long: jobs, with their progress.
//!
//! A job is a memory of this daemon alone. What it did to a VM is seen on the
//! VM; after the daemon's own restart there is no job, and the VM is as the
//! order left it.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use hebe_types::VmName;
use serde::Serialize;
use serde_json::Value;
use tokio::sync::Notify;

use crate::events::{Bus, Event};

/// Jobs that may be under way or wait at a time.
pub const OPEN_MAX: usize = 64;
/// Jobs that are remembered.
pub const KEPT_MAX: usize = 256;
/// Lines of progress that are remembered of one.
const LINES_MAX: usize = 64;

/// How a job is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum JobState {
    /// Under way, or waiting for its turn.
    Running,
    /// It did what was asked.
    Done,
    /// It did not; `error` says why.
    Failed,
}

/// What a job is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum JobKind {
    /// Boot a VM.
    Start,
    /// Shut a VM down.
    Stop,
    /// Suspend a VM on memory.
    Suspend,
    /// Resume a VM.
    Resume,
    /// Resume all that were up before the host rebooted.
    ResumeAll,
    /// Reboot the host.
    Reboot,
}

/// One job.
#[derive(Clone, Debug, Serialize)]
pub struct Job {
    /// Counts from 1 in each daemon.
    pub id: u64,
    /// What it is about.
    pub kind: JobKind,
    /// Its VM, where it is about one.
    pub vm: Option<VmName>,
    /// Ordered by the supervisor, not by a client.
    pub supervisor: bool,
    /// How it is.
    pub state: JobState,
    /// When it was ordered, in seconds since 1970.
    pub began_at: f64,
    /// When it ended.
    pub ended_at: Option<f64>,
    /// What it said on its way: the last lines.
    pub progress: Vec<String>,
    /// What it gave back, where there is something.
    pub result: Option<Value>,
    /// Why it failed, as one sentence.
    pub error: Option<String>,
}

/// All jobs that are remembered.
#[derive(Debug)]
pub struct Jobs {
    table: Mutex<Table>,
    bus: Arc<Bus>,
    ended: Notify,
}

#[derive(Debug, Default)]
struct Table {
    last: u64,
    jobs: BTreeMap<u64, Job>,
}

impl Table {
    fn open(&self) -> usize {
        let running = |job: &&Job| job.state == JobState::Running;
        self.jobs.values().filter(running).count()
    }
}

impl Jobs {
    /// None yet; their events go to `bus`.
    pub fn new(bus: Arc<Bus>) -> Self {
        Self {
            table: Mutex::default(),
            bus,
            ended: Notify::new(),
        }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        // A table is whole between any two of its statements.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins a job; `None` where too many are open.
    pub fn begin(&self, kind: JobKind, vm: Option<&VmName>, supervisor: bool) -> Option<Job> {
        let job = {
            let mut table = self.table();
            if table.open() >= OPEN_MAX {
                return None;
            }
            table.last += 1;
            let job = Job {
                id: table.last,
                kind,
                vm: vm.cloned(),
                supervisor,
                state: JobState::Running,
                began_at: now_s(),
                ended_at: None,
                progress: Vec::new(),
                result: None,
                error: None,
            };
            table.jobs.insert(job.id, job.clone());
            let ended = |job: &Job| job.state != JobState::Running;
            while table.jobs.len() > KEPT_MAX {
                let oldest = table.jobs.iter().find(|(_, job)| ended(job));
                let Some(id) = oldest.map(|(id, _)| *id) else {
                    break;
                };
                table.jobs.remove(&id);
            }
            job
        };
        self.bus.tell(&Event::Job(job.clone()));
        Some(job)
    }

    fn change(&self, id: u64, change: impl FnOnce(&mut Job)) {
        let changed = {
            let mut table = self.table();
            let Some(job) = table.jobs.get_mut(&id) else {
                return;
            };
            change(job);
            job.clone()
        };
        self.bus.tell(&Event::Job(changed));
    }

    /// Notes a line of progress.
    pub fn say(&self, id: u64, line: &str) {
        self.change(id, |job| {
            if job.progress.len() == LINES_MAX {
                job.progress.remove(0);
            }
            job.progress.push(line.to_owned());
        });
    }

    /// Ends a job.
    pub fn end(&self, id: u64, result: Result<Value, String>) {
        self.change(id, |job| {
            job.ended_at = Some(now_s());
            match result {
                Ok(value) => {
                    job.state = JobState::Done;
                    job.result = (!value.is_null()).then_some(value);
                }
                Err(error) => {
                    job.state = JobState::Failed;
                    job.error = Some(error);
                }
            }
        });
        self.ended.notify_waiters();
    }

    /// One job.
    pub fn get(&self, id: u64) -> Option<Job> {
        self.table().jobs.get(&id).cloned()
    }

    /// All of them, the newest first.
    pub fn all(&self) -> Vec<Job> {
        self.table().jobs.values().rev().cloned().collect()
    }

    /// VMs that a job is at work on.
    pub fn busy_with(&self, name: &VmName) -> bool {
        let table = self.table();
        let mut jobs = table.jobs.values();
        jobs.any(|job| job.state == JobState::Running && job.vm.as_ref() == Some(name))
    }

    /// How many are open.
    pub fn open(&self) -> usize {
        self.table().open()
    }

    /// Waits until none is open.
    pub async fn all_ended(&self) {
        loop {
            let ended = self.ended.notified();
            tokio::pin!(ended);
            // Counted before the look, so that no end falls between.
            ended.as_mut().enable();
            if self.open() == 0 {
                return;
            }
            ended.await;
        }
    }
}

fn now_s() -> f64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0.0, |d| d.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn open_jobs_are_bounded_and_old_ones_forgotten() {
        let jobs = Jobs::new(Arc::default());
        let begin = || jobs.begin(JobKind::Start, None, false);
        let open: Vec<Job> = (0..OPEN_MAX).map(|_| begin().expect("room")).collect();
        assert!(begin().is_none());
        jobs.end(open[5].id, Ok(Value::Null));
        let more = begin().expect("room again");
        assert_eq!(jobs.open(), OPEN_MAX);
        jobs.end(more.id, Err("no".into()));
        for _ in 0..2 * KEPT_MAX {
            let job = begin().expect("room");
            jobs.end(job.id, Ok(Value::Null));
        }
        assert_eq!(jobs.all().len(), KEPT_MAX);
        assert_eq!(
            jobs.get(open[0].id).map(|job| job.state),
            Some(JobState::Running)
        );
        assert!(jobs.get(more.id).is_none(), "forgotten");
    }

    #[test]
    fn a_job_keeps_its_last_lines_and_how_it_ended() {
        let jobs = Jobs::new(Arc::default());
        let web: VmName = "web".parse().expect("name");
        let job = jobs.begin(JobKind::Stop, Some(&web), false).expect("room");
        assert!(jobs.busy_with(&web));
        for line in 0..100 {
            jobs.say(job.id, &line.to_string());
        }
        jobs.end(job.id, Err("it does not power off".into()));
        assert!(!jobs.busy_with(&web));
        let job = jobs.get(job.id).expect("kept");
        assert_eq!((job.progress.len(), job.progress[63].as_str()), (64, "99"));
        assert_eq!(job.state, JobState::Failed);
        assert!(job.ended_at >= Some(job.began_at));
    }
}
