//! The store as the host uses it, behind a trait so that tests can do without
//! one.

use std::fs::{self, OpenOptions};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use hebe_store::{Access, ExecStatus, SegmentEntry, Store, StoreError};
use hebe_sys::dax;
use hebe_sys::luo::LuoError;
use hebe_types::{ByteSize, SegmentId, VmId, VmName};
use serde::{Deserialize, Serialize};

use crate::check::DAX_MODULES;

/// How long an order waits for another manager of the store, which may be
/// scrubbing a large segment.
const MANAGER_WAIT: Duration = Duration::from_secs(60);

/// Why the store could not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum StoreTrouble {
    /// This host has no store.
    #[error(
        "this host has no store that outlives its kernel: reserve memory with memmap=SIZE!START on the kernel command line and run `hebe store init`, or give the VM store = \"memfd\""
    )]
    None,
    /// The store's own reason.
    #[error("{0}")]
    Store(#[from] StoreError),
    /// The device could not be opened for a VMM.
    #[error("cannot open {path} for the VMM: check its permissions")]
    Device {
        /// Which device.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The segment's description could not be written down.
    #[error("cannot describe the segment to the VMM")]
    Describe(#[from] serde_json::Error),
    /// Linux cannot carry the VM's memory, or what it carried cannot be had.
    #[error("{0}")]
    Carried(#[from] LuoError),
    /// The process that keeps what arrived.
    #[error("the keeper of VMs that the kernel before handed over does not answer")]
    Keeper(#[source] std::io::Error),
    /// A test's own reason.
    #[error("{0}")]
    Other(String),
}

/// What a segment's execution area says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "exec", rename_all = "kebab-case")]
pub enum ExecView {
    /// No VM ever ran in it.
    Empty,
    /// Its VM ran and ended: nothing can be resumed.
    Ended,
    /// A VMM runs in it, or did when it or its host stopped.
    Running {
        /// The boot of the host in which it ran.
        #[serde(serialize_with = "hex", deserialize_with = "from_hex")]
        boot_id: [u8; 16],
        /// The VMM's process id in that boot.
        pid: u32,
    },
    /// A state is committed.
    Frozen {
        /// Bytes of state.
        state_bytes: u64,
        /// Wall clock at the commit, in nanoseconds.
        frozen_ns: u64,
    },
    /// Unreadable.
    Damaged {
        /// In which way.
        reason: String,
    },
}

fn hex<S: serde::Serializer>(bytes: &[u8; 16], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&VmId(*bytes))
}

fn from_hex<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<[u8; 16], D::Error> {
    let text = String::deserialize(deserializer)?;
    let read = hebe_sys::proc::parse_uuid(&text);
    read.ok_or_else(|| serde::de::Error::custom("not an id of 32 hexadecimal digits"))
}

impl From<&ExecStatus> for ExecView {
    fn from(status: &ExecStatus) -> Self {
        match status {
            ExecStatus::Empty => Self::Empty,
            ExecStatus::Ended => Self::Ended,
            ExecStatus::Running { boot_id, pid, .. } => Self::Running {
                boot_id: *boot_id,
                pid: *pid,
            },
            ExecStatus::Frozen { len, frozen_ns, .. } => Self::Frozen {
                state_bytes: *len,
                frozen_ns: *frozen_ns,
            },
            ExecStatus::Damaged { reason } => Self::Damaged {
                reason: reason.clone(),
            },
        }
    }
}

/// One segment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SegmentView {
    /// Its record.
    pub id: SegmentId,
    /// Its VM's name, where readable.
    pub name: Option<VmName>,
    /// Its VM, where readable.
    #[serde(skip)]
    pub vm: Option<VmId>,
    /// Guest RAM.
    pub memory: ByteSize,
    /// Number of extents that RAM lies in.
    pub extents: usize,
    /// Its state.
    #[serde(flatten)]
    pub exec: ExecView,
    /// It lies in files of its own, which the kernel before handed over and the
    /// keeper holds.
    pub carried: bool,
    /// Somebody has it mapped: a VMM that runs its VM, or holds it frozen.
    pub held: bool,
    /// The `hebe_store::SegmentSpec` as JSON, for the VMM and for `store show`.
    #[serde(skip)]
    pub spec: String,
}

/// The whole store.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct StoreView {
    /// The device.
    pub path: PathBuf,
    /// The store's own id.
    #[serde(serialize_with = "hex")]
    pub uuid: [u8; 16],
    /// Its size.
    pub capacity: ByteSize,
    /// What is not given to a segment.
    pub free: ByteSize,
    /// There is no such device: all there is was handed over by the kernel before.
    #[serde(skip)]
    pub kept_only: bool,
    /// Physical start and length in bytes; `None` for a plain file.
    pub phys_range: Option<(u64, u64)>,
    /// Its segments.
    pub segments: Vec<SegmentView>,
}

impl StoreView {
    /// The one segment of a VM; `None` when it has none or several.
    pub fn segment_of(&self, name: &VmName) -> Option<&SegmentView> {
        let mut own = self
            .segments
            .iter()
            .filter(|s| s.name.as_ref() == Some(name));
        own.next().filter(|_| own.next().is_none())
    }

    /// A segment of a VM that somebody has mapped.
    pub fn held_of(&self, name: &VmName) -> Option<&SegmentView> {
        let mut own = self.segments.iter();
        own.find(|s| s.held && s.name.as_ref() == Some(name))
    }
}

/// A segment made for a new VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewSegment {
    /// Its record.
    pub id: SegmentId,
    /// The `SegmentSpec` as JSON.
    pub spec: String,
}

/// What the host needs of a store.
pub trait StoreAccess: Send + Sync {
    /// Everything in it; `None` when this host has no store.
    fn view(&self) -> Result<Option<StoreView>, StoreTrouble>;
    /// Has the store's device there, where this kernel could have it and does not
    /// yet.
    fn settle(&self) {}
    /// Whether anything else used the store's memory since it was made:
    /// [`StoreError::Overrun`]. A host without a store has nothing to find.
    fn check(&self) -> Result<(), StoreTrouble> {
        Ok(())
    }
    /// Makes a segment that reads as zero.
    fn create(&self, vm: VmId, name: &VmName, memory: ByteSize)
    -> Result<NewSegment, StoreTrouble>;
    /// Scrubs and frees the segment that `vm` had when it was listed; `None` for
    /// one whose record is damaged.
    fn drop_segment(&self, id: SegmentId, vm: Option<VmId>) -> Result<(), StoreTrouble>;
    /// A descriptor of the device for one VMM.
    fn device(&self) -> Result<OwnedFd, StoreTrouble>;
    /// The report kept in the store, if any.
    fn read_report(&self) -> Result<Option<Vec<u8>>, StoreTrouble>;
    /// Keeps a report in the store.
    fn write_report(&self, bytes: &[u8]) -> Result<(), StoreTrouble>;
    /// Opens the store as its manager and stays so until [`StoreAccess::release`],
    /// so that nothing has to be opened inside the pause window.
    fn hold(&self) -> Result<(), StoreTrouble>;
    /// Ends [`StoreAccess::hold`].
    fn release(&self);
}

/// The store on this host's device.
#[derive(Debug)]
pub struct DeviceStore {
    given: Option<PathBuf>,
    /// Where it was found: a whole host of VMs waits for the next look.
    found: OnceLock<PathBuf>,
    held: Mutex<Option<Store>>,
}

impl DeviceStore {
    /// The store at `path`; without a path the first `/dev/dax*` that holds one.
    pub fn new(path: Option<PathBuf>) -> Self {
        Self {
            given: path,
            found: OnceLock::new(),
            held: Mutex::new(None),
        }
    }

    fn find(&self) -> Result<Option<PathBuf>, StoreTrouble> {
        if let Some(path) = self.given.as_ref().or(self.found.get()) {
            return Ok(Some(path.clone()));
        }
        let found = Store::find()?;
        if let Some(path) = &found {
            let _ = self.found.set(path.clone());
        }
        Ok(found)
    }

    fn read(&self) -> Result<Option<Store>, StoreTrouble> {
        match self.find()? {
            Some(path) => Ok(Some(Store::open(&path, Access::Read)?)),
            None => Ok(None),
        }
    }

    fn manage(&self) -> Result<Store, StoreTrouble> {
        let path = self.find()?.ok_or(StoreTrouble::None)?;
        let began = Instant::now();
        loop {
            match Store::open(&path, Access::Manage) {
                Err(StoreError::Busy(_)) if began.elapsed() < MANAGER_WAIT => {
                    thread::sleep(Duration::from_millis(20));
                }
                other => return Ok(other?),
            }
        }
    }

    fn with_manager<T>(
        &self,
        work: impl FnOnce(&mut Store) -> Result<T, StoreError>,
    ) -> Result<T, StoreTrouble> {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        match held.as_mut() {
            Some(store) => Ok(work(store)?),
            None => Ok(work(&mut self.manage()?)?),
        }
    }
}

fn segment_view(store: &Store, entry: &SegmentEntry) -> Result<SegmentView, StoreTrouble> {
    Ok(match entry {
        SegmentEntry::Valid(info) => SegmentView {
            id: info.spec.id,
            name: Some(info.spec.name.clone()),
            vm: Some(info.spec.vm),
            memory: ByteSize(info.spec.ram.iter().map(|p| p.place.len).sum()),
            extents: info.spec.ram.len(),
            exec: ExecView::from(&info.exec),
            carried: false,
            held: store.is_held(&info.spec)?,
            spec: serde_json::to_string(&info.spec)?,
        },
        SegmentEntry::Damaged { slot, name, reason } => SegmentView {
            id: SegmentId(*slot),
            name: name.clone(),
            vm: None,
            memory: ByteSize(0),
            extents: 0,
            exec: ExecView::Damaged {
                reason: reason.clone(),
            },
            carried: false,
            held: false,
            spec: String::new(),
        },
    })
}

/// An initramfs without the package's hook, or one that another tool made, leaves
/// the reserved range to udev, which may come later than whoever looks for VMs.
fn have_device(cmdline: &str, found: &dyn Fn() -> bool, load: &dyn Fn()) {
    if !dax::parse_memmap_reservations(cmdline).is_empty() && !found() {
        load();
    }
}

/// Loads what makes a device of the reserved range, and waits for that. What
/// cannot be loaded may be built in.
fn load_range() {
    let loaded = Command::new("modprobe")
        .arg("-aq")
        .args(DAX_MODULES.split(' '))
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .stdin(Stdio::null())
        .status();
    // What came of it shows where the device is looked for.
    let _ = (loaded, dax::settle(Path::new("/sys")));
}

impl StoreAccess for DeviceStore {
    fn settle(&self) {
        if self.given.is_none() {
            let cmdline = fs::read_to_string("/proc/cmdline").unwrap_or_default();
            let found = || !matches!(self.find(), Ok(None));
            have_device(&cmdline, &found, &load_range);
        }
    }

    fn view(&self) -> Result<Option<StoreView>, StoreTrouble> {
        let Some(store) = self.read()? else {
            return Ok(None);
        };
        let info = store.info()?;
        let segments = store.segments()?;
        Ok(Some(StoreView {
            path: info.path.clone(),
            uuid: info.uuid,
            capacity: ByteSize(info.capacity),
            free: ByteSize(info.free),
            phys_range: info.phys_range,
            kept_only: false,
            segments: segments
                .iter()
                .map(|entry| segment_view(&store, entry))
                .collect::<Result<_, _>>()?,
        }))
    }

    fn check(&self) -> Result<(), StoreTrouble> {
        match self.read()? {
            Some(store) => Ok(store.check()?),
            None => Ok(()),
        }
    }

    fn create(
        &self,
        vm: VmId,
        name: &VmName,
        memory: ByteSize,
    ) -> Result<NewSegment, StoreTrouble> {
        let spec = self.with_manager(|store| store.create(vm, name, memory))?;
        Ok(NewSegment {
            id: spec.id,
            spec: serde_json::to_string(&spec)?,
        })
    }

    fn drop_segment(&self, id: SegmentId, vm: Option<VmId>) -> Result<(), StoreTrouble> {
        self.with_manager(|store| store.drop_segment(id, vm))
    }

    fn device(&self) -> Result<OwnedFd, StoreTrouble> {
        let path = self.find()?.ok_or(StoreTrouble::None)?;
        // Not a duplicate of a manager's descriptor: that would share its
        // lock, and the VMM would be the store's manager until it closes it.
        let opened = OpenOptions::new().read(true).write(true).open(&path);
        match opened {
            Ok(file) => Ok(file.into()),
            Err(source) => Err(StoreTrouble::Device { path, source }),
        }
    }

    fn read_report(&self) -> Result<Option<Vec<u8>>, StoreTrouble> {
        match self.read()? {
            Some(store) => Ok(store.read_report()?),
            None => Ok(None),
        }
    }

    fn write_report(&self, bytes: &[u8]) -> Result<(), StoreTrouble> {
        self.with_manager(|store| store.write_report(bytes))
    }

    fn hold(&self) -> Result<(), StoreTrouble> {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        if held.is_none() {
            *held = Some(self.manage()?);
        }
        Ok(())
    }

    fn release(&self) {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        *held = None;
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    #[test]
    fn modules_are_loaded_for_a_range_without_a_device_and_for_nothing_else() {
        for (cmdline, there, loads) in [
            ("quiet memmap=4G!12G", false, 1),
            ("quiet memmap=4G!12G", true, 0),
            ("quiet", false, 0),
            ("memmap=4G$12G quiet", false, 0),
        ] {
            let loaded = Cell::new(0);
            have_device(cmdline, &|| there, &|| loaded.set(loaded.get() + 1));
            assert_eq!(loaded.get(), loads, "{cmdline}, {there}");
        }
    }
}
