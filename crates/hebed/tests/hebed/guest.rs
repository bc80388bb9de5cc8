//! A guest of three bytes, as an ELF file with a PVH note.

const BASE: u32 = 0x10_0000;
/// Halts for ever: `hlt`, and back to it.
const IDLE: [u8; 3] = [0xf4, 0xeb, 0xfd];

/// The file.
pub fn image() -> Vec<u8> {
    const CODE_AT: u32 = 64 + 2 * 56 + 20;
    const CODE_LEN: u32 = IDLE.len() as u32;
    let long = |value: u32| u64::from(value).to_le_bytes();
    let segment = |kind: u32, rights: u32, words: [u32; 6]| {
        let mut header = [kind.to_le_bytes(), rights.to_le_bytes()].concat();
        header.extend(words.map(long).concat());
        header
    };
    // 64-bit, little-endian; executable, x86-64; two program headers.
    let mut elf = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0\x01\0\0\0".to_vec();
    elf.extend([long(BASE), long(64), long(0)].concat());
    elf.extend([0, 0, 0, 0, 64, 0, 56, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
    elf.extend(segment(1, 7, [CODE_AT, BASE, BASE, CODE_LEN, CODE_LEN, 1]));
    elf.extend(segment(4, 4, [CODE_AT - 20, 0, 0, 20, 20, 4]));
    // XEN_ELFNOTE_PHYS32_ENTRY.
    elf.extend(b"\x04\0\0\0\x04\0\0\0\x12\0\0\0Xen\0");
    elf.extend(BASE.to_le_bytes());
    elf.extend(IDLE);
    elf
}

/// Whether this machine runs no guest; said on standard error, too.
pub fn cannot_run() -> bool {
    let why = hebe_kvm::host_can_run().err();
    if let Some(why) = &why {
        eprintln!("skipped here: a test with a running guest: {why} (runs in the lab)");
    }
    why.is_some()
}
