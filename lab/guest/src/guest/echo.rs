//! Echo services for the probes.

use std::io::{Read, Write};
use std::net::{TcpListener, UdpSocket};
use std::thread;

use anyhow::{Context, Result};
use lab_guest::status::{TCP_ECHO_PORT, UDP_ECHO_PORT};

/// Sends every datagram back.
pub fn start_udp() -> Result<()> {
    let socket = UdpSocket::bind(("0.0.0.0", UDP_ECHO_PORT)).context("UDP echo cannot listen")?;
    thread::spawn(move || {
        let mut buffer = [0; 1500];
        loop {
            if let Ok((len, from)) = socket.recv_from(&mut buffer) {
                // A lost reply is what the probe is there to see.
                let _ = socket.send_to(&buffer[..len], from);
            }
        }
    });
    Ok(())
}

/// Sends every byte of a connection back until it is closed.
pub fn start_tcp() -> Result<()> {
    let listener =
        TcpListener::bind(("0.0.0.0", TCP_ECHO_PORT)).context("TCP echo cannot listen")?;
    thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            thread::spawn(move || {
                let mut buffer = [0; 1500];
                while let Ok(len) = stream.read(&mut buffer) {
                    if len == 0 || stream.write_all(&buffer[..len]).is_err() {
                        break;
                    }
                }
            });
        }
    });
    Ok(())
}
