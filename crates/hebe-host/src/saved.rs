//! Saved VMs and the list of VMs to boot: what outlives the host on its disk.
//!
//! A saved VM is `saved/NAME.hebe` (RAM and state, written by its VMM) with
//! `saved/NAME.json` beside it (what the host must know to restore it). The
//! name `NAME.hebe` is the commit: it is given when everything is on disk.
//!
//! ```text
//!   NAME.new/part ──rename──▶ NAME.hebe ──rename──▶ NAME.restoring ──remove──▶ –
//!   VMM writes                saved                 a VMM starts from it       it runs
//! ```
//!
//! `NAME.new` is the one directory here that the VM's own VMM can reach from
//! its cage, and no other VMM can: it is made before the VMM starts, and stays
//! until the VM is dropped. A VMM that is killed while it writes leaves
//! `NAME.new/part.partial` there.
//!
//! A file stops being `NAME.hebe` *before* the VM may run: once it runs, its
//! disk goes on, and the file's RAM must never meet that disk again.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use hebe_flow::resume::SavedFact;
use hebe_types::{ByteSize, VmConfig, VmId, VmName};
use serde::{Deserialize, Serialize};

use crate::files;
use crate::host::{Host, HostError, Layout};

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
            part: Self::writable(layout, name).join("part"),
            complete: with("hebe"),
            restoring: with("restoring"),
            info: with("json"),
        }
    }

    /// The directory that the VM's VMM writes to.
    pub fn writable(layout: &Layout, name: &VmName) -> PathBuf {
        layout.state.join("saved").join(format!("{name}.new"))
    }

    /// Makes the directory and removes what an earlier attempt left.
    pub fn prepare(&self, info: &SavedInfo) -> Result<(), HostError> {
        if let Some(dir) = self.part.parent() {
            fs::create_dir_all(dir).map_err(HostError::file("create", dir))?;
        }
        files::remove_durably(&self.part).map_err(HostError::file("remove", &self.part))?;
        files::write_json(&self.info, info).map_err(HostError::file("write", &self.info))
    }

    /// Commits the file that the VMM wrote.
    pub fn commit(&self) -> Result<(), HostError> {
        files::rename_durably(&self.part, &self.complete)
            .map_err(HostError::file("commit", &self.complete))
    }

    /// Withdraws everything: the VM runs, or is given up. When this returns
    /// without error, nothing on disk can be restored any more.
    pub fn withdraw(&self) -> Result<(), HostError> {
        let mut partial = self.part.clone();
        partial.set_extension("partial");
        let files = [
            &self.complete,
            &self.restoring,
            &self.part,
            &partial,
            &self.info,
        ];
        for path in files {
            files::remove_durably(path).map_err(HostError::file("remove", path))?;
        }
        Ok(())
    }

    /// [`SavedPaths::withdraw`], and the directory that the VM's VMM wrote to:
    /// the VM is given up.
    pub fn remove(&self) -> Result<(), HostError> {
        self.withdraw()?;
        let dir = self.part.parent().unwrap_or(&self.part);
        match fs::remove_dir_all(dir) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(HostError::file("remove", dir)(e)),
            _ => Ok(()),
        }
    }

    /// Which file there is.
    pub fn fact(&self) -> Option<SavedFact> {
        if self.restoring.exists() {
            Some(SavedFact::Restoring)
        } else if self.complete.exists() {
            Some(SavedFact::Complete)
        } else {
            None
        }
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

/// VMs that a cold reboot shuts down (`pending.json`).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pending {
    /// What boots each.
    pub vms: Vec<VmConfig>,
}

fn pending_path(layout: &Layout) -> PathBuf {
    layout.state.join("pending.json")
}

impl Pending {
    /// The list; empty when there is none.
    pub fn read(layout: &Layout) -> Result<Self, HostError> {
        let path = pending_path(layout);
        let read: io::Result<Option<Self>> = files::read_json(&path);
        Ok(read
            .map_err(HostError::file("read", &path))?
            .unwrap_or_default())
    }

    /// Writes the list durably; an empty one is no file.
    pub fn write(&self, host: &Host) -> Result<(), HostError> {
        let path = pending_path(&host.layout);
        let written = if self.vms.is_empty() {
            files::remove_durably(&path)
        } else {
            files::write_json(&path, self)
        };
        written.map_err(HostError::file("write", &path))
    }

    /// The names on it.
    pub fn names(&self) -> BTreeSet<VmName> {
        self.vms.iter().map(|c| c.name.clone()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
        };
        paths.prepare(&info).expect("prepare");
        fs::write(&paths.part, b"state").expect("the VMM writes");
        assert!(all(&layout).is_empty());
        paths.commit().expect("commit");
        assert_eq!(all(&layout).get(&name), Some(&SavedFact::Complete));
        assert_eq!(paths.read_info(), Some(info));
        files::rename_durably(&paths.complete, &paths.restoring).expect("restore begins");
        assert_eq!(all(&layout).get(&name), Some(&SavedFact::Restoring));
        let partial = SavedPaths::writable(&layout, &name).join("part.partial");
        fs::write(&partial, b"half").expect("a VMM was killed");
        paths.withdraw().expect("it runs");
        assert!(all(&layout).is_empty());
        assert!(!partial.exists());
        paths.remove().expect("dropped");
        assert!(!SavedPaths::writable(&layout, &name).exists());
        paths.remove().expect("already gone");
    }
}
