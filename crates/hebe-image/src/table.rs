//! Partition tables: GPT (UEFI 2.10, chapter 5) and MBR.
//!
//! Read here and not by a crate: those that know GPT want to write, too, and
//! take an image's word for how much memory its table needs.

use crate::source::Piece;

const SECTOR: u64 = 512;
/// Most partitions that are looked at.
const PARTITIONS_MAX: usize = 128;
/// Largest table of GPT, in bytes; the usual one has 16 KiB.
const TABLE_MAX: u32 = 1 << 20;
/// Longest chain of logical partitions.
const CHAIN_MAX: usize = 64;

/// A partition.
pub(crate) struct Partition {
    /// As Linux and GRUB count, from 1.
    pub(crate) number: u32,
    /// Its bytes.
    pub(crate) piece: Piece,
}

/// The partitions of a disk, in the order of their numbers; none where there is
/// no table.
pub(crate) fn partitions(disk: &Piece) -> Vec<Partition> {
    let Some(sector) = disk.bytes::<512>(0) else {
        return Vec::new();
    };
    if sector[510..] != [0x55, 0xaa] {
        return Vec::new();
    }
    let records = mbr_records(&sector);
    // A boot sector without a table has program text there.
    if records.iter().any(|r| r.status & 0x7f != 0) {
        return Vec::new();
    }
    let mut found = if records.iter().any(|r| r.kind == 0xee) {
        gpt(disk).unwrap_or_default()
    } else {
        mbr(disk, &records)
    };
    found.truncate(PARTITIONS_MAX);
    found
}

struct Record {
    status: u8,
    kind: u8,
    first: u64,
    sectors: u64,
}

fn mbr_records(sector: &[u8; 512]) -> [Record; 4] {
    std::array::from_fn(|i| {
        let record = &sector[446 + 16 * i..][..16];
        Record {
            status: record[0],
            kind: record[4],
            first: u64::from(le32(record, 8)),
            sectors: u64::from(le32(record, 12)),
        }
    })
}

fn mbr(disk: &Piece, records: &[Record; 4]) -> Vec<Partition> {
    let mut found = Vec::new();
    let mut logical = Vec::new();
    for (number, record) in (1..).zip(records) {
        match record.kind {
            0 => {}
            0x05 | 0x0f | 0x85 => logical = logical_partitions(disk, record.first),
            _ => found.extend(partition(disk, number, record.first, record.sectors)),
        }
    }
    found.extend(logical);
    found
}

/// Each link describes one partition, from itself, and names the next link,
/// from the first.
fn logical_partitions(disk: &Piece, base: u64) -> Vec<Partition> {
    let mut found = Vec::new();
    let mut at = base;
    for number in (5..).take(CHAIN_MAX) {
        let Some(sector) = at.checked_mul(SECTOR).and_then(|o| disk.bytes::<512>(o)) else {
            break;
        };
        if sector[510..] != [0x55, 0xaa] {
            break;
        }
        let [own, next, ..] = mbr_records(&sector);
        if own.kind != 0 {
            found.extend(partition(disk, number, at + own.first, own.sectors));
        }
        if next.kind == 0 || next.first == 0 {
            break;
        }
        at = base + next.first;
    }
    found
}

/// By the first header that is whole, the one at the end being the spare.
fn gpt(disk: &Piece) -> Option<Vec<Partition>> {
    let last = (disk.len() / SECTOR).checked_sub(1)?;
    [1, last].into_iter().find_map(|at| gpt_at(disk, at))
}

fn gpt_at(disk: &Piece, at: u64) -> Option<Vec<Partition>> {
    let mut header = disk.bytes::<512>(at.checked_mul(SECTOR)?)?;
    let header_len = le32(&header, 12) as usize;
    if &header[..8] != b"EFI PART" || !(92..=512).contains(&header_len) {
        return None;
    }
    let checksum = le32(&header, 16);
    header[16..20].fill(0);
    if crc32fast::hash(&header[..header_len]) != checksum || le64(&header, 24) != at {
        return None;
    }
    let (count, each) = (le32(&header, 80), le32(&header, 84));
    let len = count.checked_mul(each).filter(|len| *len <= TABLE_MAX)?;
    if each < 128 || !each.is_multiple_of(8) {
        return None;
    }
    let mut table = vec![0; len as usize];
    let offset = le64(&header, 72).checked_mul(SECTOR)?;
    disk.read_at(&mut table, offset).ok()?;
    if crc32fast::hash(&table) != le32(&header, 88) {
        return None;
    }
    let mut found = Vec::new();
    for (number, entry) in (1..).zip(table.chunks_exact(each as usize)) {
        if entry[..16].iter().all(|b| *b == 0) {
            continue;
        }
        let (first, last) = (le64(entry, 32), le64(entry, 40));
        let sectors = last.checked_sub(first).and_then(|n| n.checked_add(1));
        found.extend(sectors.and_then(|n| partition(disk, number, first, n)));
        if found.len() == PARTITIONS_MAX {
            break;
        }
    }
    Some(found)
}

/// `None` where it does not lie on the disk.
fn partition(disk: &Piece, number: u32, first: u64, sectors: u64) -> Option<Partition> {
    let start = first.checked_mul(SECTOR).filter(|start| *start > 0)?;
    let piece = disk.part(start, sectors.checked_mul(SECTOR)?)?;
    Some(Partition { number, piece })
}

fn le32(bytes: &[u8], at: usize) -> u32 {
    let mut word = [0; 4];
    word.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(word)
}

fn le64(bytes: &[u8], at: usize) -> u64 {
    u64::from(le32(bytes, at)) | u64::from(le32(bytes, at + 4)) << 32
}

#[cfg(test)]
mod tests {
    use std::rc::Rc;

    use super::*;
    use crate::testing::{gpt_disk, mbr_disk, mbr_record};

    fn found(disk: &[u8]) -> Vec<(u32, u8)> {
        let first = |p: &Partition| p.piece.bytes::<1>(0).expect("a byte")[0];
        let found = partitions(&Piece::whole(Rc::new(disk.to_vec())));
        found.iter().map(|p| (p.number, first(p))).collect()
    }

    #[test]
    fn gpt_is_read_from_either_header_and_never_from_a_damaged_one() {
        let mut disk = gpt_disk(&[&[1; 512], &[2; 1024]]);
        assert_eq!(found(&disk), [(1, 1), (2, 2)]);
        disk[512 + 60] ^= 1;
        assert_eq!(found(&disk), [(1, 1), (2, 2)], "by the spare");
        let spare = disk.len() - 512;
        disk[spare + 80] ^= 1;
        assert_eq!(found(&disk), []);
        // Whatever the header says of its table, it is not believed.
        let sound = gpt_disk(&[&[1; 512]]);
        for (at, value) in [(80, u32::MAX), (84, u32::MAX), (84, 1), (84, 0), (72, 77)] {
            let mut disk = sound.clone();
            for header in [512, disk.len() - 512] {
                disk[header + at..][..4].copy_from_slice(&value.to_le_bytes());
                disk[header + 16..][..4].fill(0);
                let sum = crc32fast::hash(&disk[header..header + 92]);
                disk[header + 16..][..4].copy_from_slice(&sum.to_le_bytes());
            }
            assert_eq!(found(&disk), [], "{at} {value}");
        }
    }

    #[test]
    fn mbr_has_primary_and_logical_partitions_and_no_endless_chain() {
        let mut disk = mbr_disk(&[&[1; 512], &[2; 512]]);
        assert_eq!(found(&disk), [(1, 1), (2, 2)]);
        // An extended partition whose second link names itself.
        let base = disk.len() as u32 / 512;
        disk.resize(disk.len() + 4 * 512, 0);
        mbr_record(&mut disk, 0, 2, 0x05, base, 4);
        let link = base as usize * 512;
        disk[link + 510..][..2].copy_from_slice(&[0x55, 0xaa]);
        disk[link + 1024..][..512].fill(7);
        mbr_record(&mut disk, link, 0, 0x83, 2, 1);
        assert_eq!(found(&disk), [(1, 1), (2, 2), (5, 7)]);
        mbr_record(&mut disk, link, 1, 0x05, 1, 1);
        disk.copy_within(link..link + 512, link + 512);
        let again = found(&disk);
        assert!(again.len() <= 2 + CHAIN_MAX, "{again:?}");
    }

    #[test]
    fn what_lies_outside_the_disk_is_no_partition() {
        let mut disk = mbr_disk(&[&[1; 512]]);
        mbr_record(&mut disk, 0, 1, 0x83, u32::MAX, 1);
        mbr_record(&mut disk, 0, 2, 0x83, 1, u32::MAX);
        mbr_record(&mut disk, 0, 3, 0x83, 0, 1);
        assert_eq!(found(&disk), [(1, 1)]);
        assert_eq!(found(&[0x55; 100]), []);
        assert_eq!(found(&[0; 4096]), []);
    }
}
