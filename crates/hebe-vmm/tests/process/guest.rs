//! Guests of a few instructions, as ELF files with a PVH note. They begin in
//! 32-bit protected mode with interrupts off.

const BASE: u32 = 0x10_0000;

/// Halts for ever.
pub const IDLE: &[u8] = &[0xf4, 0xeb, 0xfd];

/// An ELF file that is entered at its code.
pub fn image(code: &[u8]) -> Vec<u8> {
    const NOTE_AT: u32 = 64 + 2 * 56;
    const NOTE_LEN: u32 = 20;
    let long = |value: u32| u64::from(value).to_le_bytes();
    let len = code.len() as u32;
    // 64-bit, little-endian; executable, x86-64; two program headers.
    let mut elf = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0\x01\0\0\0".to_vec();
    elf.extend([long(BASE), long(64), long(0)].concat());
    elf.extend([0, 0, 0, 0, 64, 0, 56, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
    // The code, with all rights, and the note.
    elf.extend([1u32.to_le_bytes(), 7u32.to_le_bytes()].concat());
    let code_at = NOTE_AT + NOTE_LEN;
    elf.extend([code_at, BASE, BASE, len, len, 1].map(long).concat());
    elf.extend([4u32.to_le_bytes(), 4u32.to_le_bytes()].concat());
    elf.extend([NOTE_AT, 0, 0, NOTE_LEN, NOTE_LEN, 4].map(long).concat());
    // XEN_ELFNOTE_PHYS32_ENTRY.
    elf.extend(b"\x04\0\0\0\x04\0\0\0\x12\0\0\0Xen\0");
    elf.extend(BASE.to_le_bytes());
    elf.extend(code);
    elf
}

/// Why this machine runs no guest, if so: said on standard error too.
pub fn cannot_run() -> bool {
    match hebe_kvm::host_can_run() {
        Ok(()) => false,
        Err(why) => {
            use std::io::Write;
            let line =
                format!("skipped here: a test with a running guest: {why} (runs in the lab)");
            let _ = writeln!(std::io::stderr(), "{line}");
            true
        }
    }
}

/// A disk with a FAT file system that holds these files.
pub fn fat(files: &[(&str, &[u8])]) -> Vec<u8> {
    use std::io::Write;

    let mut disk = std::io::Cursor::new(vec![0; 1 << 20]);
    fatfs::format_volume(&mut disk, fatfs::FormatVolumeOptions::new()).expect("format");
    let fs = fatfs::FileSystem::new(&mut disk, fatfs::FsOptions::new()).expect("open");
    for (path, contents) in files {
        let mut dir = fs.root_dir();
        let (parents, name) = path.rsplit_once('/').unwrap_or(("", path));
        for parent in parents.split('/').filter(|p| !p.is_empty()) {
            dir = dir.create_dir(parent).expect("mkdir");
        }
        let mut file = dir.create_file(name).expect("create");
        file.write_all(contents).expect("write");
    }
    fs.unmount().expect("unmount");
    disk.into_inner()
}
