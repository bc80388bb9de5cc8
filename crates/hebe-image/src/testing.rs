//! Images for tests.

/// Sectors of the gap before the first partition.
const GAP: usize = 64;

fn rounded(contents: &[u8]) -> usize {
    contents.len().next_multiple_of(512)
}

/// Writes a record of an MBR's table at `sector` of the disk, in bytes.
pub(crate) fn mbr_record(
    disk: &mut [u8],
    sector: usize,
    index: usize,
    kind: u8,
    first: u32,
    sectors: u32,
) {
    let record = &mut disk[sector + 446 + 16 * index..][..16];
    record[4] = kind;
    record[8..12].copy_from_slice(&first.to_le_bytes());
    record[12..16].copy_from_slice(&sectors.to_le_bytes());
}

/// A disk with an MBR and these partitions.
pub(crate) fn mbr_disk(partitions: &[&[u8]]) -> Vec<u8> {
    let mut disk = vec![0; GAP * 512];
    disk[510..512].copy_from_slice(&[0x55, 0xaa]);
    for (index, contents) in partitions.iter().enumerate() {
        let (first, sectors) = (disk.len() / 512, rounded(contents) / 512);
        mbr_record(&mut disk, 0, index, 0x83, first as u32, sectors as u32);
        disk.extend_from_slice(contents);
        disk.resize((first + sectors) * 512, 0);
    }
    disk
}

/// A disk with a GPT, its spare, and these partitions.
pub(crate) fn gpt_disk(partitions: &[&[u8]]) -> Vec<u8> {
    let mut disk = mbr_disk(&[]);
    mbr_record(&mut disk, 0, 0, 0xee, 1, u32::MAX);
    let mut table = vec![0; 128 * 128];
    for (entry, contents) in table.chunks_exact_mut(128).zip(partitions) {
        let (first, sectors) = (disk.len() / 512, rounded(contents) / 512);
        entry[..16].fill(0xaf);
        entry[32..40].copy_from_slice(&(first as u64).to_le_bytes());
        entry[40..48].copy_from_slice(&((first + sectors - 1) as u64).to_le_bytes());
        disk.extend_from_slice(contents);
        disk.resize((first + sectors) * 512, 0);
    }
    let spare = disk.len() / 512;
    disk[2 * 512..34 * 512].copy_from_slice(&table);
    disk.extend_from_slice(&table);
    let last = disk.len() / 512;
    disk.resize(disk.len() + 512, 0);
    for (at, table_at) in [(1, 2), (last, spare)] {
        let mut header = [0; 92];
        header[..8].copy_from_slice(b"EFI PART");
        header[12] = 92;
        header[24..32].copy_from_slice(&(at as u64).to_le_bytes());
        header[72..80].copy_from_slice(&(table_at as u64).to_le_bytes());
        header[80..84].copy_from_slice(&128u32.to_le_bytes());
        header[84..88].copy_from_slice(&128u32.to_le_bytes());
        header[88..92].copy_from_slice(&crc32fast::hash(&table).to_le_bytes());
        let sum = crc32fast::hash(&header);
        header[16..20].copy_from_slice(&sum.to_le_bytes());
        disk[at * 512..][..92].copy_from_slice(&header);
    }
    disk
}
