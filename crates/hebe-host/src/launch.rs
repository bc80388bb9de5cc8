//! Starting one VMM.
//!
//! Ordering requirements:
//! 1. the VM's lock is held before anything is looked at or made: from here to
//!    the end of the VMM exactly one process owns the VM;
//! 2. what a former VMM left in the directory (socket, exit record) goes before
//!    the new one starts, so that nothing old is taken for an answer;
//! 3. the networks that Hebe makes for it are there before it runs; of one that is
//!    resumed with others, the bridge, which passes nothing on before its rules are
//!    in ([`hebe_net::Expected`]); of one that goes on, passt's socket, in which what
//!    its guest sends waits until passt reads ([`hebe_net::passt::begin`]);
//! 4. the locked descriptor passes to the VMM; this process lets go of its own
//!    only after the VMM answers, so that there is no instant without an owner;
//! 5. a guest boots only after it was certain, with its disks locked, that none is
//!    another VM's at rest (`crate::gate`);
//! 6. the device descriptor is given to the one child it is meant for, and is
//!    close-on-exec everywhere else (invariant: a VMM reaches its own segment).

use std::fs::{self, OpenOptions};
use std::io::{self, PipeReader, PipeWriter, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use hebe_api::{VmStatus, plain};
use hebe_store::luo::SegmentFiles;
use hebe_sys::proc::spawn_detached;
use hebe_types::{ByteSize, DiskConfig, SegmentId, VmConfig, VmId, VmName};
use serde::{Deserialize, Serialize};

use crate::claims;
use crate::definitions;
use crate::files;
use crate::gate::{self, Gate};
use crate::host::{Cage, Host};
use crate::limits::{GroupView, Limits, killed};
use crate::lock::VmLock;
use crate::mounted::refuse_mounted;
use crate::network;
use crate::saved::LifeFile;
use crate::stores::{ExecView, SegmentView, StoreTrouble};
use crate::vmm;

/// How long a VMM may take until it answers. Reading a large saved file and
/// building a VM under emulation both take long.
pub const LAUNCH_WAIT: Duration = Duration::from_secs(120);

/// How long a VMM may take to come to where it is limited, where it must be.
const LIMITS_WAIT: Duration = Duration::from_secs(5);

/// Longest `exit.json`, in bytes.
const EXIT_LEN_MAX: u64 = 1 << 20;

/// How a VMM ended, as it wrote it (`exit.json`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExitRecord {
    /// `power-off`, `triple-fault`, `quit`, `frozen`, `saved` or `error`. A reset
    /// by the guest ends no VMM: it boots again in place.
    pub reason: String,
    /// More, where there is more.
    #[serde(default)]
    pub message: Option<String>,
    /// Whether a vCPU ever entered the guest, where the VMM says so.
    #[serde(default)]
    pub ran: Option<bool>,
}

impl ExitRecord {
    /// The record in a VM's directory, if there is a readable one. The VMM
    /// wrote it, whose guest may have taken it over: what it says counts for
    /// that VM alone, and its words are made plain.
    pub fn read(dir: &Path) -> Option<Self> {
        let read = files::read_json_within(&dir.join("exit.json"), EXIT_LEN_MAX);
        let record: Self = read.ok().flatten()?;
        Some(Self {
            reason: plain(&record.reason),
            message: record.message.as_deref().map(plain),
            ran: record.ran,
        })
    }

    /// The message, or the reason where there is none.
    pub fn words(&self) -> &str {
        match &self.message {
            Some(message) if !message.is_empty() => message,
            _ => &self.reason,
        }
    }

    /// The guest ended by its own will or by order: nothing of it is left to
    /// be continued.
    pub fn is_clean_end(&self) -> bool {
        matches!(self.reason.as_str(), "power-off" | "quit")
    }

    /// The guest brought its VMM to an end: it ran, and its processor shut down,
    /// or it reset itself and does not boot again.
    pub fn is_failure_of_guest(&self) -> bool {
        self.ran == Some(true) && matches!(self.reason.as_str(), "triple-fault" | "error")
    }
}

/// What the host remembers of a VM that is up (`instance.json`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Instance {
    /// Its identity.
    pub vm: VmId,
    /// Guest RAM.
    pub memory: ByteSize,
    /// Its segment; `None` for a memfd.
    pub segment: Option<SegmentId>,
    /// Its RAM lies in files that can be carried into the next kernel: store
    /// `luo`.
    #[serde(default)]
    pub files: bool,
}

impl Instance {
    /// The record in a VM's directory, if there is a readable one.
    pub fn read(dir: &Path) -> Option<Self> {
        files::read_json(&dir.join("instance.json")).ok().flatten()
    }
}

/// Where guest RAM comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Memory {
    /// A segment of the store.
    Segment {
        /// Its record.
        id: SegmentId,
        /// The `SegmentSpec` as JSON.
        spec: String,
    },
    /// Files of its own, which the VMM gets: store `luo`.
    Files {
        /// The `SegmentSpec` as JSON.
        spec: String,
        /// The files.
        files: SharedFiles,
    },
    /// Memory of the VMM's own.
    Memfd,
}

/// The files of a segment; the same only if they are the very same.
#[derive(Clone, Debug)]
pub struct SharedFiles(Arc<Vec<OwnedFd>>);

impl PartialEq for SharedFiles {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for SharedFiles {}

impl Memory {
    /// Memory in these files.
    pub fn of_files(files: SegmentFiles) -> Result<Self, StoreTrouble> {
        let spec = serde_json::to_string(files.spec())?;
        let files = SharedFiles(Arc::new(files.into_fds()));
        Ok(Self::Files { spec, files })
    }
}

/// What the VM starts from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// Its kernel.
    Boot(Box<VmConfig>),
    /// The state frozen in its segment.
    Frozen,
    /// A saved file.
    File(PathBuf),
}

impl Origin {
    /// Whether a state is continued, which the VMM withdraws before the VM
    /// runs: nobody else can tell whether it did.
    fn is_state(&self) -> bool {
        !matches!(self, Self::Boot(_))
    }
}

/// One VMM to be started.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Launch {
    /// The VM's name.
    pub name: VmName,
    /// Its identity.
    pub vm: VmId,
    /// Size of guest RAM.
    pub size: ByteSize,
    /// Its RAM.
    pub memory: Memory,
    /// What it starts from.
    pub origin: Origin,
    /// Take disks that changed since the state in `origin` was made.
    pub accept_changed_disk: bool,
    /// Its part of the network `hebe0` is being made with that of others.
    pub is_expected: bool,
}

impl Launch {
    /// The one order by which a VMM continues the state in `segment`; `None`
    /// where no state is committed, or the record cannot be read.
    pub fn of_frozen(segment: &SegmentView) -> Option<Self> {
        let (ExecView::Frozen { .. }, Some(name), Some(vm)) =
            (&segment.exec, &segment.name, segment.vm)
        else {
            return None;
        };
        Some(Self {
            name: name.clone(),
            vm,
            size: segment.memory,
            memory: Memory::Segment {
                id: segment.id,
                spec: segment.spec.clone(),
            },
            origin: Origin::Frozen,
            accept_changed_disk: false,
            is_expected: false,
        })
    }
}

/// Why a VMM did not start.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// The program could not be started.
    #[error("cannot start {path}: install hebe-vmm beside hebe, or name it in HEBE_VMM")]
    NoProgram {
        /// Which program.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It ended before the VM ran.
    #[error("VM '{name}' did not start: {reason}")]
    Ended {
        /// Which VM.
        name: VmName,
        /// What the VMM said.
        reason: String,
    },
    /// It did not answer.
    #[error(
        "VM '{name}' did not start within {seconds} s and its VMM was ended; its last words: {words}"
    )]
    Silent {
        /// Which VM.
        name: VmName,
        /// How long it had.
        seconds: u64,
        /// The end of its log.
        words: String,
    },
    /// It did not answer, and may already run what it was started to continue.
    #[error(
        "VM '{name}' did not answer within {seconds} s: its VMM (process {pid}) goes on, because it may have withdrawn the state it continues; see `hebe list`, and end it with `hebe stop {name} --force` only if the VM may be lost; its last words: {words}"
    )]
    Unanswered {
        /// Which VM.
        name: VmName,
        /// How long it had.
        seconds: u64,
        /// Its VMM.
        pid: u32,
        /// The end of its log.
        words: String,
    },
    /// A disk is another VM's, which came to rest meanwhile.
    #[error("{0}")]
    Taken(String),
    /// A disk is this host's own.
    #[error("{0}")]
    Mounted(String),
    /// A network that Hebe makes cannot be had.
    #[error("{0}")]
    Network(String),
    /// The device could not be had.
    #[error(transparent)]
    Store(#[from] StoreTrouble),
    /// A file of the runtime directory.
    #[error("cannot prepare {path}: check that the run directory may be written")]
    Directory {
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Has the VMM's program read from its disk, without waiting for that: VMs that are
/// to be resumed wait for it otherwise.
pub fn read_ahead(host: &Host) {
    // It is read when it is needed, at the latest.
    if let Ok(program) = fs::File::open(&host.layout.vmm) {
        let _ = rustix::fs::fadvise(&program, 0, None, rustix::fs::Advice::WillNeed);
    }
}

/// Starts a VMM and waits until its VM runs. The caller holds the VM's lock.
/// On failure no process is left, and files and segments are the caller's; but
/// after [`LaunchError::Unanswered`] they are the VMM's, which lives on.
pub fn launch(
    host: &Host,
    lock: &VmLock,
    order: &Launch,
    wait: Duration,
) -> Result<VmStatus, LaunchError> {
    let dir = host.layout.vm_dir(&order.name);
    refuse_mounted(&disks_of(host, order)).map_err(LaunchError::Mounted)?;
    prepare_dir(host, &dir, order)?;
    // Of VMs that have ended by themselves.
    host.system.let_go_of_ended();
    let mut passts = network::connect(host, order)?;
    let nets = std::mem::take(&mut passts.ends);
    let mut confined = Confined::of(host).map_err(directory_error(&dir))?;
    confined.later &= order.origin == Origin::Frozen;
    let (child, gate) = spawn(host, lock, order, &dir, nets, &mut confined)?;
    killed::note(&dir, child.id());
    // While it starts, and before it makes its VM: threads that the kernel starts
    // for a VM may stay where it was made (`kvm-nx-lpage-recovery`, as of Linux 6.1),
    // and a unit of systemd with one of them in it does not end before the VM does. Where
    // that is no matter, a VM that is resumed does not wait for PID 1, which starts the
    // rest of the host meanwhile.
    // A VMM that stays where it is runs its VM as well, if its cage need not be
    // whole; what a host's shutdown does to it then is said by `hebe host check`.
    let limits = Limits::of(host, order);
    // The VMM's turn with PID 1 comes last, for it is the one that waits.
    passts.adopt(host, &order.name);
    passts.look_after_while(host, &order.name, || {
        let adopted = host.system.adopt(&order.name, child.id(), &limits);
        confined.tell(host, child.id(), adopted);
        wait_until_up(host, &dir, order, child, gate, wait)
    })
}

/// The VM's disks, as far as they are known here: a state says it, too, and its
/// VMM wrote that.
fn disks_of(host: &Host, order: &Launch) -> Vec<DiskConfig> {
    if let Origin::Boot(config) = &order.origin {
        return config.disks.clone();
    }
    let known = LifeFile::new(&host.layout, &order.name, order.vm).existing();
    let config = known.and_then(|path| definitions::read_toml::<VmConfig>(&path).ok());
    config.map_or_else(Vec::new, |config| config.disks)
}

fn directory_error(path: &Path) -> impl FnOnce(io::Error) -> LaunchError {
    move |source| LaunchError::Directory {
        path: path.to_owned(),
        source,
    }
}

fn prepare_dir(host: &Host, dir: &Path, order: &Launch) -> Result<(), LaunchError> {
    for old in ["vmm.sock", "vsock.sock", "exit.json"] {
        let path = dir.join(old);
        match fs::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                return Err(directory_error(&path)(e));
            }
            _ => {}
        }
    }
    killed::forget(dir).map_err(directory_error(dir))?;
    let segment = match &order.memory {
        Memory::Segment { id, .. } => Some(*id),
        Memory::Files { .. } | Memory::Memfd => None,
    };
    let instance = Instance {
        vm: order.vm,
        memory: order.size,
        segment,
        files: matches!(order.memory, Memory::Files { .. }),
    };
    // Not durable on purpose: it describes a process, which dies with the
    // kernel, and a resume must not wait for a disk.
    let path = dir.join("instance.json");
    let text = serde_json::to_vec(&instance).map_err(io::Error::from);
    text.and_then(|t| fs::write(&path, t))
        .map_err(directory_error(&path))?;
    if let Origin::Boot(config) = &order.origin {
        let path = dir.join("config.toml");
        let text = toml::to_string(&config.for_vmm()).map_err(io::Error::other);
        let text = text.map_err(directory_error(&path))?;
        fs::write(&path, &text).map_err(directory_error(&path))?;
        // Without it the VM runs as well.
        let _ = LifeFile::begin(&host.layout, &order.name, order.vm, &text);
    }
    Ok(())
}

fn spawn(
    host: &Host,
    lock: &VmLock,
    order: &Launch,
    dir: &Path,
    nets: Vec<(usize, OwnedFd)>,
    confined: &mut Confined,
) -> Result<(Child, Option<gate::Held>), LaunchError> {
    let lock_path = dir.join("lock");
    let lock_fd = lock.share().map_err(directory_error(&lock_path))?;
    let log_path = dir.join("log");
    let log = OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(&log_path)
        .map_err(directory_error(&log_path))?;
    let vmm = &host.layout.vmm;
    let mut command = Command::new(vmm);
    let VmId(id) = order.vm;
    let id: String = id.iter().map(|b| format!("{b:02x}")).collect();
    command.args(["--name", order.name.as_str(), "--vm-id", &id]);
    command.arg("--run-dir").arg(dir);
    command.arg("--lock-fd");
    command.arg(lock_fd.as_raw_fd().to_string());
    let mut keep = vec![lock_fd];
    for (nic, end) in nets {
        command.arg("--net-fd");
        command.arg(format!("{nic}={}", end.as_raw_fd()));
        keep.push(end);
    }
    match &order.memory {
        Memory::Memfd => {
            command.arg("--memfd");
        }
        Memory::Segment { spec, .. } => {
            let device = host.store.device()?;
            command.arg("--segment-fd");
            command.arg(device.as_raw_fd().to_string());
            command.args(["--segment", spec]);
            keep.push(device);
        }
        Memory::Files { spec, files } => {
            for file in files.0.iter() {
                let copy = file.try_clone().map_err(directory_error(dir))?;
                command.arg("--segment-fd");
                command.arg(copy.as_raw_fd().to_string());
                keep.push(copy);
            }
            command.args(["--segment", spec]);
        }
    }
    match &order.origin {
        Origin::Boot(_) => command.arg("--config").arg(dir.join("config.toml")),
        Origin::Frozen => command.arg("--resume"),
        Origin::File(file) => command.arg("--restore").arg(file),
    };
    if order.origin.is_state()
        && let Some(known) = LifeFile::new(&host.layout, &order.name, order.vm).existing()
    {
        command.arg("--expect").arg(known);
    }
    if order.accept_changed_disk {
        command.arg("--accept-changed-disk");
    }
    confined.order(&mut command, &mut keep);
    let gate = match &order.origin {
        Origin::Boot(_) => Some(Gate::new().map_err(directory_error(dir))?),
        Origin::Frozen | Origin::File(_) => None,
    };
    let gate = gate.map(|gate| gate.order(&mut command, &mut keep));
    command.stdin(Stdio::null());
    command.stdout(Stdio::null());
    command.stderr(Stdio::from(log));
    let child = spawn_detached(command, keep).map_err(|source| LaunchError::NoProgram {
        path: vmm.clone(),
        source,
    })?;
    Ok((child, gate))
}

/// How the VMM confines itself. Nothing here keeps a VM from running whose cage
/// need not be whole.
struct Confined {
    cage: &'static str,
    /// It makes its VM before it is where it belongs.
    later: bool,
    /// By which it is told that it is where it belongs, and whether it has limits
    /// there.
    word: Option<PipeReader>,
    ours: Option<PipeWriter>,
}

impl Confined {
    fn of(host: &Host) -> io::Result<Self> {
        let cage = match host.config() {
            _ if host.layout.no_sandbox => "off",
            Ok(config) => config.cage.as_str(),
            Err(_) => Cage::On.as_str(),
        };
        let (word, ours) = match io::pipe() {
            Ok((word, ours)) => (Some(word), Some(ours)),
            Err(error) if cage == Cage::Required.as_str() => return Err(error),
            Err(_) => (None, None),
        };
        let later = cage == Cage::On.as_str() && host.system.place_ends_alone();
        Ok(Self {
            cage,
            later,
            word,
            ours,
        })
    }

    fn order(&mut self, command: &mut Command, keep: &mut Vec<OwnedFd>) {
        command.args(["--cage", self.cage]);
        if let Some(word) = self.word.take() {
            command.arg("--limits-fd");
            command.arg(word.as_raw_fd().to_string());
            keep.push(word.into());
            if self.later {
                command.arg("--limits-later");
            }
        }
    }

    /// Tells a VMM that waits for it how it is limited, or why not.
    fn tell(self, host: &Host, pid: u32, adopted: Result<(), String>) {
        let Some(mut word) = self.ours else { return };
        let patience = match self.cage == Cage::Required.as_str() {
            true => LIMITS_WAIT,
            false => Duration::ZERO,
        };
        let limited = adopted.and_then(|()| limited(host, pid, patience));
        let text = match &limited {
            Ok(view) => format!("on {view}"),
            Err(why) => format!("off {why}"),
        };
        // It may have ended.
        let _ = word.write_all(text.as_bytes());
    }
}

/// Waits until a VMM is where it is limited, so long at most.
fn limited(host: &Host, pid: u32, patience: Duration) -> Result<GroupView, String> {
    let began = Instant::now();
    loop {
        match host.system.limits_of(pid) {
            Ok(view) if view.is_limited() => return Ok(view),
            Ok(view) if began.elapsed() >= patience => return Err(view.to_string()),
            Err(why) if began.elapsed() >= patience => return Err(why),
            _ => thread::sleep(Duration::from_millis(2)),
        }
    }
}

fn wait_until_up(
    host: &Host,
    dir: &Path,
    order: &Launch,
    mut child: Child,
    gate: Option<gate::Held>,
    wait: Duration,
) -> Result<VmStatus, LaunchError> {
    let socket = &host.layout.socket(&order.name);
    let began = Instant::now();
    if let (Some(gate), Origin::Boot(config)) = (gate, &order.origin) {
        let look = || claims::taken(host, config).map_or(Ok(()), Err);
        gate.pass(wait, look).map_err(|why| {
            let _ = child.kill();
            let _ = child.wait();
            LaunchError::Taken(why)
        })?;
    }
    let mut pause = Duration::from_millis(1);
    loop {
        let left = wait.saturating_sub(began.elapsed());
        if socket.exists() {
            let patience = left.max(Duration::from_millis(1));
            let status = vmm::status(socket, patience).ok();
            let own = |s: &VmStatus| s.name == order.name && s.id == order.vm;
            if let Some(status) = status.filter(own) {
                return Ok(status);
            }
        }
        if let Ok(Some(status)) = child.try_wait() {
            // A VMM that is killed says nothing.
            let killed = status.code().is_none();
            let why = killed.then(|| host.system.out_of_memory(child.id()));
            return Err(LaunchError::Ended {
                name: order.name.clone(),
                reason: why
                    .flatten()
                    .map_or_else(|| last_words(dir, Some(status)), |w| w.words().to_owned()),
            });
        }
        if left.is_zero() && order.origin.is_state() {
            return Err(LaunchError::Unanswered {
                name: order.name.clone(),
                seconds: wait.as_secs(),
                pid: child.id(),
                words: last_words(dir, None),
            });
        }
        if left.is_zero() {
            let _ = child.kill();
            let _ = child.wait();
            return Err(LaunchError::Silent {
                name: order.name.clone(),
                seconds: wait.as_secs(),
                words: last_words(dir, None),
            });
        }
        thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(10));
    }
}

/// Why a VMM ended: its own record if there is one, else the end of its log.
pub fn last_words(dir: &Path, status: Option<ExitStatus>) -> String {
    if let Some(record) = ExitRecord::read(dir) {
        return record.words().to_owned();
    }
    let lines = files::tail(&dir.join("log"), 3);
    if let Some(word) = killed_by_cage(&lines) {
        return word;
    }
    match (lines.is_empty(), status) {
        (false, _) => lines.join(" | "),
        (true, Some(status)) => format!("hebe-vmm ended without a word ({status})"),
        (true, None) => "none".to_owned(),
    }
}

/// What a VMM said that made a system call which no VMM makes: its guest may
/// have taken it over; or that was ended by that signal from elsewhere.
pub(crate) fn killed_by_cage(log: &[String]) -> Option<String> {
    let last: serde_json::Value = serde_json::from_str(log.last()?).ok()?;
    let word = last.get("text")?.as_str()?;
    let hint = "its guest may have broken into it, or this is a fault of Hebe";
    if word.starts_with("ended by a SIGSYS") {
        return Some(plain(word));
    }
    word.starts_with("killed by its cage")
        .then(|| format!("{}: {hint}", plain(word)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_vmm_leaves_is_bounded_and_plain() {
        let dir = tempfile::tempdir().expect("dir");
        let record = dir.path().join("exit.json");
        let text = r#"{"reason":"error","message":"\u001b[2J\u001b]0;x\u0007gone","ran":true}"#;
        fs::write(&record, text).expect("write");
        let words = last_words(dir.path(), None);
        assert!(words.ends_with("gone"), "{words:?}");
        assert!(!words.contains(char::is_control), "{words:?}");
        // Before the end there is nothing, or a part of it.
        for part in [0, 1, text.len() - 1] {
            fs::write(&record, &text[..part]).expect("write");
            assert_eq!(ExitRecord::read(dir.path()), None);
        }
        // Longer than any disk, and soon read all the same.
        let file = fs::File::create(&record).expect("create");
        file.set_len(1 << 42).expect("sparse");
        assert_eq!(ExitRecord::read(dir.path()), None);
        let log = fs::File::create(dir.path().join("log")).expect("create");
        log.set_len(1 << 42).expect("sparse");
        std::os::unix::fs::FileExt::write_all_at(&log, b"\n\x1b[31mred\n", (1 << 42) - 10)
            .expect("its end");
        let words = last_words(dir.path(), None);
        assert!(words.contains("red"), "{words:?}");
        assert!(!words.contains(char::is_control), "{words:?}");
    }

    #[test]
    fn the_last_word_of_a_vmm_that_its_cage_killed_is_its_reason() {
        let dir = tempfile::tempdir().expect("dir");
        let word = r#"{"level":"error","text":"killed by its cage: it made system call 59, which hebe-vmm never makes"}"#;
        let before = r#"{"level":"info","text":"running"}"#;
        fs::write(dir.path().join("log"), format!("{before}\n{word}\n")).expect("log");
        let words = last_words(dir.path(), None);
        assert!(words.starts_with("killed by its cage: "), "{words}");
        assert!(words.contains("system call 59"), "{words}");
        // What an earlier VMM said is no word of this one.
        assert_eq!(killed_by_cage(&[word.into(), before.into()]), None);
    }

    #[test]
    fn a_vmm_is_caged_as_the_host_says() {
        let root = tempfile::tempdir().expect("dir");
        let mut host = Host {
            layout: crate::host::Layout::below(root.path()),
            ..Host::here()
        };
        let words = |host: &Host| {
            let (mut command, mut keep) = (Command::new("x"), Vec::new());
            let mut confined = Confined::of(host).expect("a pipe");
            confined.order(&mut command, &mut keep);
            assert!(confined.ours.is_some() && keep.len() == 1, "for its place");
            let words = command.get_args().map(|a| a.to_string_lossy().into_owned());
            let words: Vec<String> = words.collect();
            assert_eq!(words[2], "--limits-fd");
            words[..2].to_vec()
        };
        assert_eq!(words(&host), ["--cage", "on"]);
        let toml = host.layout.config.join("host.toml");
        fs::create_dir_all(&host.layout.config).expect("mkdir");
        fs::write(&toml, "cage = \"required\"\n").expect("write");
        assert_eq!(words(&host)[1], "required");
        // A VM's life comes before its cage.
        fs::write(&toml, "cage = \"perhaps\"\n").expect("write");
        assert_eq!(words(&host)[1], "on");
        host.layout.no_sandbox = true;
        assert_eq!(words(&host), ["--cage", "off"]);
    }

    #[test]
    fn only_a_committed_state_of_a_known_vm_is_continued() {
        let vm = VmId([7; 16]);
        let frozen = SegmentView {
            id: SegmentId(3),
            name: "web".parse().ok(),
            vm: Some(vm),
            memory: ByteSize::mib(4),
            extents: 1,
            exec: ExecView::Frozen {
                state_bytes: 9,
                frozen_ns: 1,
            },
            carried: false,
            held: false,
            spec: "{}".into(),
        };
        let order = Launch::of_frozen(&frozen).expect("a state");
        assert_eq!((order.vm, order.size), (vm, ByteSize::mib(4)));
        assert_eq!(order.origin, Origin::Frozen);
        assert!(matches!(order.memory, Memory::Segment { id, .. } if id == frozen.id));
        let running = ExecView::Running {
            boot_id: [0; 16],
            pid: 1,
        };
        let damaged = ExecView::Damaged {
            reason: "crc".into(),
        };
        for exec in [ExecView::Empty, ExecView::Ended, running, damaged] {
            let other = SegmentView {
                exec,
                ..frozen.clone()
            };
            assert_eq!(Launch::of_frozen(&other), None, "{other:?}");
        }
        let nameless = SegmentView { vm: None, ..frozen };
        assert_eq!(Launch::of_frozen(&nameless), None);
    }
}
