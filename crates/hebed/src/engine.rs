//! Everything that blocks, away from the threads that serve clients.
//!
//! Looks at the VMs are shared: a client gets one that began after it asked,
//! and clients that ask at the same time get the same one. So a thousand
//! clients cost two looks, and nobody is told what was true before.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use hebe_host::Host;
use hebe_host::listing::{self, Survey};
use tokio::sync::{Mutex, RwLock, Semaphore};

/// Questions that are answered at a time, besides looks and jobs.
const READERS: usize = 8;
/// Agents in guests that are told something at a time.
const SPEAKERS: usize = 8;
/// Jobs that are carried out at a time.
const WORKERS: usize = 32;

/// Somebody is in the midst of an order that concerns all VMs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the host is being rebooted or resumed: VMs are left alone until that is done")]
pub struct Quiet;

/// The work broke off: a fault of the daemon's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the daemon failed at it: see its log, and please report this")]
pub struct Broken;

/// Runs what blocks.
#[derive(Clone)]
pub struct Engine {
    host: Host,
    readers: Arc<Semaphore>,
    speakers: Arc<Semaphore>,
    workers: Arc<Semaphore>,
    /// Shared by all work, for as long as it may wait for children of its own.
    at_work: Arc<RwLock<()>>,
    last: Arc<Mutex<Option<Seen>>>,
    quiet: Arc<AtomicUsize>,
}

/// A look, and when it began.
type Seen = (Instant, Arc<Survey>);

/// VMs are left alone as long as it lives.
#[derive(Debug)]
pub struct KeepQuiet(Arc<AtomicUsize>);

impl Drop for KeepQuiet {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Engine {
    /// Works on this host.
    pub fn new(host: Host) -> Self {
        Self {
            host,
            readers: Arc::new(Semaphore::new(READERS)),
            speakers: Arc::new(Semaphore::new(SPEAKERS)),
            workers: Arc::new(Semaphore::new(WORKERS)),
            at_work: Arc::default(),
            last: Arc::default(),
            quiet: Arc::default(),
        }
    }

    /// The host.
    pub fn host(&self) -> &Host {
        &self.host
    }

    /// From now on nobody looks at VMs.
    pub fn keep_quiet(&self) -> KeepQuiet {
        self.quiet.fetch_add(1, Ordering::AcqRel);
        KeepQuiet(Arc::clone(&self.quiet))
    }

    /// Whether somebody is in the midst of an order for all VMs, here or in
    /// another program.
    pub fn is_quiet(&self) -> bool {
        let ours = self.quiet.load(Ordering::Acquire) > 0;
        ours || hebe_host::lock::VmLock::is_held(&self.host.layout.run.join("host"))
    }

    /// Refuses to look at anything while [`Engine::is_quiet`].
    pub fn unless_quiet(&self) -> Result<(), Ask> {
        if self.is_quiet() {
            return Err(Ask::Quiet(Quiet));
        }
        Ok(())
    }

    /// How everything is, looked at after this was asked.
    pub async fn survey(&self) -> Result<Arc<Survey>, Ask> {
        self.unless_quiet()?;
        let asked = Instant::now();
        let engine = self.clone();
        // A task of its own: a client that goes away does not end a look that
        // others wait for.
        let look = tokio::spawn(async move {
            let mut last = engine.last.lock().await;
            if let Some((began, survey)) = &*last
                && *began >= asked
            {
                return Ok(Arc::clone(survey));
            }
            let began = Instant::now();
            let host = engine.host.clone();
            let survey = engine.blocking(move || listing::survey(&host)).await?;
            let survey = Arc::new(survey);
            *last = Some((began, Arc::clone(&survey)));
            Ok(survey)
        });
        match look.await {
            Ok(found) => found.map_err(Ask::Broken),
            Err(_) => Err(Ask::Broken(Broken)),
        }
    }

    /// A question that takes a while; a few are answered at a time.
    pub async fn read<T: Send + 'static>(
        &self,
        question: impl FnOnce(&Host) -> T + Send + 'static,
    ) -> Result<T, Broken> {
        self.with(&self.readers, question).await
    }

    /// An order.
    pub async fn order<T: Send + 'static>(
        &self,
        order: impl FnOnce(&Host) -> T + Send + 'static,
    ) -> Result<T, Broken> {
        self.with(&self.workers, order).await
    }

    /// An order for an agent in a guest, which may take minutes; none where too
    /// many are under way.
    pub async fn speak<T: Send + 'static>(
        &self,
        order: impl FnOnce(&Host) -> T + Send + 'static,
    ) -> Result<Option<T>, Broken> {
        let Ok(turn) = Arc::clone(&self.speakers).try_acquire_owned() else {
            return Ok(None);
        };
        let host = self.host.clone();
        // Not as other work: this has no children, and would keep those of other
        // work from being buried.
        let work = move || {
            let _turn = turn;
            order(&host)
        };
        let done = tokio::task::spawn_blocking(work).await;
        done.map(Some).map_err(|_| Broken)
    }

    async fn with<T: Send + 'static>(
        &self,
        turns: &Arc<Semaphore>,
        work: impl FnOnce(&Host) -> T + Send + 'static,
    ) -> Result<T, Broken> {
        let turn = Arc::clone(turns).acquire_owned().await;
        let turn = turn.map_err(|_| Broken)?;
        let host = self.host.clone();
        self.blocking(move || {
            // Held by the work, not by who waits for it.
            let _turn = turn;
            work(&host)
        })
        .await
    }

    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Broken> {
        let at_work = Arc::clone(&self.at_work).read_owned().await;
        let work = move || {
            let _at_work = at_work;
            work()
        };
        tokio::task::spawn_blocking(work).await.map_err(|_| Broken)
    }

    /// Takes leave of VMMs that ended: they are this process's children, and
    /// nobody else waits for them. Not while any work may do so itself.
    pub fn bury(&self) {
        use rustix::process::{WaitOptions, wait};
        if let Ok(_nobody) = self.at_work.try_write() {
            while let Ok(Some(_)) = wait(WaitOptions::NOHANG) {}
        }
    }
}

/// Why there is no look.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Ask {
    /// [`Quiet`].
    #[error(transparent)]
    Quiet(#[from] Quiet),
    /// [`Broken`].
    #[error(transparent)]
    Broken(#[from] Broken),
}
