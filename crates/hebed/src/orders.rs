//! The routes that change something: each makes a job.

use std::time::Duration;

use axum::Json;
use axum::extract::rejection::JsonRejection;
use axum::extract::{Extension, FromRequest, Path, Request, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use hebe_flow::life::Order;
use hebe_host::ops::{self, ResumeFrom, ResumeOptions, StopOptions};
use hebe_host::preflight::{self, RebootOptions};
use hebe_host::reboot::{self, RebootEnd};
use hebe_host::{Host, resume_all as all};
use hebe_types::{RebootMethod, VmName};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::answers::{Problem, VerdictAnswer};
use crate::app::{App, Failed};
use crate::jobs::{Job, JobKind};
use crate::limits::Peer;
use crate::policy::without_slot;
use crate::routes::{Answer, Named, admitted};
use crate::{log, watch};

/// How long a guest has to shut down, in seconds, where nobody says otherwise.
const TIMEOUT_S: u64 = 60;
/// Longest time that a client may give it, in seconds.
const TIMEOUT_S_MAX: u64 = 3600;

/// A body of JSON; an empty one stands for all defaults.
pub struct Body<T>(pub T);

impl<T: DeserializeOwned + Default, S: Send + Sync> FromRequest<S> for Body<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, state: &S) -> Result<Self, Problem> {
        let length = axum::body::HttpBody::size_hint(request.body()).exact();
        if length == Some(0) {
            return Ok(Self(T::default()));
        }
        let read: Result<Json<T>, JsonRejection> = Json::from_request(request, state).await;
        let Json(value) = read?;
        Ok(Self(value))
    }
}

fn accepted(job: &Job) -> Response {
    let place = HeaderValue::try_from(format!("/v1/jobs/{}", job.id));
    let mut response = (StatusCode::ACCEPTED, Json(job)).into_response();
    if let Ok(place) = place {
        response.headers_mut().insert(header::LOCATION, place);
    }
    response
}

/// Orders something of one VM, after a look whether it fits.
async fn of_vm<T: Serialize + Send + 'static>(
    app: &App,
    kind: JobKind,
    name: VmName,
    fits: Option<Order>,
    order: impl FnOnce(&Host, &VmName) -> Result<T, Failed> + Send + 'static,
) -> Answer<Response> {
    admitted(app, &name, fits).await?;
    watch::ordered(app, &name);
    let vm = name.clone();
    let work = move |host: &Host, _: &(dyn Fn(&str) + Sync)| order(host, &name);
    let (job, _) = app.order(kind, Some(&vm), false, work)?;
    log::info(format!("job {}: {kind:?} of '{vm}' ordered", job.id));
    Ok(accepted(&job))
}

/// What `start` takes.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct StartBody {
    /// Also a VM that is lost, whose frozen memory is then given up.
    afresh: bool,
}

/// `POST /v1/vms/{name}/start`.
pub async fn start(
    State(app): State<App>,
    name: Named,
    Body(body): Body<StartBody>,
) -> Answer<Response> {
    let Path(name) = name?;
    let order = if body.afresh {
        Order::StartAfresh
    } else {
        Order::Start
    };
    of_vm(
        &app,
        JobKind::Start,
        name,
        Some(order),
        move |host, name| {
            let started = if body.afresh {
                ops::start_afresh(host, name)
            } else {
                ops::start(host, name)
            };
            Ok(started?)
        },
    )
    .await
}

/// What `stop` takes.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct StopBody {
    /// How long the guest has, in seconds; 0 does not ask it.
    timeout_s: u64,
    /// Power off one that does not shut down in time.
    force: bool,
}

impl Default for StopBody {
    fn default() -> Self {
        Self {
            timeout_s: TIMEOUT_S,
            force: false,
        }
    }
}

/// `POST /v1/vms/{name}/stop`.
pub async fn stop(
    State(app): State<App>,
    name: Named,
    Body(body): Body<StopBody>,
) -> Answer<Response> {
    let Path(name) = name?;
    timeout_fits(body.timeout_s)?;
    if body.timeout_s == 0 && !body.force {
        let text = "timeout_s = 0 does not ask the guest, and without force it is not powered off either: give it time, or say force";
        return Err(Problem::new(StatusCode::BAD_REQUEST, text));
    }
    let options = StopOptions {
        timeout: Duration::from_secs(body.timeout_s),
        force: body.force,
    };
    // Force ends what nothing else fits any more.
    let fits = (!body.force).then_some(Order::Stop);
    of_vm(&app, JobKind::Stop, name, fits, move |host, name| {
        Ok(ops::stop(host, name, options)?)
    })
    .await
}

fn timeout_fits(timeout_s: u64) -> Answer<()> {
    if timeout_s <= TIMEOUT_S_MAX {
        return Ok(());
    }
    let text = format!("timeout_s = {timeout_s} is too long: at most {TIMEOUT_S_MAX}");
    Err(Problem::new(StatusCode::BAD_REQUEST, text))
}

/// What takes nothing.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct NoBody {}

/// `POST /v1/vms/{name}/suspend`.
pub async fn suspend(
    State(app): State<App>,
    name: Named,
    Body(NoBody {}): Body<NoBody>,
) -> Answer<Response> {
    let Path(name) = name?;
    of_vm(
        &app,
        JobKind::Suspend,
        name,
        Some(Order::Freeze),
        |host, name| Ok(ops::suspend(host, name)?),
    )
    .await
}

/// What `resume` takes.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ResumeBody {
    from: Option<From>,
    again: bool,
    accept_changed_disk: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum From {
    Memory,
    File,
}

/// `POST /v1/vms/{name}/resume`.
pub async fn resume(
    State(app): State<App>,
    name: Named,
    Body(body): Body<ResumeBody>,
) -> Answer<Response> {
    let Path(name) = name?;
    if body.again && body.from == Some(From::Memory) {
        let text = "again is about the saved file, and from = memory gives that up: leave one out";
        return Err(Problem::new(StatusCode::BAD_REQUEST, text));
    }
    let options = ResumeOptions {
        from: body.from.map(|from| match from {
            From::Memory => ResumeFrom::Memory,
            From::File => ResumeFrom::File,
        }),
        again: body.again,
        accept_changed_disk: body.accept_changed_disk,
    };
    of_vm(&app, JobKind::Resume, name, None, move |host, name| {
        Ok(ops::resume(host, name, options)?)
    })
    .await
}

/// What `resume-all` takes.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ResumeAllBody {
    /// Boot also VMs with `autostart = true`.
    autostart: bool,
}

/// `POST /v1/resume-all`.
pub async fn resume_all(
    State(app): State<App>,
    Body(body): Body<ResumeAllBody>,
) -> Answer<Response> {
    let quiet = app.engine.keep_quiet();
    let work = move |host: &Host, _: &(dyn Fn(&str) + Sync)| {
        let _quiet = quiet;
        let began = host.system.stamp();
        Ok(all::resume_all(host, began, body.autostart)?)
    };
    let (job, _) = app.order(JobKind::ResumeAll, None, false, work)?;
    log::info(format!("job {}: all VMs are resumed", job.id));
    Ok(accepted(&job))
}

/// What a reboot takes, as `hebe reboot` does.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RebootBody {
    method: RebootMethod,
    kernel: Option<std::path::PathBuf>,
    initrd: Option<std::path::PathBuf>,
    append: Option<String>,
    cmdline: Option<String>,
    hard: bool,
    kexec: bool,
    timeout_s: Option<u64>,
    force: bool,
}

impl RebootBody {
    /// What is asked of the host, if this peer may ask it.
    fn options(self, peer: Peer) -> Answer<RebootOptions> {
        let names_kernel = self.kernel.is_some()
            || self.initrd.is_some()
            || self.append.is_some()
            || self.cmdline.is_some();
        if names_kernel && !peer.may_name_kernels() {
            let text = "only root on this host may name a kernel, an initramfs or a command line: leave them out, which boots the running kernel anew, or use `hebe reboot`";
            return Err(Problem::new(StatusCode::FORBIDDEN, text));
        }
        let bad = |text: &str| Problem::new(StatusCode::BAD_REQUEST, text);
        if self.timeout_s.is_some() && self.method != RebootMethod::Cold {
            return Err(bad(
                "timeout_s is for guests that shut down, as with method cold: leave it out",
            ));
        }
        timeout_fits(self.timeout_s.unwrap_or(0))?;
        let options = RebootOptions {
            method: self.method,
            kernel: self.kernel,
            initrd: self.initrd,
            append: self.append,
            cmdline: self.cmdline,
            hard: self.hard,
            kexec: self.kexec,
            timeout_s: self.timeout_s.unwrap_or(TIMEOUT_S),
            force: self.force,
            direct: false,
        };
        match options.contradiction() {
            Some(why) => Err(bad(why)),
            None => Ok(options),
        }
    }
}

/// `POST /v1/reboot/preflight`: what a reboot would do; nothing is changed.
pub async fn preflight(
    State(app): State<App>,
    Extension(peer): Extension<Peer>,
    Body(body): Body<RebootBody>,
) -> Answer<Json<VerdictAnswer>> {
    let options = body.options(peer)?;
    app.engine.unless_quiet()?;
    let look = move |host: &Host| preflight::preflight(host, &options, true).0;
    let verdict = app.engine.read(look).await?;
    Ok(Json(VerdictAnswer {
        passes: verdict.passes(),
        verdict,
    }))
}

/// `POST /v1/reboot`.
pub async fn reboot(
    State(app): State<App>,
    Extension(peer): Extension<Peer>,
    Body(body): Body<RebootBody>,
) -> Answer<Response> {
    let options = body.options(peer)?;
    let quiet = app.engine.keep_quiet();
    let work = move |host: &Host, say: &(dyn Fn(&str) + Sync)| {
        let _quiet = quiet;
        without_slot(host).map_err(|why| ended(RebootEnd::Refused(why), say))?;
        match reboot::reboot(host, &options, say) {
            Ok(never) => match never {},
            Err(end) => Err::<(), _>(ended(end, say)),
        }
    };
    let (job, _) = app.order(JobKind::Reboot, None, false, work)?;
    log::info(format!("job {}: a reboot of the host is ordered", job.id));
    Ok(accepted(&job))
}

fn ended(end: RebootEnd, say: &(dyn Fn(&str) + Sync)) -> Failed {
    let text = match end {
        RebootEnd::Refused(why) => format!("the reboot is refused: {why}"),
        RebootEnd::Aborted {
            why,
            stranded,
            notes,
        } => {
            for note in notes {
                say(&format!("while undoing: {note}"));
            }
            for (vm, place) in &stranded {
                say(&format!("VM '{vm}' does not run; it is {place}"));
            }
            if stranded.is_empty() {
                format!("the reboot was undone and every VM runs: {why}")
            } else {
                format!("the reboot was undone: {why}")
            }
        }
    };
    Failed { text, busy: false }
}
