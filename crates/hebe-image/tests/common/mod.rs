//! File systems made by mke2fs, and disks around them.

use std::io::{Cursor, Write};
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;
use std::rc::Rc;

use hebe_image::{ImageError, Limits, Source};

pub use hebe_image::load;

/// A directory that becomes a file system.
pub struct Tree(tempfile::TempDir);

impl Tree {
    pub fn new() -> Self {
        Self(tempfile::tempdir().expect("dir"))
    }

    pub fn file(self, path: &str, contents: &str) -> Self {
        let path = self.0.path().join(path);
        std::fs::create_dir_all(path.parent().expect("parent")).expect("mkdir");
        std::fs::write(path, contents).expect("write");
        self
    }

    pub fn link(self, path: &str, target: &str) -> Self {
        let path = self.0.path().join(path);
        std::fs::create_dir_all(path.parent().expect("parent")).expect("mkdir");
        symlink(target, path).expect("link");
        self
    }

    pub fn ext4(&self) -> Vec<u8> {
        self.made("ext4", &[])
    }

    /// By mke2fs, which is part of e2fsprogs.
    pub fn made(&self, kind: &str, more: &[&str]) -> Vec<u8> {
        let file = tempfile::NamedTempFile::new().expect("file");
        let made = Command::new("mke2fs")
            .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
            .args([
                "-q",
                "-F",
                "-t",
                kind,
                "-U",
                "11111111-2222-3333-4444-555555555555",
            ])
            .args(more)
            .arg("-d")
            .args([self.0.path(), file.path()])
            .arg("8M")
            .status()
            .expect("mke2fs, of e2fsprogs, makes the file systems of these tests");
        assert!(made.success());
        std::fs::read(file.path()).expect("read")
    }

    pub fn fat(&self) -> Vec<u8> {
        let mut disk = Cursor::new(vec![0; 2 << 20]);
        fatfs::format_volume(&mut disk, fatfs::FormatVolumeOptions::new()).expect("format");
        let fs = fatfs::FileSystem::new(&mut disk, fatfs::FsOptions::new()).expect("open");
        copy(self.0.path(), &fs.root_dir());
        fs.unmount().expect("unmount");
        disk.into_inner()
    }
}

fn copy(from: &Path, to: &fatfs::Dir<'_, &mut Cursor<Vec<u8>>>) {
    for entry in std::fs::read_dir(from).expect("read") {
        let entry = entry.expect("entry");
        let name = entry.file_name().into_string().expect("name");
        if entry.path().is_dir() {
            copy(&entry.path(), &to.create_dir(&name).expect("mkdir"));
        } else {
            let contents = std::fs::read(entry.path()).expect("read");
            let mut file = to.create_file(&name).expect("create");
            file.write_all(&contents).expect("write");
        }
    }
}

pub struct Booted {
    pub title: String,
    pub cmdline: String,
    pub kernel: Vec<u8>,
    pub initrd: Vec<u8>,
}

fn try_load(disk: &[u8]) -> Result<Booted, ImageError> {
    let (mut kernel, mut initrd) = (Vec::new(), Vec::new());
    let source: Rc<dyn Source> = Rc::new(disk.to_vec());
    let found = load(source, Limits::default(), &mut kernel, &mut initrd)?;
    assert_eq!(found.kernel, kernel.len() as u64);
    assert_eq!(found.initrd, initrd.len() as u64);
    Ok(Booted {
        title: found.title,
        cmdline: found.cmdline,
        kernel,
        initrd,
    })
}

pub fn booted(disk: &[u8]) -> Booted {
    try_load(disk).expect("it boots")
}

pub fn refusal(disk: &[u8]) -> String {
    match try_load(disk) {
        Ok(booted) => panic!("it boots {}", booted.title),
        Err(error) => error.to_string(),
    }
}

pub fn gpt(partitions: &[Vec<u8>]) -> Vec<u8> {
    let contents: Vec<&[u8]> = partitions.iter().map(Vec::as_slice).collect();
    disks::gpt_disk(&contents)
}

#[path = "../../src/testing.rs"]
#[allow(dead_code)]
mod disks;
