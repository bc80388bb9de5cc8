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

/// What the guest told of a panic; absent without such a device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PvpanicV1 {
    /// What it wrote since it booted: bit 0, its kernel panicked; bit 1, it
    /// has loaded a crash kernel after that.
    pub seen: u8,
}

impl Section for PvpanicV1 {
    const KIND: SectionKind = SectionKind::Pvpanic;
    const VERSION: u32 = 1;
}

/// VM generation ID; absent where the VM has none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GenerationIdV1 {
    /// What the guest finds in its memory.
    pub id: [u8; 16],
}

impl Section for GenerationIdV1 {
    const KIND: SectionKind = SectionKind::GenerationId;
    const VERSION: u32 = 1;
}

/// A real-time clock; absent where the VM has none.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RtcV1 {
    /// The register that the data port is for.
    pub index: u8,
    /// Seconds that the guest's clock is ahead of the host's wall clock.
    pub ahead_s: i64,
    /// The time's registers while the guest sets it: seconds, minutes, hours,
    /// day of the week, day, month, year, century.
    pub set: Option<[u8; 8]>,
    /// All 128 registers; those of the time mean nothing.
    pub registers: Vec<u8>,
}

impl Section for RtcV1 {
    const KIND: SectionKind = SectionKind::Rtc;
    const VERSION: u32 = 1;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{hex, unhex};
    use crate::{StateError, StateReader, StateWriter};

    /// What release 0.1 writes for [`samples`]. Never edited: a change of a
    /// struct is a new version beside this one.
    const GOLDEN: &str = include_str!("../../golden/machine-v1.hex");
    /// Length of the container's header, the only part that another section
    /// changes.
    const HEADER_LEN: usize = 28;

    #[derive(Debug, PartialEq)]
    struct Samples {
        vm: VmV1,
        vcpus: [VcpuV1; 2],
        irqchip: IrqchipV1,
        clock: ClockV1,
        acpi: AcpiV1,
    }

    fn samples() -> Samples {
        Samples {
            vm: VmV1 {
                id: *b"\x00\x11\x22\x33\x44\x55\x66\x77\x88\x99\xaa\xbb\xcc\xdd\xee\xff",
                config_toml: "name = \"web\"\nmemory = \"256MiB\"\n".to_owned(),
                resumes: 300,
                release: "0.1.0".to_owned(),
                host_kernel: "6.1.0-50-cloud-amd64".to_owned(),
            },
            vcpus: [full_vcpu(), bare_vcpu()],
            irqchip: IrqchipV1 {
                chips: vec![vec![1, 2, 3], vec![0xff; 3], vec![]],
            },
            clock: ClockV1 {
                kvmclock_ns: 0x0123_4567_89ab_cdef,
                realtime_ns: 1_700_000_000_123_456_789,
                host_tsc: u64::MAX,
                host_tsc_khz: 2_994_375,
            },
            acpi: AcpiV1 { pending_events: 1 },
        }
    }

    /// Every field differs from every other, so that none can change places.
    fn full_vcpu() -> VcpuV1 {
        VcpuV1 {
            cpuid: vec![
                CpuidEntryV1 {
                    function: 0,
                    index: 0,
                    flags: 0,
                    registers: [0x1f, 0x756e_6547, 0x6c65_746e, 0x4965_6e69],
                },
                CpuidEntryV1 {
                    function: 0x8000_0001,
                    index: 2,
                    flags: 1,
                    registers: [3, 4, 5, u32::MAX],
                },
            ],
            mp_state: 3,
            regs: vec![0x11; 4],
            sregs: vec![0x22; 5],
            xsave: vec![0x33; 130],
            xcrs: vec![0x44; 6],
            debug_regs: vec![0x55; 7],
            lapic: vec![0x66; 8],
            msrs: vec![(0x10, 0xffff_ffff_ffff), (0xc000_0080, 0xd01)],
            events: vec![0x77; 9],
            tsc_khz: 2_400_000,
            tsc_offset: Some(0xffff_ff00_0000_0001),
        }
    }

    fn bare_vcpu() -> VcpuV1 {
        VcpuV1 {
            cpuid: vec![],
            mp_state: 1,
            regs: vec![],
            sregs: vec![],
            xsave: vec![],
            xcrs: vec![],
            debug_regs: vec![],
            lapic: vec![],
            msrs: vec![],
            events: vec![],
            tsc_khz: 0,
            tsc_offset: None,
        }
    }

    fn write(samples: &Samples) -> StateWriter {
        let mut writer = StateWriter::new();
        writer.add(0, &samples.vm);
        for (instance, vcpu) in (0..).zip(&samples.vcpus) {
            writer.add(instance, vcpu);
        }
        writer.add(0, &samples.irqchip);
        writer.add(0, &samples.clock);
        writer.add(0, &samples.acpi);
        writer
    }

    #[test]
    fn the_encoding_is_the_golden_one() {
        let encoded = write(&samples()).finish();
        assert!(encoded == unhex(GOLDEN), "encoded now:\n{}", hex(&encoded));
    }

    #[test]
    fn the_golden_bytes_decode_to_the_same_values() {
        let bytes = unhex(GOLDEN);
        let mut reader = StateReader::parse(&bytes).expect("parse");
        assert_eq!(reader.instances(SectionKind::Vcpu), [0, 1]);
        let decoded = Samples {
            vm: reader.take(0).expect("VM"),
            vcpus: [0, 1].map(|instance| reader.take(instance).expect("vCPU")),
            irqchip: reader.take(0).expect("interrupt controllers"),
            clock: reader.take(0).expect("clock"),
            acpi: reader.take(0).expect("ACPI"),
        };
        assert_eq!(decoded, samples());
        assert_eq!(reader.finish(), Ok(()));
    }

    #[test]
    fn the_golden_bytes_with_a_section_of_a_newer_release_are_refused_by_name() {
        let mut writer = write(&samples());
        writer.add_raw(4711, 3, 0, b"from later");
        let bytes = writer.finish();
        let golden = unhex(GOLDEN);
        assert!(bytes[HEADER_LEN..].starts_with(&golden[HEADER_LEN..]));
        let refused = StateReader::parse(&bytes).expect_err("unknown kind");
        let unknown = StateError::UnknownKind {
            kind: 4711,
            version: 3,
        };
        assert_eq!(refused, unknown);
        let sentence = refused.to_string();
        assert!(
            sentence.contains("kind 4711 (version 3)") && sentence.contains("newer"),
            "{sentence}"
        );
    }

    /// Sections of VMs that have these devices, apart from the others' golden
    /// bytes: a VM without them has none.
    #[test]
    fn a_panic_and_a_generation_are_kinds_9_and_10() {
        let (panic, id) = (PvpanicV1 { seen: 3 }, GenerationIdV1 { id: [7; 16] });
        let mut writer = StateWriter::new();
        writer.add(0, &panic);
        writer.add(0, &id);
        let bytes = writer.finish();
        let mut raw = StateWriter::new();
        raw.add_raw(9, 1, 0, &[3]);
        raw.add_raw(10, 1, 0, &[7; 16]);
        assert_eq!(bytes, raw.finish());
        let mut reader = StateReader::parse(&bytes).expect("parse");
        assert_eq!(reader.take(0), Ok(panic));
        assert_eq!(reader.take(0), Ok(id));
        assert_eq!(reader.finish(), Ok(()));
    }

    #[test]
    fn a_clock_is_kind_11() {
        let rtc = RtcV1 {
            index: 0x32,
            ahead_s: -300,
            set: Some([1, 2, 3, 4, 5, 6, 7, 8]),
            registers: vec![0x26, 2],
        };
        let mut writer = StateWriter::new();
        writer.add(0, &rtc);
        let bytes = writer.finish();
        let mut raw = StateWriter::new();
        let payload = [0x32, 0xd7, 4, 1, 1, 2, 3, 4, 5, 6, 7, 8, 2, 0x26, 2];
        raw.add_raw(11, 1, 0, &payload);
        assert_eq!(bytes, raw.finish());
        let mut reader = StateReader::parse(&bytes).expect("parse");
        assert_eq!(reader.take(0), Ok(rtc));
        assert_eq!(reader.finish(), Ok(()));
    }

    #[test]
    fn cut_payloads_do_not_decode_and_do_not_panic() {
        let payload = postcard::to_stdvec(&full_vcpu()).expect("encode");
        for len in 0..payload.len() {
            let cut = postcard::take_from_bytes::<VcpuV1>(&payload[..len]);
            assert!(cut.is_err(), "{len} bytes");
        }
    }
}
