//! The board: which device answers at which port and address.

use std::sync::Arc;

use hebe_boot::layout;
use hebe_devices::{PciRoot, Pvpanic, Rtc, SerialPort};
use hebe_kvm::IoHandler;

use crate::acpi::Acpi;
use crate::log;
use crate::vm::Event;

/// Keyboard controller command port: value 0xfe pulses the reset line, and
/// Linux falls back to that.
const PORT_KEYBOARD: u16 = 0x64;
const KEYBOARD_RESET: u8 = 0xfe;
const PORT_RTC_LAST: u16 = layout::PORT_RTC + 1;

/// Everything that answers to vCPUs' I/O. Shared by all vCPU threads; each
/// part locks for itself.
pub(crate) struct Board {
    pub(crate) pci: PciRoot,
    pub(crate) serial: Option<Arc<SerialPort>>,
    pub(crate) acpi: Acpi,
    pub(crate) pvpanic: Option<Pvpanic>,
    pub(crate) rtc: Option<Rtc>,
}

impl Board {
    pub(crate) fn new(
        pci: PciRoot,
        serial: Option<Arc<SerialPort>>,
        acpi: Acpi,
        pvpanic: Option<Pvpanic>,
        rtc: Option<Rtc>,
    ) -> Self {
        Self {
            pci,
            serial,
            acpi,
            pvpanic,
            rtc,
        }
    }

    /// Its guest told that its kernel panicked.
    pub(crate) fn has_panicked(&self) -> bool {
        self.pvpanic.as_ref().is_some_and(Pvpanic::has_panicked)
    }

    /// The guest asked for power-off or reset: it must not be suspended any
    /// more, because it would resume behind its own end.
    pub(crate) fn is_ending(&self) -> bool {
        self.acpi.is_ending()
    }
}

impl IoHandler for Board {
    fn pio_read(&self, port: u16, data: &mut [u8]) {
        // A floating bus reads as ones.
        data.fill(0xff);
        match port {
            0xcf8..=0xcff => self.pci.pio_read(port, data),
            layout::PORT_SLEEP_CONTROL..=layout::PORT_EVENTS => data[0] = self.acpi.read(port),
            PORT_KEYBOARD => data[0] = 0,
            layout::PORT_PVPANIC => {
                if let Some(pvpanic) = &self.pvpanic {
                    data[0] = pvpanic.pio_read();
                }
            }
            layout::PORT_RTC..=PORT_RTC_LAST => {
                if let Some(rtc) = &self.rtc {
                    data[0] = rtc.pio_read(port - layout::PORT_RTC);
                }
            }
            _ => {
                if let (Some(serial), Some(offset)) = (&self.serial, serial_offset(port)) {
                    data[0] = serial.pio_read(offset);
                }
            }
        }
    }

    fn pio_write(&self, port: u16, data: &[u8]) {
        match port {
            0xcf8..=0xcff => self.pci.pio_write(port, data),
            layout::PORT_SLEEP_CONTROL..=layout::PORT_EVENTS => self.acpi.write(port, data[0]),
            PORT_KEYBOARD if data[0] == KEYBOARD_RESET => {
                self.acpi.end(Event::Reset);
            }
            layout::PORT_PVPANIC => {
                let device = self.pvpanic.as_ref();
                if let Some(news) = device.and_then(|d| d.pio_write(data[0])) {
                    log::note_of_guest(news);
                }
            }
            layout::PORT_RTC..=PORT_RTC_LAST => {
                if let Some(rtc) = &self.rtc {
                    rtc.pio_write(port - layout::PORT_RTC, data[0]);
                }
            }
            _ => {
                if let (Some(serial), Some(offset)) = (&self.serial, serial_offset(port)) {
                    serial.pio_write(offset, data[0]);
                }
            }
        }
    }

    fn mmio_read(&self, address: u64, data: &mut [u8]) {
        if !self.pci.mmio_read(address, data) {
            data.fill(0xff);
        }
    }

    fn mmio_write(&self, address: u64, data: &[u8]) {
        // A write that nobody takes goes nowhere, as on a real bus.
        self.pci.mmio_write(address, data);
    }
}

fn serial_offset(port: u16) -> Option<u8> {
    port.checked_sub(layout::PORT_SERIAL)
        .filter(|offset| *offset < 8)
        .map(|offset| offset as u8)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_serial_port_has_eight_registers() {
        let first = layout::PORT_SERIAL;
        let offsets: Vec<u8> = (first..first + 8).filter_map(serial_offset).collect();
        assert_eq!(offsets, [0, 1, 2, 3, 4, 5, 6, 7]);
        for port in [0, first - 1, first + 8, u16::MAX] {
            assert_eq!(serial_offset(port), None, "{port:#x}");
        }
    }
}
