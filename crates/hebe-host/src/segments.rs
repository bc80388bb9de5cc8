//! Giving segments up, with a look at who may still be in them.
//!
//! A VM's lock says who owns it, and lies in the runtime directory. Where that
//! directory was emptied, the locks are gone and their holders live on; what
//! the segment itself says is all that is left to find such a VMM by.

use std::fs;

use hebe_types::VmId;

use crate::host::{Host, HostError};
use crate::stores::{ExecView, SegmentView};

/// Frees a segment, unless a VMM runs in it. The caller holds the VM's lock.
pub fn free_segment(host: &Host, segment: &SegmentView) -> Result<(), HostError> {
    refuse_in_use(host, segment)?;
    Ok(host.store.drop_segment(segment.id, segment.vm)?)
}

/// Refuses where the VMM that marked the segment as running in this boot is
/// still there.
pub fn refuse_in_use(host: &Host, segment: &SegmentView) -> Result<(), HostError> {
    let (ExecView::Running { boot_id, pid }, Some(vm)) = (&segment.exec, segment.vm) else {
        return Ok(());
    };
    if *boot_id != host.system.boot_id() || !is_vmm_of(*pid, vm) {
        return Ok(());
    }
    Err(HostError::InUse {
        segment: segment.id,
        pid: *pid,
    })
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
