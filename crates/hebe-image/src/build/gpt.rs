//! The partition table of a new disk: a GPT with one partition (UEFI
//! specification 2.10, section 5).

use std::io;
use std::os::unix::fs::FileExt;

/// Bytes of a sector.
const SECTOR: u64 = 512;
/// Where the partition begins, in bytes: a boundary that suits every disk.
pub const START: u64 = 1 << 20;
/// What is kept free at the end for the spare table, in bytes.
const TAIL: u64 = 1 << 20;
/// Entries of the table, and the bytes of each.
const ENTRIES: usize = 128;
const ENTRY_LEN: usize = 128;
/// Sectors of the table.
const TABLE_SECTORS: u64 = (ENTRIES * ENTRY_LEN) as u64 / SECTOR;
/// "Root partition, amd64", of the Discoverable Partitions Specification.
const ROOT_AMD64: u128 = 0x4f68_bce3_e8cd_4db1_96e7_fbca_f984_b709;

/// A disk with one partition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gpt {
    /// Bytes of the disk: whole mebibytes, at least 4.
    pub disk_len: u64,
    /// Name of the disk.
    pub disk_id: u128,
    /// Name of the partition.
    pub partition_id: u128,
}

impl Gpt {
    /// Bytes of the partition, which begins at [`START`].
    pub fn partition_len(&self) -> u64 {
        self.disk_len - START - TAIL
    }

    /// Writes both tables and the MBR that keeps other programs off.
    ///
    /// # Errors
    /// As writing has them.
    pub fn write(&self, disk: &impl FileExt) -> io::Result<()> {
        let last = self.disk_len / SECTOR - 1;
        let table = self.table();
        disk.write_all_at(&mbr(last), 0)?;
        disk.write_all_at(&self.header(1, last, 2, &table), SECTOR)?;
        disk.write_all_at(&table, 2 * SECTOR)?;
        let spare = last - TABLE_SECTORS;
        disk.write_all_at(&table, spare * SECTOR)?;
        disk.write_all_at(&self.header(last, 1, spare, &table), last * SECTOR)
    }

    fn table(&self) -> Vec<u8> {
        let mut table = vec![0; ENTRIES * ENTRY_LEN];
        let first = START / SECTOR;
        let last = first + self.partition_len() / SECTOR - 1;
        table[..16].copy_from_slice(&guid(ROOT_AMD64));
        table[16..32].copy_from_slice(&guid(self.partition_id));
        table[32..40].copy_from_slice(&first.to_le_bytes());
        table[40..48].copy_from_slice(&last.to_le_bytes());
        for (to, unit) in table[56..128]
            .chunks_exact_mut(2)
            .zip("root".encode_utf16())
        {
            to.copy_from_slice(&unit.to_le_bytes());
        }
        table
    }

    /// The header in sector `at`, with its other one in sector `other`.
    fn header(&self, at: u64, other: u64, table_at: u64, table: &[u8]) -> [u8; 92] {
        let last = self.disk_len / SECTOR - 1;
        let usable = [2 + TABLE_SECTORS, last - TABLE_SECTORS - 1];
        let mut header = [0; 92];
        header[..8].copy_from_slice(b"EFI PART");
        header[8..12].copy_from_slice(&0x0001_0000u32.to_le_bytes());
        header[12..16].copy_from_slice(&92u32.to_le_bytes());
        header[24..32].copy_from_slice(&at.to_le_bytes());
        header[32..40].copy_from_slice(&other.to_le_bytes());
        header[40..48].copy_from_slice(&usable[0].to_le_bytes());
        header[48..56].copy_from_slice(&usable[1].to_le_bytes());
        header[56..72].copy_from_slice(&guid(self.disk_id));
        header[72..80].copy_from_slice(&table_at.to_le_bytes());
        header[80..84].copy_from_slice(&(ENTRIES as u32).to_le_bytes());
        header[84..88].copy_from_slice(&(ENTRY_LEN as u32).to_le_bytes());
        header[88..92].copy_from_slice(&crc32fast::hash(table).to_le_bytes());
        let sum = crc32fast::hash(&header);
        header[16..20].copy_from_slice(&sum.to_le_bytes());
        header
    }
}

/// One record over the whole disk, of the kind that says "see the GPT".
fn mbr(last: u64) -> [u8; 512] {
    let mut sector = [0; 512];
    let record = &mut sector[446..462];
    record[1..4].copy_from_slice(&[0, 2, 0]);
    record[4] = 0xee;
    record[5..8].fill(0xff);
    record[8..12].copy_from_slice(&1u32.to_le_bytes());
    let sectors = u32::try_from(last).unwrap_or(u32::MAX);
    record[12..16].copy_from_slice(&sectors.to_le_bytes());
    sector[510..].copy_from_slice(&[0x55, 0xaa]);
    sector
}

/// The mixed byte order of GUIDs: the first three fields are little-endian.
fn guid(id: u128) -> [u8; 16] {
    let mut bytes = id.to_be_bytes();
    bytes[..4].reverse();
    bytes[4..6].reverse();
    bytes[6..8].reverse();
    bytes
}

#[cfg(test)]
mod tests {
    use std::rc::Rc;

    use super::*;
    use crate::source::Piece;
    use crate::table;

    const GPT: Gpt = Gpt {
        disk_len: 8 << 20,
        disk_id: 0x1111_1111_2222_3333_4444_5555_5555_5555,
        partition_id: 0x0123_4567_89ab_cdef_0123_4567_89ab_cdef,
    };

    fn disk() -> Vec<u8> {
        let file = tempfile::tempfile().expect("file");
        file.set_len(GPT.disk_len).expect("len");
        GPT.write(&file).expect("written");
        let mut disk = vec![0; GPT.disk_len as usize];
        file.read_exact_at(&mut disk, 0).expect("read");
        disk
    }

    /// Where the reader of images finds a partition.
    fn found(disk: Vec<u8>) -> Vec<(u32, Vec<u8>)> {
        let whole = Piece::whole(Rc::new(disk));
        let read = |p: &Piece| {
            let mut bytes = vec![0; 4];
            p.read_at(&mut bytes, 0).expect("read");
            bytes
        };
        let partitions = table::partitions(&whole);
        partitions
            .iter()
            .map(|p| (p.number, read(&p.piece)))
            .collect()
    }

    #[test]
    fn the_reader_of_images_finds_the_partition_by_either_table() {
        let mut disk = disk();
        disk[START as usize..][..4].copy_from_slice(b"here");
        assert_eq!(found(disk.clone()), [(1, b"here".to_vec())]);
        disk[512] = b'X';
        assert_eq!(found(disk), [(1, b"here".to_vec())]);
    }

    #[test]
    fn names_are_written_as_others_read_them() {
        let disk = disk();
        assert_eq!(disk[1024..1028], [0xe3, 0xbc, 0x68, 0x4f]);
        assert_eq!(
            disk[1040..1048],
            [0x67, 0x45, 0x23, 0x01, 0xab, 0x89, 0xef, 0xcd]
        );
        assert_eq!(GPT.partition_len(), 6 << 20);
    }
}
