//! What CPUID tells a guest.

use hebe_state::v1::machine::CpuidEntryV1;
use kvm_bindings::{CpuId, kvm_cpuid_entry2};

/// Leaves whose bits are features, with a mask per register (EAX, EBX, ECX,
/// EDX) of those that must still be there after a reload. Bits that the CPU
/// or the VMM changes while it runs (OSXSAVE, APIC ids …) are left out.
const FEATURE_LEAVES: [(u32, u32, [u32; 4]); 9] = [
    (
        0x1,
        0,
        [
            0,
            0,
            !(1 << 27 | 1 << 24 | 1 << 31 | 1 << 3),
            !(1 << 9 | 1 << 28),
        ],
    ),
    (0x7, 0, [0, !0, !(1 << 4), !0]),
    (0xd, 0, [!0, 0, 0, !0]),
    (0xd, 1, [!0, 0, 0, 0]),
    (0x7, 1, [!0, !0, !0, !0]),
    (0x8000_0001, 0, [0, 0, !0, !(1 << 9)]),
    (0x8000_0008, 0, [0, !0, 0, 0]),
    (0x8000_0021, 0, [!0, 0, 0, 0]),
    (0x4000_0001, 0, [!0, 0, 0, 0]),
];

/// Guests are offered no virtualization of their own: its state is not saved.
const CPUID_1_ECX_VMX: u32 = 1 << 5;
const CPUID_80000001_ECX_SVM: u32 = 1 << 2;

/// A running guest relies on a feature that this host does not offer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the guest uses processor features that this host kernel does not offer (CPUID {leaf:#x}.{subleaf}, register {register}, bits {bits:#x}): go back to the kernel it was suspended under"
)]
pub struct CpuidRefusal {
    leaf: u32,
    subleaf: u32,
    register: usize,
    bits: u32,
}

/// The CPUID of vCPU `index` of `count`, from what KVM supports.
pub fn guest_cpuid(supported: &CpuId, index: u8, count: u8, tsc_deadline: bool) -> CpuId {
    let mut cpuid = supported.clone();
    let apic_id = u32::from(index);
    for entry in cpuid.as_mut_slice() {
        match entry.function {
            0x1 => {
                // Initial APIC id, logical processors, CLFLUSH size as KVM gave it.
                entry.ebx = (entry.ebx & 0x0000_ff00) | apic_id << 24 | u32::from(count) << 16;
                entry.ecx |= 1 << 31;
                if tsc_deadline {
                    entry.ecx |= 1 << 24;
                }
                entry.ecx &= !CPUID_1_ECX_VMX;
                set_bit(&mut entry.edx, 28, count > 1);
            }
            0x4 => {
                // Caches are private to a core; the package has `count` cores.
                entry.eax &= !0xffff_c000;
                entry.eax |= (u32::from(count.next_power_of_two()) - 1) << 26;
            }
            0xb | 0x1f => {
                let (shift, number, level_type) = match entry.index {
                    0 => (0, 1, 1),
                    1 => (
                        count.next_power_of_two().trailing_zeros(),
                        u32::from(count),
                        2,
                    ),
                    _ => (0, 0, 0),
                };
                entry.eax = shift;
                entry.ebx = number;
                entry.ecx = entry.index & 0xff | level_type << 8;
                entry.edx = apic_id;
            }
            0x8000_0001 => entry.ecx &= !CPUID_80000001_ECX_SVM,
            0x8000_0008 => {
                entry.ecx = (entry.ecx & !0xf0ff) | (u32::from(count) - 1);
            }
            0x8000_001e => {
                entry.eax = apic_id;
                entry.ebx = apic_id;
                entry.ecx = 0;
            }
            _ => {}
        }
    }
    cpuid
}

fn set_bit(word: &mut u32, bit: u32, on: bool) {
    *word = *word & !(1 << bit) | u32::from(on) << bit;
}

/// Refuses when `saved` has a feature that `supported` lacks.
pub fn missing_features(saved: &[CpuidEntryV1], supported: &CpuId) -> Result<(), CpuidRefusal> {
    for (leaf, subleaf, masks) in FEATURE_LEAVES {
        let Some(wanted) = saved
            .iter()
            .find(|e| e.function == leaf && e.index == subleaf)
        else {
            continue;
        };
        let offered = supported
            .as_slice()
            .iter()
            .find(|e| e.function == leaf && e.index == subleaf)
            .map_or([0; 4], |e| [e.eax, e.ebx, e.ecx, e.edx]);
        for (register, mask) in masks.into_iter().enumerate() {
            let bits = wanted.registers[register] & mask & !offered[register];
            if bits != 0 {
                return Err(CpuidRefusal {
                    leaf,
                    subleaf,
                    register,
                    bits,
                });
            }
        }
    }
    Ok(())
}

pub(crate) fn to_v1(cpuid: &CpuId) -> Vec<CpuidEntryV1> {
    let entry = |e: &kvm_cpuid_entry2| CpuidEntryV1 {
        function: e.function,
        index: e.index,
        flags: e.flags,
        registers: [e.eax, e.ebx, e.ecx, e.edx],
    };
    cpuid.as_slice().iter().map(entry).collect()
}

pub(crate) fn from_v1(entries: &[CpuidEntryV1]) -> Option<CpuId> {
    let entry = |e: &CpuidEntryV1| kvm_cpuid_entry2 {
        function: e.function,
        index: e.index,
        flags: e.flags,
        eax: e.registers[0],
        ebx: e.registers[1],
        ecx: e.registers[2],
        edx: e.registers[3],
        ..Default::default()
    };
    let entries: Vec<_> = entries.iter().map(entry).collect();
    CpuId::from_entries(&entries).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host() -> CpuId {
        let entries = [
            kvm_cpuid_entry2 {
                function: 1,
                ecx: 0x6,
                edx: 0x3,
                ..Default::default()
            },
            kvm_cpuid_entry2 {
                function: 7,
                ebx: 0x20,
                ..Default::default()
            },
        ];
        CpuId::from_entries(&entries).expect("few entries")
    }

    #[test]
    fn the_host_that_made_a_guest_can_take_it_back() {
        let guest = to_v1(&guest_cpuid(&host(), 1, 2, true));
        assert_eq!(missing_features(&guest, &host()), Ok(()));
    }

    #[test]
    fn a_feature_that_went_away_is_named() {
        let mut guest = to_v1(&host());
        guest[1].registers[1] |= 1 << 16;
        let refusal = missing_features(&guest, &host()).expect_err("AVX-512 is missing");
        assert!(refusal.to_string().contains("0x7.0"), "{refusal}");
        assert!(refusal.to_string().contains("0x10000"), "{refusal}");
    }
}
