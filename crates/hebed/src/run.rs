//! The daemon from its first instant to its last.

use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::time::Duration;

use hebe_host::Host;
use hebe_host::listing::with_cause;
use hebe_host::lock::VmLock;
use hebe_types::counted;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::Semaphore;

use crate::agents::Asking;
use crate::app::App;
use crate::cli::Args;
use crate::routes::router;
use crate::server::{self, CONNECTIONS_MAX};
use crate::systemd::Systemd;
use crate::tls::Secure;
use crate::{log, policy, watch};

/// Threads that serve clients.
const THREADS: usize = 2;
/// Threads for what blocks.
const BLOCKING_THREADS: usize = 64;
/// How long jobs may take to end when the daemon is asked to.
const END_WAIT: Duration = Duration::from_secs(20);

/// Runs until a signal; the error is one sentence.
pub fn run(args: &Args, systemd: Systemd, handed: Vec<UnixListener>) -> Result<(), String> {
    let host = Host::here();
    let own = host.layout.run.join("hebed");
    let run_dir = &host.layout.run;
    std::fs::create_dir_all(run_dir).map_err(|e| {
        format!(
            "cannot make {}: run hebed as root, or name another directory in HEBE_RUN_DIR ({})",
            run_dir.display(),
            with_cause(&e)
        )
    })?;
    let _only_one = match VmLock::take(&own) {
        Ok(Some(lock)) => lock,
        Ok(None) => return Err("another hebed is at work on this host: stop it first".into()),
        Err(error) => {
            let text = with_cause(&error);
            return Err(format!("cannot lock {}: {text}", own.display()));
        }
    };
    let listeners = if handed.is_empty() {
        let path = args.socket.clone();
        let path = path.unwrap_or_else(|| run_dir.join("hebed.sock"));
        let listener = server::listen(&path, args.group.as_deref()).map_err(|e| with_cause(&e))?;
        log::info(format!("listens on {}", path.display()));
        vec![listener]
    } else {
        handed
    };
    let secure = match args.secure() {
        None => None,
        Some((address, files)) => {
            let secure = Secure::listen(address, &files).map_err(|e| with_cause(&e))?;
            let address = secure.address().unwrap_or(address);
            let ca = files.client_ca.display();
            log::info(format!("listens on {address}, for certificates of {ca}"));
            Some(secure)
        }
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(THREADS)
        .max_blocking_threads(BLOCKING_THREADS)
        .enable_all()
        .build()
        .map_err(|e| format!("the daemon cannot start its threads: {}", with_cause(&e)))?;
    let ended = runtime.block_on(serve(args, host, (listeners, secure), systemd));
    // Whatever still blocks may be broken off at any instant.
    runtime.shutdown_background();
    ended
}

async fn serve(
    args: &Args,
    host: Host,
    (listeners, secure): (Vec<UnixListener>, Option<Secure>),
    systemd: Systemd,
) -> Result<(), String> {
    let unheard = |e: std::io::Error| format!("signals cannot be heard: {}", with_cause(&e));
    let mut terminate = signal(SignalKind::terminate()).map_err(unheard)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(unheard)?;
    let app = App::new(host, args.allow_exec);
    let turns = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let mut servers = tokio::task::JoinSet::new();
    for listener in listeners {
        servers.spawn(server::serve(
            listener,
            router(app.clone()),
            Arc::clone(&turns),
        ));
    }
    if let Some(secure) = secure {
        servers.spawn(secure.serve(router(app.clone()), Arc::clone(&turns)));
    }
    if !args.no_samples {
        tokio::spawn(watch::sample(app.clone(), args.sample_every()));
    }
    tokio::spawn(policy::follow(app.clone(), args.look_every()));
    let systemd = Arc::new(systemd);
    systemd.say("READY=1");
    let agents = Asking::new(args.agent_every());
    let looks = watch::watch(app.clone(), args.poll(), agents, Arc::clone(&systemd));
    let watcher = tokio::spawn(looks);
    let ended = tokio::select! {
        _ = terminate.recv() => Ok(()),
        _ = interrupt.recv() => Ok(()),
        Some(error) = servers.join_next() => Err(match error {
            Ok(error) => format!("nobody can be served: {}", with_cause(&error)),
            Err(_) => "nobody can be served: the server broke off".to_owned(),
        }),
        _ = watcher => Err("the VMs are not watched any more: please report this".to_owned()),
    };
    systemd.say("STOPPING=1");
    servers.abort_all();
    let open = app.jobs.open();
    if open > 0 {
        log::info(format!(
            "under way, and may end first: {}",
            counted(open, "job")
        ));
        let _ = tokio::time::timeout(END_WAIT, app.jobs.all_ended()).await;
    }
    ended
}
