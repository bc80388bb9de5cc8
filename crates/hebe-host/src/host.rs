//! Where everything lies on a host, and what an order can fail with.

use std::env;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use hebe_api::ClientError;
use hebe_flow::stopping::Wish;
use hebe_snapshot::SnapshotError;
use hebe_store::luo::HolePolicy;
use hebe_sys::fdstore::Given;
use hebe_types::{ByteSize, SegmentId, VmName};
use serde::Deserialize;

use crate::definitions::DefinitionError;
use crate::launch::LaunchError;
use crate::lock::VmLock;
use crate::luo::store::WithKept;
use crate::stores::{DeviceStore, StoreAccess, StoreTrouble};
use crate::system::{Machine, System, SystemError};

/// How long an order that concerns all VMs waits for those of single VMs.
const ORDERS_WAIT: Duration = Duration::from_secs(60);

/// Directories and programs of a host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// `HEBE_RUN_DIR`, by default `/run/hebe`: gone with the kernel.
    pub run: PathBuf,
    /// `HEBE_CONFIG_DIR`, by default `/etc/hebe`: what people write.
    pub config: PathBuf,
    /// `HEBE_STATE_DIR`, by default `/var/lib/hebe`: what Hebe keeps.
    pub state: PathBuf,
    /// `HEBE_STORE`; by default the first `/dev/dax*` that holds a store.
    pub store: Option<PathBuf>,
    /// `HEBE_VMM`; by default `hebe-vmm` beside this program, then in `PATH`.
    pub vmm: PathBuf,
    /// It is started without its cage: for debugging.
    pub no_sandbox: bool,
    /// Frozen VMs that the state directory says nothing of are resumed, too.
    pub unnoted: bool,
}

impl Layout {
    /// From the environment.
    pub fn from_env() -> Self {
        let dir = |key: &str, default: &str| {
            env::var_os(key)
                .filter(|v| !v.is_empty())
                .map_or_else(|| PathBuf::from(default), PathBuf::from)
        };
        Self {
            run: dir("HEBE_RUN_DIR", "/run/hebe"),
            config: dir("HEBE_CONFIG_DIR", "/etc/hebe"),
            state: dir("HEBE_STATE_DIR", "/var/lib/hebe"),
            store: env::var_os("HEBE_STORE")
                .filter(|v| !v.is_empty())
                .map(PathBuf::from),
            vmm: find_vmm(),
            no_sandbox: false,
            unnoted: false,
        }
    }

    /// Everything below `root`, for tests.
    pub fn below(root: &Path) -> Self {
        Self {
            run: root.join("run"),
            config: root.join("etc"),
            state: root.join("state"),
            store: None,
            vmm: root.join("hebe-vmm"),
            no_sandbox: false,
            unnoted: false,
        }
    }

    /// A VM's runtime directory.
    pub fn vm_dir(&self, name: &VmName) -> PathBuf {
        self.run.join("vms").join(name.as_str())
    }

    /// Where the keeper of arrived VMs listens, see [`crate::luo::keeper`].
    pub fn keeper_socket(&self) -> PathBuf {
        self.run.join("host").join("keeper.sock")
    }

    /// A VM's control socket.
    pub fn socket(&self, name: &VmName) -> PathBuf {
        self.vm_dir(name).join("vmm.sock")
    }
}

fn find_vmm() -> PathBuf {
    if let Some(path) = env::var_os("HEBE_VMM").filter(|v| !v.is_empty()) {
        return path.into();
    }
    let beside = env::current_exe()
        .ok()
        .and_then(|exe| Some(exe.parent()?.join("hebe-vmm")))
        .filter(|path| path.exists());
    let in_path = || {
        let path = env::var_os("PATH")?;
        env::split_paths(&path)
            .map(|dir| dir.join("hebe-vmm"))
            .find(|candidate| candidate.exists())
    };
    beside
        .or_else(in_path)
        .unwrap_or_else(|| PathBuf::from("/usr/bin/hebe-vmm"))
}

/// `host.toml`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct HostConfig {
    /// What is stopped before VMs are suspended, and started when a
    /// reboot is undone.
    pub services: Services,
    /// How VMMs are confined.
    pub cage: Cage,
    /// How VMs in store `luo` are carried.
    pub live_update: LiveUpdateConfig,
    /// What becomes of VMs when a service manager takes the host down.
    pub shutdown: Shutdown,
}

/// What becomes of VMs when a service manager takes the host down.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Shutdown {
    /// Those whose memory does not survive.
    pub vms: Wish,
    /// How long a guest has to power off, in seconds.
    pub timeout_s: u64,
    /// At a kexec into a kernel that Hebe did not load.
    pub foreign_kernel: ForeignKernel,
}

impl Default for Shutdown {
    fn default() -> Self {
        Self {
            vms: Wish::Save,
            timeout_s: 60,
            foreign_kernel: ForeignKernel::Save,
        }
    }
}

/// What VMs in memory are worth where nobody knows the next kernel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ForeignKernel {
    /// They are saved: it may not keep the reserved memory.
    #[default]
    Save,
    /// They are frozen there: somebody answers for its command line.
    Trust,
}

/// How a VMM is confined, where `--no-sandbox` does not say otherwise.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Cage {
    /// As far as the kernel can.
    #[default]
    On,
    /// Wholly, or the VM does not run.
    Required,
}

impl Cage {
    /// The word for it that a VMM takes.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::On => "on",
            Self::Required => "required",
        }
    }
}

/// What is done about memory that guests do not use, which the kernel fills
/// when it preserves it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LiveUpdateConfig {
    /// Leave empty parts out, or fill everything while the VMs run.
    pub holes: Holes,
    /// Most memory of one VM that may be filled; without it, as much as there is.
    pub fill_max: Option<ByteSize>,
    /// Who holds what the kernel is to carry, up to the jump.
    pub carrier: CarrierChoice,
}

/// See [`LiveUpdateConfig::carrier`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CarrierChoice {
    /// PID 1 where it can and takes the host down, otherwise Hebe itself.
    #[default]
    Auto,
    /// Hebe's own process, which therefore leaves by itself.
    Own,
    /// systemd's file descriptor store, or nobody.
    Systemd,
}

/// See [`LiveUpdateConfig::holes`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Holes {
    /// Empty parts are left out, holes in the others filled.
    #[default]
    Trim,
    /// All of it is filled: nothing of that is left for the pause.
    Fill,
}

impl From<Holes> for HolePolicy {
    fn from(holes: Holes) -> Self {
        match holes {
            Holes::Trim => Self::Trim,
            Holes::Fill => Self::Fill,
        }
    }
}

/// Host services, as shell commands in order.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Services {
    /// Commands that stop them.
    pub stop: Vec<String>,
    /// Commands that start them again.
    pub start: Vec<String>,
    /// How long one command may take, in seconds.
    pub timeout_s: u64,
}

impl Default for Services {
    fn default() -> Self {
        Self {
            stop: Vec::new(),
            start: Vec::new(),
            timeout_s: 60,
        }
    }
}

impl Services {
    /// How long one command may take.
    pub fn timeout(&self) -> Duration {
        Duration::from_secs(self.timeout_s)
    }
}

/// A host: its places, its store, its machine.
#[derive(Clone)]
pub struct Host {
    /// Where everything lies.
    pub layout: Layout,
    /// The store.
    pub store: Arc<dyn StoreAccess>,
    /// The machine.
    pub system: Arc<dyn System>,
}

impl Host {
    /// The host this process runs on.
    pub fn here() -> Self {
        let layout = Layout::from_env();
        let device = Arc::new(DeviceStore::new(layout.store.clone()));
        let store = Arc::new(WithKept::new(device, layout.keeper_socket()));
        Self {
            layout,
            store,
            system: Arc::new(Machine::default()),
        }
    }

    /// The same, with what systemd gave this process at its start.
    pub fn given(self, given: Given) -> Self {
        Self {
            system: Arc::new(Machine::new(given)),
            ..self
        }
    }

    /// The lock under which one order at a time concerns all VMs. Orders of
    /// single VMs that are under way are waited for; new ones are refused.
    pub fn lock_all(&self) -> Result<VmLock, HostError> {
        let dir = self.layout.run.join("host");
        let taken = VmLock::take_from_sharers(&dir, ORDERS_WAIT);
        match taken.map_err(HostError::file("lock", &dir))? {
            Some(lock) => Ok(lock),
            None if VmLock::is_held(&dir) => Err(HostError::HostBusy),
            None => Err(HostError::OrdersBusy),
        }
    }

    /// The lock that every order of a single VM shares, so that none happens
    /// in the midst of one that concerns all.
    pub fn lock_orders(&self) -> Result<VmLock, HostError> {
        let dir = self.layout.run.join("host");
        VmLock::take_shared(&dir)
            .map_err(HostError::file("lock", &dir))?
            .ok_or(HostError::HostBusy)
    }

    /// `host.toml`, or its defaults when there is none.
    pub fn config(&self) -> Result<HostConfig, DefinitionError> {
        let path = self.layout.config.join("host.toml");
        if path.exists() {
            crate::definitions::read_toml(&path)
        } else {
            Ok(HostConfig::default())
        }
    }
}

/// Why an order was not carried out.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// No such VM.
    #[error(
        "there is no VM '{name}': `hebe list` shows those there are, and a new one needs {expected}"
    )]
    NoSuchVm {
        /// The name asked for.
        name: VmName,
        /// Where its definition would be.
        expected: PathBuf,
    },
    /// The order does not fit the VM's state.
    #[error("VM '{name}': {why}")]
    Refused {
        /// Which VM.
        name: VmName,
        /// Why, with the way out.
        why: String,
    },
    /// Somebody else is at work on the VM.
    #[error("VM '{0}' is held by a running VMM or another hebe command: see `hebe list`")]
    Busy(VmName),
    /// Somebody is at work on all VMs.
    #[error(
        "another `hebe reboot` or `hebe resume --all` is at work on this host: wait until it is done"
    )]
    HostBusy,
    /// Orders of single VMs go on.
    #[error("other hebe commands are at work on VMs of this host: wait until they are done")]
    OrdersBusy,
    /// The runtime directory lost the lock of a VMM that lives.
    #[error(
        "{} still has the memory of segment {segment} mapped, though its runtime directory was emptied: shut its guest down from inside, or end it with `hebe stop {} --force`",
        pid.map_or("a VMM".to_owned(), |pid| format!("the VMM of process {pid}")),
        name.as_ref().map_or("NAME", VmName::as_str)
    )]
    InUse {
        /// Which segment.
        segment: SegmentId,
        /// Its VM.
        name: Option<VmName>,
        /// The VMM, where it can be found.
        pid: Option<u32>,
    },
    /// The VMM did not do as asked.
    #[error("VM '{name}': {source}")]
    Vmm {
        /// Which VM.
        name: VmName,
        /// What it answered.
        source: ClientError,
    },
    /// The VMM lives and does not answer.
    #[error(
        "the VMM of '{name}' does not end: look at {log}, or end it with `hebe stop {name} --force`"
    )]
    Stuck {
        /// Which VM.
        name: VmName,
        /// Its log.
        log: PathBuf,
    },
    /// Not even by force.
    #[error(
        "the VMM of '{name}' was killed and does not end: the kernel holds process {pid}, as it does while a disk does not answer; where systemd runs, `systemctl kexec` or `systemctl reboot` takes the host down all the same, and keeps the other VMs"
    )]
    Unkillable {
        /// Which VM.
        name: VmName,
        /// Its VMM.
        pid: u32,
    },
    /// The guest did not shut down in time.
    #[error(
        "the guest of '{name}' did not power off within {seconds} s and still runs: give it --timeout, or `hebe stop {name} --force`"
    )]
    NoPowerOff {
        /// Which VM.
        name: VmName,
        /// How long it had.
        seconds: u64,
    },
    /// VMs would be lost with the store.
    #[error(
        "the store {} is not made anew, because {} would be lost for good: `hebe resume NAME` and shut it down, or give it up with `hebe drop NAME --yes`",
        path.display(),
        frozen_words(names)
    )]
    FrozenInStore {
        /// The store.
        path: PathBuf,
        /// The VMs that are frozen in it, one at least.
        names: Vec<VmName>,
    },
    /// A definition is wrong.
    #[error(transparent)]
    Definition(#[from] DefinitionError),
    /// A VMM did not start.
    #[error(transparent)]
    Launch(#[from] LaunchError),
    /// The store refused.
    #[error(transparent)]
    Store(#[from] StoreTrouble),
    /// A saved file is not fit to be restored.
    #[error(transparent)]
    Saved(#[from] SnapshotError),
    /// The machine refused.
    #[error(transparent)]
    System(#[from] SystemError),
    /// A file could not be read or written.
    #[error("cannot {what} {path}: check that the directory exists and may be written")]
    File {
        /// What was tried.
        what: &'static str,
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

fn frozen_words(names: &[VmName]) -> String {
    let each: Vec<String> = names.iter().map(|name| format!("'{name}'")).collect();
    let (a_vm, is) = match names.len() {
        1 => ("VM", "which is"),
        _ => ("VMs", "which are"),
    };
    format!("{a_vm} {}, {is} frozen in it,", each.join(", "))
}

impl HostError {
    /// For `map_err` on file operations.
    pub fn file(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::File {
            what,
            path: path.to_owned(),
            source,
        }
    }
}
