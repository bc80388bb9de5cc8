//! The keeper: a small process of the new kernel that holds what the kernel
//! before handed over, until each VM has its VMM.
//!
//! A session can be retrieved once, and what was not retrieved is freed with
//! it; so whoever retrieves has to live as long as any VM is not resumed, and a
//! `hebe resume` that ends must not take VMs along. The keeper does nothing
//! else: it retrieves, listens, gives files out, lets go on order, and ends
//! when it holds nothing more. It never maps guest RAM.
//!
//! ```text
//! hebe resume ──starts──▶ keeper: listens, reads the list, says on its stdout how many,
//!                                 retrieves them all, and serves meanwhile:
//!   list ─▶ what there is and what is awaited
//!   take SEGMENT ─▶ its files, once they have arrived    release SEGMENT ─▶ let go
//! ```
//! So each VM is resumed as soon as its own memory is there.
//!
//! From its first retrieve to its last release nothing may end it but SIGKILL:
//! it does not obey SIGTERM, a client or a starter that is gone costs it
//! nothing, and whatever it needs is open before.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::io::{self, Write};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use hebe_api::{fits_a_frame, read_frame, write_frame};
use hebe_store::SegmentSpec;
use hebe_store::luo::{self, Arrival, ArrivedHost, ArrivedVm, Lost};
use hebe_sys::fdstore::Notify;
use hebe_sys::luo::{Adopted, Handed, LuoError, Orchestrator};
use hebe_sys::{fdpass, proc};
use hebe_types::{ByteSize, SegmentId, VmId, VmName};
use serde::{Deserialize, Serialize};

use super::arrivals::{ArrivalNote, Arrivals};
use crate::host::Host;
use crate::listing::with_cause;
use crate::stores::{ExecView, SegmentView};

/// Segments of a store have smaller numbers.
pub const FIRST_KEPT: u32 = 1000;
const _: () = assert!(FIRST_KEPT >= luo::VMS_MAX);
/// VMs that are retrieved at once, at least: one that takes long, or never comes, must
/// not hold up all others on a computer with one processor.
const WORKERS_MIN: usize = 2;

/// How long either side waits for the other; a request is a few words.
pub(super) const WAIT: Duration = Duration::from_secs(20);
/// How long whoever wants a VM's memory waits for its arrival: retrieving goes
/// through every page.
pub(super) const TAKE_WAIT: Duration = Duration::from_secs(3600);
/// The program's own word for it, see `start`.
pub const WORD: &str = "keeper";

/// What is asked of the keeper; one request on each connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "ask", rename_all = "kebab-case")]
pub(super) enum Ask {
    /// Answered with [`Listing`].
    List,
    /// Answered with [`Answer`]; the files follow.
    Take { segment: SegmentId },
    /// Answered with [`Answer`].
    Release { segment: SegmentId },
}

#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct Answer {
    /// The `SegmentSpec` as JSON, and how many files follow.
    pub(super) files: Option<(String, usize)>,
    pub(super) error: Option<String>,
}

/// Everything that arrived and is still held, or is still to arrive.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Listing {
    /// The kernel that sent it, where it said so.
    pub kernel: Option<String>,
    /// Its report.
    pub report: Option<String>,
    /// The VMs.
    pub vms: Vec<Kept>,
}

/// One VM, or what is left of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kept {
    /// Stands for a segment's number.
    pub segment: SegmentId,
    /// Its name, as far as anything says it.
    pub name: Option<VmName>,
    /// Its id, as far as anything says it.
    pub vm: Option<VmId>,
    /// Guest RAM; 0 where unknown.
    pub memory: ByteSize,
    /// What its execution-state area says; damaged where it did not arrive.
    pub exec: ExecView,
    /// A VMM has it mapped.
    pub held: bool,
    /// It is still being retrieved.
    pub awaited: bool,
    /// The `SegmentSpec` as JSON; empty where it did not arrive.
    pub spec: String,
}

impl Kept {
    /// The same as of a segment in a store.
    pub fn into_view(self) -> SegmentView {
        SegmentView {
            id: self.segment,
            name: self.name,
            vm: self.vm,
            memory: self.memory,
            extents: usize::from(self.memory.0 > 0),
            exec: self.exec,
            carried: true,
            held: self.held,
            spec: self.spec,
        }
    }
}

/// Where one process listens, and where it notes what arrived.
#[derive(Clone, Debug)]
pub struct Place {
    /// Its socket.
    pub socket: PathBuf,
    /// See [`Arrivals`].
    pub record: PathBuf,
    /// The running kernel's boot.
    pub boot_id: [u8; 16],
}

impl Place {
    /// On this host, in this boot.
    pub fn of(host: &Host) -> Self {
        Self {
            socket: host.layout.keeper_socket(),
            record: Arrivals::path(&host.layout),
            boot_id: host.system.boot_id(),
        }
    }
}

/// What one process holds.
#[derive(Debug)]
struct Keeper {
    place: Place,
    holding: Mutex<Holding>,
    changed: Condvar,
}

#[derive(Debug)]
struct Holding {
    kernel: Option<String>,
    report: Option<String>,
    vms: BTreeMap<SegmentId, Held>,
    arrivals: Arrivals,
    /// Every VM that there is has its entry, arrived or awaited.
    listed: bool,
    /// Nothing is awaited any more.
    all: bool,
}

#[derive(Debug)]
struct Held {
    name: Option<VmName>,
    vm: Option<VmId>,
    memory: Content,
}

#[derive(Debug)]
enum Content {
    Awaited(Box<SegmentSpec>),
    Whole(Arc<ArrivedVm>),
    Lost(Lost),
}

impl Holding {
    /// Nothing is held, and nothing is to come.
    fn is_over(&self) -> bool {
        self.all && self.vms.is_empty()
    }
}

/// Retrieves everything, many VMs at once, and serves meanwhile and as long as
/// any VM is held. Tells `said` how many there are, as soon as that is known:
/// while they are still being retrieved, where the list of them arrived.
///
/// # Errors
/// The socket cannot be made; nothing was retrieved then.
pub fn keep(
    orchestrator: Box<dyn Orchestrator>,
    place: Place,
    said: impl Write + Send,
) -> io::Result<()> {
    keep_then(orchestrator, place, said, || ())
}

/// [`keep`]; `arrived` is called when all is retrieved that there is.
///
/// # Errors
/// The same.
pub fn keep_then(
    orchestrator: Box<dyn Orchestrator>,
    place: Place,
    said: impl Write + Send,
    arrived: impl FnOnce() + Send,
) -> io::Result<()> {
    // Before anything is retrieved: from then on this process must not fail.
    let listener = listen(&place.socket)?;
    let keeper = Keeper {
        holding: Mutex::new(Holding {
            kernel: None,
            report: None,
            vms: BTreeMap::new(),
            arrivals: Arrivals::begin(&place.record, place.boot_id),
            listed: false,
            all: false,
        }),
        changed: Condvar::new(),
        place,
    };
    thread::scope(|scope| {
        scope.spawn(|| {
            keeper.retrieve(orchestrator, said);
            arrived();
        });
        keeper.serve(&listener, scope);
    });
    // Under its own name it is nobody else's: there is one keeper per boot.
    fs::remove_file(&keeper.place.socket)
}

impl Keeper {
    fn lock(&self) -> MutexGuard<'_, Holding> {
        self.holding.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until `ready` holds, or for as long as a client has patience.
    fn wait(&self, ready: impl Fn(&Holding) -> bool) -> MutexGuard<'_, Holding> {
        let waited = self
            .changed
            .wait_timeout_while(self.lock(), TAKE_WAIT, |holding| !ready(holding));
        waited.unwrap_or_else(PoisonError::into_inner).0
    }

    fn retrieve(&self, orchestrator: Box<dyn Orchestrator>, mut said: impl Write) {
        // Whoever started this may be gone, and what it wanted to know with it.
        let mut say = |count: usize| {
            let _ = writeln!(said, "{count}").and_then(|()| said.flush());
        };
        // Where the list is damaged the VMs are looked for all the same.
        let host = luo::host(&*orchestrator).ok().flatten();
        let expected = host.as_ref().and_then(awaited);
        let known = expected.as_ref().map(BTreeMap::len);
        {
            let mut holding = self.lock();
            holding.kernel = host.as_ref().map(|h| h.kernel.clone());
            let report = host.as_ref().and_then(|h| h.report.clone());
            holding.report = report.and_then(|bytes| String::from_utf8(bytes).ok());
            holding.vms = expected.unwrap_or_default();
            holding.listed = known.is_some();
        }
        self.changed.notify_all();
        if let Some(count) = known {
            say(count);
        }
        let workers = thread::available_parallelism().map_or(WORKERS_MIN, usize::from);
        let workers = workers.max(WORKERS_MIN);
        let count = self.after(move || {
            luo::arrive(&*orchestrator, host.as_ref(), workers, &|arrival| {
                self.arrived(arrival);
            });
            // The device is given back: sessions live on without it.
            drop(orchestrator);
        });
        if known.is_none() {
            say(count);
        }
    }

    /// Everything has arrived that does, after this: whatever that comes to, nobody
    /// waits for what does not come. How many VMs there are.
    fn after(&self, arrive: impl FnOnce()) -> usize {
        let _ = catch_unwind(AssertUnwindSafe(arrive));
        let mut holding = self.lock();
        holding.await_no_more();
        (holding.listed, holding.all) = (true, true);
        holding.arrivals.complete = true;
        holding.arrivals.write(&self.place.record);
        let count = holding.vms.len();
        self.tell(holding);
        count
    }

    fn arrived(&self, arrival: Arrival) {
        let mut holding = self.lock();
        holding.arrivals.vms.push(ArrivalNote::of(&arrival));
        // Before anybody can take it: whoever resumes it tells how long it took.
        holding.arrivals.write(&self.place.record);
        let held = Held {
            name: arrival.name,
            vm: arrival.vm,
            memory: match arrival.outcome {
                Ok(vm) => Content::Whole(Arc::new(vm)),
                Err(lost) => Content::Lost(lost),
            },
        };
        let segment = SegmentId(FIRST_KEPT + arrival.slot);
        holding.vms.insert(segment, held);
        self.tell(holding);
    }

    /// Something changed: whoever waits looks, and with nothing left it ends.
    fn tell(&self, holding: MutexGuard<'_, Holding>) {
        let over = holding.is_over();
        drop(holding);
        self.changed.notify_all();
        if over {
            // It waits for a client: this is one.
            let _ = UnixStream::connect(&self.place.socket);
        }
    }

    fn serve<'scope>(
        &'scope self,
        listener: &UnixListener,
        scope: &'scope thread::Scope<'scope, '_>,
    ) {
        while !self.lock().is_over() {
            // Too many open files, for instance: what is held must not go.
            let Ok((stream, _)) = listener.accept() else {
                thread::sleep(Duration::from_millis(50));
                continue;
            };
            // A client that breaks off is its own business.
            let talk = move || drop(self.converse(stream));
            let _ = thread::Builder::new().spawn_scoped(scope, talk);
        }
    }

    fn converse(&self, mut stream: UnixStream) -> io::Result<()> {
        stream.set_read_timeout(Some(WAIT))?;
        stream.set_write_timeout(Some(WAIT))?;
        let Some(ask) = read_frame::<Ask>(&mut stream)? else {
            return Ok(());
        };
        match ask {
            Ask::List => {
                let mut holding = self.wait(|holding| holding.listed);
                holding.let_go_of_running(self.place.boot_id);
                let listing = holding.listing();
                self.tell(holding);
                write_frame(&mut stream, &listing)
            }
            Ask::Take { segment } => self.give(&mut stream, segment),
            Ask::Release { segment } => {
                let error = self.release(segment).err();
                write_frame(&mut stream, &Answer { error, files: None })
            }
        }
    }

    fn release(&self, segment: SegmentId) -> Result<(), String> {
        let mut holding = self.lock();
        match holding.vms.get(&segment).map(|held| &held.memory) {
            None => return Err(format!("no segment {segment}")),
            Some(Content::Awaited(_)) => {
                return Err(format!(
                    "segment {segment} is still being retrieved: try again"
                ));
            }
            Some(_) => {}
        }
        holding.vms.remove(&segment);
        self.tell(holding);
        Ok(())
    }

    fn give(&self, stream: &mut UnixStream, segment: SegmentId) -> io::Result<()> {
        let is_there = |holding: &Holding| {
            let held = holding.vms.get(&segment);
            !held.is_some_and(|held| matches!(held.memory, Content::Awaited(_)))
        };
        let holding = self.wait(is_there);
        let vm = match holding.vms.get(&segment).map(|held| &held.memory) {
            Some(Content::Whole(vm)) => Arc::clone(vm),
            other => {
                let error = Some(match other {
                    Some(Content::Lost(lost)) => not_whole(lost),
                    Some(_) => format!("segment {segment} is still being retrieved: try again"),
                    None => format!("no segment {segment}"),
                });
                drop(holding);
                return write_frame(stream, &Answer { error, files: None });
            }
        };
        drop(holding);
        let fds: Vec<BorrowedFd<'_>> = vm.files.fds().collect();
        let spec = serde_json::to_string(vm.files.spec())?;
        let answer = Answer {
            files: Some((spec, fds.len())),
            error: None,
        };
        write_frame(stream, &answer)?;
        fdpass::send(stream, &fds)
    }
}

/// The VMs of the list; `None` where it does not name all of them.
fn awaited(host: &ArrivedHost) -> Option<BTreeMap<SegmentId, Held>> {
    let entries = host.expected().map(|(slot, spec)| {
        let spec = spec.ok()?.clone();
        let held = Held {
            name: Some(spec.name.clone()),
            vm: Some(spec.vm),
            memory: Content::Awaited(Box::new(spec)),
        };
        Some((SegmentId(FIRST_KEPT + slot), held))
    });
    entries.collect()
}

impl Holding {
    /// A VM that runs in this boot has a VMM, which holds its memory: a client
    /// ended before it could say so.
    fn let_go_of_running(&mut self, here: [u8; 16]) {
        self.vms.retain(|_, held| match &held.memory {
            Content::Whole(vm) => !matches!(
                exec_of(vm),
                ExecView::Running { boot_id, .. } if boot_id == here
            ),
            Content::Awaited(_) | Content::Lost(_) => true,
        });
    }

    /// What was not retrieved by now is not retrieved any more.
    fn await_no_more(&mut self) {
        for held in self.vms.values_mut() {
            if matches!(held.memory, Content::Awaited(_)) {
                held.memory = Content::Lost(Lost::died());
            }
        }
    }

    /// What a client is told, in one frame. The report comes from the memory of the
    /// kernel before, and a text of control characters is six times as long when it
    /// is written down as JSON: it is left out rather than the VMs.
    fn listing(&self) -> Listing {
        let mut listing = Listing {
            kernel: self.kernel.clone(),
            report: self.report.clone(),
            vms: self.vms.iter().map(|(id, held)| kept(*id, held)).collect(),
        };
        if !fits_a_frame(&listing) {
            listing.report = None;
        }
        listing
    }
}

fn exec_of(vm: &ArrivedVm) -> ExecView {
    match vm.files.status() {
        Ok(status) => ExecView::from(&status),
        Err(error) => ExecView::Damaged {
            reason: with_cause(&error),
        },
    }
}

fn not_whole(lost: &Lost) -> String {
    format!(
        "it did not arrive whole from the kernel before: {}",
        with_cause(&lost.reason)
    )
}

fn kept(segment: SegmentId, held: &Held) -> Kept {
    let json = |spec: &SegmentSpec| serde_json::to_string(spec).unwrap_or_default();
    let (memory, exec, spec, mapped) = match &held.memory {
        Content::Whole(vm) => (
            vm.files.spec().memory(),
            exec_of(vm),
            json(vm.files.spec()),
            vm.files.is_held().unwrap_or(true),
        ),
        // Whoever sent it had it frozen, or did not jump.
        Content::Awaited(spec) => {
            let exec = ExecView::Frozen {
                state_bytes: 0,
                frozen_ns: 0,
            };
            (spec.memory(), exec, json(spec), false)
        }
        Content::Lost(lost) => {
            let reason = not_whole(lost);
            let exec = ExecView::Damaged { reason };
            (ByteSize(0), exec, String::new(), false)
        }
    };
    Kept {
        segment,
        name: held.name.clone(),
        vm: held.vm,
        memory,
        exec,
        held: mapped,
        awaited: matches!(held.memory, Content::Awaited(_)),
        spec,
    }
}

/// Where VMs are retrieved from: the sessions that another process got from the
/// kernel, and the device for what that did not.
///
/// # Errors
/// The device cannot be opened, and nothing was handed over.
pub fn source(host: &Host, handed: Vec<Adopted>) -> Result<Box<dyn Orchestrator>, LuoError> {
    if handed.is_empty() {
        return super::orchestrator(host);
    }
    let system = Arc::clone(&host.system);
    let open = move || system.orchestrator();
    Ok(Box::new(Handed::new(handed, Box::new(open))))
}

/// What the keeper's process was started with.
#[derive(Debug, Default)]
pub struct Start {
    /// Sessions that PID 1 handed over, with their names in its store.
    pub sessions: Vec<(String, OwnedFd)>,
    /// Where PID 1 listens.
    pub notify: Option<OsString>,
}

impl Start {
    /// The sessions, and what tells PID 1 that it need not hold them any more.
    fn take(self) -> (Vec<Adopted>, impl FnOnce() + Send) {
        let mut names = Vec::new();
        let mut adopted = Vec::new();
        for (name, fd) in self.sessions {
            match hebe_sys::luo::adopt(fd) {
                Ok(session) => {
                    names.push(name);
                    adopted.push(session);
                }
                Err(error) => eprintln!("{name} is no session: {error}"),
            }
        }
        let let_go = move || {
            let Some(address) = self.notify else { return };
            // It hears nobody who is gone when it looks who it was.
            let told = Notify::connect(&address).and_then(|pid1| {
                names.iter().try_for_each(|name| pid1.remove(name))?;
                pid1.settle(WAIT)
            });
            if let Err(error) = told {
                // They are finished, and hold nothing.
                eprintln!("systemd was not told to let go of its descriptors: {error}");
            }
        };
        (adopted, let_go)
    }
}

/// What the keeper's process does, from its start to its end; `said` is told how
/// many VMs it holds, or why none.
pub fn run(host: &Host, start: Start, mut said: impl Write + Send) -> io::Result<()> {
    // An end in good order would be none: what it holds has no other holder.
    let _ = proc::hold_signals();
    let _ = proc::raise_file_limit();
    // It holds every VM's memory, and little of its own.
    let _ = fs::write("/proc/self/oom_score_adj", "-1000");
    let (handed, let_go) = start.take();
    match source(host, handed) {
        Ok(orchestrator) => {
            eprintln!("SIGTERM is not obeyed as long as VMs are held: resume or drop them");
            keep_then(orchestrator, Place::of(host), said, let_go)
        }
        Err(error) => writeln!(said, "error {}", with_cause(&error)),
    }
}

/// Listens where clients look; a socket that is there was a dead keeper's.
fn listen(socket: &Path) -> io::Result<UnixListener> {
    if let Some(dir) = socket.parent() {
        fs::create_dir_all(dir)?;
    }
    match fs::remove_file(socket) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    UnixListener::bind(socket)
}

#[cfg(test)]
mod tests {
    use hebe_store::luo::SegmentFiles;

    use super::*;

    /// As many VMs as there can be, with the longest names, and the longest report:
    /// the VMs are listed whatever it holds, and the report unless it is none.
    #[test]
    fn the_vms_are_listed_whatever_the_report_of_the_kernel_before_holds() {
        let root = tempfile::tempdir().expect("dir");
        let awaited = |slot: u32| {
            let name: VmName = format!("{slot:x<32}").parse().expect("name");
            let vm = VmId([0xff; 16]);
            // Below and above the hole under 4 GiB.
            let files = SegmentFiles::create(vm, &name, ByteSize::gib(6)).expect("files");
            let held = Held {
                name: Some(name),
                vm: Some(vm),
                memory: Content::Awaited(Box::new(files.spec().clone())),
            };
            (SegmentId(FIRST_KEPT + slot), held)
        };
        let mut holding = Holding {
            kernel: Some("7".repeat(56)),
            report: None,
            vms: (0..luo::VMS_MAX).map(awaited).collect(),
            arrivals: Arrivals::begin(&root.path().join("arrivals.json"), [1; 16]),
            listed: true,
            all: false,
        };
        // What JSON itself is made of becomes twice as long.
        for (text, is_told) in [("\"", true), ("\n", true), ("x", true), ("\u{1}", false)] {
            holding.report = Some(text.repeat(hebe_store::REPORT_LEN_MAX));
            let mut frame = Vec::new();
            write_frame(&mut frame, &holding.listing()).expect("it is told");
            let told: Listing = read_frame(&mut frame.as_slice())
                .expect("a frame")
                .expect("one");
            assert_eq!(told.vms.len(), luo::VMS_MAX as usize);
            let report = told.report.as_ref();
            assert_eq!(report.is_some(), is_told, "{text:?}");
            assert!(report.is_none_or(|r| Some(r) == holding.report.as_ref()));
        }
    }

    /// What a panic at one VM comes to is told by that VM; this is what nobody
    /// thought of.
    #[test]
    fn nobody_waits_for_what_a_panic_kept_from_coming() {
        let root = tempfile::tempdir().expect("dir");
        let place = Place {
            socket: root.path().join("keeper.sock"),
            record: root.path().join("arrivals.json"),
            boot_id: [1; 16],
        };
        let (vm, name) = (VmId([7; 16]), "web".parse::<VmName>().expect("name"));
        let files = SegmentFiles::create(vm, &name, ByteSize::mib(4)).expect("files");
        let awaited = Held {
            name: Some(name),
            vm: Some(vm),
            memory: Content::Awaited(Box::new(files.spec().clone())),
        };
        let keeper = Keeper {
            holding: Mutex::new(Holding {
                kernel: None,
                report: None,
                vms: BTreeMap::from([(SegmentId(FIRST_KEPT), awaited)]),
                arrivals: Arrivals::begin(&place.record, place.boot_id),
                listed: true,
                all: false,
            }),
            changed: Condvar::new(),
            place,
        };
        assert!(keeper.lock().listing().vms[0].awaited);
        assert_eq!(keeper.after(|| panic!("told to")), 1);
        let holding = keeper.lock();
        assert!(holding.all && !holding.is_over() && holding.arrivals.complete);
        let kept = &holding.listing().vms[0];
        assert!(!kept.awaited, "{kept:?}");
        let ExecView::Damaged { reason } = &kept.exec else {
            panic!("{kept:?}");
        };
        assert!(!reason.is_empty());
        // It has its name still, to be given up by.
        assert_eq!(kept.vm, Some(vm));
    }
}
