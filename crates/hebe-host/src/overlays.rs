//! Disks that keep nothing: `snapshot = true`.
//!
//! Over each such disk the host puts an empty image when the VM boots
//! (`overlays/NAME.ID.N.qcow2` in the state directory), and the VMM gets that
//! in the disk's place, with the disk behind it. It belongs to one life of the
//! VM, by its id: it is there as long as that life may go on, suspended, saved
//! or over a reboot of the host, and goes with it. The VM's state knows both
//! files as it knows every disk, so that old memory meets no other ones.
//!
//! An image is removed only where it is certain that its life is over: after
//! the next boot succeeded, not before, because a boot that fails leaves what
//! was frozen or saved as it was; when the memory of a life that is nowhere else
//! is given up; and once nothing knows a VM of that name any more, and every store
//! is here in which it may be frozen all the same (`stores_known`).

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder};
use std::os::unix::fs::DirBuilderExt;
use std::path::PathBuf;

use hebe_block::{BlockError, make_overlay};
use hebe_sys::proc::parse_uuid;
use hebe_types::{VmConfig, VmId, VmName};

use crate::definitions;
use crate::host::{Host, HostError, Layout};
use crate::launch::{ExitRecord, Instance};
use crate::listing::with_cause;
use crate::lock::VmLock;
use crate::notes;
use crate::pending::Pending;
use crate::saved::{self, LifeFile, SavedPaths};
use crate::segments;
use crate::stores::SegmentView;
use crate::stores_known;

fn folder(layout: &Layout) -> PathBuf {
    layout.state.join("overlays")
}

fn path(layout: &Layout, name: &VmName, vm: VmId, index: usize) -> PathBuf {
    folder(layout).join(format!("{name}.{vm}.{index}.qcow2"))
}

/// The definition as the life `vm` has it: with a new image over each disk that
/// is to stay as it is.
///
/// # Errors
/// A disk that cannot be used, or an image that cannot be made: what was made
/// is gone again.
pub(crate) fn begin(layout: &Layout, config: &VmConfig, vm: VmId) -> Result<VmConfig, HostError> {
    let mut config = config.clone();
    let name = config.name.clone();
    for (index, disk) in config.disks.iter_mut().enumerate() {
        if !disk.snapshot {
            continue;
        }
        make_folder(layout)?;
        *disk = make_overlay(&path(layout, &name, vm, index), disk).map_err(|error| {
            end(layout, &name, vm);
            refused(&name, &error)
        })?;
    }
    Ok(config)
}

/// Nobody else may list what is there; but a VMM, which has a user of its own by
/// then, looks whether its disk would be found again.
fn make_folder(layout: &Layout) -> Result<(), HostError> {
    let folder = folder(layout);
    let mut builder = DirBuilder::new();
    fs::create_dir_all(&layout.state)
        .and_then(|()| builder.recursive(true).mode(0o711).create(&folder))
        .map_err(HostError::file("create", &folder))
}

fn refused(name: &VmName, error: &BlockError) -> HostError {
    HostError::Refused {
        name: name.clone(),
        why: with_cause(error),
    }
}

/// Removes the images of one life, which is over or never began.
pub(crate) fn end(layout: &Layout, name: &VmName, vm: VmId) {
    let vm = vm.to_string();
    remove(layout, |of, id| of == name.as_str() && id == vm);
}

/// Removes the images of all lives of a VM but one.
pub(crate) fn forget(layout: &Layout, name: &VmName, but: Option<VmId>) {
    let but = but.map(|vm| vm.to_string());
    remove(layout, |of, id| {
        of == name.as_str() && but.as_deref() != Some(id)
    });
}

/// The memory of a life was given up, by order and under the VM's lock: its images
/// go along, and the record of what it was booted with, unless it may be continued
/// from elsewhere.
pub(crate) fn freed(host: &Host, name: &VmName, vm: VmId) {
    let layout = &host.layout;
    let noted = notes::all(layout).iter().any(|n| n.vm == vm && !n.given_up);
    let also = |s: &SegmentView| s.vm.is_none() || s.vm == Some(vm);
    if !noted && !SavedPaths::new(layout, name).is_any() && !is_in_store(host, also) {
        end(layout, name, vm);
        LifeFile::new(layout, name, vm).remove();
    }
}

/// Whether such a segment is in the store; also where that cannot be told.
fn is_in_store(host: &Host, which: impl Fn(&SegmentView) -> bool) -> bool {
    let view = host.store.view();
    view.map_or(true, |view| {
        view.iter().flat_map(|v| &v.segments).any(which)
    })
}

/// Whether a VM of this name may be continued or booted; also where that cannot be
/// told. Certain for one who has its lock, without which nothing of that changes.
fn is_known(host: &Host, name: &VmName) -> bool {
    let layout = &host.layout;
    let also = |s: &SegmentView| s.vm.is_none() || s.name.as_ref().is_none_or(|of| of == name);
    definitions::find(layout, name).is_some()
        || SavedPaths::new(layout, name).is_any()
        || Pending::read(layout).map_or(true, |pending| pending.has(name))
        || notes::all(layout)
            .iter()
            .any(|n| n.name == *name && !n.given_up)
        || is_in_store(host, also)
        || is_store_away(host)
}

/// Whether a store is not here in which a VM may be frozen that nothing tells of.
fn is_store_away(host: &Host) -> bool {
    let view = host.store.view();
    view.map_or(true, |view| {
        stores_known::is_any_away(&host.layout, view.as_ref())
    })
}

/// Removes what is left of a VM that nothing knows any more: its definition was
/// deleted, and no life of it runs, is frozen, saved, noted or to be booted.
fn forget_unknown(host: &Host, name: &VmName, lives: &[VmId]) {
    let dir = host.layout.vm_dir(name);
    // Whoever is known is not locked for that, not even for an instant.
    if dir.exists() || is_known(host, name) {
        return;
    }
    // One that runs knows nobody any more where the runtime directory was emptied.
    if lives.iter().any(|vm| segments::vmm_of(*vm).is_some()) {
        return;
    }
    let Ok(Some(lock)) = VmLock::take(&dir) else {
        return;
    };
    // One that came and went between the two has more in it than its lock.
    let others = fs::read_dir(&dir).into_iter().flatten().count() > 1;
    if others {
        return;
    }
    if !is_known(host, name) {
        forget(&host.layout, name, None);
        saved::forget_lives(&host.layout, name, None);
    }
    let _ = lock.remove_dir();
}

/// Removes the images of VMs whose guests powered themselves off, or were
/// ended by order: nothing of them can be continued, though nobody has freed
/// what else they hold yet. No lock is needed for that: such a life does not
/// come back, and the next one has another id. And what is left of VMs that nothing
/// knows.
pub fn sweep(host: &Host) {
    let layout = &host.layout;
    let mut lives: BTreeMap<VmName, Vec<VmId>> = BTreeMap::new();
    let images = all(layout).into_iter();
    let images = images.filter_map(|(name, id)| Some((name, VmId(parse_uuid(&id)?))));
    for (name, vm) in images.chain(LifeFile::known(layout)) {
        lives.entry(name).or_default().push(vm);
    }
    for (name, lives) in &lives {
        forget_unknown(host, name, lives);
    }
    for (name, id) in all(layout) {
        let dir = layout.vm_dir(&name);
        let over = || {
            let vm = Instance::read(&dir).map(|instance| instance.vm);
            let vm = vm.filter(|vm| vm.to_string() == id)?;
            ExitRecord::read(&dir)?.is_clean_end().then_some(vm)
        };
        if !VmLock::is_held(&dir)
            && let Some(vm) = over()
        {
            end(layout, &name, vm);
        }
    }
}

/// Whether something was written over a disk of the VM's that a reboot which
/// boots it again throws away.
pub(crate) fn has_any(layout: &Layout, name: &VmName) -> bool {
    all(layout).iter().any(|(of, _)| of == name)
}

/// Names and ids of all images.
fn all(layout: &Layout) -> Vec<(VmName, String)> {
    let entries = fs::read_dir(folder(layout)).into_iter().flatten().flatten();
    let parts = entries.filter_map(|entry| {
        let file = entry.file_name();
        let mut parts = file.to_str()?.split('.');
        Some((parts.next()?.parse().ok()?, parts.next()?.to_owned()))
    });
    parts.collect()
}

/// What stays, stays without harm, and takes room: no other life has its id.
fn remove(layout: &Layout, which: impl Fn(&str, &str) -> bool) {
    let entries = fs::read_dir(folder(layout)).into_iter().flatten().flatten();
    for entry in entries {
        let file = entry.file_name();
        let mut parts = file.to_str().unwrap_or_default().split('.');
        if let (Some(name), Some(id)) = (parts.next(), parts.next())
            && which(name, id)
        {
            let _ = fs::remove_file(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use hebe_block::BlockBackend;

    use super::*;

    fn config(disk: &Path, more: &str) -> VmConfig {
        let text = format!(
            "name = 'web'\nmemory = '8MiB'\nkernel = '/k'\n[[disk]]\npath = '{}'\n{more}",
            disk.display()
        );
        toml::from_str(&text).expect("definition")
    }

    fn left(layout: &Layout) -> usize {
        fs::read_dir(folder(layout)).map_or(0, Iterator::count)
    }

    #[test]
    fn what_is_written_over_a_disk_goes_with_the_life_and_the_disk_stays() {
        let root = tempfile::tempdir().expect("dir");
        let layout = Layout::below(root.path());
        let disk = root.path().join("disk.img");
        fs::write(&disk, vec![7; 3 << 20]).expect("disk");
        let plain = config(&disk, "");
        let (first, second) = (VmId([1; 16]), VmId([2; 16]));
        assert_eq!(begin(&layout, &plain, first).expect("as it is"), plain);
        assert_eq!(left(&layout), 0);
        let wanted = config(&disk, "snapshot = true");
        let over = begin(&layout, &wanted, first).expect("made");
        assert_eq!(over.validate(), Ok(()));
        assert_eq!(over.disks[0].backing, std::slice::from_ref(&disk));
        let mode = fs::metadata(folder(&layout)).expect("folder").permissions();
        assert_eq!(
            std::os::unix::fs::PermissionsExt::mode(&mode) & 0o777,
            0o711
        );
        let backend = BlockBackend::of(&over.disks[0]).expect("open");
        backend.write_at(&[9; 4096], 1 << 20).expect("write");
        backend.settle().expect("settle");
        drop(backend);
        let next = begin(&layout, &wanted, second).expect("made");
        assert!(has_any(&layout, &over.name));
        let other: VmName = "web-2".parse().expect("name");
        forget(&layout, &other, None);
        assert_eq!(left(&layout), 2);
        forget(&layout, &over.name, Some(second));
        assert!(!over.disks[0].path.exists() && next.disks[0].path.exists());
        end(&layout, &over.name, second);
        assert_eq!(left(&layout), 0);
        assert!(!has_any(&layout, &over.name));
        assert!(fs::read(&disk).expect("disk").iter().all(|b| *b == 7));
    }

    #[test]
    fn a_disk_that_another_vm_writes_to_or_that_is_not_there_is_refused_and_nothing_is_left() {
        let root = tempfile::tempdir().expect("dir");
        let layout = Layout::below(root.path());
        let (good, bad) = (root.path().join("good.img"), root.path().join("bad.img"));
        fs::write(&good, vec![7; 1 << 20]).expect("disk");
        let more = format!(
            "snapshot = true\n[[disk]]\npath = '{}'\nsnapshot = true",
            bad.display()
        );
        let config = config(&good, &more);
        let vm = VmId([1; 16]);
        let refused = || {
            let refused = begin(&layout, &config, vm).expect_err("refused");
            assert_eq!(left(&layout), 0, "{refused}");
            refused.to_string()
        };
        assert!(refused().contains("bad.img"));
        fs::write(&bad, vec![7; 1 << 20]).expect("disk");
        let writer = BlockBackend::open(&bad, false).expect("open");
        assert!(refused().contains("in use"));
        drop(writer);
        begin(&layout, &config, vm).expect("made");
        assert_eq!(left(&layout), 2);
    }
}
