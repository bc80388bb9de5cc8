//! Takes the guest's word that its kernel panicked (the `pvpanic` interface
//! of QEMU, docs/specs): one port, which reads as what can be told, and to
//! which the guest writes what happened.

use std::sync::atomic::{AtomicU8, Ordering};

use hebe_state::v1::machine::PvpanicV1;

/// The kernel panicked.
const PANICKED: u8 = 1;
/// It panicked, and a crash kernel takes over.
const CRASH_LOADED: u8 = 2;
const KNOWN: u8 = PANICKED | CRASH_LOADED;

/// The device. It does nothing to the guest, which knows best what is to
/// become of it.
#[derive(Debug, Default)]
pub struct Pvpanic {
    seen: AtomicU8,
}

impl Pvpanic {
    /// The device as saved. Bits that mean nothing are left out.
    pub fn restore(state: PvpanicV1) -> Self {
        Self {
            seen: AtomicU8::new(state.seen & KNOWN),
        }
    }

    /// Its state. Only while vCPUs stand still.
    pub fn save(&self) -> PvpanicV1 {
        PvpanicV1 {
            seen: self.seen.load(Ordering::SeqCst),
        }
    }

    /// Reads the port: what the guest can tell.
    pub fn pio_read(&self) -> u8 {
        KNOWN
    }

    /// Writes the port; returns what is new, for the log. A guest that writes
    /// without end has two things to say at most.
    pub fn pio_write(&self, value: u8) -> Option<&'static str> {
        let before = self.seen.fetch_or(value & KNOWN, Ordering::SeqCst);
        let new = value & KNOWN & !before;
        if new & PANICKED != 0 {
            Some("the guest's kernel panicked")
        } else {
            (new != 0).then_some("the guest's kernel panicked, and a crash kernel takes over")
        }
    }

    /// Whether the guest's kernel panicked since it booted.
    pub fn has_panicked(&self) -> bool {
        self.seen.load(Ordering::SeqCst) != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_thing_is_told_once_and_nonsense_is_nothing() {
        let device = Pvpanic::default();
        assert_eq!(device.pio_read(), 3);
        for value in [0, 4, 0xfc] {
            assert_eq!(device.pio_write(value), None);
        }
        assert!(!device.has_panicked());
        assert_eq!(device.pio_write(1), Some("the guest's kernel panicked"));
        assert!(device.has_panicked());
        assert_eq!(device.pio_write(1), None);
        assert!(
            device
                .pio_write(0xff)
                .is_some_and(|w| w.contains("crash kernel"))
        );
        assert_eq!(device.pio_write(0xff), None);
    }

    #[test]
    fn save_restore_save_is_equal_and_what_happened_later_is_not_in_it() {
        let device = Pvpanic::default();
        device.pio_write(1);
        let saved = device.save();
        assert_eq!(saved, device.save(), "saving changes nothing");
        device.pio_write(2);
        let restored = Pvpanic::restore(saved);
        assert_eq!(restored.save(), saved);
        assert!(restored.has_panicked());
        assert_eq!(restored.pio_write(1), None, "told before");
        assert_eq!(Pvpanic::restore(PvpanicV1 { seen: 0xff }).save().seen, 3);
    }
}
