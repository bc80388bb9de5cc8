//! KVM structs as bytes and back.

use kvm_bindings::{
    kvm_debugregs, kvm_irqchip, kvm_lapic_state, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs,
};

/// The bytes have another length than the struct.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a saved {name} has {found} bytes, and this build expects {expected}")]
pub struct WrongLength {
    name: &'static str,
    found: usize,
    expected: usize,
}

/// A struct of the KVM API without padding that matters and for which every
/// bit pattern is a value.
///
/// # Safety
/// The type is `repr(C)`, holds integers, arrays and unions of these alone,
/// and was zeroed before the kernel filled it.
pub(crate) unsafe trait Pod: Copy {
    const NAME: &'static str;
}

macro_rules! pod {
    ($($name:ident = $len:expr),* $(,)?) => {
        $(
            // The kernel's ABI: a change of the bindings must not go unnoticed.
            const _: () = assert!(size_of::<$name>() == $len);
            // SAFETY: a bindgen struct of integers, see the trait.
            unsafe impl Pod for $name {
                const NAME: &'static str = stringify!($name);
            }
        )*
    };
}

pod! {
    kvm_regs = 144,
    kvm_sregs = 312,
    kvm_xcrs = 392,
    kvm_debugregs = 128,
    kvm_lapic_state = 1024,
    kvm_vcpu_events = 64,
    kvm_irqchip = 520,
}

/// The bytes of `value`.
pub(crate) fn to_bytes<T: Pod>(value: &T) -> Vec<u8> {
    // SAFETY: `value` is valid for reads of its size, and `Pod` promises that
    // its bytes are initialised.
    unsafe { std::slice::from_raw_parts(std::ptr::from_ref(value).cast::<u8>(), size_of::<T>()) }
        .to_vec()
}

/// The struct in `bytes`, which must have its exact length.
pub(crate) fn from_bytes<T: Pod>(bytes: &[u8]) -> Result<T, WrongLength> {
    if bytes.len() != size_of::<T>() {
        return Err(WrongLength {
            name: T::NAME,
            found: bytes.len(),
            expected: size_of::<T>(),
        });
    }
    // SAFETY: the length fits, the read is unaligned, and `Pod` promises that
    // every bit pattern is a value.
    Ok(unsafe { bytes.as_ptr().cast::<T>().read_unaligned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structs_round_trip_and_other_lengths_are_refused() {
        let regs = kvm_regs {
            rax: 1,
            rflags: 2,
            ..Default::default()
        };
        let bytes = to_bytes(&regs);
        assert_eq!(from_bytes::<kvm_regs>(&bytes), Ok(regs));
        assert!(from_bytes::<kvm_regs>(&bytes[1..]).is_err());
        assert!(from_bytes::<kvm_sregs>(&bytes).is_err());
    }
}
