//! Saved VMs: what outlives the host on its disk.
//!
//! A saved VM is `saved/NAME.hebe` (RAM and state, written by its VMM) with
//! `saved/NAME.json` beside it (what the host must know to restore it). The
//! name `NAME.hebe` is the commit: it is given when everything is on disk.
//!
//! ```text
//!   NAME.part ──rename──▶ NAME.hebe ──rename──▶ NAME.restoring ──remove──▶ –
//!   VMM writes            saved                 a VMM starts from it       it runs
//! ```
//!
//! The host makes `NAME.part` and hands it to the VMM, open; a VMM reaches
//! nothing here by name. One that is killed while it writes leaves it there,
//! to no effect.
//!
//! A file stops being `NAME.hebe` *before* the VM may run: once it runs, its
//! disk goes on, and the file's RAM must never meet that disk again.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use hebe_flow::resume::SavedFact;
use hebe_sys::proc::parse_uuid;
use hebe_types::{ByteSize, VmId, VmName};
use serde::{Deserialize, Serialize};

use crate::files;
use crate::host::{HostError, Layout};

/// What the host must know to restore a saved VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedInfo {
    /// Its identity.
    pub vm: VmId,
    /// Guest RAM.
    pub memory: ByteSize,
    /// Its RAM was in the store, and is to be so again.
    pub in_store: bool,
    /// Its RAM was in store `luo`, and is to be so again where the kernel has it.
    #[serde(default)]
    pub in_files: bool,
    /// A restore from it began in memory that is no segment, although its RAM
    /// was in the store: this kernel has none. A segment that the next kernel
    /// finds tells nothing about that restore.
    #[serde(default)]
    pub apart: bool,
}

impl SavedInfo {
    /// The life in whose segment a restore goes on.
    fn segment_of_restore(&self) -> Option<VmId> {
        (self.in_store && !self.apart).then_some(self.vm)
    }
}

/// Paths of one saved VM.
#[derive(Clone, Debug)]
pub struct SavedPaths {
    /// Being written.
    pub part: PathBuf,
    /// Complete.
    pub complete: PathBuf,
    /// A restore from it began.
    pub restoring: PathBuf,
    /// [`SavedInfo`].
    pub info: PathBuf,
}

impl SavedPaths {
    /// The paths for `name`.
    pub fn new(layout: &Layout, name: &VmName) -> Self {
        let dir = layout.state.join("saved");
        let with = |ending: &str| dir.join(format!("{name}.{ending}"));
        Self {
            part: with("part"),
            complete: with("hebe"),
            restoring: with("restoring"),
            info: with("json"),
        }
    }

    /// Removes what an earlier attempt left, and makes the file that the VMM
    /// is to write.
    pub fn prepare(&self, info: &SavedInfo) -> Result<File, HostError> {
        if let Some(dir) = self.part.parent() {
            fs::create_dir_all(dir).map_err(HostError::file("create", dir))?;
        }
        files::remove_durably(&self.part).map_err(HostError::file("remove", &self.part))?;
        files::write_json(&self.info, info).map_err(HostError::file("write", &self.info))?;
        let mut options = OpenOptions::new();
        options.read(true).write(true).create_new(true).mode(0o600);
        let made = options.open(&self.part);
        made.map_err(HostError::file("create", &self.part))
    }

    /// Commits the file that the VMM wrote: everything in it is on disk.
    pub fn commit(&self) -> Result<(), HostError> {
        files::rename_durably(&self.part, &self.complete)
            .map_err(HostError::file("commit", &self.complete))
    }

    /// Writes down whether the restore that is about to begin goes into a
    /// segment. Durable, and to be done before [`SavedPaths::set_aside`].
    pub(crate) fn note_place(&self, info: &SavedInfo, in_segment: bool) -> Result<(), HostError> {
        let apart = info.in_store && !in_segment;
        if apart == info.apart {
            return Ok(());
        }
        let info = SavedInfo {
            apart,
            ..info.clone()
        };
        files::write_json(&self.info, &info).map_err(HostError::file("write", &self.info))
    }

    /// A VM may run from now on, from this file or from its memory: what is set
    /// aside is restored by an order that says so alone. Durable; whether there
    /// was a complete file.
    pub fn set_aside(&self) -> Result<bool, HostError> {
        let there = self.complete.try_exists();
        if !there.map_err(HostError::file("look at", &self.complete))? {
            return Ok(false);
        }
        files::rename_durably(&self.complete, &self.restoring)
            .map_err(HostError::file("withdraw", &self.complete))?;
        Ok(true)
    }

    /// Undoes [`SavedPaths::set_aside`] of a VM that certainly did not run.
    pub fn put_back(&self) -> Result<(), HostError> {
        if !self.restoring.exists() {
            return Ok(());
        }
        files::rename_durably(&self.restoring, &self.complete)
            .map_err(HostError::file("put back", &self.complete))
    }

    /// Withdraws everything: the VM runs, or is given up. When this returns
    /// without error, nothing on disk can be restored any more.
    pub fn withdraw(&self) -> Result<(), HostError> {
        let files = [&self.complete, &self.restoring, &self.part, &self.info];
        for path in files {
            files::remove_durably(path).map_err(HostError::file("remove", path))?;
        }
        Ok(())
    }

    /// Which file there is; one that cannot be looked at may be a VM's only state,
    /// and counts as there.
    pub fn fact(&self) -> Option<SavedFact> {
        if may_be_there(&self.restoring) {
            let info = self.read_info();
            let into = info.and_then(|info| info.segment_of_restore());
            Some(SavedFact::Restoring { into })
        } else if may_be_there(&self.complete) {
            Some(SavedFact::Complete)
        } else {
            None
        }
    }

    /// Whether there may be a complete file.
    pub(crate) fn may_be_complete(&self) -> bool {
        may_be_there(&self.complete)
    }

    /// Whether anything of it is there, complete or not.
    pub(crate) fn is_any(&self) -> bool {
        [&self.part, &self.complete, &self.restoring]
            .iter()
            .any(|path| may_be_there(path))
    }

    /// The file that a restore would read.
    pub fn to_restore(&self) -> &Path {
        if self.complete.exists() {
            &self.complete
        } else {
            &self.restoring
        }
    }

    /// What the host must know, where readable.
    pub fn read_info(&self) -> Option<SavedInfo> {
        files::read_json(&self.info).ok().flatten()
    }
}

fn may_be_there(path: &Path) -> bool {
    path.try_exists().unwrap_or(true)
}

/// All saved VMs.
pub fn all(layout: &Layout) -> BTreeMap<VmName, SavedFact> {
    let entries = fs::read_dir(layout.state.join("saved"));
    let mut found = BTreeMap::new();
    for entry in entries.into_iter().flatten().flatten() {
        let file = entry.file_name();
        let name = file.to_str().and_then(|f| {
            f.strip_suffix(".hebe")
                .or_else(|| f.strip_suffix(".restoring"))
        });
        let Some(Ok(name)) = name.map(str::parse::<VmName>) else {
            continue;
        };
        if let Some(fact) = SavedPaths::new(layout, &name).fact() {
            found.insert(name, fact);
        }
    }
    found
}

/// What a VM was booted with, kept as long as its life may go on
/// (`lives/NAME.ID.toml`). The state that it is frozen or saved with says it,
/// too, but its VMM wrote that.
#[derive(Clone, Debug)]
pub struct LifeFile(PathBuf);

impl LifeFile {
    /// That of the life `vm` of `name`.
    pub fn new(layout: &Layout, name: &VmName, vm: VmId) -> Self {
        Self(lives(layout).join(format!("{name}.{vm}.toml")))
    }

    /// Writes it. Those of the lives before stay until this one runs:
    /// one that is frozen may go on if it does not.
    ///
    /// # Errors
    /// The file cannot be written: a state of this life will not be compared.
    pub fn begin(layout: &Layout, name: &VmName, vm: VmId, text: &str) -> io::Result<()> {
        let Self(path) = Self::new(layout, name, vm);
        files::write_durably(&path, text.as_bytes())
    }

    /// Those of all lives of a VM that may go on.
    pub fn all(layout: &Layout, name: &VmName) -> Vec<PathBuf> {
        let entries = fs::read_dir(lives(layout)).into_iter().flatten().flatten();
        let own = entries.filter(|entry| {
            let file = entry.file_name();
            let of = file.to_str().and_then(|f| f.split_once('.'));
            of.is_some_and(|(first, _)| first == name.as_str())
        });
        own.map(|entry| entry.path()).collect()
    }

    /// Of which VMs and which lives of them there are any.
    pub(crate) fn known(layout: &Layout) -> Vec<(VmName, VmId)> {
        let entries = fs::read_dir(lives(layout)).into_iter().flatten().flatten();
        let parts = entries.filter_map(|entry| {
            let file = entry.file_name();
            let mut parts = file.to_str()?.split('.');
            let (name, vm) = (parts.next()?.parse().ok()?, parse_uuid(parts.next()?)?);
            Some((name, VmId(vm)))
        });
        parts.collect()
    }

    /// Removes it. One that stays is harmless: no other life has its id.
    pub(crate) fn remove(self) {
        let _ = fs::remove_file(self.0);
    }

    /// Where it is, if it is.
    pub fn existing(self) -> Option<PathBuf> {
        self.0.exists().then_some(self.0)
    }
}

fn lives(layout: &Layout) -> PathBuf {
    layout.state.join("lives")
}

/// Forgets what a life was to be booted with that did not begin.
pub(crate) fn forget_life(layout: &Layout, name: &VmName, vm: VmId) {
    let _ = fs::remove_file(LifeFile::new(layout, name, vm).0);
}

/// Forgets what the VM's lives were booted with, but for the life `but`. A file
/// that stays is harmless: no other life has its id.
pub(crate) fn forget_lives(layout: &Layout, name: &VmName, but: Option<VmId>) {
    let but = but.map(|vm| LifeFile::new(layout, name, vm).0);
    for path in LifeFile::all(layout, name) {
        if Some(&path) != but.as_ref() {
            let _ = fs::remove_file(path);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn a_life_is_known_until_it_is_forgotten() {
        let root = tempfile::tempdir().expect("dir");
        let layout = Layout::below(root.path());
        let name = |text: &str| text.parse::<VmName>().expect("name");
        let (web, other) = (name("web"), name("web-2"));
        let (first, second) = (VmId([1; 16]), VmId([2; 16]));
        let known = |name, vm| LifeFile::new(&layout, name, vm).existing().is_some();
        LifeFile::begin(&layout, &other, first, "b").expect("write");
        LifeFile::begin(&layout, &web, first, "a").expect("write");
        assert!(known(&web, first) && !known(&web, second));
        LifeFile::begin(&layout, &web, second, "a").expect("write");
        assert!(known(&web, second) && known(&web, first));
        forget_lives(&layout, &web, Some(second));
        assert!(known(&web, second) && !known(&web, first));
        forget_lives(&layout, &web, None);
        assert!(!known(&web, second) && known(&other, first));
    }

    /// A loop of links stands for a disk that fails.
    #[test]
    fn a_file_that_cannot_be_looked_at_counts_as_there() {
        let root = tempfile::tempdir().expect("dir");
        let layout = Layout::below(root.path());
        let paths = SavedPaths::new(&layout, &"web".parse().expect("name"));
        fs::create_dir_all(layout.state.join("saved")).expect("mkdir");
        assert_eq!(paths.fact(), None);
        let fails = |path: &Path| {
            let name = path.file_name().expect("a name");
            std::os::unix::fs::symlink(name, path).expect("link");
        };
        fails(&paths.complete);
        assert_eq!(paths.fact(), Some(SavedFact::Complete));
        paths.set_aside().expect_err("nobody knows what it is");
        fails(&paths.restoring);
        assert_eq!(paths.fact(), Some(SavedFact::Restoring { into: None }));
        assert!(paths.is_any());
    }

    #[test]
    fn a_file_is_saved_exactly_between_its_two_renames() {
        let root = tempfile::tempdir().expect("dir");
        let layout = Layout::below(root.path());
        let name: VmName = "web".parse().expect("name");
        let paths = SavedPaths::new(&layout, &name);
        let info = SavedInfo {
            vm: VmId([7; 16]),
            memory: ByteSize::mib(64),
            in_store: true,
            in_files: false,
            apart: false,
        };
        fs::create_dir_all(layout.state.join("saved")).expect("mkdir");
        fs::write(&paths.part, b"of an attempt before").expect("left");
        let mut part = paths.prepare(&info).expect("prepare");
        part.write_all(b"state").expect("the VMM writes");
        assert!(all(&layout).is_empty());
        paths.commit().expect("commit");
        assert_eq!(all(&layout).get(&name), Some(&SavedFact::Complete));
        assert_eq!(paths.read_info(), Some(info.clone()));
        files::rename_durably(&paths.complete, &paths.restoring).expect("restore begins");
        let restoring = |into| Some(SavedFact::Restoring { into });
        assert_eq!(paths.fact(), restoring(Some(info.vm)));
        paths.note_place(&info, false).expect("into a memfd");
        assert_eq!(all(&layout).get(&name).copied(), restoring(None));
        let noted = paths.read_info().expect("readable");
        paths.note_place(&noted, true).expect("into a segment");
        assert_eq!(paths.fact(), restoring(Some(info.vm)));
        let text = fs::read(&paths.restoring).expect("the file");
        assert_eq!(text, b"state");
        fs::write(&paths.part, b"half").expect("a VMM was killed");
        paths.withdraw().expect("it runs");
        let left = fs::read_dir(layout.state.join("saved")).expect("dir");
        assert_eq!(left.count(), 0);
        paths.withdraw().expect("already gone");
    }
}
