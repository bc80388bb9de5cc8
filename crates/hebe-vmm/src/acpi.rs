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

    /// The guest ends.
    pub(crate) fn end(&self, event: Event) {
        self.ending.store(true, Ordering::SeqCst);
        // The receiver is gone only while the VM is being torn down.
        let _ = self.events.send(event);
    }

    pub(crate) fn is_ending(&self) -> bool {
        self.ending.load(Ordering::SeqCst)
    }
}
