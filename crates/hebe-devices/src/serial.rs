//! The 16550 serial port at 0x3f8, over `vm-superio`.

use std::convert::Infallible;
use std::io::{self, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use hebe_state::v1::devices::SerialV1;
use vm_superio::serial::NoEvents;
use vm_superio::{Serial, SerialState, Trigger};
use vmm_sys_util::eventfd::EventFd;

use crate::ConsoleHub;
use crate::hub::InputTaker;

/// First of the port's eight I/O ports.
pub const SERIAL_PORT: u16 = 0x3f8;
/// Its interrupt line.
pub const SERIAL_IRQ: u32 = 4;

/// The saved serial port makes no sense.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("the saved serial port makes no sense: its receive buffer is longer than the port's")]
pub struct SerialStateError;

/// Raises the interrupt through an irqfd.
struct Irq(EventFd);

impl Trigger for Irq {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        // Fails only when the counter is full: the interrupt is raised anyway.
        let _ = self.0.write(1);
        Ok(())
    }
}

struct Output(Arc<ConsoleHub>);

impl Write for Output {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.0.write_output(data);
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct Inner {
    uart: Serial<Irq, NoEvents, Output>,
    paused: bool,
}

/// The serial port. It takes the hub's input.
pub struct SerialPort {
    inner: Mutex<Inner>,
    hub: Arc<ConsoleHub>,
}

impl SerialPort {
    /// A new port, running. `irq` is the irqfd of [`SERIAL_IRQ`].
    pub fn new(hub: Arc<ConsoleHub>, irq: EventFd) -> Arc<Self> {
        let uart = Serial::new(Irq(irq), Output(Arc::clone(&hub)));
        Self::assemble(uart, hub, false)
    }

    /// The port as saved, paused.
    pub fn restore(
        state: &SerialV1,
        hub: Arc<ConsoleHub>,
        irq: EventFd,
    ) -> Result<Arc<Self>, SerialStateError> {
        let saved = SerialState {
            baud_divisor_low: state.baud_divisor_low,
            baud_divisor_high: state.baud_divisor_high,
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            in_buffer: state.in_buffer.clone(),
        };
        let output = Output(Arc::clone(&hub));
        let uart =
            Serial::from_state(&saved, Irq(irq), NoEvents, output).map_err(|_| SerialStateError)?;
        Ok(Self::assemble(uart, hub, true))
    }

    fn assemble(
        uart: Serial<Irq, NoEvents, Output>,
        hub: Arc<ConsoleHub>,
        paused: bool,
    ) -> Arc<Self> {
        let port = Arc::new(Self {
            inner: Mutex::new(Inner { uart, paused }),
            hub,
        });
        let taker: Arc<dyn InputTaker> = port.clone();
        port.hub.set_taker(Arc::downgrade(&taker));
        port
    }

    /// Reads register `offset`, 0 to 7.
    pub fn pio_read(&self, offset: u8) -> u8 {
        let mut inner = self.lock();
        let value = inner.uart.read(offset);
        if offset == 0 {
            self.take_input(&mut inner);
        }
        value
    }

    /// Writes register `offset`, 0 to 7.
    pub fn pio_write(&self, offset: u8, value: u8) {
        // Neither our output nor our interrupt can fail.
        let _ = self.lock().uart.write(offset, value);
    }

    /// Takes no more input until [`SerialPort::resume`].
    pub fn pause(&self) {
        self.lock().paused = true;
    }

    /// The port's state. Only while it is paused and vCPUs stand still.
    pub fn save(&self) -> SerialV1 {
        let state = self.lock().uart.state();
        SerialV1 {
            baud_divisor_low: state.baud_divisor_low,
            baud_divisor_high: state.baud_divisor_high,
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            in_buffer: state.in_buffer,
        }
    }

    /// Goes on. Raises the interrupt once: one that the old VMM had raised
    /// and not delivered is made good by that, and a spurious one is harmless.
    pub fn resume(&self) {
        let mut inner = self.lock();
        inner.paused = false;
        let _ = inner.uart.interrupt_evt().trigger();
        self.take_input(&mut inner);
    }

    fn take_input(&self, inner: &mut Inner) {
        let room = inner.uart.fifo_capacity();
        if inner.paused || room == 0 {
            return;
        }
        let mut bytes = [0; 64];
        let want = room.min(bytes.len());
        let count = self.hub.take_input(&mut bytes[..want]);
        if count > 0 {
            let _ = inner.uart.enqueue_raw_bytes(&bytes[..count]);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl InputTaker for SerialPort {
    fn input_ready(&self) {
        self.take_input(&mut self.lock());
    }
}
