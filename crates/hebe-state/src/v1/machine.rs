//! The machine: VM, vCPUs, interrupt controllers, clock, ACPI registers.
//!
//! Fields that hold a struct of the KVM API are its bytes, in the layout that
//! the KVM API promises for ever. Their length is recorded with them, and a
//! reader refuses a length that it does not expect rather than pad or cut.

use serde::{Deserialize, Serialize};

use crate::{Section, SectionKind};

/// Who the VM is, and what it is made of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmV1 {
    /// The VM's id, which must equal the id in its segment's record.
    pub id: [u8; 16],
    /// The VM's definition, in TOML, as it was when the VM booted.
    pub config_toml: String,
    /// Times the VM was resumed since it booted.
    pub resumes: u32,
    /// The release that wrote this state.
    pub release: String,
    /// `uname -r` of the host kernel that wrote this state.
    pub host_kernel: String,
}

impl Section for VmV1 {
    const KIND: SectionKind = SectionKind::Vm;
    const VERSION: u32 = 1;
}

/// One entry of `KVM_SET_CPUID2`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuidEntryV1 {
    /// EAX on entry.
    pub function: u32,
    /// ECX on entry.
    pub index: u32,
    /// `KVM_CPUID_FLAG_*`.
    pub flags: u32,
    /// EAX, EBX, ECX, EDX on return.
    pub registers: [u32; 4],
}

/// One vCPU.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VcpuV1 {
    /// What CPUID tells the guest.
    pub cpuid: Vec<CpuidEntryV1>,
    /// `kvm_mp_state`.
    pub mp_state: u32,
    /// `kvm_regs`.
    pub regs: Vec<u8>,
    /// `kvm_sregs`.
    pub sregs: Vec<u8>,
    /// `kvm_xsave`, 4096 bytes or more.
    pub xsave: Vec<u8>,
    /// `kvm_xcrs`; empty where the host has no XSAVE.
    pub xcrs: Vec<u8>,
    /// `kvm_debugregs`.
    pub debug_regs: Vec<u8>,
    /// `kvm_lapic_state`.
    pub lapic: Vec<u8>,
    /// Index and value, in the order in which they are to be set.
    pub msrs: Vec<(u32, u64)>,
    /// `kvm_vcpu_events`.
    pub events: Vec<u8>,
    /// The guest's TSC frequency.
    pub tsc_khz: u32,
    /// `KVM_VCPU_TSC_OFFSET`: guest TSC less host TSC; absent where KVM has no such attribute.
    pub tsc_offset: Option<u64>,
}

impl Section for VcpuV1 {
    const KIND: SectionKind = SectionKind::Vcpu;
    const VERSION: u32 = 1;
}

/// The in-kernel interrupt controllers besides the LAPICs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IrqchipV1 {
    /// `kvm_irqchip` of the first PIC, the second PIC and the IOAPIC.
    pub chips: Vec<Vec<u8>>,
}

impl Section for IrqchipV1 {
    const KIND: SectionKind = SectionKind::Irqchip;
    const VERSION: u32 = 1;
}

/// Clocks at the instant of suspend.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClockV1 {
    /// kvmclock, in nanoseconds.
    pub kvmclock_ns: u64,
    /// The host's `CLOCK_REALTIME` at the same instant, in nanoseconds.
    pub realtime_ns: u64,
    /// The host's TSC at the same instant.
    pub host_tsc: u64,
    /// The host's TSC frequency, in kHz.
    pub host_tsc_khz: u32,
}

impl Section for ClockV1 {
    const KIND: SectionKind = SectionKind::Clock;
    const VERSION: u32 = 1;
}

/// ACPI registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AcpiV1 {
    /// Events that the guest has not fetched yet: bit 0 is the power button.
    pub pending_events: u8,
}

impl Section for AcpiV1 {
    const KIND: SectionKind = SectionKind::Acpi;
    const VERSION: u32 = 1;
}
