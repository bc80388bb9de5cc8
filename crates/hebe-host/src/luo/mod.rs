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

pub(crate) mod carry;
pub(crate) mod check;
pub mod keeper;
pub mod store;

use hebe_api::{Client, ClientError, FreezeReport, Request, Response};
use hebe_store::luo::SegmentFiles;
use hebe_sys::fdpass;
use hebe_types::{ByteSize, StoreKind, VmConfig, VmId, VmName};

use crate::host::{Host, HostError};
use crate::launch::Memory;
use crate::listing::VmRow;
use crate::notes;
use crate::stores::{SegmentView, StoreTrouble};
use crate::vmm;

/// The store's name in lists and definitions.
pub const STORE: &str = "luo";

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
    let files = keeper::take(&socket, segment.id).map_err(StoreTrouble::Keeper)?;
    Ok(Memory::of_files(files)?)
}

/// A VMM runs the VM: the keeper need not hold its memory any more. Where that
/// cannot be said now, the keeper finds it out when it is asked next.
pub(crate) fn taken_over(host: &Host, segment: &SegmentView) {
    let _ = keeper::release(&host.layout.keeper_socket(), segment.id);
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
        if let Some(vm) = status.filter(|_| vmm::is_refusal(&source)) {
            notes::forget(&host.layout, name, vm);
        }
        HostError::Vmm {
            name: name.clone(),
            source,
        }
    })
}

/// Forgets that these VMs, which are up, were to be carried.
pub(crate) fn forget_arrived<'a>(host: &Host, up: impl Iterator<Item = (&'a VmName, VmId)>) {
    let noted: Vec<_> = notes::all(&host.layout)
        .into_iter()
        .filter(notes::FrozenNote::is_carried)
        .collect();
    for (name, vm) in up {
        if noted.iter().any(|n| n.name == *name && n.vm == vm) {
            notes::forget(&host.layout, name, vm);
        }
    }
}
