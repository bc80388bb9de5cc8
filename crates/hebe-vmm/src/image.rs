//! Booting from the first disk: kernel, initrd and command line are read anew
//! at each boot, so that what the guest installs takes effect when it resets.
//!
//! They lie in memory files that are open before the cage is entered, and hold
//! something only from the look at the disk until the guest has it.

use std::fs::File;
use std::io::{self, Seek, Write};
use std::path::PathBuf;
use std::rc::Rc;

use hebe_block::BlockBackend;
use hebe_boot::{BootError, BootFile};
use hebe_image::Limits;
use hebe_types::VmConfig;
use rustix::fs::MemfdFlags;

use crate::held::BootFiles;
use crate::log;
use crate::vm::VmError;

/// Longest command line, as in a definition.
const CMDLINE_MAX: usize = 2047;

/// What the next boot is told. As long as it lives, the boot files hold what
/// was found.
pub(crate) struct Found<'a> {
    pub(crate) cmdline: String,
    pub(crate) has_initrd: bool,
    /// To be emptied.
    files: Option<&'a BootFiles>,
}

impl Drop for Found<'_> {
    fn drop(&mut self) {
        if let Some(files) = self.files {
            let initrd = files.initrd.iter().map(BootFile::file);
            for mut file in initrd.chain([files.kernel.file()]) {
                // What stays costs memory, and the next look overwrites it.
                let _ = file.set_len(0).and_then(|()| file.rewind());
            }
        }
    }
}

/// Room for what a disk boots.
pub(crate) fn places() -> Result<BootFiles, BootError> {
    let memory = |what: &'static str| {
        let path = PathBuf::from(format!("the first disk's {what}"));
        match rustix::fs::memfd_create(what, MemfdFlags::CLOEXEC) {
            Ok(fd) => Ok((File::from(fd), path)),
            Err(errno) => Err(BootError::Unreadable {
                what,
                path,
                source: errno.into(),
            }),
        }
    };
    let (kernel, kernel_path) = memory("kernel")?;
    let (initrd, initrd_path) = memory("initrd")?;
    Ok(BootFiles {
        kernel: BootFile::kernel_in(kernel, kernel_path),
        initrd: Some(BootFile::initrd_in(initrd, initrd_path)),
    })
}

/// What the VM boots now: as its definition says, or as its first disk does.
pub(crate) fn look<'a>(
    files: &'a BootFiles,
    disks: &[BlockBackend],
    config: &VmConfig,
) -> Result<Found<'a>, VmError> {
    let (None, Some(disk), Some(initrd)) = (&config.kernel, disks.first(), &files.initrd) else {
        return Ok(Found {
            cmdline: config.cmdline.clone(),
            has_initrd: true,
            files: None,
        });
    };
    let mut found = Found {
        cmdline: String::new(),
        has_initrd: false,
        files: Some(files),
    };
    // What a former look left behind when it failed.
    let fresh = |file: &mut &File| file.set_len(0).and_then(|()| file.rewind());
    let (mut kernel, mut initrd) = (files.kernel.file(), initrd.file());
    fresh(&mut kernel)
        .and_then(|()| fresh(&mut initrd))
        .map_err(hebe_image::ImageError::Sink)?;
    let mut limits = Limits::default();
    limits.initrd = limits.initrd.min(config.memory.bytes());
    limits.kernel = limits.kernel.min(config.memory.bytes());
    let source = Rc::new(disk.again()?);
    let boot = buffered(kernel, initrd, |kernel, initrd| {
        hebe_image::load(source, limits, kernel, initrd)
    })?;
    found.has_initrd = boot.initrd > 0;
    found.cmdline = joined(&boot.cmdline, &config.cmdline)?;
    log::note_of_guest(&format!("boots from its first disk: {}", boot.title));
    Ok(found)
}

fn buffered<T>(
    kernel: &File,
    initrd: &File,
    load: impl FnOnce(&mut dyn Write, &mut dyn Write) -> Result<T, hebe_image::ImageError>,
) -> Result<T, VmError> {
    let mut kernel = io::BufWriter::new(kernel);
    let mut initrd = io::BufWriter::new(initrd);
    let loaded = load(&mut kernel, &mut initrd)?;
    let flushed = kernel.flush().and_then(|()| initrd.flush());
    flushed.map_err(hebe_image::ImageError::Sink)?;
    Ok(loaded)
}

/// The disk's command line, and behind it the definition's, which wins where
/// the kernel takes the last word.
fn joined(disk: &str, own: &str) -> Result<String, VmError> {
    let both = [disk.trim(), own.trim()];
    let words: Vec<&str> = both.into_iter().filter(|part| !part.is_empty()).collect();
    let cmdline = words.join(" ");
    match cmdline.len() {
        len if len > CMDLINE_MAX || cmdline.contains('\0') => Err(VmError::Cmdline(len)),
        _ => Ok(cmdline),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    fn config(disk: &std::path::Path, cmdline: &str) -> VmConfig {
        let text = format!(
            "name = 'web'\nmemory = '8MiB'\ncmdline = '{cmdline}'\n[[disk]]\npath = '{}'\n",
            disk.display()
        );
        toml::from_str(&text).expect("definition")
    }

    /// A FAT disk that boots `kernel` with `options`.
    fn disk(path: &std::path::Path, kernel: &str, options: &str) {
        let entry = format!("linux /k\noptions {options}\n");
        let files = [
            ("loader/entries/a.conf", entry.as_bytes()),
            ("k", kernel.as_bytes()),
        ];
        std::fs::write(path, crate::guest::fat(&files)).expect("write");
    }

    #[test]
    fn each_look_finds_what_the_disk_says_then_and_leaves_nothing() {
        let dir = tempfile::tempdir().expect("dir");
        let path = dir.path().join("disk");
        let files = places().expect("places");
        for (kernel, options) in [("the first kernel", "a"), ("another", "b c")] {
            disk(&path, kernel, options);
            let disks = [BlockBackend::open(&path, false).expect("open")];
            let found = look(&files, &disks, &config(&path, " last ")).expect("found");
            assert_eq!(found.cmdline, format!("{options} last"));
            assert!(!found.has_initrd);
            let mut text = String::new();
            let mut file = files.kernel.file();
            file.rewind().expect("rewind");
            file.read_to_string(&mut text).expect("read");
            assert_eq!(text, kernel);
            drop(found);
            assert_eq!(files.kernel.file().metadata().expect("metadata").len(), 0);
        }
        disk(&path, "k", &"x".repeat(CMDLINE_MAX));
        let disks = [BlockBackend::open(&path, false).expect("open")];
        let refused = look(&files, &disks, &config(&path, "y"))
            .err()
            .expect("refused");
        assert!(matches!(refused, VmError::Cmdline(2049)), "{refused}");
        assert_eq!(files.kernel.file().metadata().expect("metadata").len(), 0);
    }

    #[test]
    fn a_definition_with_a_kernel_is_taken_at_its_word() {
        let files = places().expect("places");
        let mut config = config(std::path::Path::new("/none"), "own");
        config.kernel = Some("/k".into());
        let found = look(&files, &[], &config).expect("nothing to look at");
        assert_eq!(found.cmdline, "own");
        assert!(found.has_initrd);
    }
}
