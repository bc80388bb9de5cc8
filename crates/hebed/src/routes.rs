//! The API. `docs/openapi.json` describes it; a test compares the two.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::rejection::{JsonRejection, PathRejection, QueryRejection};
use axum::extract::{Path, Query, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::middleware;
use axum::response::sse::{self, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodRouter, get, post};
use axum::{Json, Router};
use hebe_flow::life::Order;
use hebe_host::ageing::{path_below, read as read_samples};
use hebe_host::check::host_check;
use hebe_host::listing::{Survey, VmRow, with_cause};
use hebe_host::preflight::Level;
use hebe_host::report::complete_report;
use hebe_host::stores::StoreView;
use hebe_host::{Host, files, gantt, ops};
use hebe_policy::ageing::{Look, LookError, Period, assess};
use hebe_types::{VmId, VmName};
use serde::{Deserialize, Serialize};
use tokio_stream::wrappers::BroadcastStream;
use tokio_stream::wrappers::errors::BroadcastStreamRecvError;
use tokio_stream::{Stream, StreamExt};

use crate::answers::{AgeAnswer, CheckAnswer, HostAnswer, Problem, ReportAnswer, Vm, Vms};
use crate::app::App;
use crate::jobs::Job;
use crate::{agent_orders, limits, metrics, orders, policy};

/// How this API is described.
pub const OPENAPI: &str = include_str!("../../../docs/openapi.json");
/// Lines of a console or log, if not asked for otherwise.
const LINES: usize = 200;
/// Most lines of one.
const LINES_MAX: usize = 1000;
/// A sign of life to those who listen.
const ALIVE_EVERY: Duration = Duration::from_secs(15);

/// What a handler gives back.
pub type Answer<T> = Result<T, Problem>;

/// A route: its methods as OpenAPI names them, its path, what it does.
pub type Route = (&'static [&'static str], &'static str, MethodRouter<App>);

/// Every route there is.
pub fn routes() -> Vec<Route> {
    vec![
        (&["get"], "/", get(page)),
        (&["get"], "/metrics", get(metrics_text)),
        (&["get"], "/v1/openapi.json", get(openapi)),
        (&["get"], "/v1/host", get(host)),
        (&["get"], "/v1/host/check", get(check)),
        (&["get"], "/v1/host/age", get(age)),
        (&["get"], "/v1/vms", get(vms)),
        (&["get"], "/v1/vms/{name}", get(vm)),
        (&["get"], "/v1/vms/{name}/console", get(console)),
        (&["get"], "/v1/vms/{name}/log", get(vmm_log)),
        (&["post"], "/v1/vms/{name}/start", post(orders::start)),
        (&["post"], "/v1/vms/{name}/stop", post(orders::stop)),
        (&["post"], "/v1/vms/{name}/suspend", post(orders::suspend)),
        (&["post"], "/v1/vms/{name}/resume", post(orders::resume)),
        (&["get"], "/v1/vms/{name}/agent", get(agent_orders::ping)),
        (
            &["post"],
            "/v1/vms/{name}/agent/time",
            post(agent_orders::time),
        ),
        (
            &["post"],
            "/v1/vms/{name}/agent/freeze",
            post(agent_orders::freeze),
        ),
        (
            &["post"],
            "/v1/vms/{name}/agent/thaw",
            post(agent_orders::thaw),
        ),
        (
            &["post"],
            "/v1/vms/{name}/agent/shutdown",
            post(agent_orders::shutdown),
        ),
        (
            &["post"],
            "/v1/vms/{name}/agent/exec",
            post(agent_orders::exec),
        ),
        (&["post"], "/v1/resume-all", post(orders::resume_all)),
        (&["post"], "/v1/reboot", post(orders::reboot)),
        (&["post"], "/v1/reboot/preflight", post(orders::preflight)),
        (&["get"], "/v1/report", get(report)),
        (&["get"], "/v1/report.svg", get(report_svg)),
        (&["get"], "/v1/store", get(store)),
        (&["get"], "/v1/jobs", get(jobs)),
        (&["get"], "/v1/jobs/{id}", get(job)),
        (&["get"], "/v1/events", get(events)),
    ]
}

/// The whole API.
pub fn router(app: App) -> Router {
    let add = |router: Router<App>, (_, path, methods): Route| router.route(path, methods);
    routes()
        .into_iter()
        .fold(Router::new(), add)
        .fallback(nothing_there)
        .method_not_allowed_fallback(not_that_way)
        .layer(middleware::from_fn(limits::keep_to))
        .layer(middleware::map_response(marked))
        .with_state(app)
}

/// No browser guesses what an answer is, keeps it, or shows it in a frame.
async fn marked(mut response: Response) -> Response {
    let headers = response.headers_mut();
    for (name, value) in [
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::CACHE_CONTROL, "no-store"),
        (header::X_FRAME_OPTIONS, "DENY"),
        (header::REFERRER_POLICY, "no-referrer"),
        // What is no page loads nothing; a drawing has styles of its own.
        (
            header::CONTENT_SECURITY_POLICY,
            "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
        ),
    ] {
        let value = HeaderValue::from_static(value);
        headers.entry(name).or_insert(value);
    }
    response
}

async fn nothing_there() -> Problem {
    let text = "there is nothing at this path: GET /v1/openapi.json lists what there is";
    Problem::new(StatusCode::NOT_FOUND, text)
}

async fn not_that_way() -> Problem {
    let text = "this path takes another method: see the Allow header";
    Problem::new(StatusCode::METHOD_NOT_ALLOWED, text)
}

impl From<PathRejection> for Problem {
    fn from(error: PathRejection) -> Self {
        Self::new(StatusCode::BAD_REQUEST, error.body_text())
    }
}

impl From<QueryRejection> for Problem {
    fn from(error: QueryRejection) -> Self {
        Self::new(StatusCode::BAD_REQUEST, error.body_text())
    }
}

impl From<JsonRejection> for Problem {
    fn from(error: JsonRejection) -> Self {
        Self::new(error.status(), error.body_text())
    }
}

/// A VM's name in a path.
pub type Named = Result<Path<VmName>, PathRejection>;

/// The page. Its script and its styles stand in it, and run by a number that is
/// another one each time: what a guest's or a VM's words may bring in does not
/// have it.
async fn page() -> Answer<Response> {
    let nonce = nonce().ok_or_else(|| {
        let text = "this kernel has no random numbers yet: try again";
        Problem::for_now(StatusCode::SERVICE_UNAVAILABLE, text, 1)
    })?;
    let policy = format!(
        "default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    );
    let text = include_str!("page.html").replace("NONCE", &nonce);
    let mut response = text.into_response();
    let headers = response.headers_mut();
    let kind = HeaderValue::from_static("text/html; charset=utf-8");
    headers.insert(header::CONTENT_TYPE, kind);
    if let Ok(policy) = HeaderValue::from_str(&policy) {
        headers.insert(header::CONTENT_SECURITY_POLICY, policy);
    }
    Ok(response)
}

fn nonce() -> Option<String> {
    let mut bytes = [0; 16];
    let flags = rustix::rand::GetRandomFlags::empty();
    let count = rustix::rand::getrandom(&mut bytes, flags).ok()?;
    (count == bytes.len()).then(|| bytes.iter().map(|b| format!("{b:02x}")).collect())
}

async fn openapi() -> Response {
    let kind = HeaderValue::from_static("application/json");
    ([(header::CONTENT_TYPE, kind)], OPENAPI).into_response()
}

async fn metrics_text(State(app): State<App>) -> Answer<Response> {
    // A reboot is no reason to have no figures at all.
    let survey = app.engine.survey().await.ok();
    let quiet = survey.is_none();
    let figures = app
        .engine
        .read(move |host| metrics::host_figures(host, quiet))
        .await?;
    let text = metrics::text(&app, survey.as_deref(), &figures);
    let kind = HeaderValue::from_static(metrics::CONTENT_TYPE);
    Ok(([(header::CONTENT_TYPE, kind)], text).into_response())
}

async fn host(State(app): State<App>) -> Answer<Json<HostAnswer>> {
    let policy_halted = app.engine.read(policy::halted).await?;
    let survey = app.engine.survey().await.ok();
    let count = |survey: Arc<Survey>| {
        let mut counts = BTreeMap::new();
        for row in survey.rows.values() {
            *counts.entry(row.state.as_str()).or_insert(0) += 1;
        }
        counts
    };
    let system = &app.engine.host().system;
    Ok(Json(HostAnswer {
        version: env!("CARGO_PKG_VERSION"),
        kernel: system.release(),
        boot_id: VmId(system.boot_id()).to_string(),
        up_s: hebe_sys::proc::since_boot_ns() as f64 / 1e9,
        daemon: app.id.clone(),
        daemon_up_s: app.began.elapsed().as_secs_f64(),
        quiet: app.engine.is_quiet(),
        policy_halted,
        vms: survey.map(count),
    }))
}

async fn check(State(app): State<App>) -> Answer<Json<CheckAnswer>> {
    app.engine.unless_quiet()?;
    let checks = app.engine.read(host_check).await?;
    let ready = checks.iter().all(|check| check.level != Level::Fail);
    Ok(Json(CheckAnswer { ready, checks }))
}

/// As `hebe host age` takes them.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct AgeQuery {
    #[serde(default = "a_day")]
    period: String,
    #[serde(default = "error_rate")]
    error_rate: f64,
    #[serde(default = "confidence")]
    confidence: f64,
}

fn a_day() -> String {
    "1d".into()
}

fn error_rate() -> f64 {
    0.05
}

fn confidence() -> f64 {
    0.95
}

async fn age(
    State(app): State<App>,
    query: Result<Query<AgeQuery>, QueryRejection>,
) -> Answer<Json<AgeAnswer>> {
    let Query(query) = query?;
    let bad = |text: String| Problem::new(StatusCode::BAD_REQUEST, text);
    let period: Result<Period, _> = query.period.parse();
    let Period(period) = period.map_err(|e| bad(with_cause(&e)))?;
    let look = Look {
        period,
        error_rate: query.error_rate,
        confidence: query.confidence,
    };
    let assessed = app.engine.read(move |host| {
        let samples = read_samples(&path_below(&host.layout.state));
        let samples =
            samples.map_err(|e| Problem::new(StatusCode::INTERNAL_SERVER_ERROR, with_cause(&e)))?;
        assess(&samples, host.system.boot_id(), look).map_err(|e| match e {
            LookError::NoSamples => Problem::new(StatusCode::NOT_FOUND, e.to_string()),
            _ => bad(e.to_string()),
        })
    });
    let assessment = assessed.await??;
    let ageing = assessment.soonest().is_some();
    Ok(Json(AgeAnswer { ageing, assessment }))
}

fn described<'a>(app: &App, survey: &'a Survey, row: &'a VmRow) -> Vm<'a> {
    let definition = survey.definitions.get(&row.name);
    Vm {
        row,
        definition: definition.and_then(|d| d.as_ref().ok()),
        definition_error: definition.and_then(|d| d.as_ref().err().map(ToString::to_string)),
        supervision: app.supervision(&row.name),
        agent: app.agents().of(&row.name, row.state),
    }
}

async fn vms(State(app): State<App>) -> Answer<Response> {
    let survey = app.engine.survey().await?;
    let vms = survey
        .rows
        .values()
        .map(|row| described(&app, &survey, row));
    let answer = Vms {
        vms: vms.collect(),
        store_trouble: survey.store_trouble.as_deref(),
    };
    Ok(Json(answer).into_response())
}

async fn vm(State(app): State<App>, name: Named) -> Answer<Response> {
    let Path(name) = name?;
    let survey = app.engine.survey().await?;
    let row = survey.row(app.engine.host(), &name)?;
    Ok(Json(described(&app, &survey, row)).into_response())
}

/// The VM, if there is one and `order` fits its state.
pub async fn admitted(app: &App, name: &VmName, order: Option<Order>) -> Answer<()> {
    let survey = app.engine.survey().await?;
    let row = survey.row(app.engine.host(), name)?;
    match order {
        Some(order) => Ok(ops::admit(row, order)?),
        None => Ok(()),
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct LinesQuery {
    #[serde(default)]
    lines: Option<usize>,
}

type Lines = Result<Query<LinesQuery>, QueryRejection>;

async fn console(State(app): State<App>, name: Named, query: Lines) -> Answer<Response> {
    tail(&app, name, query, "console.log").await
}

async fn vmm_log(State(app): State<App>, name: Named, query: Lines) -> Answer<Response> {
    tail(&app, name, query, "log").await
}

async fn tail(app: &App, name: Named, query: Lines, file: &'static str) -> Answer<Response> {
    let (Path(name), Query(query)) = (name?, query?);
    admitted(app, &name, None).await?;
    let lines = query.lines.unwrap_or(LINES);
    if lines > LINES_MAX {
        let text = format!("lines={lines} is too many: at most {LINES_MAX}");
        return Err(Problem::new(StatusCode::BAD_REQUEST, text));
    }
    let path = app.engine.host().layout.vm_dir(&name).join(file);
    let found = app.engine.read(move |_| files::tail(&path, lines)).await?;
    let mut text = found.join("\n");
    if !text.is_empty() {
        text.push('\n');
    }
    // Guests write what they like: it is text, and nothing else.
    let kind = HeaderValue::from_static("text/plain; charset=utf-8");
    Ok(([(header::CONTENT_TYPE, kind)], text).into_response())
}

async fn store(State(app): State<App>) -> Answer<Json<StoreView>> {
    app.engine.unless_quiet()?;
    let view = app.engine.read(|host: &Host| host.store.view()).await?;
    let view = view.map_err(|e| Problem::new(StatusCode::INTERNAL_SERVER_ERROR, with_cause(&e)))?;
    view.map(Json).ok_or_else(|| {
        let text = hebe_host::stores::StoreTrouble::None.to_string();
        Problem::new(StatusCode::NOT_FOUND, text)
    })
}

async fn last_report(app: &App) -> Answer<hebe_host::timeline::Timeline> {
    app.engine.unless_quiet()?;
    let report = app.engine.read(complete_report).await?;
    let report = report.map_err(|e| Problem::new(StatusCode::INTERNAL_SERVER_ERROR, e))?;
    report.ok_or_else(|| {
        let text = "there is no report: this host has not been rebooted by Hebe yet";
        Problem::new(StatusCode::NOT_FOUND, text)
    })
}

async fn report(State(app): State<App>) -> Answer<Json<ReportAnswer>> {
    let timeline = last_report(&app).await?;
    Ok(Json(ReportAnswer {
        rows: timeline.rows(),
        downtime: timeline.downtimes(),
        timeline,
    }))
}

async fn report_svg(State(app): State<App>) -> Answer<Response> {
    let timeline = last_report(&app).await?;
    let kind = HeaderValue::from_static("image/svg+xml");
    Ok(([(header::CONTENT_TYPE, kind)], gantt::svg(&timeline)).into_response())
}

#[derive(Serialize)]
struct JobsAnswer {
    jobs: Vec<Job>,
}

async fn jobs(State(app): State<App>) -> Response {
    let jobs = app.jobs.all();
    Json(JobsAnswer { jobs }).into_response()
}

async fn job(State(app): State<App>, id: Result<Path<u64>, PathRejection>) -> Answer<Json<Job>> {
    let Path(id) = id?;
    app.jobs.get(id).map(Json).ok_or_else(|| {
        let text = format!(
            "there is no job {id}: those of an earlier daemon are forgotten, and so are old ones; the VM itself says how it is"
        );
        Problem::new(StatusCode::NOT_FOUND, text)
    })
}

#[derive(Serialize)]
struct Hello<'a> {
    daemon: &'a str,
    jobs: Vec<Job>,
}

type Events = Sse<KeepAliveStream>;
type KeepAliveStream = std::pin::Pin<Box<dyn Stream<Item = Result<sse::Event, Infallible>> + Send>>;

async fn events(State(app): State<App>) -> Answer<Response> {
    let turn = Arc::clone(&app.listeners).try_acquire_owned();
    let turn = turn.map_err(|_| {
        let text = "too many clients listen to events: try again later";
        Problem::for_now(StatusCode::SERVICE_UNAVAILABLE, text, 10)
    })?;
    // Heard from here on, and then said how things are: nothing falls between.
    let heard = BroadcastStream::new(app.bus.listen());
    let hello = Hello {
        daemon: &app.id,
        jobs: app.jobs.all(),
    };
    let hello = serde_json::to_string(&hello).unwrap_or_default();
    let first = sse::Event::default().event("hello").data(hello);
    let more = heard.map(move |event| {
        let _turn = &turn;
        Ok(match event {
            Ok(sent) => sse::Event::default()
                .event(sent.kind)
                .id(sent.number.to_string())
                .data(&*sent.data),
            Err(BroadcastStreamRecvError::Lagged(count)) => sse::Event::default()
                .event("lost")
                .data(format!("{{\"events\":{count}}}")),
        })
    });
    let all: KeepAliveStream = Box::pin(tokio_stream::once(Ok(first)).chain(more));
    let answer: Events = Sse::new(all);
    Ok(answer
        .keep_alive(KeepAlive::new().interval(ALIVE_EVERY))
        .into_response())
}
