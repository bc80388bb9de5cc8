//! The cache outside the checkout: packages, unpacked kernels, QEMU.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use rustix::fs::{FlockOperation, flock};

use crate::progress::Progress;

/// A folder that is ours alone while this value lives.
pub struct Cache {
    root: PathBuf,
    _lock: File,
}

impl Cache {
    /// Opens the cache and waits until no other run uses it.
    pub fn open(progress: &dyn Progress) -> Result<Self> {
        let root = default_root()?;
        fs::create_dir_all(&root).with_context(|| {
            format!(
                "cannot create the cache folder {}; set HEBE_CACHE to a folder that can be written",
                root.display()
            )
        })?;
        let path = root.join("lock");
        let lock = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .with_context(|| format!("cannot open {}", path.display()))?;
        if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
            progress.step("waiting for another run that fills the same cache");
            flock(&lock, FlockOperation::LockExclusive).context("cannot lock the cache")?;
        }
        Ok(Self { root, _lock: lock })
    }

    /// The cache's folder.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// A folder that is complete or absent: filled by `fill` under another
    /// name and renamed when done.
    pub fn filled(&self, name: &str, fill: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
        let done = self.root.join(name);
        if done.exists() {
            return Ok(done);
        }
        let part = self.root.join(format!("{name}.part"));
        if part.exists() {
            fs::remove_dir_all(&part)
                .with_context(|| format!("cannot remove {}", part.display()))?;
        }
        fs::create_dir_all(&part).with_context(|| format!("cannot create {}", part.display()))?;
        fill(&part)?;
        fs::rename(&part, &done).with_context(|| format!("cannot complete {}", done.display()))?;
        Ok(done)
    }
}

/// `HEBE_CACHE`, else `hebe` in `XDG_CACHE_HOME`, else in `~/.cache`.
pub fn default_root() -> Result<PathBuf> {
    let var = |name| {
        std::env::var_os(name)
            .filter(|v| !v.is_empty())
            .map(PathBuf::from)
    };
    if let Some(path) = var("HEBE_CACHE") {
        return Ok(path);
    }
    if let Some(path) = var("XDG_CACHE_HOME") {
        return Ok(path.join("hebe"));
    }
    match var("HOME") {
        Some(home) => Ok(home.join(".cache/hebe")),
        None => {
            bail!("neither HEBE_CACHE nor HOME is set; set HEBE_CACHE to a folder for downloads")
        }
    }
}
