//! VMs in store `luo`: ordinary memory, which Linux's Live Update Orchestrator
//! carries into the next kernel ([`hebe_store::luo`]; docs/live-update.md).
//!
//! ```text
//! old kernel                                     new kernel
//!   VMM (files) ──SegmentFiles──▶ reboot job       keeper ◀─retrieve── kernel
//!                                 [carry]             │ [keeper]
//!                        sessions │ until the jump    └─take─▶ hebe resume ──▶ VMM (files)
//! ```
//! Whoever has the files has the memory. In the old kernel that is the VMM,
//! also of a VM that is frozen; over the jump the kernel; in the new one first
//! the keeper and then the next VMM.

pub mod arrivals;
pub mod asking;
pub(crate) mod carry;
pub(crate) mod check;
mod image;
pub mod keeper;
pub mod store;

use std::thread;
use std::time::{Duration, Instant};

use hebe_api::{Client, ClientError, FreezeReport, Request, Response, VmStatus, VmmState};
use hebe_store::ExecStatus;
use hebe_store::luo::SegmentFiles;
use hebe_sys::fdpass;
use hebe_sys::luo::{LuoError, Orchestrator};
use hebe_types::{ByteSize, StoreKind, VmConfig, VmId, VmName};

use crate::definitions;
use crate::host::{CarrierChoice, Host, HostError, Layout};
use crate::launch::{ExitRecord, Instance, LAUNCH_WAIT, Launch, Memory, Origin, launch};
use crate::listing::{VmRow, with_cause};
use crate::lock::VmLock;
use crate::notes;
use crate::ops;
use crate::stores::{SegmentView, StoreTrouble};
use crate::systemd;
use crate::vmm;

/// The store's name in lists and definitions.
pub const STORE: &str = "luo";
/// How long another owner of the device is waited for, where memory depends on
/// it: most need it no longer than Hebe does.
const OWNER_WAIT: Duration = Duration::from_secs(3);

/// What carries memory, opened; waits a little for another owner to be done.
pub(crate) fn orchestrator(host: &Host) -> Result<Box<dyn Orchestrator>, LuoError> {
    let began = Instant::now();
    loop {
        match host.system.orchestrator() {
            Err(LuoError::Taken) if began.elapsed() < OWNER_WAIT => {
                thread::sleep(Duration::from_millis(20));
            }
            other => return other,
        }
    }
}

/// Whether what is preserved outlives this process where the service manager
/// leaves for the next kernel, because PID 1 holds the sessions; in words, by
/// whom. That the unit is active is not asked: when the host is taken down it is
/// being stopped. Otherwise `hebe reboot` leaves by itself while VMs are in this store,
/// and [`crate::stopping`] saves them.
///
/// # Errors
/// Why PID 1 does not hold them.
pub(crate) fn carrier(host: &Host) -> Result<String, String> {
    let config = host.config().map_err(|e| with_cause(&e))?;
    if config.live_update.carrier == CarrierChoice::Own {
        return Err("host.toml says carrier = \"own\"".into());
    }
    host.system.live_update().map_err(|e| with_cause(&e))?;
    let vms = definitions::all(&host.layout).len();
    host.system.fd_store_of(systemd::UNIT, vms + 1)
}

/// Whether that will be so when the host is taken down.
pub(crate) fn carried_by_manager(host: &Host) -> bool {
    host.system.armed().is_ok() && carrier(host).is_ok()
}

/// Whether `store = "auto"` means this store, where there is no other one.
pub(crate) fn may_be_chosen(host: &Host, config: &VmConfig) -> bool {
    config.store == StoreKind::Auto && !config.hugepages && host.system.live_update().is_ok()
}

/// Memory for a VM that boots.
pub(crate) fn new_memory(host: &Host, config: &VmConfig, vm: VmId) -> Result<Memory, HostError> {
    host.system.live_update().map_err(StoreTrouble::from)?;
    memory(&config.name, vm, config.memory)
}

/// Fresh memory that reads as zero.
pub(crate) fn memory(name: &VmName, vm: VmId, size: ByteSize) -> Result<Memory, HostError> {
    let files = SegmentFiles::create(vm, name, size).map_err(StoreTrouble::from)?;
    Ok(Memory::of_files(files)?)
}

/// The memory of a VM that the keeper holds; the keeper goes on holding it.
pub(crate) fn memory_of_kept(host: &Host, segment: &SegmentView) -> Result<Memory, HostError> {
    let socket = host.layout.keeper_socket();
    let files = asking::take(&socket, segment.id).map_err(StoreTrouble::Keeper)?;
    Ok(Memory::of_files(files)?)
}

/// Resumes a VM whose VMM ended while it was frozen, from its memory as the
/// reboot holds it. On failure it is as it was, and lost when that lets it go.
pub(crate) fn continue_here(
    host: &Host,
    name: &VmName,
    files: &SegmentFiles,
) -> Result<VmStatus, HostError> {
    let refused = |why: &str| HostError::Refused {
        name: name.clone(),
        why: why.into(),
    };
    if !matches!(
        files.status().map_err(StoreTrouble::from)?,
        ExecStatus::Frozen { .. }
    ) {
        return Err(refused("its VMM ended, and it has no committed state"));
    }
    let lock = ops::lock(host, name)?;
    let copies = files.fds().map(|fd| fd.try_clone_to_owned());
    let copies = copies.collect::<Result<_, _>>();
    let copies = copies.map_err(|_| refused("its memory cannot be handed on"))?;
    let spec = files.spec();
    let own = SegmentFiles::from_fds(spec.clone(), copies).map_err(StoreTrouble::from)?;
    let order = Launch {
        name: name.clone(),
        vm: spec.vm,
        size: spec.memory(),
        memory: Memory::of_files(own)?,
        origin: Origin::Frozen,
        accept_changed_disk: false,
        is_expected: false,
    };
    Ok(launch(host, &lock, &order, LAUNCH_WAIT)?)
}

/// A VMM runs the VM: the keeper need not hold its memory any more. Where that
/// cannot be said now, the keeper finds it out when it is asked next.
pub(crate) fn taken_over(host: &Host, segment: &SegmentView) {
    let _ = asking::release(&host.layout.keeper_socket(), segment.id);
}

/// The files of a VM that is up, from its VMM, which keeps them.
pub(crate) fn files_of(host: &Host, name: &VmName, vm: VmId) -> Result<SegmentFiles, HostError> {
    let ask = |source| HostError::Vmm {
        name: name.clone(),
        source,
    };
    let broken = |e| ask(ClientError::Broken(e));
    let mut client = Client::connect(&host.layout.socket(name)).map_err(ask)?;
    client.set_timeout(Some(vmm::STATUS_WAIT)).map_err(ask)?;
    let answer = client.call(&Request::SegmentFiles).map_err(ask)?;
    let Response::SegmentFiles { count, spec } = answer else {
        return Err(ask(ClientError::Unexpected));
    };
    let fds = fdpass::receive(&client.into_stream(), count).map_err(broken)?;
    let spec = serde_json::from_str(&spec).map_err(StoreTrouble::from)?;
    let files = SegmentFiles::from_fds(spec, fds).map_err(StoreTrouble::from)?;
    if files.spec().vm != vm || files.spec().name != *name {
        return Err(HostError::Refused {
            name: name.clone(),
            why: "its VMM handed out another VM's memory: please report this".into(),
        });
    }
    Ok(files)
}

/// Suspends a VM on memory. Its VMM stays: the memory would end with it.
pub(crate) fn suspend(host: &Host, row: &VmRow) -> Result<FreezeReport, HostError> {
    let name = &row.name;
    let status = row.status.as_ref().map(|s| s.id);
    if let Some(vm) = status {
        let memory = row.memory.unwrap_or_default();
        notes::note_carried(host, name, vm, memory)?;
    }
    vmm::freeze(&host.layout.socket(name), vmm::FREEZE_WAIT).map_err(|source| {
        if vmm::is_refusal(&source) {
            forget_running(host, status.map(|vm| (name, vm)));
        }
        HostError::Vmm {
            name: name.clone(),
            source,
        }
    })
}

/// Forgets that these were to be carried, if they run. One that another order
/// froze meanwhile, or that could not be let run again, stays noted, and so does
/// one that does not answer.
pub(crate) fn forget_running<'a>(host: &Host, vms: impl IntoIterator<Item = (&'a VmName, VmId)>) {
    for (name, vm) in vms {
        let status = vmm::status(&host.layout.socket(name), vmm::STATUS_WAIT);
        let runs = |state| matches!(state, VmmState::Running | VmmState::Paused);
        if status.is_ok_and(|s| s.id == vm && runs(s.state)) {
            notes::forget_here(host, name, vm);
        }
    }
}

/// [`forget_running`], of all that are noted: after a resume, and after a reboot
/// that was killed while it prepared.
pub(crate) fn forget_arrived(host: &Host) {
    let noted = notes::all(&host.layout);
    let carried = noted.iter().filter(|n| n.is_carried() && !n.given_up);
    // Where that cannot be told the note stays, which does no harm.
    let up = carried.filter(|n| VmLock::look(&host.layout.vm_dir(&n.name)).unwrap_or(false));
    forget_running(host, up.map(|n| (&n.name, n.vm)));
}

/// Whether that life of a VM ended here by the guest's will or by order: then
/// nothing of it was, or is, to be carried.
pub(crate) fn ended_here(layout: &Layout, name: &VmName, vm: VmId) -> bool {
    let dir = layout.vm_dir(name);
    let same = Instance::read(&dir).is_some_and(|instance| instance.vm == vm);
    same && ExitRecord::read(&dir).is_some_and(|record| record.is_clean_end())
}

/// Forgets a VM that ended here, for good: its runtime directory is about to go.
pub(crate) fn forget_ended(host: &Host, name: &VmName) {
    let Some(Instance { vm, .. }) = Instance::read(&host.layout.vm_dir(name)) else {
        return;
    };
    let noted = notes::read(&host.layout, name, vm).ok().flatten();
    let carried = noted.is_some_and(|note| note.is_carried());
    if carried && ended_here(&host.layout, name, vm) {
        notes::forget_here(host, name, vm);
    }
}
