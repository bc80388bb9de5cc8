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
//! hebe resume ──starts──▶ keeper: retrieve all ─▶ says how many on its stdout ─▶ serves
//!   list ─▶ what there is     take SEGMENT ─▶ its files     release SEGMENT ─▶ let go
//! ```

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::BorrowedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::sync::PoisonError;
use std::time::Duration;

use hebe_api::{read_frame, write_frame};
use hebe_store::luo::{self, Arrival, ArrivedVm, Lost, SegmentFiles};
use hebe_sys::luo::Orchestrator;
use hebe_sys::{fdpass, proc};
use hebe_types::{ByteSize, SegmentId, VmId, VmName};
use serde::{Deserialize, Serialize};

use crate::host::{Host, Layout};
use crate::listing::with_cause;
use crate::notes;
use crate::stores::{ExecView, SegmentView};

/// Segments of a store have smaller numbers.
pub const FIRST_KEPT: u32 = 1000;
const _: () = assert!(FIRST_KEPT >= luo::VMS_MAX);

/// How long either side waits for the other; a request is a few words.
const WAIT: Duration = Duration::from_secs(20);
/// The program's own word for it, see `start`.
pub const WORD: &str = "keeper";

/// What is asked of the keeper; one request on each connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "ask", rename_all = "kebab-case")]
enum Ask {
    /// Answered with [`Listing`].
    List,
    /// Answered with [`Answer`]; the files follow.
    Take { segment: SegmentId },
    /// Answered with [`Answer`].
    Release { segment: SegmentId },
}

#[derive(Debug, Default, Serialize, Deserialize)]
struct Answer {
    /// The `SegmentSpec` as JSON, and how many files follow.
    files: Option<(String, usize)>,
    error: Option<String>,
}

/// Everything that arrived and is still held.
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

/// What one process holds.
#[derive(Debug, Default)]
pub struct Keeper {
    kernel: Option<String>,
    report: Option<String>,
    boot_id: [u8; 16],
    vms: BTreeMap<SegmentId, Held>,
}

#[derive(Debug)]
struct Held {
    name: Option<VmName>,
    vm: Option<VmId>,
    outcome: Result<ArrivedVm, Lost>,
}

impl Keeper {
    /// Retrieves everything, many VMs at once. `boot_id` is the running kernel's.
    pub fn retrieve(orchestrator: &dyn Orchestrator, boot_id: [u8; 16]) -> Self {
        // Where the list is damaged the VMs are looked for all the same.
        let host = luo::host(orchestrator).ok().flatten();
        let vms = Mutex::new(BTreeMap::new());
        let workers = std::thread::available_parallelism().map_or(2, usize::from);
        luo::arrive(orchestrator, host.as_ref(), workers, &|arrival: Arrival| {
            let held = Held {
                name: arrival.name,
                vm: arrival.vm,
                outcome: arrival.outcome,
            };
            let mut vms = vms.lock().unwrap_or_else(PoisonError::into_inner);
            vms.insert(SegmentId(FIRST_KEPT + arrival.slot), held);
        });
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).ok();
        Self {
            kernel: host.as_ref().map(|h| h.kernel.clone()),
            report: host.and_then(|h| h.report).and_then(text),
            boot_id,
            vms: vms.into_inner().unwrap_or_else(PoisonError::into_inner),
        }
    }

    /// How many VMs it holds, whole or not.
    pub fn len(&self) -> usize {
        self.vms.len()
    }

    /// Whether it holds nothing.
    pub fn is_empty(&self) -> bool {
        self.vms.is_empty()
    }

    /// Serves until nothing is held any more.
    pub fn serve(mut self, listener: &UnixListener) -> io::Result<()> {
        while !self.is_empty() {
            let (mut stream, _) = listener.accept()?;
            // A client that breaks off is its own business.
            let _ = self.converse(&mut stream);
        }
        Ok(())
    }

    fn converse(&mut self, stream: &mut UnixStream) -> io::Result<()> {
        stream.set_read_timeout(Some(WAIT))?;
        stream.set_write_timeout(Some(WAIT))?;
        let Some(ask) = read_frame::<Ask>(stream)? else {
            return Ok(());
        };
        match ask {
            Ask::List => {
                self.let_go_of_running();
                write_frame(stream, &self.listing())
            }
            Ask::Take { segment } => self.give(stream, segment),
            Ask::Release { segment } => {
                let gone = self.vms.remove(&segment);
                let error = gone.is_none().then(|| format!("no segment {segment}"));
                write_frame(stream, &Answer { error, files: None })
            }
        }
    }

    /// A VM that runs in this boot has a VMM, which holds its memory: a client
    /// ended before it could say so.
    fn let_go_of_running(&mut self) {
        let here = self.boot_id;
        self.vms.retain(|_, held| match &held.outcome {
            Ok(vm) => !matches!(
                exec_of(vm),
                ExecView::Running { boot_id, .. } if boot_id == here
            ),
            Err(_) => true,
        });
    }

    fn listing(&self) -> Listing {
        Listing {
            kernel: self.kernel.clone(),
            report: self.report.clone(),
            vms: self.vms.iter().map(|(id, held)| kept(*id, held)).collect(),
        }
    }

    fn give(&self, stream: &mut UnixStream, segment: SegmentId) -> io::Result<()> {
        let whole = self.vms.get(&segment).map(|held| &held.outcome);
        let Some(Ok(vm)) = whole else {
            let error = Some(format!("segment {segment} did not arrive whole"));
            return write_frame(stream, &Answer { error, files: None });
        };
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

fn exec_of(vm: &ArrivedVm) -> ExecView {
    match vm.files.status() {
        Ok(status) => ExecView::from(&status),
        Err(error) => ExecView::Damaged {
            reason: with_cause(&error),
        },
    }
}

fn kept(segment: SegmentId, held: &Held) -> Kept {
    let (memory, exec, spec, mapped) = match &held.outcome {
        Ok(vm) => (
            vm.files.spec().memory(),
            exec_of(vm),
            serde_json::to_string(vm.files.spec()).unwrap_or_default(),
            vm.files.is_held().unwrap_or(true),
        ),
        Err(lost) => {
            let reason = format!(
                "it did not arrive whole from the kernel before: {}",
                with_cause(&lost.reason)
            );
            (
                ByteSize(0),
                ExecView::Damaged { reason },
                String::new(),
                false,
            )
        }
    };
    Kept {
        segment,
        name: held.name.clone(),
        vm: held.vm,
        memory,
        exec,
        held: mapped,
        spec,
    }
}

/// What the keeper's process does, from its start to its end: retrieves, says
/// on `said` how many VMs it holds, or why none, and serves.
pub fn run(host: &Host, mut said: impl Write) -> io::Result<()> {
    let _ = proc::raise_file_limit();
    // It holds every VM's memory, and little of its own.
    let _ = fs::write("/proc/self/oom_score_adj", "-1000");
    let retrieved = host.system.orchestrator();
    let keeper = match retrieved {
        // The device is given back at once: sessions live on without it.
        Ok(orchestrator) => Keeper::retrieve(&*orchestrator, host.system.boot_id()),
        Err(error) => return writeln!(said, "error {}", with_cause(&error)),
    };
    if keeper.is_empty() {
        return writeln!(said, "0");
    }
    let socket = host.layout.keeper_socket();
    let listener = listen(&socket)?;
    writeln!(said, "{}", keeper.len())?;
    said.flush()?;
    drop(said);
    keeper.serve(&listener)?;
    // Under its own name it is nobody else's: there is one keeper per boot.
    fs::remove_file(&socket)
}

/// Listens where clients look; a socket that is there was a dead keeper's.
pub fn listen(socket: &Path) -> io::Result<UnixListener> {
    if let Some(dir) = socket.parent() {
        fs::create_dir_all(dir)?;
    }
    match fs::remove_file(socket) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    UnixListener::bind(socket)
}

/// Starts the keeper's process and waits for what it says.
pub(crate) fn start(layout: &Layout) -> Result<usize, String> {
    let started = |e: io::Error| format!("the keeper cannot be started: {e}");
    let dir = layout.run.join("host");
    fs::create_dir_all(&dir).map_err(started)?;
    let log = fs::File::create(dir.join("keeper.log")).map_err(started)?;
    let program = std::env::current_exe().map_err(started)?;
    let mut command = Command::new(program);
    command.arg(WORD);
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    command.stderr(Stdio::from(log));
    let mut child = proc::spawn_detached(command, Vec::new()).map_err(started)?;
    let mut word = String::new();
    if let Some(stdout) = child.stdout.take() {
        // Ends when the keeper said it, or ended.
        BufReader::new(stdout)
            .read_line(&mut word)
            .map_err(started)?;
    }
    let word = word.trim();
    match word.parse() {
        Ok(count) => Ok(count),
        Err(_) => Err(match word.strip_prefix("error ") {
            Some(why) => why.to_owned(),
            None => {
                let log = crate::files::tail(&dir.join("keeper.log"), 3).join(" | ");
                format!("the keeper ended without a word: {log}")
            }
        }),
    }
}

/// Has everything that the kernel before handed over retrieved, if that was not
/// done. Gives the reason why it could not be, where some VM is missed.
pub(crate) fn ensure(host: &Host) -> Option<String> {
    let missed = || {
        let notes = notes::all(&host.layout);
        notes.iter().any(|n| n.is_carried() && !n.given_up)
    };
    if UnixStream::connect(host.layout.keeper_socket()).is_ok() {
        return None;
    }
    let started = match host.system.live_update() {
        Ok(()) => host.system.start_keeper(host).map(drop),
        Err(why) => Err(with_cause(&why)),
    };
    started.err().filter(|_| missed())
}

fn ask(socket: &Path, ask: Ask) -> io::Result<Option<UnixStream>> {
    let mut stream = match UnixStream::connect(socket) {
        Ok(stream) => stream,
        // There is none, or it ended: nothing is held.
        Err(e)
            if matches!(
                e.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
            ) =>
        {
            return Ok(None);
        }
        Err(e) => return Err(e),
    };
    stream.set_read_timeout(Some(WAIT))?;
    stream.set_write_timeout(Some(WAIT))?;
    match write_frame(&mut stream, &ask) {
        // It ended this instant.
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => Ok(None),
        other => other.map(|()| Some(stream)),
    }
}

/// What the keeper on `socket` holds; `None` where there is none.
pub fn list(socket: &Path) -> io::Result<Option<Listing>> {
    let Some(mut stream) = ask(socket, Ask::List)? else {
        return Ok(None);
    };
    // Closed without an answer: it ended, because it holds nothing more.
    match read_frame(&mut stream) {
        Err(e) if e.kind() == io::ErrorKind::ConnectionReset => Ok(None),
        other => other,
    }
}

fn answer(stream: Option<&mut UnixStream>) -> io::Result<Answer> {
    let gone = || io::Error::other("the keeper is gone, and what it held with it");
    let stream = stream.ok_or_else(gone)?;
    let answer: Answer = read_frame(stream)?.ok_or_else(gone)?;
    match answer.error {
        Some(why) => Err(io::Error::other(why)),
        None => Ok(answer),
    }
}

/// The files of a VM.
pub fn take(socket: &Path, segment: SegmentId) -> io::Result<SegmentFiles> {
    let mut stream = ask(socket, Ask::Take { segment })?;
    let Answer { files, .. } = answer(stream.as_mut())?;
    let (Some((spec, count)), Some(stream)) = (files, stream) else {
        return Err(io::ErrorKind::InvalidData.into());
    };
    let fds = fdpass::receive(&stream, count)?;
    let spec = serde_json::from_str(&spec)?;
    SegmentFiles::from_fds(spec, fds).map_err(io::Error::other)
}

/// The keeper lets go of a VM; unless a VMM holds its memory, that is freed.
pub fn release(socket: &Path, segment: SegmentId) -> io::Result<()> {
    let mut stream = ask(socket, Ask::Release { segment })?;
    answer(stream.as_mut()).map(drop)
}
