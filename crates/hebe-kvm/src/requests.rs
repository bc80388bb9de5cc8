//! What this crate asks of KVM, by number (KVM API; `_IOC` of
//! <asm-generic/ioctl.h>), for who lets through nothing else.

use std::mem::size_of;

use kvm_bindings::{
    kvm_clock_data, kvm_cpuid2, kvm_debugregs, kvm_device_attr, kvm_enable_cap, kvm_fpu,
    kvm_ioeventfd, kvm_irq_routing, kvm_irqchip, kvm_irqfd, kvm_lapic_state, kvm_mp_state,
    kvm_msr_list, kvm_msrs, kvm_regs, kvm_sregs, kvm_userspace_memory_region, kvm_vcpu_events,
    kvm_xcrs, kvm_xsave,
};

const NONE: u32 = 0;
const WRITE: u32 = 1;
const READ: u32 = 2;
const BOTH: u32 = 3;

const fn request<T>(way: u32, number: u32) -> u32 {
    way << 30 | (size_of::<T>() as u32) << 16 | 0xae << 8 | number
}

/// Makes a VM. Only a boot asks for it.
pub const CREATE_VM: u32 = request::<()>(NONE, 0x01);

/// What a vCPU's thread asks for: that it runs, its registers, and, when its
/// guest sets up a device, interrupts and doorbells.
pub const VCPU: &[u32] = &[
    request::<()>(NONE, 0x80), // KVM_RUN
    request::<kvm_regs>(READ, 0x81),
    request::<kvm_regs>(WRITE, 0x82),
    request::<kvm_sregs>(READ, 0x83),
    request::<kvm_sregs>(WRITE, 0x84),
    request::<kvm_msrs>(BOTH, 0x88),
    request::<kvm_msrs>(WRITE, 0x89),
    request::<u32>(WRITE, 0x8b), // KVM_SET_SIGNAL_MASK
    request::<kvm_fpu>(WRITE, 0x8d),
    request::<kvm_lapic_state>(READ, 0x8e),
    request::<kvm_lapic_state>(WRITE, 0x8f),
    request::<kvm_cpuid2>(WRITE, 0x90),
    request::<kvm_cpuid2>(BOTH, 0x91),
    request::<kvm_mp_state>(READ, 0x98),
    request::<kvm_mp_state>(WRITE, 0x99),
    request::<kvm_vcpu_events>(READ, 0x9f),
    request::<kvm_vcpu_events>(WRITE, 0xa0),
    request::<kvm_debugregs>(READ, 0xa1),
    request::<kvm_debugregs>(WRITE, 0xa2),
    request::<()>(NONE, 0xa2), // KVM_SET_TSC_KHZ
    request::<()>(NONE, 0xa3), // KVM_GET_TSC_KHZ
    request::<kvm_xsave>(READ, 0xa4),
    request::<kvm_xsave>(WRITE, 0xa5),
    request::<kvm_xcrs>(READ, 0xa6),
    request::<kvm_xcrs>(WRITE, 0xa7),
    request::<()>(NONE, 0xad), // KVM_KVMCLOCK_CTRL
    request::<kvm_xsave>(READ, 0xcf),
    request::<kvm_device_attr>(WRITE, 0xe1),
    request::<kvm_device_attr>(WRITE, 0xe2),
    request::<kvm_device_attr>(WRITE, 0xe3),
    request::<kvm_irq_routing>(WRITE, 0x6a),
    request::<kvm_irqfd>(WRITE, 0x76),
    request::<kvm_ioeventfd>(WRITE, 0x79),
];

/// What a VM is made with, saved and restored, beside its vCPUs.
pub const MACHINE: &[u32] = &[
    request::<()>(NONE, 0x00), // KVM_GET_API_VERSION
    CREATE_VM,
    request::<kvm_msr_list>(BOTH, 0x02),
    request::<()>(NONE, 0x03), // KVM_CHECK_EXTENSION
    request::<()>(NONE, 0x04), // KVM_GET_VCPU_MMAP_SIZE
    request::<kvm_cpuid2>(BOTH, 0x05),
    request::<()>(NONE, 0x41), // KVM_CREATE_VCPU
    request::<kvm_userspace_memory_region>(WRITE, 0x46),
    request::<()>(NONE, 0x47), // KVM_SET_TSS_ADDR
    request::<u64>(WRITE, 0x48),
    request::<()>(NONE, 0x60), // KVM_CREATE_IRQCHIP
    request::<kvm_irqchip>(BOTH, 0x62),
    request::<kvm_irqchip>(READ, 0x63),
    request::<kvm_clock_data>(WRITE, 0x7b),
    request::<kvm_clock_data>(READ, 0x7c),
    request::<kvm_enable_cap>(WRITE, 0xa3),
];

#[cfg(test)]
mod tests {
    use super::*;

    /// What is asked for by a number of this crate's own: rarely, so that a
    /// guest would have to be lucky to show that one is missing.
    #[test]
    fn what_this_crate_asks_for_itself_is_let_through() {
        for number in [
            crate::settle::KVM_SET_SIGNAL_MASK(),
            crate::rate::KVM_SET_TSC_KHZ(),
            crate::machine::KVM_SET_DEVICE_ATTR(),
            crate::machine::KVM_GET_DEVICE_ATTR(),
            crate::machine::KVM_HAS_DEVICE_ATTR(),
        ] {
            assert!(VCPU.contains(&(number as u32)), "{number:#x}");
        }
    }

    /// As strace(1) names them.
    #[test]
    fn numbers_are_those_of_the_kernel() {
        for number in [
            0xae80,
            0x8090_ae81,
            0x4090_ae82,
            0x9000_aea4,
            0x4008_ae6a,
            0x4040_ae79,
        ] {
            assert!(VCPU.contains(&number), "{number:#x}");
        }
        for number in [
            0xae01,
            0x4020_ae46,
            0xc008_ae05,
            0xc208_ae62,
            0x8208_ae63,
            0x4068_aea3,
        ] {
            assert!(MACHINE.contains(&number), "{number:#x}");
        }
    }
}
