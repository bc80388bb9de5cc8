//! Initramfs archives: the newc format of cpio (kernel documentation,
//! early-userspace/buffer-format).

use std::collections::BTreeSet;

/// Mode bits of a folder.
const DIR: u32 = 0o040_000;
/// Mode bits of a regular file.
const FILE: u32 = 0o100_000;
/// Mode bits of a symbolic link.
const LINK: u32 = 0o120_000;
/// Mode bits of a character device.
const CHAR: u32 = 0o020_000;

/// An archive in the making. Parent folders are added by themselves.
#[derive(Default)]
pub struct Archive {
    bytes: Vec<u8>,
    folders: BTreeSet<String>,
    inode: u32,
}

impl Archive {
    /// An empty archive.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a folder and its parents.
    pub fn folder(&mut self, path: &str) {
        self.parents(path);
        let path = path.trim_matches('/');
        if !path.is_empty() && self.folders.insert(path.to_owned()) {
            self.entry(path, DIR | 0o755, (0, 0), b"");
        }
    }

    /// Adds a file.
    pub fn file(&mut self, path: &str, permissions: u32, data: &[u8]) {
        self.parents(path);
        self.entry(path.trim_matches('/'), FILE | permissions, (0, 0), data);
    }

    /// Adds a symbolic link.
    pub fn link(&mut self, path: &str, target: &str) {
        self.parents(path);
        self.entry(
            path.trim_matches('/'),
            LINK | 0o777,
            (0, 0),
            target.as_bytes(),
        );
    }

    /// Adds a character device.
    pub fn character_device(&mut self, path: &str, permissions: u32, major: u32, minor: u32) {
        self.parents(path);
        self.entry(
            path.trim_matches('/'),
            CHAR | permissions,
            (major, minor),
            b"",
        );
    }

    /// Closes the archive.
    pub fn finish(mut self) -> Vec<u8> {
        self.inode = 0;
        self.entry("TRAILER!!!", 0, (0, 0), b"");
        self.bytes
    }

    fn parents(&mut self, path: &str) {
        if let Some((parent, _)) = path.trim_matches('/').rsplit_once('/') {
            self.folder(parent);
        }
    }

    fn entry(&mut self, name: &str, mode: u32, device: (u32, u32), data: &[u8]) {
        self.inode += 1;
        let links = if mode & 0o170_000 == DIR { 2 } else { 1 };
        let fields = [
            self.inode,
            mode,
            0, // owner
            0, // group
            links,
            0, // time: the same input gives the same archive
            data.len() as u32,
            0,
            0,
            device.0,
            device.1,
            name.len() as u32 + 1,
            0, // checksum, unused in newc
        ];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes
                .extend_from_slice(format!("{field:08X}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(data);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(mut bytes: &[u8]) -> Vec<(String, u32, Vec<u8>)> {
        let mut all = Vec::new();
        loop {
            assert_eq!(&bytes[..6], b"070701");
            let field = |i: usize| {
                let text = std::str::from_utf8(&bytes[6 + 8 * i..14 + 8 * i]).expect("hex");
                u32::from_str_radix(text, 16).expect("hex")
            };
            let (mode, size, name_len) = (field(1), field(6) as usize, field(11) as usize);
            let name = String::from_utf8(bytes[110..110 + name_len - 1].to_vec()).expect("name");
            let start = (110 + name_len).next_multiple_of(4);
            let data = bytes[start..start + size].to_vec();
            bytes = &bytes[(start + size).next_multiple_of(4)..];
            if name == "TRAILER!!!" {
                assert!(bytes.is_empty());
                return all;
            }
            all.push((name, mode, data));
        }
    }

    #[test]
    fn entries_come_back_in_order_with_their_parents_once() {
        let mut archive = Archive::new();
        archive.file("/init", 0o755, b"abc");
        archive.file("/a/b/c", 0o644, b"");
        archive.file("/a/b/d", 0o600, b"12345");
        archive.link("/bin/sh", "busybox");
        archive.character_device("/dev/console", 0o600, 5, 1);
        let bytes = archive.finish();
        assert_eq!(bytes.len() % 4, 0);
        let all = names(&bytes);
        let paths: Vec<&str> = all.iter().map(|(n, _, _)| n.as_str()).collect();
        assert_eq!(
            paths,
            [
                "init",
                "a",
                "a/b",
                "a/b/c",
                "a/b/d",
                "bin",
                "bin/sh",
                "dev",
                "dev/console"
            ]
        );
        assert_eq!(all[0], ("init".into(), 0o100_755, b"abc".to_vec()));
        assert_eq!(all[4].2, b"12345");
        assert_eq!(all[6], ("bin/sh".into(), 0o120_777, b"busybox".to_vec()));
        assert_eq!(all[8].1, 0o020_600);
    }
}
