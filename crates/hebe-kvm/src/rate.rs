//! The rate at which a guest's TSC is said to run.
//!
//! KVM gives a new vCPU the rate that it knew when it was initialised itself
//! (`max_tsc_khz`). Linux measures the TSC again a second after its start, and
//! where KVM is built into the kernel the two can differ. KVM then tries to
//! scale the guest's TSC; on a processor without scaling it fails to, says so
//! in the kernel's log alone ("user requested TSC rate below hardware speed"),
//! and leaves the vCPU with a scaling ratio of zero. Its kvmclock is computed
//! with that: it jumps ahead by all that the host's TSC ever counted, and the
//! guest never recovers. Seen on Linux 7.3.4 in the emulated machine, in about
//! one warm reboot of eight. Right after a reboot it is most likely, because
//! frozen VMs come back about when Linux measures.
//!
//! So each vCPU is told the host's own rate, as it is now, which needs no
//! scaling.

use std::os::fd::AsRawFd;

use kvm_ioctls::{VcpuFd, VmFd};
use vmm_sys_util::ioctl::ioctl_with_val;
use vmm_sys_util::ioctl_io_nr;

// KVM API, 4.55 `KVM_SET_TSC_KHZ`, which is for VMs (from Linux 5.16 on) and
// for vCPUs.
ioctl_io_nr!(KVM_SET_TSC_KHZ, 0xae, 0xa2);

/// The host's own rate, which KVM fills in for zero.
const HOSTS_OWN: u64 = 0;

fn set(of: &impl AsRawFd, khz: u64) -> bool {
    // SAFETY: the argument is a number, and no memory is passed.
    unsafe { ioctl_with_val(&of.as_raw_fd(), KVM_SET_TSC_KHZ(), khz) == 0 }
}

/// What the VM's next vCPU begins with; before Linux 5.16 it cannot be told,
/// and newer kernels take it only from a VM without vCPUs.
pub(crate) fn of_new_vcpus(vm: &VmFd) {
    set(vm, HOSTS_OWN);
}

/// The vCPU's, whatever it began with. KVM refuses only where it could do
/// nothing else anyway, and a KVM without it has nothing to correct.
pub(crate) fn of_vcpu(vcpu: &VcpuFd) {
    set(vcpu, HOSTS_OWN);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Machine, host_can_run};

    /// What KVM does by itself where it measured the TSC too early.
    #[test]
    fn a_rate_that_the_host_has_no_more_is_not_passed_on() {
        if let Err(error) = host_can_run() {
            println!("skipped: {error}");
            return;
        }
        let machine = Machine::new().expect("a machine");
        let vcpu = machine.create_vcpu(0).expect("a vCPU");
        let host = vcpu.tsc_khz().expect("the host's rate");
        for stale in [host - host / 100, host + host / 100] {
            let machine = Machine::new().expect("a machine");
            if !set(machine.vm_fd(), u64::from(stale)) {
                println!("this KVM takes no rate for new vCPUs: tried in the emulated machine");
                return;
            }
            let vcpu = machine.create_vcpu(0).expect("a vCPU");
            assert_eq!(vcpu.tsc_khz(), Some(host), "begun at {stale} kHz");
        }
    }
}
