//! Giving segments up, with a look at who may still be in them.
//!
//! A VM's lock says who owns it, and lies in the runtime directory. Where that
//! directory was emptied, the locks are gone and their holders live on. What is
//! never lost is the lock that a VMM has on the segment itself, as long as it
//! maps it ([`SegmentView::held`]): it refuses a second VMM and a drop, and here
//! it tells such a VMM from a VM that nobody has.

use std::fs;
use std::thread;
use std::time::Duration;

use hebe_store::StoreError;
use hebe_types::{VmId, VmName};

use crate::host::{Host, HostError};
use crate::notes;
use crate::ops::lock;
use crate::overlays;
use crate::stores::{SegmentView, StoreTrouble, StoreView};

/// How long a VMM that let its VM's lock go may need to end altogether.
const END_WAIT: Duration = Duration::from_millis(50);

/// Frees a segment, unless a VMM has it mapped. The caller holds the VM's lock.
pub fn free_segment(host: &Host, segment: &SegmentView) -> Result<(), HostError> {
    refuse_in_use(segment)?;
    match host.store.drop_segment(segment.id, segment.vm) {
        Err(StoreTrouble::Store(StoreError::Held(_))) => return Err(in_use(segment, None)),
        other => other?,
    }
    if let (Some(name), Some(vm)) = (&segment.name, segment.vm) {
        if segment.carried {
            notes::forget(&host.layout, name, vm);
        } else {
            notes::forget_here(host, name, vm);
        }
    }
    Ok(())
}

/// Frees a segment that was listed, if `admit` agrees to what is in it now: the
/// VM's lock is taken first, for whoever held it may have frozen the VM since
/// the listing. Gives what was freed.
///
/// # Errors
/// [`HostError::Busy`] while its VM is somebody's; what `admit` says.
pub fn drop_listed<E: From<HostError>>(
    host: &Host,
    listed: &SegmentView,
    admit: impl FnOnce(&SegmentView) -> Result<(), E>,
) -> Result<SegmentView, E> {
    // One whose record is damaged names no VM: the store alone has its lock.
    let taken = listed.name.as_ref().map(|name| lock(host, name));
    let _lock = taken.transpose()?;
    let view = host.store.view().map_err(HostError::from)?;
    let segments = view.iter().flat_map(|v| &v.segments);
    let same = |s: &&SegmentView| (s.id, s.vm, &s.name) == (listed.id, listed.vm, &listed.name);
    let gone = || HostError::from(StoreTrouble::from(StoreError::NoSuchSegment(listed.id)));
    let now = segments.into_iter().find(same).ok_or_else(gone)?;
    admit(now)?;
    free_segment(host, now)?;
    if let (Some(name), Some(vm)) = (&now.name, now.vm) {
        overlays::freed(host, name, vm);
    }
    Ok(now.clone())
}

/// Refuses where a VMM of the segment's VM is still there.
pub fn refuse_in_use(segment: &SegmentView) -> Result<(), HostError> {
    let holder = segment.vm.filter(|_| segment.held).and_then(vmm_of);
    match holder {
        Some(pid) => Err(in_use(segment, Some(pid))),
        // Without a process it may be gone by now: the store has the last word.
        None => Ok(()),
    }
}

fn in_use(segment: &SegmentView, pid: Option<u32>) -> HostError {
    HostError::InUse {
        segment: segment.id,
        name: segment.name.clone(),
        pid,
    }
}

/// What is said of a VM whose VMM lives and lost its runtime directory, with
/// that VMM's process where it can be found. The caller saw that nobody holds
/// the VM's lock.
pub(crate) fn stranded(
    host: &Host,
    store: Option<&StoreView>,
    name: &VmName,
) -> Option<(Option<u32>, HostError)> {
    let segment = store?.held_of(name)?;
    let pid = segment.vm.and_then(vmm_of);
    if pid.is_none() {
        thread::sleep(END_WAIT);
        host.store.view().ok().flatten()?.held_of(name)?;
    }
    Some((pid, in_use(segment, pid)))
}

/// The living process that was started as the VMM of that VM.
pub(crate) fn vmm_of(vm: VmId) -> Option<u32> {
    let processes = fs::read_dir("/proc").ok()?.flatten();
    processes
        .filter_map(|process| process.file_name().to_str()?.parse().ok())
        .find(|pid| is_vmm_of(*pid, vm))
}

/// Whether a process is the VMM of that VM; process ids are used again.
fn is_vmm_of(pid: u32, vm: VmId) -> bool {
    // Empty for one that is gone but for its exit status.
    let arguments = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let mut words = arguments.split(|&byte| byte == 0);
    words.any(|word| word == b"--vm-id")
        && words
            .next()
            .and_then(|word| std::str::from_utf8(word).ok())
            .and_then(hebe_sys::proc::parse_uuid)
            == Some(vm.0)
}
