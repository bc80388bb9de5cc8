//! The serial port and its console hub.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hebe_devices::{ConsoleHub, SerialPort};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const DATA: u8 = 0;
const IER: u8 = 1;
const LSR: u8 = 5;

fn rig() -> (Arc<ConsoleHub>, Arc<SerialPort>, EventFd) {
    let hub = ConsoleHub::new(None).expect("hub");
    let irq = EventFd::new(EFD_NONBLOCK).expect("eventfd");
    let port = SerialPort::new(Arc::clone(&hub), irq.try_clone().expect("clone"));
    (hub, port, irq)
}

fn wait(what: &str, mut done: impl FnMut() -> bool) {
    let until = Instant::now() + Duration::from_secs(120);
    while !done() {
        assert!(Instant::now() < until, "{what}: not within 120 s");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn bytes_go_both_ways_in_order() {
    let (hub, port, irq) = rig();
    port.pio_write(IER, 1);
    let (mut client, theirs) = UnixStream::pair().expect("pair");
    hub.attach(theirs).expect("attach");
    for byte in b"login: " {
        port.pio_write(DATA, *byte);
    }
    let mut prompt = [0; 7];
    client.read_exact(&mut prompt).expect("prompt");
    assert_eq!(&prompt, b"login: ");

    // More than the port's FIFO and the hub's buffer together.
    let typed: Vec<u8> = (0..10_000u32).map(|i| (i % 241) as u8).collect();
    let copy = typed.clone();
    let typist = std::thread::spawn(move || client.write_all(&copy).map(|()| client));
    wait("interrupt", || irq.read().is_ok());
    let mut got = Vec::new();
    wait("all input", || {
        while port.pio_read(LSR) & 1 != 0 {
            got.push(port.pio_read(DATA));
        }
        got.len() == typed.len()
    });
    assert!(got == typed);
    typist.join().expect("typist").expect("typed");
}

#[test]
fn a_saved_port_is_restored_with_its_input_and_raises_its_interrupt() {
    let (hub, port, _irq) = rig();
    port.pio_write(IER, 1);
    port.pio_write(7, 0x5a);
    let (mut client, theirs) = UnixStream::pair().expect("pair");
    hub.attach(theirs).expect("attach");
    client.write_all(b"abc").expect("type");
    wait("input", || port.pio_read(LSR) & 1 != 0);
    wait("all of it", || port.save().in_buffer == b"abc");
    port.pause();
    client.write_all(b"later").expect("type");
    std::thread::sleep(Duration::from_millis(20));
    let state = port.save();
    assert_eq!(state.in_buffer, b"abc", "nothing comes in while paused");

    let irq = EventFd::new(EFD_NONBLOCK).expect("eventfd");
    let next = SerialPort::restore(&state, Arc::clone(&hub), irq.try_clone().expect("clone"))
        .expect("restore");
    assert_eq!(next.save(), state);
    next.resume();
    assert!(irq.read().is_ok(), "an interrupt that may have been lost");
    assert_eq!(next.pio_read(7), 0x5a);
    let mut got = Vec::new();
    wait("all input", || {
        while next.pio_read(LSR) & 1 != 0 {
            got.push(next.pio_read(DATA));
        }
        got.len() == 8
    });
    assert_eq!(got, b"abclater");
}

#[test]
fn a_state_that_makes_no_sense_is_refused() {
    let (hub, port, irq) = rig();
    port.pause();
    let mut state = port.save();
    state.in_buffer = vec![0; 65];
    assert!(SerialPort::restore(&state, hub, irq).is_err());
}
