//! The cache outside the checkout: packages, unpacked kernels, QEMU.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use rustix::fs::{FlockOperation, flock};

use crate::progress::Progress;

/// The cache's folder. What is in it is complete: an entry is filled under
/// another name, by one process at a time, and renamed when done.
pub struct Cache {
    root: PathBuf,
}

impl Cache {
    /// Opens the cache; its folder is created.
    pub fn open() -> Result<Self> {
        let root = default_root()?;
        fs::create_dir_all(&root).with_context(|| {
            format!(
                "cannot create the cache folder {}; set HEBE_CACHE to a folder that can be written",
                root.display()
            )
        })?;
        Ok(Self { root })
    }

    /// The cache's folder.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The entry `name`; `fill` makes it when it is not there, or when `good`
    /// does not like what is there.
    pub fn filled(
        &self,
        name: &str,
        progress: &dyn Progress,
        good: impl Fn(&Path) -> bool,
        fill: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<PathBuf> {
        self.fill_part(name, progress, good, |part| {
            if part.exists() {
                remove(part)?;
            }
            fs::create_dir_all(part)
                .with_context(|| format!("cannot create {}", part.display()))?;
            fill(part)
        })
    }

    /// The same for what takes long: `fill` finds what an ended run left in the
    /// folder, and goes on from there.
    pub fn resumed(
        &self,
        name: &str,
        progress: &dyn Progress,
        good: impl Fn(&Path) -> bool,
        fill: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<PathBuf> {
        self.fill_part(name, progress, good, |part| {
            fs::create_dir_all(part)
                .with_context(|| format!("cannot create {}", part.display()))?;
            fill(part)
        })
    }

    fn fill_part(
        &self,
        name: &str,
        progress: &dyn Progress,
        good: impl Fn(&Path) -> bool,
        fill: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<PathBuf> {
        let done = self.root.join(name);
        if done.exists() && good(&done) {
            return Ok(done);
        }
        let _held = lock(&self.root.join(format!("{name}.lock")), progress)?;
        // Another run may have filled it while this one waited.
        if done.exists() && good(&done) {
            return Ok(done);
        }
        let part = self.root.join(format!("{name}.part"));
        fill(&part)?;
        if done.exists() {
            remove(&done)?;
        }
        fs::rename(&part, &done).with_context(|| format!("cannot complete {}", done.display()))?;
        Ok(done)
    }
}

/// Waits for a lock file; it is held until the returned file is dropped.
pub fn lock(path: &Path, progress: &dyn Progress) -> Result<File> {
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(path)
        .with_context(|| format!("cannot open {}", path.display()))?;
    if flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
        progress.step("waiting for another run that fetches the same");
        flock(&file, FlockOperation::LockExclusive)
            .with_context(|| format!("cannot lock {}", path.display()))?;
    }
    Ok(file)
}

fn remove(folder: &Path) -> Result<()> {
    fs::remove_dir_all(folder).with_context(|| format!("cannot remove {}", folder.display()))
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::progress::Silent;

    #[test]
    fn an_entry_is_complete_or_absent() {
        let folder = tempfile::tempdir().expect("folder");
        let cache = Cache {
            root: folder.path().to_owned(),
        };
        let any = |_: &Path| true;
        let failing = cache.filled("a", &Silent, any, |_| bail!("no network"));
        assert!(failing.is_err() && !folder.path().join("a").exists());
        let write = |text: &'static str| {
            move |dir: &Path| fs::write(dir.join("f"), text).map_err(Into::into)
        };
        let done = cache.filled("a", &Silent, any, write("1")).expect("filled");
        cache.filled("a", &Silent, any, write("2")).expect("kept");
        assert_eq!(fs::read_to_string(done.join("f")).expect("f"), "1");
        cache
            .filled("a", &Silent, |_| false, write("3"))
            .expect("replaced");
        assert_eq!(fs::read_to_string(done.join("f")).expect("f"), "3");
    }

    #[test]
    fn what_takes_long_goes_on_where_it_ended() {
        let folder = tempfile::tempdir().expect("folder");
        let cache = Cache {
            root: folder.path().to_owned(),
        };
        let ended = cache.resumed(
            "a",
            &Silent,
            |_| true,
            |dir| {
                fs::write(dir.join("half"), "1")?;
                bail!("interrupted")
            },
        );
        assert!(ended.is_err() && !folder.path().join("a").exists());
        let done = cache
            .resumed(
                "a",
                &Silent,
                |_| true,
                |dir| {
                    assert!(dir.join("half").exists());
                    Ok(())
                },
            )
            .expect("completed");
        assert!(done.join("half").exists());
    }
}
