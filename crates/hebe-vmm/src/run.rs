//! A VMM's life, from its command line to the report of its end.

use std::cell::Cell;
use std::fs;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::ExitCode;
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, bail};
use hebe_api::VmmState;
use hebe_kvm::Stop;
use hebe_snapshot::SavedFile;
use hebe_store::{ExecStatus, Segment};
use hebe_sys::clock::stamp_now;
use hebe_types::{Stamp, VmConfig};
use serde_json::json;

use crate::args::Args;
use crate::cage::{self, Awaited, Confined, Wish};
use crate::control::{self, Shared};
use crate::held::{GivenNets, Held};
use crate::log;
use crate::parts::Disks;
use crate::signals;
use crate::vm::{Event, Found, Identity, Origin, Vm, VmError, mark_ended};

/// How a VMM ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The guest powered itself off.
    PowerOff,
    /// The operator ended the VMM of a VM that was not suspended.
    Quit,
    /// A signal ended the VMM of a VM that was not suspended.
    Terminated,
    /// The VM is frozen in its segment.
    Frozen,
    /// The VM is saved in a file.
    Saved,
    /// The guest's processor shut down.
    TripleFault,
    /// It did not boot again after a reset.
    Failed(String),
}

impl Outcome {
    /// 0 for an end that somebody wanted, 11 for a triple fault, 1 otherwise.
    pub fn exit_code(&self) -> ExitCode {
        match self {
            Self::PowerOff | Self::Quit | Self::Terminated | Self::Frozen | Self::Saved => {
                ExitCode::SUCCESS
            }
            Self::TripleFault => ExitCode::from(11),
            Self::Failed(_) => ExitCode::FAILURE,
        }
    }

    fn message(&self) -> String {
        match self {
            Self::Terminated => "powered off by a signal to its VMM".to_owned(),
            Self::Failed(message) => message.clone(),
            _ => String::new(),
        }
    }

    fn reason(&self) -> &'static str {
        match self {
            Self::PowerOff => "power-off",
            Self::Quit | Self::Terminated => "quit",
            Self::Frozen => "frozen",
            Self::Saved => "saved",
            Self::TripleFault => "triple-fault",
            Self::Failed(_) => "error",
        }
    }
}

/// Runs one VM to its end, and reports the end in `exit.json`.
pub fn run(args: Args) -> anyhow::Result<Outcome> {
    let process_started = stamp_now();
    ignore_hangups();
    // Two VMMs never run the same RAM. Held until the end is on record:
    // whoever has the lock then finds no older record, and none half written.
    let lock = args.lock_fd.map(take_fd).transpose()?;
    let record = EndRecord::open(&args.run_dir);
    let ran = Cell::new(false);
    let panicked = Cell::new(false);
    let result = live(args, process_started, &ran, &panicked);
    let (reason, mut message) = match &result {
        Ok(outcome) => (outcome.reason(), outcome.message()),
        Err(error) => ("error", format!("{error:#}")),
    };
    if panicked.get() {
        let separator = if message.is_empty() { "" } else { "; " };
        message = format!("{message}{separator}the guest's kernel had panicked");
    }
    let report = json!({ "reason": reason, "message": message, "ran": ran.get() }).to_string();
    if let Err(error) = record.and_then(|record| record.write(&report)) {
        log::log_error(&format!("exit.json cannot be written: {error}"));
    }
    drop(lock);
    result
}

/// `exit.json`, open from the beginning: at the end there is no way to it.
///
/// `hebe list` reads it without the lock. What is there before the end, nothing
/// or a part, is no JSON object and no record.
struct EndRecord(File);

impl EndRecord {
    fn open(run_dir: &Path) -> io::Result<Self> {
        File::create(run_dir.join("exit.json")).map(Self)
    }

    fn write(mut self, report: &str) -> io::Result<()> {
        self.0.write_all(report.as_bytes())?;
        match self.0.sync_all() {
            // What cannot be synced needs no sync.
            Err(e) if e.kind() == io::ErrorKind::InvalidInput => Ok(()),
            synced => synced,
        }
    }
}

/// Writes what the VM is made of to `config.toml`, as a boot finds it there:
/// whole or not at all. Not durable on purpose: it describes a process.
fn write_config(run_dir: &Path, config: &VmConfig) -> io::Result<()> {
    let text = toml::to_string(config).map_err(io::Error::other)?;
    let part = run_dir.join("config.toml.part");
    fs::write(&part, text)?;
    fs::rename(part, run_dir.join("config.toml"))
}

const BEFORE_IT_RAN: &str = "ended by a signal before the VM ran";

const NOBODY_LOOKED: &str = "whoever started this VM ended before it was certain that its disks are no other VM's: start it again";

/// What a VM needs to come up.
struct Start<'a> {
    shared: &'a Shared,
    args: &'a Args,
    process_started: Stamp,
    events: &'a Sender<Event>,
    inbox: &'a Receiver<Event>,
    /// Set before a vCPU may have entered the guest: until then, what the VM
    /// was resumed or restored from is still good.
    ran: &'a Cell<bool>,
}

/// Ordering requirements:
/// 1. what the VM needs from outside is open before the cage is entered;
/// 2. no thread exists before that: all inherit the cage;
/// 3. whatever can fail besides the VM itself comes before it: once a vCPU
///    has run, there is no way back to what it was resumed from;
/// 4. a VM that boots waits until it is certain, with its disks locked, that they
///    are no other VM's ([`Gate`]).
///
/// Clients that connect early wait in the listener's queue, then at the lock.
fn live(
    args: Args,
    process_started: Stamp,
    ran: &Cell<bool>,
    panicked: &Cell<bool>,
) -> anyhow::Result<Outcome> {
    hebe_kvm::install_kick_handler().context("the kick signal's handler cannot be installed")?;
    let (events, inbox) = mpsc::channel();
    signals::block().context("SIGTERM cannot be waited for")?;
    let shared: Shared = Arc::new(Mutex::new(None));
    let mut place = shared.lock().unwrap_or_else(PoisonError::into_inner);
    let listener = control::listen(&args.run_dir.join("vmm.sock"))?;
    let start = Start {
        shared: &shared,
        args: &args,
        process_started,
        events: &events,
        inbox: &inbox,
        ran,
    };
    let vm = if args.resume || args.restore.is_some() {
        start.take_back(listener)?
    } else {
        start.boot(listener)?
    };
    vm.announce();
    *place = Some(vm);
    drop(place);
    log::note("running");
    wait(&shared, &events, &inbox, panicked)
}

impl Start<'_> {
    fn boot(&self, listener: UnixListener) -> anyhow::Result<Vm> {
        let args = self.args;
        let config = read_config(args)?;
        if config.name != args.name {
            bail!(
                "the definition is of VM '{}', not of '{}'",
                config.name,
                args.name
            );
        }
        config.validate()?;
        let segment = Arc::new(map_segment(args, &config)?);
        let identity = Identity {
            id: args.vm_id,
            config,
            run_dir: args.run_dir.clone(),
        };
        let held = Arc::new(Held::open(&identity, given_nets(args)?)?);
        let gate = args.gate_fd.map(Gate::locked).transpose()?;
        let cage = self.confine(listener)?;
        let mut vm = Vm::boot_with(held, identity, segment, self.events)?;
        vm.cage = Some(cage);
        gate.map_or(Ok(()), Gate::wait)?;
        self.set_off(&mut vm)?;
        Ok(vm)
    }

    /// Resumes or restores. Nothing is withdrawn until the VM is whole again:
    /// a failure leaves the state where it was.
    fn take_back(&self, listener: UnixListener) -> anyhow::Result<Vm> {
        let args = self.args;
        let (segment, state) = match &args.restore {
            None => {
                let segment = Arc::new(map_given_segment(args)?);
                let state = segment.exec().load()?;
                (segment, state)
            }
            Some(path) => restore_ram(args, path)?,
        };
        let state_read = stamp_now();
        let run_dir = args.run_dir.clone();
        let disks = if args.accept_changed_disk {
            Disks::Any
        } else {
            Disks::Same
        };
        let origin = Origin {
            disks,
            copied: args.restore.is_some(),
        };
        let found = Found::read(args.vm_id, run_dir, &segment, &state)?;
        if let Some(expected) = &args.expect {
            refuse_another(&found.identity.config, expected)?;
        }
        let held = Arc::new(Held::open_to_resume(&found.identity, given_nets(args)?)?);
        // For whoever checks what the VM needs. It runs without that, too.
        if let Err(error) = write_config(&args.run_dir, &found.identity.config) {
            log::log_error(&format!("config.toml cannot be written: {error}"));
        }
        let cage = self.confine(listener)?;
        let mut vm = Vm::resume_found(origin, found, held, segment, self.events)?;
        vm.cage = Some(cage);
        let constructed = stamp_now();
        self.set_off(&mut vm)?;
        vm.set_resume_report(self.process_started, state_read, constructed);
        Ok(vm)
    }

    /// Enters the cage, and starts the threads that all VMs have.
    fn confine(&self, listener: UnixListener) -> anyhow::Result<Confined> {
        let mut word = self.args.limits_fd.map(take_fd).transpose()?;
        let later = self.args.limits_later && self.args.cage == Wish::On;
        let later = word.take_if(|_| later).map(Awaited::by);
        let later = later.transpose().context("no word can be awaited")?;
        let report = cage::enter(self.args.cage, word.map(File::from))?;
        let cage = Confined::new(report, later);
        if signals::arrived() {
            bail!("{BEFORE_IT_RAN}");
        }
        signals::forward(self.events.clone()).context("SIGTERM cannot be waited for")?;
        control::serve(listener, self.shared.clone(), self.events.clone())
            .context("the control thread cannot be started")?;
        Ok(cage)
    }

    /// Lets the VM run, unless a signal came first: what it comes from is
    /// then kept.
    fn set_off(&self, vm: &mut Vm) -> anyhow::Result<()> {
        if self.inbox.try_recv() == Ok(Event::Terminated) {
            bail!("{BEFORE_IT_RAN}");
        }
        self.ran.set(true);
        Ok(vm.start()?)
    }
}

/// Where whoever starts this process looks once more, while the disks are locked,
/// whether one of them is another VM's.
struct Gate(File);

impl Gate {
    /// Says that they are locked.
    fn locked(fd: RawFd) -> anyhow::Result<Self> {
        let mut gate = File::from(take_fd(fd)?);
        gate.write_all(&[1]).context(NOBODY_LOOKED)?;
        Ok(Self(gate))
    }

    /// The VM is whole by now, and waits for the word alone.
    fn wait(mut self) -> anyhow::Result<()> {
        self.0.read_exact(&mut [0]).context(NOBODY_LOOKED)
    }
}

fn restore_ram(args: &Args, path: &Path) -> anyhow::Result<(Arc<Segment>, Vec<u8>)> {
    let saved = SavedFile::open(path)?;
    let segment = if args.segment.is_some() {
        map_given_segment(args)?
    } else {
        let total = saved.ram_ranges().iter().map(|r| r.len).sum();
        Segment::new_memfd(args.vm_id, &args.name, hebe_types::ByteSize(total), false)?
    };
    // The file's holes stay what the segment holds: it must be a fresh one.
    if segment.exec().status() != ExecStatus::Empty {
        bail!("the segment to restore into is not a fresh one: free it with `hebe store drop`");
    }
    let mut views: Vec<_> = segment
        .ram()
        .iter()
        .map(|m| {
            // SAFETY: the fresh segment is mapped here alone and outlives the
            // views, which end with this function.
            unsafe { hebe_snapshot::RamViewMut::new(m.gpa, m.host, m.len) }
        })
        .collect();
    saved.load_into(&mut views)?;
    let state = saved.state().to_vec();
    Ok((Arc::new(segment), state))
}

fn given_nets(args: &Args) -> anyhow::Result<GivenNets> {
    let given = args.net_fd.iter();
    given.map(|(nic, fd)| Ok((*nic, take_fd(*fd)?))).collect()
}

fn map_given_segment(args: &Args) -> anyhow::Result<Segment> {
    let (false, Some(spec)) = (args.segment_fd.is_empty(), &args.segment) else {
        bail!("--segment-fd and --segment say where the VM's RAM is: one of them is missing");
    };
    if spec.vm != args.vm_id {
        bail!("the segment is VM {}'s, not VM {}'s", spec.vm, args.vm_id);
    }
    let fds = args.segment_fd.iter().map(|fd| take_fd(*fd));
    let mut fds = fds.collect::<anyhow::Result<Vec<OwnedFd>>>()?;
    // A segment with files of its own has at least two: state, and RAM.
    match fds.pop() {
        Some(device) if fds.is_empty() => Ok(Segment::map(device, spec)?),
        last => {
            fds.extend(last);
            Ok(Segment::map_files(fds, spec)?)
        }
    }
}

fn map_segment(args: &Args, config: &VmConfig) -> anyhow::Result<Segment> {
    if args.memfd {
        return Ok(Segment::new_memfd(
            args.vm_id,
            &args.name,
            config.memory,
            config.hugepages,
        )?);
    }
    map_given_segment(args)
}

/// Refuses a state whose definition is not the `expected` one: its VMM wrote
/// it, whose guest may have taken it over, and here files are opened by what it
/// says. An expected one that cannot be read refuses nothing: a VM's life comes
/// first.
fn refuse_another(config: &VmConfig, expected: &Path) -> anyhow::Result<()> {
    let read = fs::read_to_string(expected).map_err(anyhow::Error::from);
    let parsed = read.and_then(|text| Ok(toml::from_str::<VmConfig>(&text)?));
    match parsed {
        Ok(expected) if expected == *config => Ok(()),
        Ok(_) => bail!(
            "its state names another definition than the VM was booted with, so its guest may have broken into its VMM: compare {} with `hebe store show`, and remove that file only to trust the state; `hebe drop --yes` gives it up",
            expected.display()
        ),
        Err(error) => {
            log::log_error(&format!(
                "the definition in the state is not compared: {} cannot be read: {error:#}",
                expected.display()
            ));
            Ok(())
        }
    }
}

fn read_config(args: &Args) -> anyhow::Result<VmConfig> {
    let mut text = String::new();
    match (&args.config, args.config_fd) {
        (Some(path), _) => {
            text = fs::read_to_string(path)
                .with_context(|| format!("{} cannot be read", path.display()))?;
        }
        (None, Some(fd)) => {
            File::from(take_fd(fd)?)
                .read_to_string(&mut text)
                .context("the definition cannot be read")?;
        }
        (None, None) => bail!("--config or --config-fd must give the VM's definition"),
    }
    toml::from_str(&text).context("the definition is not valid")
}

/// Takes over an inherited descriptor, once.
fn take_fd(fd: RawFd) -> anyhow::Result<OwnedFd> {
    // SAFETY: F_GETFD only asks whether the descriptor is open.
    if fd <= 2 || unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
        bail!("descriptor {fd} was not handed over");
    }
    // SAFETY: the descriptor is open, was handed over by whoever started this
    // process for this argument alone, and nothing else here owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A closed terminal or a vanished client must not end a VM.
fn ignore_hangups() {
    for signal in [libc::SIGHUP, libc::SIGPIPE] {
        // SAFETY: ignoring a signal installs no handler.
        unsafe { libc::signal(signal, libc::SIG_IGN) };
    }
}

/// Waits for the VM's end; a reset builds it again in the same RAM, and a VM
/// with which KVM cannot go on waits for the order to end.
fn wait(
    shared: &Shared,
    events: &Sender<Event>,
    inbox: &Receiver<Event>,
    panicked: &Cell<bool>,
) -> anyhow::Result<Outcome> {
    loop {
        // `events` is alive, so the channel cannot be closed.
        let Ok(event) = inbox.recv() else {
            bail!("the VM's threads are gone")
        };
        let mut guard = shared.lock().unwrap_or_else(PoisonError::into_inner);
        let outcome = match &event {
            Event::Reset => {
                log::note_of_guest("reset by the guest");
                match rebuild(&mut guard, events, inbox) {
                    None => continue,
                    Some(outcome) => outcome,
                }
            }
            Event::PowerOff => Outcome::PowerOff,
            Event::VcpuStopped(Stop::Shutdown) => Outcome::TripleFault,
            Event::VcpuStopped(stop) => {
                let why = match stop {
                    Stop::Failed(why) => why.clone(),
                    other => format!("{other:?}"),
                };
                log::log_error(&format!("the VM stands still: {why}"));
                if let Some(vm) = guard.as_mut() {
                    vm.fail(why);
                }
                continue;
            }
            // Whoever sent it wanted an end in good order, and this would be
            // none. SIGKILL and an order that names no state still end it.
            Event::Terminated if guard.as_ref().is_some_and(Vm::is_last_holder) => {
                log::log_error(&format!("SIGTERM is not obeyed: {}", VmError::LastHolder));
                continue;
            }
            Event::Quit | Event::Terminated => match guard.as_ref().map(Vm::state) {
                Some(VmmState::Frozen) => Outcome::Frozen,
                Some(VmmState::Saved) => Outcome::Saved,
                _ if event == Event::Terminated => Outcome::Terminated,
                _ => Outcome::Quit,
            },
        };
        match &outcome {
            Outcome::Failed(why) => log::log_error(why),
            outcome => log::note(outcome.reason()),
        }
        if let Some(vm) = guard.take() {
            panicked.set(vm.board.has_panicked());
            match outcome {
                // The segment keeps what it says: a frozen state, or that the
                // VM ran when it failed.
                Outcome::Frozen | Outcome::TripleFault | Outcome::Failed(_) => {
                    vm.dismantle();
                }
                // Who orders the end has made the file a saved VM's; a signal
                // may come before that.
                Outcome::Saved if event == Event::Terminated => {
                    vm.dismantle();
                }
                Outcome::PowerOff | Outcome::Quit | Outcome::Terminated | Outcome::Saved => {
                    vm.withdraw();
                }
            }
        }
        return Ok(outcome);
    }
}

/// Boots the VM anew in the RAM that it had. Returns how the VMM ends if that
/// is not to be, or fails; the segment then says that the VM ended by order,
/// or still that it ran.
fn rebuild(
    vm: &mut Option<Vm>,
    events: &Sender<Event>,
    inbox: &Receiver<Event>,
) -> Option<Outcome> {
    let old = vm.take()?;
    let (held, cage) = (old.held.clone(), old.cage.clone());
    let stands_by = old.stands_by;
    let (identity, segment) = old.dismantle();
    // What the old vCPUs still said is about a VM that is gone; an order to
    // end is not.
    while let Ok(event) = inbox.try_recv() {
        let outcome = match event {
            Event::Quit => Outcome::Quit,
            Event::Terminated => Outcome::Terminated,
            _ => continue,
        };
        mark_ended(&segment);
        return Some(outcome);
    }
    let built = Vm::boot_with(held, identity, segment, events).and_then(|mut fresh| {
        fresh.cage = cage;
        fresh.stands_by = stands_by;
        if !stands_by {
            fresh.start()?;
        }
        Ok(fresh)
    });
    match built {
        Ok(fresh) => {
            *vm = Some(fresh);
            None
        }
        Err(error) => Some(Outcome::Failed(format!(
            "the guest reset itself, and does not boot again: {}",
            control::chain(&error)
        ))),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use hebe_api::{Client, Request, Response};
    use hebe_store::ExecStatus;

    use super::*;
    use crate::guest;
    use crate::testing::running;

    /// Writes 1 to port 0x602, and does so again.
    const RESETS: &[u8] = &[0x66, 0xba, 0x02, 0x06, 0xb0, 0x01, 0xee, 0xeb, 0xf7];

    #[test]
    fn a_guest_that_resets_without_end_is_suspended_all_the_same() {
        if guest::cannot_run() {
            return;
        }
        let dir = tempfile::tempdir().expect("dir");
        let (events, inbox) = mpsc::channel();
        let running = crate::testing::running_code(RESETS, dir.path(), "", &events);
        let (vm, segment) = running.expect("vm");
        let shared: Shared = Arc::new(Mutex::new(Some(vm)));
        let path = dir.path().join("socket");
        let listener = UnixListener::bind(&path).expect("a socket");
        control::serve(listener, shared.clone(), events.clone()).expect("served");
        let body = {
            let shared = shared.clone();
            move || wait(&shared, &events, &inbox, &Cell::new(false))
        };
        let main = std::thread::spawn(body);
        let mut client = Client::connect(&path).expect("connect");
        client
            .set_timeout(Some(Duration::from_secs(60)))
            .expect("a time limit");
        for _ in 0..10 {
            match client.call(&Request::Freeze) {
                Ok(Response::Frozen(_)) => {}
                other => panic!("{other:?}"),
            }
            let status = segment.exec().status();
            assert!(matches!(status, ExecStatus::Frozen { .. }), "{status:?}");
            client.call(&Request::Thaw).expect("thawed");
        }
        let frozen = client.call(&Request::Freeze);
        assert!(matches!(frozen, Ok(Response::Frozen(_))), "{frozen:?}");
        client
            .call(&Request::Quit { expected: None })
            .expect("ended");
        let outcome = main.join().expect("main").expect("an end");
        assert_eq!(outcome, Outcome::Frozen);
        // And it can be resumed.
        let state = segment.exec().load().expect("state");
        let (events, _inbox) = mpsc::channel();
        let id = hebe_types::VmId([0x11; 16]);
        Vm::resume(id, dir.path().to_owned(), segment, &state, &events).expect("resumed");
    }

    #[test]
    fn an_order_to_end_during_a_reset_is_obeyed_and_a_failed_boot_is_told() {
        if guest::cannot_run() {
            return;
        }
        let dir = tempfile::tempdir().expect("dir");
        for (event, outcome) in [
            (Event::Quit, Outcome::Quit),
            (Event::Terminated, Outcome::Terminated),
        ] {
            let (events, inbox) = mpsc::channel();
            let (vm, segment) = running(dir.path(), "", &events).expect("vm");
            let mut place = Some(vm);
            // Said before the reset, and of no interest after it.
            events
                .send(Event::VcpuStopped(Stop::Shutdown))
                .expect("send");
            events.send(event).expect("send");
            assert_eq!(rebuild(&mut place, &events, &inbox), Some(outcome));
            assert!(place.is_none());
            assert_eq!(segment.exec().status(), ExecStatus::Ended);
        }
        let (events, inbox) = mpsc::channel();
        let (vm, segment) = running(dir.path(), "", &events).expect("vm");
        let mut place = Some(vm);
        assert_eq!(rebuild(&mut place, &events, &inbox), None);
        let state = place.as_ref().map(Vm::state);
        assert_eq!(state, Some(VmmState::Running));
        let kernel = dir.path().join("kernel");
        fs::write(&kernel, "none").expect("overwrite");
        match rebuild(&mut place, &events, &inbox) {
            Some(Outcome::Failed(why)) => assert!(why.contains("kernel"), "{why}"),
            other => panic!("{other:?}"),
        }
        let status = segment.exec().status();
        assert!(matches!(status, ExecStatus::Running { .. }), "{status:?}");
        assert!(inbox.recv_timeout(Duration::ZERO).is_err());
    }
}
