//! The few registers of a hardware-reduced ACPI machine.

use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::mpsc::Sender;

use hebe_boot::layout;
use hebe_state::v1::machine::AcpiV1;
use vmm_sys_util::eventfd::EventFd;

use crate::vm::Event;

/// `SLP_EN` of the sleep control register (ACPI 6.5, 4.8.3.7).
const SLEEP_ENABLE: u8 = 1 << 5;
/// `WAK_STS` of the sleep status register: written to clear, reads as zero.
const SLEEP_STATUS: u8 = 0;

/// Power-off, reset, and the power button.
#[derive(Debug)]
pub(crate) struct Acpi {
    pending: AtomicU8,
    interrupt: EventFd,
    ending: AtomicBool,
    events: Sender<Event>,
}

impl Acpi {
    pub(crate) fn new(interrupt: EventFd, events: Sender<Event>, saved: Option<AcpiV1>) -> Self {
        let pending = AtomicU8::new(saved.map_or(0, |s| s.pending_events));
        Self {
            pending,
            interrupt,
            ending: AtomicBool::new(false),
            events,
        }
    }

    pub(crate) fn press_power_button(&self) -> std::io::Result<()> {
        self.pending
            .fetch_or(layout::EVENT_POWER_BUTTON, Ordering::SeqCst);
        self.interrupt.write(1)
    }

    /// The VM generation ID is another one: told with the next [`Acpi::kick`].
    pub(crate) fn tell_generation(&self) {
        self.pending
            .fetch_or(layout::EVENT_GENERATION, Ordering::SeqCst);
    }

    /// After a resume: an interrupt that was raised and not yet delivered may
    /// be lost; raising it again is harmless.
    pub(crate) fn kick(&self) {
        if self.pending.load(Ordering::SeqCst) != 0 {
            let _ = self.interrupt.write(1);
        }
    }

    pub(crate) fn save(&self) -> AcpiV1 {
        AcpiV1 {
            pending_events: self.pending.load(Ordering::SeqCst),
        }
    }

    pub(crate) fn read(&self, port: u16) -> u8 {
        match port {
            layout::PORT_EVENTS => self.pending.swap(0, Ordering::SeqCst),
            layout::PORT_SLEEP_STATUS => SLEEP_STATUS,
            _ => 0,
        }
    }

    pub(crate) fn write(&self, port: u16, value: u8) {
        let sleep_type = value >> 2 & 7;
        let event = match port {
            layout::PORT_SLEEP_CONTROL
                if value & SLEEP_ENABLE != 0 && sleep_type == layout::SLEEP_TYPE_OFF =>
            {
                Event::PowerOff
            }
            layout::PORT_RESET if value == layout::RESET_VALUE => Event::Reset,
            _ => return,
        };
        self.end(event);
    }

    /// The guest ends, in the way that it says first: one that says it without
    /// end must not fill the channel while nobody can look.
    pub(crate) fn end(&self, event: Event) {
        if self.ending.swap(true, Ordering::SeqCst) {
            return;
        }
        // The receiver is gone only while the VM is being torn down.
        let _ = self.events.send(event);
    }

    pub(crate) fn is_ending(&self) -> bool {
        self.ending.load(Ordering::SeqCst)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{self, Receiver};

    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    use super::*;

    struct Rig {
        acpi: Acpi,
        interrupt: EventFd,
        events: Receiver<Event>,
    }

    fn rig(saved: Option<AcpiV1>) -> Rig {
        let interrupt = EventFd::new(EFD_NONBLOCK).expect("eventfd");
        let (sender, events) = mpsc::channel();
        let raised = interrupt.try_clone().expect("eventfd");
        Rig {
            acpi: Acpi::new(raised, sender, saved),
            interrupt,
            events,
        }
    }

    impl Rig {
        fn writes(&self, port: u16, value: u8) -> Option<Event> {
            self.acpi.write(port, value);
            self.events.try_recv().ok()
        }

        fn interrupts(&self) -> u64 {
            self.interrupt.read().unwrap_or(0)
        }
    }

    #[test]
    fn only_s5_with_the_enable_bit_powers_off() {
        let rig = rig(None);
        let off = layout::SLEEP_TYPE_OFF << 2;
        let others = (0..=u8::MAX).filter(|v| v & 0b11_1100 != off | SLEEP_ENABLE);
        for value in others {
            assert_eq!(rig.writes(layout::PORT_SLEEP_CONTROL, value), None);
        }
        assert!(!rig.acpi.is_ending());
        let event = rig.writes(layout::PORT_SLEEP_CONTROL, off | SLEEP_ENABLE);
        assert_eq!(event, Some(Event::PowerOff));
        assert!(rig.acpi.is_ending());
    }

    #[test]
    fn only_the_reset_value_resets() {
        let rig = rig(None);
        let others = (0..=u8::MAX).filter(|v| *v != layout::RESET_VALUE);
        for value in others {
            assert_eq!(rig.writes(layout::PORT_RESET, value), None);
        }
        for port in [layout::PORT_SLEEP_STATUS, layout::PORT_EVENTS] {
            assert_eq!(rig.writes(port, layout::RESET_VALUE), None);
        }
        assert!(!rig.acpi.is_ending());
        let event = rig.writes(layout::PORT_RESET, layout::RESET_VALUE);
        assert_eq!(event, Some(Event::Reset));
        assert!(rig.acpi.is_ending());
    }

    #[test]
    fn a_guest_that_ends_without_end_is_told_of_once() {
        let rig = rig(None);
        let reset = || rig.writes(layout::PORT_RESET, layout::RESET_VALUE);
        assert_eq!(reset(), Some(Event::Reset));
        let off = layout::SLEEP_TYPE_OFF << 2 | SLEEP_ENABLE;
        for _ in 0..1000 {
            assert_eq!(reset(), None);
            assert_eq!(rig.writes(layout::PORT_SLEEP_CONTROL, off), None);
        }
        assert!(rig.acpi.is_ending());
    }

    #[test]
    fn the_power_button_interrupts_and_is_read_once() {
        let rig = rig(None);
        rig.acpi.kick();
        assert_eq!(rig.interrupts(), 0, "nothing is pending");
        rig.acpi.press_power_button().expect("pressed");
        assert_eq!(rig.interrupts(), 1);
        assert_eq!(rig.acpi.read(layout::PORT_SLEEP_STATUS), 0);
        let events = || rig.acpi.read(layout::PORT_EVENTS);
        assert_eq!((events(), events()), (layout::EVENT_POWER_BUTTON, 0));
    }

    #[test]
    fn a_button_that_the_guest_has_not_seen_is_there_after_a_resume() {
        let before = rig(None);
        before.acpi.press_power_button().expect("pressed");
        let saved = before.acpi.save();
        assert_eq!(saved, before.acpi.save(), "saving takes nothing away");
        let after = rig(Some(saved));
        after.acpi.kick();
        assert_eq!(after.interrupts(), 1);
        let seen = after.acpi.read(layout::PORT_EVENTS);
        assert_eq!(seen, layout::EVENT_POWER_BUTTON);
        assert_eq!(after.acpi.save().pending_events, 0);
    }
}
