//! Watches that the monotonic clock never goes backwards, on any CPU.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use super::{Findings, cpus, monotonic_ns};

const PAUSE: Duration = Duration::from_millis(100);

/// Starts one thread per CPU; all compare with the latest time that any saw.
pub fn start(findings: &Arc<Findings>) {
    let latest = Arc::new(AtomicU64::new(0));
    for cpu in 0..cpus() {
        let latest = latest.clone();
        let findings = findings.clone();
        thread::spawn(move || {
            if let Err(e) = crate::sys::pin_to_cpu(cpu) {
                println!("LAB: clock: {e}");
            }
            loop {
                // Read before the clock: what it holds was true before now.
                let before = latest.load(Ordering::SeqCst);
                let now = monotonic_ns();
                if now < before {
                    findings.backwards.fetch_add(1, Ordering::Relaxed);
                }
                latest.fetch_max(now, Ordering::SeqCst);
                thread::sleep(PAUSE);
            }
        });
    }
}
