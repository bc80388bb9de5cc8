//! Disks of VMs at rest that may be continued.
//!
//! A VM that runs has its disks locked. One that is frozen or saved has no
//! process that could, and its memory holds what its disks held: if another VM
//! wrote to one of them, it could never be continued, or, where nothing shows
//! that (a block device), would destroy what is there. So a VM that would is not
//! booted before somebody decided about the one that is at rest. That is looked
//! after twice: before anything is made, and when its disks are locked
//! (`crate::gate`).

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use hebe_types::{VmConfig, VmId, VmName};

use crate::definitions;
use crate::host::{Host, HostError};
use crate::notes;
use crate::saved::{self, LifeFile, SavedPaths};
use crate::stores::ExecView;

/// A VM that may be continued, and what it was booted with.
struct AtRest {
    name: VmName,
    /// How it is kept.
    how: &'static str,
    config: VmConfig,
}

/// Refuses a boot that would write to the disk of another VM, which is at rest.
///
/// # Errors
/// [`HostError::Refused`], with the ways out.
pub(crate) fn refuse_taken(host: &Host, config: &VmConfig) -> Result<(), HostError> {
    let name = config.name.clone();
    taken(host, config).map_or(Ok(()), |why| Err(HostError::Refused { name, why }))
}

/// Which disk that a VM is to boot with and would write to is another VM's, which
/// is at rest; in words, with the ways out.
pub(crate) fn taken(host: &Host, config: &VmConfig) -> Option<String> {
    let written = config.disks.iter().filter(|d| !d.readonly && !d.snapshot);
    let written: Vec<(&PathBuf, Inode)> = written
        .filter_map(|disk| Some((&disk.path, Inode::of(&disk.path)?)))
        .collect();
    if written.is_empty() {
        return None;
    }
    let others = at_rest(host);
    let mut others = others.iter().filter(|other| other.name != config.name);
    others.find_map(|other| {
        let claimed = other.claimed();
        let (path, _) = written.iter().find(|(_, inode)| claimed.contains(inode))?;
        let AtRest { name, how, .. } = other;
        Some(format!(
            "its disk {} is VM '{name}''s, too, which is {how} and could not be continued once another VM wrote to it: `hebe resume {name}` and shut it down, or give it up with `hebe drop {name} --yes`",
            path.display()
        ))
    })
}

/// Which VM at rest has a disk at `path`, or behind one; and how it is kept.
pub fn of_vm_at_rest(host: &Host, path: &Path) -> Option<(VmName, &'static str)> {
    let inode = Inode::of(path)?;
    let claims = |other: &AtRest| other.claimed().contains(&inode);
    let found = at_rest(host).into_iter().find(claims)?;
    Some((found.name, found.how))
}

impl AtRest {
    /// Its disks, and what lies behind them.
    fn claimed(&self) -> Vec<Inode> {
        let files = self.config.disks.iter().flat_map(|disk| {
            let behind = disk.backing.iter();
            std::iter::once(&disk.path).chain(behind)
        });
        files.filter_map(|path| Inode::of(path)).collect()
    }
}

/// Every VM that may be continued, where it is known what it was booted with.
fn at_rest(host: &Host) -> Vec<AtRest> {
    let layout = &host.layout;
    let view = host.store.view().ok().flatten();
    let segments = view.iter().flat_map(|view| &view.segments);
    let frozen = segments.filter_map(|segment| {
        let is_frozen = matches!(segment.exec, ExecView::Frozen { .. });
        // Where that cannot be told it may be continued.
        let given_up = || notes::is_given_up(layout, segment).unwrap_or(false);
        let (name, vm) = (segment.name.clone()?, segment.vm?);
        (is_frozen && !given_up()).then_some((name, vm, "frozen in memory"))
    });
    let notes = notes::all(layout);
    let away = notes::elsewhere(&notes, view.as_ref());
    let away = away.map(|note| (note.name.clone(), note.vm, "frozen in a store that is away"));
    let files = saved::all(layout).into_keys();
    let files = files.filter_map(|name| {
        let vm = SavedPaths::new(layout, &name).read_info()?.vm;
        Some((name, vm, "saved in a file"))
    });
    let kept: Vec<(VmName, VmId, &str)> = frozen.chain(away).chain(files).collect();
    let known = kept.into_iter().filter_map(|(name, vm, how)| {
        let path = LifeFile::new(layout, &name, vm).existing()?;
        let config = definitions::read_toml(&path).ok()?;
        Some(AtRest { name, how, config })
    });
    known.collect()
}

/// What tells a file or a block device from every other one on this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Inode {
    File { dev: u64, inode: u64 },
    Device { rdev: u64 },
}

impl Inode {
    fn of(path: &Path) -> Option<Self> {
        let found = fs::metadata(path).ok()?;
        Some(match found.file_type().is_block_device() {
            true => Self::Device { rdev: found.rdev() },
            false => Self::File {
                dev: found.dev(),
                inode: found.ino(),
            },
        })
    }
}
