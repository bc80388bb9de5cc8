//! What the API says: bodies, and statuses of what went wrong.

use std::collections::BTreeMap;

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use hebe_host::HostError;
use hebe_host::listing::{VmRow, with_cause};
use hebe_host::preflight::{Check, Verdict};
use hebe_host::timeline::{Downtime, Row, Timeline};
use hebe_policy::ageing::Assessment;
use hebe_types::{VmConfig, VmName};
use serde::Serialize;

use crate::agents::Agent;
use crate::engine::{Ask, Broken};

/// What went wrong, as one sentence with the way out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The status.
    pub status: StatusCode,
    /// The sentence.
    pub error: String,
    /// When to try again, in seconds, where that may help.
    pub retry_after_s: Option<u32>,
}

#[derive(Serialize)]
struct ProblemBody<'a> {
    error: &'a str,
}

impl Problem {
    /// A problem that stays one.
    pub fn new(status: StatusCode, error: impl Into<String>) -> Self {
        Self {
            status,
            error: error.into(),
            retry_after_s: None,
        }
    }

    /// One that may be gone by then.
    pub fn for_now(status: StatusCode, error: impl Into<String>, retry_after_s: u32) -> Self {
        Self {
            retry_after_s: Some(retry_after_s),
            ..Self::new(status, error)
        }
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let body = ProblemBody { error: &self.error };
        let mut response = (self.status, Json(body)).into_response();
        if let Some(seconds) = self.retry_after_s {
            let value = HeaderValue::from(seconds);
            response.headers_mut().insert(header::RETRY_AFTER, value);
        }
        response
    }
}

impl From<HostError> for Problem {
    fn from(error: HostError) -> Self {
        let status = match &error {
            HostError::NoSuchVm { .. } => StatusCode::NOT_FOUND,
            HostError::Refused { .. }
            | HostError::Busy(_)
            | HostError::HostBusy
            | HostError::OrdersBusy
            | HostError::InUse { .. }
            | HostError::FrozenInStore { .. }
            | HostError::Stuck { .. }
            | HostError::Unkillable { .. }
            | HostError::NoPowerOff { .. } => StatusCode::CONFLICT,
            _ => StatusCode::INTERNAL_SERVER_ERROR,
        };
        Self::new(status, with_cause(&error))
    }
}

impl From<Ask> for Problem {
    fn from(error: Ask) -> Self {
        match error {
            Ask::Quiet(quiet) => {
                Self::for_now(StatusCode::SERVICE_UNAVAILABLE, quiet.to_string(), 5)
            }
            Ask::Broken(broken) => broken.into(),
        }
    }
}

impl From<Broken> for Problem {
    fn from(error: Broken) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, error.to_string())
    }
}

/// One VM.
#[derive(Debug, Serialize)]
pub struct Vm<'a> {
    /// What is known of it.
    #[serde(flatten)]
    pub row: &'a VmRow,
    /// Its definition, where there is a readable one.
    pub definition: Option<&'a VmConfig>,
    /// Why its definition cannot be read, if so.
    pub definition_error: Option<String>,
    /// What the supervisor has in mind with it.
    pub supervision: Supervision,
    /// The agent in its guest, where something is known of it.
    pub agent: Option<Agent>,
}

/// What the supervisor has in mind with a VM.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Supervision {
    /// It is to be started since the host's start.
    pub due: bool,
    /// Starts in a row.
    pub restarts: u32,
    /// In so many seconds it is started again.
    pub starts_in_s: Option<f64>,
    /// It is not started again, because it was too often.
    pub given_up: bool,
}

/// The VMs.
#[derive(Debug, Serialize)]
pub struct Vms<'a> {
    /// In order of their names.
    pub vms: Vec<Vm<'a>>,
    /// Why the store cannot be read, if so.
    pub store_trouble: Option<&'a str>,
}

/// The host, and its daemon.
#[derive(Clone, Debug, Serialize)]
pub struct HostAnswer {
    /// The daemon's release.
    pub version: &'static str,
    /// The running kernel.
    pub kernel: String,
    /// This boot of the host.
    pub boot_id: String,
    /// How long ago the host booted, in seconds.
    pub up_s: f64,
    /// This run of the daemon: its jobs and events count from 1.
    pub daemon: String,
    /// How long ago the daemon began, in seconds.
    pub daemon_up_s: f64,
    /// Somebody is in the midst of a reboot or a resume of all VMs.
    pub quiet: bool,
    /// Why the policy reboots nothing until somebody says so, if so.
    pub policy_halted: Option<String>,
    /// How many VMs there are in each state, where they can be looked at.
    pub vms: Option<BTreeMap<&'static str, usize>>,
}

/// Is the machine ready?
#[derive(Debug, Serialize)]
pub struct CheckAnswer {
    /// Nothing is missing.
    pub ready: bool,
    /// The checks.
    pub checks: Vec<Check>,
}

/// Is the host ageing?
#[derive(Debug, Serialize)]
pub struct AgeAnswer {
    /// Some indicator has a trend towards its limit.
    pub ageing: bool,
    /// The looks at each.
    #[serde(flatten)]
    pub assessment: Assessment,
}

/// What a reboot would do.
#[derive(Debug, Serialize)]
pub struct VerdictAnswer {
    /// It may be begun.
    pub passes: bool,
    /// The verdict.
    #[serde(flatten)]
    pub verdict: Verdict,
}

/// The report of the last reboot.
#[derive(Debug, Serialize)]
pub struct ReportAnswer {
    /// The stamps.
    #[serde(flatten)]
    pub timeline: Timeline,
    /// The same as rows.
    pub rows: Vec<Row>,
    /// Of each VM.
    pub downtime: Vec<Downtime>,
}

/// What a reboot came to that did not leave the kernel.
#[derive(Debug, Serialize)]
pub struct Stranded {
    /// A VM that does not run.
    pub vm: VmName,
    /// Where it is.
    pub place: String,
}
