//! Disk images, made without mounting anything.

use std::fs::{self, File};
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};

use crate::apt::{self, Tool};
use crate::progress::Progress;

/// Makes a sparse ext4 image of `mib` MiB, filled from `contents` if given.
pub fn make_ext4(
    image: &Path,
    mib: u64,
    contents: Option<&Path>,
    progress: &dyn Progress,
) -> Result<()> {
    let tool = Tool {
        program: "mkfs.ext4",
        package: "e2fsprogs",
    };
    apt::ensure_tools(&[tool], progress)?;
    let file = File::create(image).with_context(|| format!("cannot create {}", image.display()))?;
    file.set_len(mib << 20)?;
    let mkfs = apt::find_program("mkfs.ext4").context("mkfs.ext4 is missing: install e2fsprogs")?;
    let mut command = Command::new(mkfs);
    command.args(["-q", "-F", "-m", "0", "-J", "size=8"]);
    // Nothing is left for the kernel to initialise in the background.
    command.args(["-E", "lazy_itable_init=0,lazy_journal_init=0,nodiscard"]);
    // Features that the oldest kernel of the lab knows.
    command.args(["-O", "^orphan_file,^metadata_csum_seed"]);
    if let Some(contents) = contents {
        command.arg("-d").arg(contents);
    }
    apt::run(command.arg(image)).map(drop)
}

/// Copies or links a file into a folder tree. What is there under that name
/// is replaced: it may be a link to `from` itself, and is not written to.
pub fn place(from: &Path, to: &Path) -> Result<()> {
    if let Some(parent) = to.parent() {
        fs::create_dir_all(parent)?;
    }
    if to.exists() {
        fs::remove_file(to).with_context(|| format!("cannot replace {}", to.display()))?;
    }
    if fs::hard_link(from, to).is_err() {
        fs::copy(from, to).with_context(|| format!("cannot copy {}", from.display()))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_placed_twice_keeps_its_contents() {
        let folder = tempfile::tempdir().expect("a folder");
        let (from, to) = (folder.path().join("from"), folder.path().join("a/to"));
        fs::write(&from, "contents").expect("written");
        for _ in 0..2 {
            place(&from, &to).expect("placed");
            assert_eq!(fs::read(&from).expect("read"), b"contents");
            assert_eq!(fs::read(&to).expect("read"), b"contents");
        }
    }
}
