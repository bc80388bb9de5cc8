//! The disk writer: records with checksums, fsynced one by one.
//!
//! A record is acknowledged when its fsync returned; an acknowledged record
//! must be found intact ever after. Records lie at `sequence % SLOTS`, so the
//! file is bounded.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use lab_guest::status::DiskCheck;

use super::{DISK, Findings};

const RECORD: usize = 4096;
const SLOTS: u64 = 1024;

fn record(sequence: u64) -> [u8; RECORD] {
    let mut bytes = [0; RECORD];
    let mut state = sequence;
    for (i, chunk) in bytes.chunks_exact_mut(8).enumerate() {
        if i > 0 {
            state = (state ^ i as u64)
                .wrapping_mul(0x9e37_79b9_7f4a_7c15)
                .rotate_left(31);
        }
        chunk.copy_from_slice(&state.to_le_bytes());
    }
    bytes
}

/// The record's sequence number, if it is intact.
fn sequence_of(bytes: &[u8; RECORD]) -> Option<u64> {
    let mut first = [0; 8];
    first.copy_from_slice(&bytes[..8]);
    let sequence = u64::from_le_bytes(first);
    (sequence != 0 && *bytes == record(sequence)).then_some(sequence)
}

/// Starts writing when the command line asks for it (`lab.disk_ms=PAUSE`);
/// without it, reports what is there.
pub fn start(findings: Arc<Findings>) {
    let pause = super::number("lab.disk_ms", 0);
    let (file, found) = match open() {
        Ok(opened) => opened,
        Err(e) => return println!("LAB: disk: {e:#}"),
    };
    set(&findings, |check| check.found_at_boot = found.len() as u64);
    if pause == 0 {
        return;
    }
    let mut sequence = found.into_iter().max().unwrap_or(0);
    thread::spawn(move || {
        loop {
            sequence += 1;
            let place = (sequence % SLOTS) * RECORD as u64;
            let written = file.write_all_at(&record(sequence), place);
            let synced = written.and_then(|()| file.sync_data());
            set(&findings, |check| {
                check.writes += 1;
                match synced {
                    Ok(()) => check.fsyncs = sequence,
                    Err(_) => check.errors += 1,
                }
            });
            thread::sleep(Duration::from_millis(pause));
        }
    });
}

fn set(findings: &Findings, change: impl FnOnce(&mut DiskCheck)) {
    if let Ok(mut disk) = findings.disk.lock() {
        change(disk.get_or_insert_default());
    }
}

fn open() -> Result<(File, Vec<u64>)> {
    let path = format!("{DISK}/records");
    let file = File::options()
        .create(true)
        .truncate(false)
        .read(true)
        .write(true)
        .open(&path)
        .with_context(|| format!("cannot open {path}"))?;
    let found = intact(&file);
    Ok((file, found))
}

fn intact(file: &File) -> Vec<u64> {
    let mut all = Vec::new();
    let mut bytes = [0; RECORD];
    for slot in 0..SLOTS {
        if file
            .read_exact_at(&mut bytes, slot * RECORD as u64)
            .is_err()
        {
            break;
        }
        all.extend(sequence_of(&bytes).filter(|s| s % SLOTS == slot));
    }
    all
}

/// Re-reads the file and checks that every acknowledged record still in it
/// is there; returns how many are missing.
pub fn verify(findings: &Findings) -> Result<u64> {
    // What is acknowledged now must be found by a read that starts later.
    let acknowledged = findings
        .disk
        .lock()
        .ok()
        .and_then(|d| d.as_ref().map(|d| d.fsyncs))
        .unwrap_or(0);
    let (_, found) = open()?;
    let oldest = acknowledged.saturating_sub(SLOTS - 2).max(1);
    let have: std::collections::HashSet<u64> = found.into_iter().collect();
    // A record may have been overwritten since by its successor in the slot.
    let missing = (oldest..=acknowledged)
        .filter(|s| !have.contains(s) && !have.contains(&(s + SLOTS)))
        .count() as u64;
    set(findings, |check| check.errors += missing);
    Ok(missing)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_recognised_and_damage_is_seen() {
        let mut bytes = record(77);
        assert_eq!(sequence_of(&bytes), Some(77));
        bytes[4000] ^= 1;
        assert_eq!(sequence_of(&bytes), None);
        assert_eq!(sequence_of(&[0; RECORD]), None);
    }
}
