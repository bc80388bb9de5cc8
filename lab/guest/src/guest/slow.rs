//! A service that takes its time to start: a stand-in for the heavy
//! application server of the papers, whose start is processor work.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;

use lab_guest::status::SLOW_PORT;

use super::{Findings, monotonic_ns};

/// Rounds of mixing per unit of work.
const ROUNDS: u64 = 1_000_000;

/// Starts the service; `work` is how many million rounds it computes first.
/// With none there is no service.
pub fn start(findings: &Arc<Findings>, work: u64) {
    if work == 0 {
        return;
    }
    let findings = findings.clone();
    thread::spawn(move || {
        let mut state = 1u64;
        for round in 0..work * ROUNDS {
            state = (state ^ round)
                .wrapping_mul(0x9e37_79b9_7f4a_7c15)
                .rotate_left(23);
        }
        std::hint::black_box(state);
        let listener = match TcpListener::bind(("0.0.0.0", SLOW_PORT)) {
            Ok(listener) => listener,
            Err(e) => return println!("LAB: slow service: {e}"),
        };
        findings
            .slow_ready_ns
            .store(monotonic_ns(), Ordering::Release);
        for mut stream in listener.incoming().flatten() {
            let mut request = [0; 1024];
            if stream.read(&mut request).is_ok() {
                let _ = stream.write_all(
                    b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nup",
                );
            }
        }
    });
}
