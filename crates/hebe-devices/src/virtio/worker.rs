//! The worker thread of a device.
//!
//! ```text
//!            resume                    pause, and nothing under way
//!  parked ───────────► waiting (epoll) ───────────────────────────► parked
//!                       │        ▲
//!                  kick, input   │ done
//!                       ▼        │
//!                  serving, under the engine's lock
//! ```
//! Owner of the device and its queues is [`Engine`], behind one lock. A
//! parked worker waits on a condition variable and touches nothing; so does
//! everybody who does not hold the engine's lock. From an order to pause on, the
//! worker begins nothing and ends what is under way; whoever gave the order
//! waits for that.
//!
//! Who pauses many asks all of them first ([`Worker::ask_to_pause`]): each worker
//! then ends what is under way and makes its disk durable beside the others.
//! ```text
//!  Open ── asked, and seen by the worker ──► Asked ── nothing under way ──► Settling ──► Settled
//! ```
//! [`Worker::pause`] takes it from wherever it is, and a resume leaves it open again.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::JoinHandle;

use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::device::{Device, Next, Queues, Stop};
use super::shared::{Shared, lock};

const TOKEN_WAKE: u64 = u64::MAX;
const TOKEN_BACKEND: u64 = u64::MAX - 1;
const EVENTS_MAX: usize = 8;

/// The device and its queues.
pub(crate) struct Engine {
    pub(crate) device: Box<dyn Device>,
    pub(crate) queues: Queues,
    /// The driver is ready, and the device has not stopped.
    pub(crate) active: bool,
    /// Neither paused nor about to be.
    pub(crate) running: bool,
    /// How far a pause is that was asked for and not waited for.
    drain: Drain,
    /// There is no worker any more.
    ended: bool,
}

/// See the module's documentation.
#[derive(Debug, Default)]
enum Drain {
    #[default]
    Open,
    Asked,
    Settling,
    Settled(io::Result<()>),
}

#[derive(Default)]
struct Wish {
    run: bool,
    exit: bool,
}

struct Inner {
    wish: Mutex<Wish>,
    wished: Condvar,
    engine: Mutex<Engine>,
    /// Nothing is under way any more, or nobody is there to end it.
    quiet: Condvar,
    /// A pause is asked for, and the worker has not seen it. Counts in `hold`.
    asked: AtomicBool,
    /// How many want the engine; the worker makes way between two requests. One
    /// that got it says nothing for the others: a guest that resets its device
    /// without end would have the worker go on over who pauses it.
    hold: Arc<AtomicUsize>,
    wake: EventFd,
    kicks: Vec<EventFd>,
    epoll: OwnedFd,
    shared: Arc<Shared>,
}

static FIRST: OnceLock<fn()> = OnceLock::new();

/// What each device's thread that begins from now on does first of all, such as
/// to confine itself. The first word counts.
pub fn on_worker_start(first: fn()) {
    let _ = FIRST.set(first);
}

/// Handle of a device's worker. Dropping it ends the thread.
pub(crate) struct Worker {
    inner: Arc<Inner>,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    /// Starts a worker, parked.
    pub(crate) fn start(device: Box<dyn Device>, shared: Arc<Shared>) -> io::Result<Self> {
        let hold = Arc::new(AtomicUsize::new(0));
        let queues = Queues::new(device.queues(), Arc::clone(&shared), Arc::clone(&hold));
        let wake = EventFd::new(EFD_NONBLOCK)?;
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        let watch = |fd: &EventFd, token| {
            // SAFETY: the eventfd outlives this call.
            let fd = unsafe { BorrowedFd::borrow_raw(fd.as_raw_fd()) };
            epoll::add(&epoll, fd, EventData::new_u64(token), EventFlags::IN)
        };
        watch(&wake, TOKEN_WAKE)?;
        let mut kicks = Vec::new();
        for index in 0..device.queues() {
            let kick = EventFd::new(EFD_NONBLOCK)?;
            watch(&kick, index as u64)?;
            kicks.push(kick);
        }
        let name = format!("virtio-{}", shared.slot);
        let inner = Arc::new(Inner {
            wish: Mutex::default(),
            wished: Condvar::new(),
            engine: Mutex::new(Engine {
                device,
                queues,
                active: false,
                running: false,
                drain: Drain::Open,
                ended: false,
            }),
            quiet: Condvar::new(),
            asked: AtomicBool::new(false),
            hold,
            wake,
            kicks,
            epoll,
            shared,
        });
        let body = Arc::clone(&inner);
        let thread = hebe_sys::thread::named(name).spawn(move || {
            if let Some(first) = FIRST.get() {
                first();
            }
            // A fault of ours must not take the VM down, nor go unseen.
            if catch_unwind(AssertUnwindSafe(|| body.run())).is_err() {
                body.shared.stop("internal error: the worker panicked");
            }
            body.end();
        })?;
        Ok(Self {
            inner,
            thread: Some(thread),
        })
    }

    /// The doorbells, one per queue.
    pub(crate) fn kicks(&self) -> &[EventFd] {
        &self.inner.kicks
    }

    /// Rings a queue's doorbell.
    pub(crate) fn kick(&self, queue: usize) {
        if let Some(kick) = self.inner.kicks.get(queue) {
            // Fails only when the counter is full: it is readable anyway.
            let _ = kick.write(1);
        }
    }

    /// The engine, with no request in hand; some may be under way. The worker
    /// makes way after the request in hand.
    pub(crate) fn engine(&self) -> MutexGuard<'_, Engine> {
        self.inner.hold.fetch_add(1, Ordering::AcqRel);
        let engine = lock(&self.inner.engine);
        self.inner.hold.fetch_sub(1, Ordering::AcqRel);
        engine
    }

    /// Has the worker end what is under way, begin nothing, and make its disk
    /// durable, and does not wait for it. [`Worker::pause`] or
    /// [`Worker::resume`] has to follow.
    pub(crate) fn ask_to_pause(&self) {
        // Also between two requests of a queue.
        self.inner.hold.fetch_add(1, Ordering::AcqRel);
        if self.inner.asked.swap(true, Ordering::AcqRel) {
            self.inner.hold.fetch_sub(1, Ordering::AcqRel);
        }
        let _ = self.inner.wake.write(1);
    }

    /// Parks the worker. After this nothing is in flight and nothing starts. What
    /// came of making the disk durable, where that was asked for before and the
    /// worker did it; it is up to the caller otherwise.
    pub(crate) fn pause(&self) -> (MutexGuard<'_, Engine>, Option<io::Result<()>>) {
        let mut engine = self.engine();
        self.inner.take_asked();
        engine.running = false;
        let busy = |engine: &Engine| {
            engine.device.under_way() > 0 || matches!(engine.drain, Drain::Settling)
        };
        while busy(&engine) && !engine.ended {
            let quiet = self.inner.quiet.wait(engine);
            engine = quiet.unwrap_or_else(PoisonError::into_inner);
        }
        lock(&self.inner.wish).run = false;
        let _ = self.inner.wake.write(1);
        let settled = match std::mem::take(&mut engine.drain) {
            Drain::Settled(result) => Some(result),
            Drain::Open | Drain::Asked | Drain::Settling => None,
        };
        (engine, settled)
    }

    /// Lets the worker go on, and makes it look at every queue: kicks that
    /// were lost with the old VMM are covered by that.
    pub(crate) fn resume(&self) {
        {
            let mut engine = self.engine();
            self.inner.take_asked();
            engine.drain = Drain::Open;
            engine.running = true;
            engine.device.resumed();
        }
        lock(&self.inner.wish).run = true;
        self.inner.wished.notify_all();
        for queue in 0..self.inner.kicks.len() {
            self.kick(queue);
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        lock(&self.inner.wish).exit = true;
        self.inner.wished.notify_all();
        let _ = self.inner.wake.write(1);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Engine {
    /// Paused, or about to be, with nothing under way.
    fn is_drained(&self) -> bool {
        !self.running && self.device.under_way() == 0
    }
}

impl Inner {
    fn run(&self) {
        let mut watched = None;
        while self.wanted() {
            if let Err(e) = self.round(&mut watched) {
                self.shared.stop(&format!("the worker cannot wait: {e}"));
                return;
            }
        }
    }

    /// Waits while parked; false when the worker is to end.
    fn wanted(&self) -> bool {
        let mut wish = lock(&self.wish);
        while !wish.run && !wish.exit {
            wish = self
                .wished
                .wait(wish)
                .unwrap_or_else(PoisonError::into_inner);
        }
        !wish.exit
    }

    fn round(&self, watched: &mut Option<RawFd>) -> io::Result<()> {
        let mut events = [MaybeUninit::<Event>::uninit(); EVENTS_MAX];
        let ready: Vec<u64> = match epoll::wait(&self.epoll, &mut events, None) {
            Ok((ready, _)) => ready.iter().map(|event| event.data.u64()).collect(),
            Err(rustix::io::Errno::INTR) => return Ok(()),
            Err(e) => return Err(e.into()),
        };
        if ready.contains(&TOKEN_WAKE) {
            let _ = self.wake.read();
        }
        let mut engine = lock(&self.engine);
        if self.take_asked() {
            engine.running = false;
            engine.drain = Drain::Asked;
        }
        if !engine.is_drained() {
            for token in ready {
                if token != TOKEN_WAKE {
                    self.serve(&mut engine, token);
                }
            }
            self.watch_backend(&engine, watched)?;
        }
        if engine.is_drained() {
            self.settle(engine);
            return Ok(());
        }
        drop(engine);
        // Whoever waits for the engine must not lose the race for its lock
        // against the next round.
        if self.hold.load(Ordering::Acquire) > 0 {
            std::thread::yield_now();
        }
        Ok(())
    }

    fn serve(&self, engine: &mut Engine, token: u64) {
        // Input goes into queue 0 of every device that has any.
        let index = if token == TOKEN_BACKEND {
            0
        } else {
            token as usize
        };
        let kick = &self.kicks[index];
        if token != TOKEN_BACKEND {
            // Before the work: a kick that comes during it is not lost.
            let _ = kick.read();
        }
        let ends = token == TOKEN_BACKEND && engine.device.under_way() > 0;
        let serves = engine.active && engine.running;
        // A kick that comes while a pause waits is made good by the resume.
        if !ends && !serves {
            return;
        }
        let Engine { device, queues, .. } = &mut *engine;
        let result = if token == TOKEN_BACKEND {
            device.backend_ready(queues)
        } else {
            device.kicked(index, queues)
        };
        for again in queues.take_again() {
            let _ = self.kicks[again].write(1);
        }
        match result {
            Ok(Next::Wait) => {}
            Ok(Next::Again) => {
                let _ = kick.write(1);
            }
            Err(stop) => self.stop(engine, &stop),
        }
        if engine.is_drained() {
            self.quiet.notify_all();
        }
    }

    /// Whether a pause was asked for that nobody has seen; now it is seen.
    fn take_asked(&self) -> bool {
        let asked = self.asked.swap(false, Ordering::AcqRel);
        if asked {
            self.hold.fetch_sub(1, Ordering::AcqRel);
        }
        asked
    }

    /// Makes the disk durable if that was asked for, and parks. Nobody waits for the
    /// engine meanwhile.
    fn settle(&self, mut engine: MutexGuard<'_, Engine>) {
        if !matches!(engine.drain, Drain::Asked) {
            return;
        }
        engine.drain = Drain::Settling;
        let disk = engine.device.disk();
        drop(engine);
        let result = disk.map_or(Ok(()), |disk| disk.settle());
        let mut engine = lock(&self.engine);
        // A resume that came meanwhile wants none of it.
        if matches!(engine.drain, Drain::Settling) {
            engine.drain = Drain::Settled(result);
            lock(&self.wish).run = false;
            self.quiet.notify_all();
        }
    }

    fn stop(&self, engine: &mut Engine, stop: &Stop) {
        engine.active = false;
        engine.device.forget();
        self.shared.stop(&stop.to_string());
    }

    /// The worker's last act, on its own thread.
    fn end(&self) {
        let mut engine = lock(&self.engine);
        engine.device.end();
        engine.ended = true;
        self.quiet.notify_all();
    }

    /// Waits on the back end only while the device can use what it brings:
    /// level-triggered input that nobody takes would spin.
    fn watch_backend(&self, engine: &Engine, watched: &mut Option<RawFd>) -> io::Result<()> {
        let listens = engine.active || engine.device.under_way() > 0;
        let wanted = engine.device.backend().filter(|_| listens);
        if wanted == *watched {
            return Ok(());
        }
        if let Some(fd) = watched.take() {
            // SAFETY: the device keeps its back end open as long as it lives,
            // and the engine's lock keeps the device.
            let fd = unsafe { BorrowedFd::borrow_raw(fd) };
            epoll::delete(&self.epoll, fd)?;
        }
        if let Some(fd) = wanted {
            // SAFETY: as above.
            let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
            let data = EventData::new_u64(TOKEN_BACKEND);
            epoll::add(self.epoll.as_fd(), borrowed, data, EventFlags::IN)?;
            *watched = Some(fd);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::{Duration, Instant};

    use hebe_state::v2::devices::DeviceV2;

    use super::super::device::Counters;
    use super::super::rng::Rng;
    use super::super::shared::Config;
    use super::*;
    use crate::msix::Msix;
    use crate::{MsiVector, MsixBackend};

    struct NoInterrupts;

    impl MsixBackend for NoInterrupts {
        fn new_vector(&self) -> io::Result<Arc<dyn MsiVector>> {
            Err(io::ErrorKind::Unsupported.into())
        }
    }

    fn shared(queues: usize) -> Arc<Shared> {
        let msix = Msix::new(0, &NoInterrupts).expect("no vectors");
        let config = Config {
            bytes: Vec::new(),
            generation: 0,
        };
        Arc::new(Shared::new(1, queues, msix, config, Arc::new(())))
    }

    /// Says that it has a request in hand, and ends it when it is told.
    struct Slow {
        begun: mpsc::Sender<()>,
        end: mpsc::Receiver<()>,
    }

    impl Device for Slow {
        fn features(&self) -> u64 {
            0
        }

        fn queues(&self) -> usize {
            1
        }

        fn config(&self) -> Vec<u8> {
            Vec::new()
        }

        fn kicked(&mut self, _queue: usize, _queues: &mut Queues) -> Result<Next, Stop> {
            let _ = self.begun.send(());
            let _ = self.end.recv();
            Ok(Next::Wait)
        }

        fn counters(&self) -> Counters {
            Counters::default()
        }

        fn save(&self) -> io::Result<DeviceV2> {
            Err(io::ErrorKind::Unsupported.into())
        }
    }

    /// A worker with a request in hand, which ends by a word.
    fn busy() -> (Worker, mpsc::Receiver<()>, mpsc::Sender<()>) {
        let (begun, begins) = mpsc::channel();
        let (ends, end) = mpsc::channel();
        let worker = Worker::start(Box::new(Slow { begun, end }), shared(1)).expect("a worker");
        worker.engine().active = true;
        worker.resume();
        begins.recv().expect("a kick by the resume");
        (worker, begins, ends)
    }

    fn wait_until(what: &str, ready: impl Fn() -> bool) {
        let until = Instant::now() + Duration::from_secs(120);
        while !ready() {
            assert!(Instant::now() < until, "{what}");
            std::thread::yield_now();
        }
    }

    fn is_settled(worker: &Worker) -> bool {
        matches!(lock(&worker.inner.engine).drain, Drain::Settled(Ok(())))
    }

    #[test]
    fn those_that_are_asked_first_pause_side_by_side() {
        let (first, _, first_ends) = busy();
        let (second, _, second_ends) = busy();
        for worker in [&first, &second] {
            // Twice is once.
            worker.ask_to_pause();
            worker.ask_to_pause();
        }
        second_ends.send(()).expect("it waits");
        wait_until("the second waits for the first", || is_settled(&second));
        assert!(first.inner.asked.load(Ordering::SeqCst), "it is not done");
        first_ends.send(()).expect("it waits");
        wait_until("the first does not end", || is_settled(&first));
        for worker in [&first, &second] {
            let (engine, settled) = worker.pause();
            assert!(!engine.running && matches!(settled, Some(Ok(()))));
            drop(engine);
            assert_eq!(worker.inner.hold.load(Ordering::SeqCst), 0);
            // Paused twice is paused once; what came between is the caller's.
            assert!(worker.pause().1.is_none());
        }
    }

    #[test]
    fn who_was_asked_and_is_not_paused_goes_on() {
        for settles in [false, true] {
            let (worker, begins, ends) = busy();
            worker.ask_to_pause();
            if settles {
                ends.send(()).expect("it waits");
                wait_until("it does not end", || is_settled(&worker));
            }
            std::thread::scope(|scope| {
                // It waits for the request in hand.
                scope.spawn(|| worker.resume());
                if !settles {
                    wait_until("nobody waits", || {
                        worker.inner.hold.load(Ordering::SeqCst) == 2
                    });
                    ends.send(()).expect("it waits");
                }
            });
            begins.recv().expect("it goes on");
            ends.send(()).expect("it waits");
            let (engine, _) = worker.pause();
            assert!(!engine.running);
            drop(engine);
            assert_eq!(worker.inner.hold.load(Ordering::SeqCst), 0);
        }
    }

    #[test]
    fn the_worker_makes_way_until_all_who_wait_have_had_the_engine() {
        let worker = Worker::start(Box::new(Rng::default()), shared(1)).expect("a worker");
        let held = || worker.inner.hold.load(Ordering::SeqCst);
        let first = worker.engine();
        std::thread::scope(|scope| {
            let (has_it, got) = mpsc::channel();
            let mut goes_on = Vec::new();
            for _ in 0..2 {
                let (go_on, wait) = mpsc::channel::<()>();
                goes_on.push(go_on);
                let (has_it, worker) = (has_it.clone(), &worker);
                scope.spawn(move || {
                    let engine = worker.engine();
                    let _ = has_it.send(());
                    let _ = wait.recv();
                    drop(engine);
                });
            }
            let until = Instant::now() + Duration::from_secs(120);
            while held() < 2 {
                assert!(Instant::now() < until, "nobody waits");
                std::thread::yield_now();
            }
            drop(first);
            got.recv().expect("one has it");
            assert_eq!(held(), 1, "the other waits still");
            drop(goes_on);
            got.recv().expect("the other has it");
        });
        assert_eq!(held(), 0);
    }
}
