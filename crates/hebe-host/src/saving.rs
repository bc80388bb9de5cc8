//! Writing a VM to its file, and restoring it from there.
//!
//! A restore may be killed between any two of its steps. What tells afterwards
//! whether the VM ran is the segment, as long as it is there; so the file's
//! name says that it counts before the segment goes that proves it:
//!
//! | killed after | segment | file | then |
//! |---|---|---|---|
//! | nothing; the old segment dropped | old; none | complete | restored |
//! | the new segment made | empty | complete | restored |
//! | the file set aside; RAM loaded, wholly or not | empty | being restored | restored: it never ran |
//! | the VM marked as running | running | being restored | it runs; without its VMM it is lost, because its disks went on |
//! | the file removed | running | none | it runs |
//! | a restore that failed: the file put back; the segment dropped | empty; none | complete | restored |
//!
//! In a memfd nothing proves anything once its VMM is gone: a person chooses.
//! So it is with a VM of the store that is restored where the kernel has none:
//! a segment of it that a later kernel finds is the one that it was saved from,
//! which holds no state, and tells nothing about the restore. That the restore
//! went elsewhere is noted before the file is set aside (`saved`).

use hebe_api::SaveReport;
use hebe_api::VmStatus;
use hebe_snapshot::SavedFile;
use hebe_types::{ByteSize, StoreKind, VmConfig, VmName};

use crate::cmdline;
use crate::definitions;
use crate::failed;
use crate::host::{Host, HostError};
use crate::launch::{Instance, LAUNCH_WAIT, Launch, LaunchError, Memory, Origin, launch};
use crate::luo;
use crate::notes;
use crate::ops::{lock, never_ran, withdraw_stale};
use crate::saved::{SavedInfo, SavedPaths};
use crate::segments::free_segment;
use crate::stores::{ExecView, SegmentView, StoreTrouble};
use crate::vmm;

/// Restores a VM from its saved file, into a fresh segment or memfd. Where it
/// may be frozen in a store that is not here, only if that is `meant` to be
/// given up.
pub fn restore(host: &Host, name: &VmName, meant: bool) -> Result<VmStatus, HostError> {
    restore_with(host, name, meant, false)
}

/// [`restore`]; whether with disks that changed since the file was saved is up
/// to the operator.
pub(crate) fn restore_with(
    host: &Host,
    name: &VmName,
    meant: bool,
    accept_changed_disk: bool,
) -> Result<VmStatus, HostError> {
    let lock = lock(host, name)?;
    let paths = SavedPaths::new(&host.layout, name);
    let info = read_info(name, &paths)?;
    let view = host.store.view().ok().flatten();
    let way = format!("`hebe resume {name} --from file`");
    let marked = notes::give_up_elsewhere(host, name, view.as_ref(), meant, &way)?;
    let prepared = prepare_restore(host, name, &info, &paths);
    let mut order = prepared.inspect_err(|_| notes::take_back(host, &marked))?;
    order.accept_changed_disk = accept_changed_disk;
    match launch(host, &lock, &order, LAUNCH_WAIT * 10) {
        Ok(status) => {
            failed::forget(&host.layout, name);
            paths.withdraw()?;
            Ok(status)
        }
        // The VMM lives: file and segment are its own.
        Err(error @ LaunchError::Unanswered { .. }) => Err(error.into()),
        Err(error) => {
            let error = HostError::from(error);
            // Where it cannot be undone, the restore is listed as interrupted;
            // why it failed is what there is to say.
            let undone = undo_restore(host, name, &paths, &order.memory, &error);
            if undone.is_ok_and(|never_ran| never_ran) {
                notes::take_back(host, &marked);
            }
            Err(error)
        }
    }
}

fn read_info(name: &VmName, paths: &SavedPaths) -> Result<SavedInfo, HostError> {
    paths.read_info().ok_or_else(|| HostError::Refused {
        name: name.clone(),
        why: format!(
            "{} is missing or damaged, so its saved file cannot be used: put it back, or give the file up with `hebe drop --yes`",
            paths.info.display()
        ),
    })
}

/// Reads all of the saved file, before memory that it is to replace is given
/// up: that memory may be the only good state.
pub(crate) fn check_file(host: &Host, name: &VmName) -> Result<(), HostError> {
    let paths = SavedPaths::new(&host.layout, name);
    read_info(name, &paths)?;
    SavedFile::open(paths.to_restore())?.verify()?;
    Ok(())
}

/// Makes the memory; from then on the file is no saved VM any more, see `saved`.
fn prepare_restore(
    host: &Host,
    name: &VmName,
    info: &SavedInfo,
    paths: &SavedPaths,
) -> Result<Launch, HostError> {
    let memory = memory_for_restore(host, name, info)?;
    let in_segment = matches!(memory, Memory::Segment { .. });
    paths.note_place(info, in_segment)?;
    paths.set_aside()?;
    Ok(Launch {
        name: name.clone(),
        vm: info.vm,
        size: info.memory,
        memory,
        origin: Origin::File(paths.restoring.clone()),
        accept_changed_disk: false,
        is_expected: false,
    })
}

fn memory_for_restore(host: &Host, name: &VmName, info: &SavedInfo) -> Result<Memory, HostError> {
    let view = match host.store.view() {
        // A VM that needs no store is restored without it.
        Err(_) if !info.in_store => None,
        other => other?,
    };
    if let Some(old) = view.as_ref().and_then(|v| v.segment_of(name)) {
        give_up_former(host, name, old)?;
    }
    if info.in_files && host.system.live_update().is_ok() {
        return luo::memory(name, info.vm, info.memory);
    }
    if !info.in_store {
        return Ok(Memory::Memfd);
    }
    if view.is_none_or(|view| view.kept_only) {
        return memory_apart(host, name, info);
    }
    let new = host.store.create(info.vm, name, info.memory)?;
    Ok(Memory::Segment {
        id: new.id,
        spec: new.spec,
    })
}

/// Memory for a VM that was in the store, under a kernel that has none: what it
/// would be booted in, where its definition leaves the choice. Its segment there
/// is no state any more, and what it holds is never continued.
///
/// # Errors
/// [`StoreTrouble::None`] where it is to be in the store and nowhere else, and
/// where this kernel reserves memory, whose device may still be on its way.
fn memory_apart(host: &Host, name: &VmName, info: &SavedInfo) -> Result<Memory, HostError> {
    let reserved = !cmdline::reservations(&host.system.cmdline()).is_empty();
    let defined = definitions::load(&host.layout, name).ok();
    let may = |(_, config): &(_, VmConfig)| config.store != StoreKind::Devdax;
    let (_, config) = (defined.filter(may).filter(|_| !reserved)).ok_or(StoreTrouble::None)?;
    let carried = config.store == StoreKind::Luo && host.system.live_update().is_ok();
    if carried || luo::may_be_chosen(host, &config) {
        return luo::memory(name, info.vm, info.memory);
    }
    Ok(Memory::Memfd)
}

/// Gives up the memory that the file replaces, wherever it lies: a state that is
/// left there would be continued once the VM that ran from the file is down.
fn give_up_former(host: &Host, name: &VmName, old: &SegmentView) -> Result<(), HostError> {
    let paths = SavedPaths::new(&host.layout, name);
    let own = paths.fact().is_some_and(|f| f.is_restoring_into(old.vm));
    let ran = matches!(old.exec, ExecView::Running { .. } | ExecView::Ended);
    if ran && own {
        return Err(HostError::Refused {
            name: name.clone(),
            why: format!(
                "it ran after its restore began, so its file is older than its disks: `hebe start {name}` boots it, `hebe drop {name} --yes` gives it up"
            ),
        });
    }
    if old.exec == ExecView::Empty && own {
        // It proves that nothing ran since the file was set aside.
        paths.put_back()?;
    }
    let precious = match &old.exec {
        ExecView::Frozen { .. } => !notes::is_given_up(&host.layout, old).unwrap_or(false),
        exec => matches!(exec, ExecView::Damaged { .. }),
    };
    if precious {
        // The file is to replace a state that may be the only good one.
        SavedFile::open(paths.to_restore())?.verify()?;
    }
    // What ran before the save: the file holds all of it.
    free_segment(host, old)
}

/// After a failed restore the file counts again, if the segment shows that the
/// VM never ran. A memfd shows nothing once its VMM is gone, except that the
/// VMM itself says it failed before it ran, or that there was none. Gives
/// whether it never ran.
fn undo_restore(
    host: &Host,
    name: &VmName,
    paths: &SavedPaths,
    memory: &Memory,
    error: &HostError,
) -> Result<bool, HostError> {
    let never_ran = match memory {
        Memory::Segment { .. } => {
            let view = host.store.view()?;
            let segment = view.as_ref().and_then(|v| v.segment_of(name));
            match segment {
                Some(fresh) if fresh.exec == ExecView::Empty => {
                    // Before its proof goes.
                    paths.put_back()?;
                    free_segment(host, fresh)?;
                    true
                }
                _ => false,
            }
        }
        Memory::Files { .. } | Memory::Memfd => never_ran(host, name, error),
    };
    if never_ran {
        paths.put_back()?;
    }
    Ok(never_ran)
}

/// Writes a VM to its saved file; the VMM lives on with the VM stopped.
pub fn save_held(
    host: &Host,
    name: &VmName,
    memory: Option<ByteSize>,
) -> Result<SaveReport, HostError> {
    let paths = SavedPaths::new(&host.layout, name);
    let instance = Instance::read(&host.layout.vm_dir(name));
    let socket = host.layout.socket(name);
    let ask = |source| HostError::Vmm {
        name: name.clone(),
        source,
    };
    let status = vmm::status_of(host, name, vmm::STATUS_WAIT).map_err(ask)?;
    let size = instance.as_ref().map(|i| i.memory).or(memory);
    let info = SavedInfo {
        vm: status.id,
        memory: size.ok_or_else(|| HostError::Refused {
            name: name.clone(),
            why: "the size of its RAM is not known: its runtime directory was emptied".into(),
        })?,
        in_store: instance.as_ref().is_some_and(|i| i.segment.is_some()),
        in_files: instance.is_some_and(|i| i.files),
        apart: false,
    };
    // One of a restore after which the VM ran would count instead of the new one.
    withdraw_stale(host, name)?;
    let part = paths.prepare(&info)?;
    let report = vmm::save(&socket, &part, &paths.complete, vmm::SAVE_WAIT);
    let report = match report {
        Ok(report) => report,
        Err(source) => {
            let _ = paths.withdraw();
            return Err(ask(source));
        }
    };
    paths.commit()?;
    Ok(report)
}
