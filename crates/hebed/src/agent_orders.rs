//! Orders for the agents in guests, as `hebe agent` gives them.
//!
//! No jobs: a client waits for the answer, which comes in time whatever the
//! guest does. For a freeze that time counts, and a program's output is for who
//! asked alone. They are carried out also for a client that went away, and take
//! no turn from orders for VMs.

use std::fmt;

use axum::Json;
use axum::extract::{Extension, Path, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use hebe_agent::{ClientError, Order};
use hebe_host::agent::{self, AgentError};
use serde::Deserialize;

use crate::answers::Problem;
use crate::app::App;
use crate::limits::Peer;
use crate::log;
use crate::orders::{Body, NoBody};
use crate::routes::{Answer, Named};

/// How long file systems stay frozen, in seconds, where nobody says otherwise.
const FREEZE_S: u32 = 10;
/// How long a program may take, in seconds, where nobody says otherwise.
const EXEC_S: u32 = 60;

impl From<AgentError> for Problem {
    fn from(error: AgentError) -> Self {
        let status = match &error {
            AgentError::NotUp { .. } => StatusCode::CONFLICT,
            AgentError::EndUnknown { .. } => StatusCode::BAD_GATEWAY,
            AgentError::Agent { error, .. } => match error {
                ClientError::Impossible(_) => StatusCode::BAD_REQUEST,
                ClientError::NoSocket(_) | ClientError::Refused(_) => StatusCode::CONFLICT,
                ClientError::NoAgent | ClientError::Senseless(_) | ClientError::Line(_) => {
                    StatusCode::BAD_GATEWAY
                }
            },
        };
        Self::new(status, error.to_string())
    }
}

/// Tells the agent in a VM to do something, and gives its answer.
async fn of_agent(
    app: &App,
    name: Named,
    what: impl fmt::Display,
    order: impl FnOnce() -> Order + Send + 'static,
) -> Answer<Response> {
    let Path(name) = name?;
    let survey = app.engine.survey().await?;
    let row = survey.row(app.engine.host(), &name)?.clone();
    log::info(format!("{name}: its agent is told: {what}"));
    let told = app
        .engine
        .speak(move |host| agent::order(host, &row, order));
    let done = told.await?.ok_or_else(|| {
        let text = "too many agents are being told something: wait until some have answered";
        Problem::for_now(StatusCode::TOO_MANY_REQUESTS, text, 5)
    })??;
    Ok(Json(agent::Answer { name: &name, done }).into_response())
}

/// Whether its numbers are within their bounds.
fn sound(order: Order) -> Answer<Order> {
    match order.check() {
        Ok(()) => Ok(order),
        Err(why) => Err(Problem::new(StatusCode::BAD_REQUEST, why)),
    }
}

/// `GET /v1/vms/{name}/agent`: what it answers now.
pub async fn ping(State(app): State<App>, name: Named) -> Answer<Response> {
    of_agent(&app, name, "ping", || Order::Ping).await
}

/// `POST /v1/vms/{name}/agent/time`.
pub async fn time(
    State(app): State<App>,
    name: Named,
    Body(NoBody {}): Body<NoBody>,
) -> Answer<Response> {
    let order = || Order::Time {
        realtime_ns: hebe_sys::clock::stamp_now().realtime_ns,
    };
    of_agent(&app, name, "time", order).await
}

/// What `freeze` takes.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct FreezeBody {
    /// They thaw by themselves after so many seconds.
    for_s: u32,
}

impl Default for FreezeBody {
    fn default() -> Self {
        Self { for_s: FREEZE_S }
    }
}

/// `POST /v1/vms/{name}/agent/freeze`.
pub async fn freeze(
    State(app): State<App>,
    name: Named,
    Body(FreezeBody { for_s }): Body<FreezeBody>,
) -> Answer<Response> {
    let order = sound(Order::Freeze { for_s })?;
    of_agent(&app, name, "freeze", || order).await
}

/// `POST /v1/vms/{name}/agent/thaw`.
pub async fn thaw(
    State(app): State<App>,
    name: Named,
    Body(NoBody {}): Body<NoBody>,
) -> Answer<Response> {
    of_agent(&app, name, "thaw", || Order::Thaw).await
}

/// What `shutdown` takes.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ShutdownBody {
    /// Boot again.
    reboot: bool,
}

/// `POST /v1/vms/{name}/agent/shutdown`.
pub async fn shutdown(
    State(app): State<App>,
    name: Named,
    Body(ShutdownBody { reboot }): Body<ShutdownBody>,
) -> Answer<Response> {
    of_agent(&app, name, "shutdown", move || Order::Shutdown { reboot }).await
}

/// What `exec` takes.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ExecBody {
    /// The program, and its arguments.
    words: Vec<String>,
    /// It is killed after so many seconds.
    for_s: u32,
}

impl Default for ExecBody {
    fn default() -> Self {
        Self {
            words: Vec::new(),
            for_s: EXEC_S,
        }
    }
}

/// `POST /v1/vms/{name}/agent/exec`.
pub async fn exec(
    State(app): State<App>,
    Extension(peer): Extension<Peer>,
    name: Named,
    Body(ExecBody { words, for_s }): Body<ExecBody>,
) -> Answer<Response> {
    if !peer.may_run_programs(app.allow_exec) {
        let text = "only root on this host may run programs in guests: start hebed with --allow-exec for all who may give it orders, or use `hebe agent`";
        return Err(Problem::new(StatusCode::FORBIDDEN, text));
    }
    let order = sound(Order::Exec { words, for_s })?;
    of_agent(&app, name, "exec", || order).await
}
