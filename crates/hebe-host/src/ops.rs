//! What may be ordered of one VM.
//!
//! Every order takes the VM's lock or talks to the VMM that holds it, and is
//! admitted by [`hebe_flow::life`] first. Orders that people give share the
//! host's lock meanwhile, so that none happens in the midst of a reboot; their
//! parts that a reboot uses too do not.

use std::io;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use hebe_api::{ClientError, FreezeReport, Request, VmStatus, VmmState};
use hebe_flow::life::{Life, Order};
use hebe_types::{StoreKind, VmConfig, VmId, VmName};

use crate::claims;
use crate::definitions;
use crate::failed;
use crate::host::{Host, HostError};
use crate::launch::{ExitRecord, LAUNCH_WAIT, Launch, LaunchError, Memory, Origin, launch};
use crate::listing::{self, Survey, VmRow, VmState};
use crate::lock::VmLock;
use crate::luo;
use crate::network;
use crate::notes;
use crate::overlays;
use crate::pending;
use crate::process::VmmProcess;
use crate::saved::{self, SavedPaths};
use crate::segments::{free_segment, refuse_in_use};
use crate::stores::{ExecView, SegmentView, StoreTrouble};
use crate::stores_known;
use crate::vmm;

pub use crate::resuming::{ResumeFrom, ResumeOptions, continue_frozen, resume};

/// How long a VMM may take to end after it was told to.
pub(crate) const END_WAIT: Duration = Duration::from_secs(30);

/// Refuses an order that does not fit the VM's state.
pub fn admit(row: &VmRow, order: Order) -> Result<(), HostError> {
    match row.life.order(order) {
        Ok(_) => Ok(()),
        Err(refused) => {
            // Of a VM that does not answer only what is known of it helps.
            let known = row.detail.as_ref();
            let known = known.filter(|_| row.state == VmState::Unresponsive);
            let refused = known
                .cloned()
                .unwrap_or_else(|| refused.sentence(&row.name));
            Err(HostError::Refused {
                name: row.name.clone(),
                why: format!("{} ({refused})", row.state.as_str()),
            })
        }
    }
}

/// Takes the VM's lock, or says that it is held.
pub fn lock(host: &Host, name: &VmName) -> Result<VmLock, HostError> {
    let dir = host.layout.vm_dir(name);
    VmLock::take(&dir)
        .map_err(HostError::file("lock", &dir))?
        .ok_or_else(|| HostError::Busy(name.clone()))
}

/// Boots a VM from its definition.
pub fn start(host: &Host, name: &VmName) -> Result<VmStatus, HostError> {
    start_as(host, name, Order::Start)
}

/// [`start`], also where the VM's memory may still be frozen in a store that is
/// not here: that memory is given up, and never continued afterwards.
pub fn start_afresh(host: &Host, name: &VmName) -> Result<VmStatus, HostError> {
    start_as(host, name, Order::StartAfresh)
}

fn start_as(host: &Host, name: &VmName, order: Order) -> Result<VmStatus, HostError> {
    let _not_all = host.lock_orders()?;
    let (path, config) = definitions::load(&host.layout, name)?;
    let survey = listing::survey(host);
    admit(survey.row(host, name)?, order)?;
    definitions::check_files(&config, &path)?;
    let status = boot_as(host, &config, order == Order::StartAfresh, None)?;
    // It is up; if this cannot be written, the next boot finds that out too.
    let _ = pending::settle(host, name);
    overlays::sweep(host);
    Ok(status)
}

/// Boots a VM from a definition that lies anywhere, and keeps that definition.
pub fn run(host: &Host, config: &VmConfig) -> Result<VmStatus, HostError> {
    run_with(host, config, None)
}

/// [`run`], with the bytes of the disk for the guest's cloud-init, which
/// `config` has at [`definitions::seed_path`]. They and the definition are
/// written under the VM's lock, once it is certain that no VM of that name uses
/// that disk or may be continued with it.
pub fn run_with(
    host: &Host,
    config: &VmConfig,
    seed: Option<&[u8]>,
) -> Result<VmStatus, HostError> {
    let _not_all = host.lock_orders()?;
    let name = &config.name;
    config.validate().map_err(|e| HostError::Refused {
        name: name.clone(),
        why: e.to_string(),
    })?;
    let survey = listing::survey(host);
    if let Some(row) = survey.rows.get(name) {
        admit(row, Order::Start)?;
    }
    // A later boot of this VM, after a cold reboot, takes the operator's own
    // definition where there is one; so it must not say something else.
    let own = definitions::expected_path(&host.layout, name);
    if own.exists() && !definitions::read_own(&own).is_ok_and(|defined| defined == *config) {
        return Err(HostError::Refused {
            name: name.clone(),
            why: format!(
                "{} defines a VM of that name otherwise: `hebe start {name}` boots that one, and another needs another name",
                own.display()
            ),
        });
    }
    let started = boot_as(host, config, false, Some(Given { seed }));
    if started.is_ok() {
        let _ = pending::settle(host, name);
        overlays::sweep(host);
    }
    started
}

/// Boots a VM: lock, segment, VMM. On failure nothing of it is left. A segment
/// of the VM's former life goes first; one with a committed state is never
/// taken for that, and neither is a VM that is frozen in a store that is not
/// here.
pub fn boot(host: &Host, config: &VmConfig) -> Result<VmStatus, HostError> {
    boot_as(host, config, false, None)
}

/// What [`run_with`] was given, to be kept.
struct Given<'a> {
    seed: Option<&'a [u8]>,
}

impl Given<'_> {
    /// Whoever came first may have booted, frozen or saved the VM since the look
    /// at it: its definition and its disk are not ours to replace.
    fn boot(self, host: &Host, lock: &VmLock, config: &VmConfig) -> Result<VmStatus, HostError> {
        let name = &config.name;
        clear_files(host, name)?;
        let view = host.store.view().ok().flatten();
        if let Some(old) = view.as_ref().and_then(|v| v.segment_of(name)) {
            refuse_state(host, old, name)?;
        }
        let known = definitions::find(&host.layout, name).is_some();
        let kept = self.keep(host, config);
        let booted = kept.and_then(|()| boot_locked(host, lock, config));
        if booted.is_err() && !known {
            definitions::forget_transient(&host.layout, name);
        }
        booted
    }

    fn keep(self, host: &Host, config: &VmConfig) -> Result<(), HostError> {
        if let Some(bytes) = self.seed {
            definitions::keep_seed(host, &config.name, bytes)?;
        }
        // Its definition is no file yet that anybody could look at.
        let whose = PathBuf::from(format!("VM '{}'", config.name));
        definitions::check_files(config, &whose)?;
        definitions::keep_transient(host, config).map(drop)
    }
}

fn boot_as(
    host: &Host,
    config: &VmConfig,
    afresh: bool,
    given: Option<Given>,
) -> Result<VmStatus, HostError> {
    let name = &config.name;
    let lock = lock(host, name)?;
    let view = host.store.view().ok().flatten();
    let way = notes::afresh(name);
    // Durable before the VM boots: from then on its disks go on.
    let marked = claims::refuse_taken(host, config)
        .and_then(|()| notes::give_up_elsewhere(host, name, view.as_ref(), afresh, &way));
    let result = marked.and_then(|marked| {
        let booted = match given {
            Some(given) => given.boot(host, &lock, config),
            None => boot_locked(host, &lock, config),
        };
        booted.inspect_err(|error| {
            if never_ran(host, name, error) {
                notes::take_back(host, &marked);
            }
        })
    });
    if result.is_err() {
        let _ = lock.remove_dir();
    }
    result
}

/// Whether a boot or a restore failed before the guest can have touched its
/// disks. Only of a VMM's start: what fails afterwards tells nothing.
pub(crate) fn never_ran(host: &Host, name: &VmName, error: &HostError) -> bool {
    match error {
        HostError::Launch(LaunchError::Ended { .. }) => {
            let record = ExitRecord::read(&host.layout.vm_dir(name));
            record.is_some_and(|record| record.ran == Some(false))
        }
        HostError::Launch(LaunchError::Silent { .. } | LaunchError::Unanswered { .. }) => false,
        // No VMM was started, or none that was let run its guest.
        _ => true,
    }
}

fn boot_locked(host: &Host, lock: &VmLock, config: &VmConfig) -> Result<VmStatus, HostError> {
    let name = &config.name;
    let vm = fresh_id()?;
    clear_files(host, name)?;
    let config = network::resolved(host, config, vm)?;
    let known = stores_known::know(host, host.store.view().ok().flatten().as_ref());
    // What is written over its disks may one day have nothing else to tell of it.
    if config.disks.iter().any(|disk| disk.snapshot) {
        known?;
    }
    let config = overlays::begin(&host.layout, &config, vm)?;
    let booted = boot_new(host, lock, &config, vm);
    match &booted {
        // Not before: a boot that fails leaves what was frozen as it was.
        Ok(_) => {
            overlays::forget(&host.layout, name, Some(vm));
            saved::forget_lives(&host.layout, name, Some(vm));
            failed::forget(&host.layout, name);
        }
        Err(error) => {
            overlays::end(&host.layout, name, vm);
            if never_ran(host, name, error) {
                saved::forget_life(&host.layout, name, vm);
            }
        }
    }
    booted
}

fn boot_new(
    host: &Host,
    lock: &VmLock,
    config: &VmConfig,
    vm: VmId,
) -> Result<VmStatus, HostError> {
    let name = &config.name;
    let memory = make_memory(host, config, vm)?;
    let order = Launch {
        name: name.clone(),
        vm,
        size: config.memory,
        memory,
        origin: Origin::Boot(Box::new(config.clone())),
        accept_changed_disk: false,
        is_expected: false,
    };
    launch(host, lock, &order, LAUNCH_WAIT).map_err(|error| {
        if let Memory::Segment { id, .. } = order.memory {
            let _ = host.store.drop_segment(id, Some(vm));
        }
        match error {
            LaunchError::Taken(why) => HostError::Refused {
                name: name.clone(),
                why,
            },
            other => other.into(),
        }
    })
}

/// A VM that boots goes on with its disks, so no file that it was saved to may
/// be left: one of a restore after which the VM ran is stale already and goes.
/// It goes before the segment, which alone proves that it is stale.
fn clear_files(host: &Host, name: &VmName) -> Result<(), HostError> {
    let paths = SavedPaths::new(&host.layout, name);
    let Some(fact) = paths.fact() else {
        return Ok(());
    };
    let view = host.store.view()?;
    let segment = view.as_ref().and_then(|v| v.segment_of(name));
    let ran = segment.is_some_and(|s| matches!(s.exec, ExecView::Running { .. } | ExecView::Ended));
    let own = fact.is_restoring_into(segment.and_then(|s| s.vm));
    if own && ran {
        return paths.withdraw();
    }
    Err(HostError::Refused {
        name: name.clone(),
        why: format!(
            "it is saved in a file: `hebe resume {name}` continues it, `hebe drop {name} --yes` gives it up"
        ),
    })
}

pub(crate) fn fresh_id() -> Result<VmId, HostError> {
    let mut id = [0u8; 16];
    let mut filled = 0;
    while filled < id.len() {
        let flags = rustix::rand::GetRandomFlags::empty();
        match rustix::rand::getrandom(&mut id[filled..], flags) {
            Ok(n) => filled += n,
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => {
                let path = std::path::Path::new("getrandom(2)");
                return Err(HostError::file("draw an id from", path)(io::Error::from(e)));
            }
        }
    }
    Ok(VmId(id))
}

fn make_memory(host: &Host, config: &VmConfig, vm: VmId) -> Result<Memory, HostError> {
    let view = match host.store.view() {
        Ok(view) => view,
        Err(_) if config.store == StoreKind::Memfd => None,
        Err(error) => return Err(error.into()),
    };
    if let Some(old) = view.as_ref().and_then(|v| v.segment_of(&config.name)) {
        free_former(host, old, &config.name)?;
    }
    let device = view.as_ref().filter(|v| !v.kept_only);
    match (config.store, device) {
        (StoreKind::Memfd, _) => return Ok(Memory::Memfd),
        (StoreKind::Luo, _) => return luo::new_memory(host, config, vm),
        (StoreKind::Auto, None) if luo::may_be_chosen(host, config) => {
            return luo::new_memory(host, config, vm);
        }
        (StoreKind::Auto, None) => return Ok(Memory::Memfd),
        (StoreKind::Devdax, None) => return Err(StoreTrouble::None.into()),
        (StoreKind::Devdax | StoreKind::Auto, Some(_)) => {}
    }
    let create = || host.store.create(vm, &config.name, config.memory);
    let new = match create() {
        // VMs whose guests powered themselves off still hold theirs.
        Err(StoreTrouble::Store(hebe_store::StoreError::OutOfSpace { .. }))
            if !reap(host)?.is_empty() =>
        {
            create()?
        }
        other => other?,
    };
    Ok(Memory::Segment {
        id: new.id,
        spec: new.spec,
    })
}

/// Frees the segment of a VM's former life; never one whose state may still be
/// continued.
fn free_former(host: &Host, old: &SegmentView, name: &VmName) -> Result<(), HostError> {
    refuse_state(host, old, name)?;
    free_segment(host, old)
}

/// Refuses to boot a VM beside a state of it that may still be continued.
fn refuse_state(host: &Host, old: &SegmentView, name: &VmName) -> Result<(), HostError> {
    let over = match &old.exec {
        ExecView::Empty | ExecView::Ended | ExecView::Running { .. } => true,
        ExecView::Frozen { .. } => notes::is_given_up(&host.layout, old)?,
        ExecView::Damaged { .. } => false,
    };
    if over {
        return Ok(());
    }
    Err(HostError::Refused {
        name: name.clone(),
        why: format!(
            "segment {} holds a state of it: `hebe resume {name}` continues it, `hebe drop {name} --yes` gives it up",
            old.id
        ),
    })
}

/// How a VM is to be stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StopOptions {
    /// How long the guest has after the power button.
    pub timeout: Duration,
    /// Power off at once when it does not, or at once with a zero timeout.
    pub force: bool,
}

/// Stops a VM and frees what it held.
pub fn stop(host: &Host, name: &VmName, options: StopOptions) -> Result<(), HostError> {
    let _not_all = host.lock_orders()?;
    let survey = listing::survey(host);
    let row = survey.row(host, name)?;
    if row.life == Life::Starting && options.force {
        pending::settle(host, name)?;
        kill(host, name, VmmProcess::of(host, row), END_WAIT)?;
    } else {
        admit(row, Order::Stop)?;
        // Before it is down, or a later boot would bring it up again.
        pending::settle(host, name)?;
        power_off(host, row, options)?;
    }
    let lock = wait_for_end(host, name, END_WAIT)?;
    free(host, lock, name)
}

/// Presses the power button and waits; ends the VMM if need be and allowed.
/// When this returns without error the guest no longer runs.
pub fn power_off(host: &Host, row: &VmRow, options: StopOptions) -> Result<(), HostError> {
    let name = &row.name;
    let socket = host.layout.socket(name);
    let process = VmmProcess::of(host, row);
    if row.life == Life::Paused {
        let _ = vmm::let_run(&socket);
    }
    if !options.timeout.is_zero() {
        match vmm::order(&socket, &Request::PowerButton, vmm::STATUS_WAIT) {
            // A guest may be off before the answer is out.
            Ok(()) | Err(ClientError::Broken(_)) => {
                if ended_within(host, name, options.timeout) {
                    return Ok(());
                }
            }
            Err(_) if options.force => {}
            Err(source) => {
                return Err(HostError::Vmm {
                    name: name.clone(),
                    source,
                });
            }
        }
    }
    if !options.force {
        return Err(HostError::NoPowerOff {
            name: name.clone(),
            seconds: options.timeout.as_secs(),
        });
    }
    end(host, name, process)
}

/// Ends a VMM whose VM is to be no more: by order, or else by force.
pub(crate) fn end_vmm(host: &Host, row: &VmRow) -> Result<(), HostError> {
    end(host, &row.name, VmmProcess::of(host, row))
}

/// [`end_vmm`], whose `process` was held when it was certain whose it is.
fn end(host: &Host, name: &VmName, process: Option<VmmProcess>) -> Result<(), HostError> {
    if vmm::quit(host, name, None).is_err() || !ended_within(host, name, END_WAIT) {
        return kill(host, name, process, END_WAIT);
    }
    wait_for_end(host, name, END_WAIT).map(drop)
}

fn kill(
    host: &Host,
    name: &VmName,
    process: Option<VmmProcess>,
    wait: Duration,
) -> Result<(), HostError> {
    if let Some(process) = &process {
        process.kill();
    }
    match (wait_for_end(host, name, wait), process) {
        (Err(HostError::Stuck { name, .. }), Some(process)) => {
            let pid = process.pid;
            Err(HostError::Unkillable { name, pid })
        }
        (ended, _) => ended.map(drop),
    }
}

/// Waits until nobody holds the VM's lock.
pub fn ended_within(host: &Host, name: &VmName, wait: Duration) -> bool {
    let dir = host.layout.vm_dir(name);
    let began = Instant::now();
    loop {
        if !VmLock::is_held(&dir) {
            return true;
        }
        if began.elapsed() >= wait {
            return false;
        }
        thread::sleep(Duration::from_millis(5));
    }
}

/// Waits until the VMM is gone, and takes the lock it held.
pub fn wait_for_end(host: &Host, name: &VmName, wait: Duration) -> Result<VmLock, HostError> {
    let stuck = || HostError::Stuck {
        name: name.clone(),
        log: host.layout.vm_dir(name).join("log"),
    };
    if !ended_within(host, name, wait) {
        return Err(stuck());
    }
    let lock = lock(host, name)?;
    host.system.let_go(name);
    Ok(lock)
}

/// Frees the segment and the directory of a VM that ended. A state that is
/// committed stays, and with it what the VM may have to be booted from.
fn free(host: &Host, lock: VmLock, name: &VmName) -> Result<(), HostError> {
    let view = host.store.view()?;
    let segment = view.as_ref().and_then(|v| v.segment_of(name));
    let frozen = segment.is_some_and(|s| matches!(s.exec, ExecView::Frozen { .. }));
    if !frozen {
        withdraw_outlived(host, name, segment)?;
    }
    if let Some(segment) = segment.filter(|_| !frozen) {
        free_segment(host, segment)?;
    }
    if !frozen {
        saved::forget_lives(&host.layout, name, None);
        overlays::forget(&host.layout, name, None);
        definitions::forget_transient(&host.layout, name);
    }
    failed::forget(&host.layout, name);
    luo::forget_ended(host, name);
    let dir = host.layout.vm_dir(name);
    lock.remove_dir().map_err(HostError::file("remove", &dir))
}

/// Removes the file of a restore after which the VM ran, where whoever restored
/// it did not come to that. It goes before the segment and the record of the
/// end, which alone prove that its disks went on: without them it would be
/// offered as one that may be restored again.
fn withdraw_outlived(
    host: &Host,
    name: &VmName,
    segment: Option<&SegmentView>,
) -> Result<(), HostError> {
    let paths = SavedPaths::new(&host.layout, name);
    let Some(fact) = paths.fact().filter(|fact| fact.is_restoring()) else {
        return Ok(());
    };
    let in_segment = |s: &SegmentView| {
        let ran = matches!(s.exec, ExecView::Running { .. } | ExecView::Ended);
        ran && fact.is_restoring_into(s.vm)
    };
    let on_record = || ExitRecord::read(&host.layout.vm_dir(name)).and_then(|record| record.ran);
    if segment.is_some_and(in_segment) || on_record() == Some(true) {
        return paths.withdraw();
    }
    Ok(())
}

/// Suspends a VM on memory: freeze, then the VMM ends.
pub fn suspend(host: &Host, name: &VmName) -> Result<FreezeReport, HostError> {
    let _not_all = host.lock_orders()?;
    let survey = listing::survey(host);
    suspend_seen(host, &survey, survey.row(host, name)?)
}

/// [`suspend`] of a VM that was looked at, under a lock that keeps an order for
/// all VMs away.
pub(crate) fn suspend_seen(
    host: &Host,
    survey: &Survey,
    row: &VmRow,
) -> Result<FreezeReport, HostError> {
    admit(row, Order::Freeze)?;
    let name = &row.name;
    let socket = host.layout.socket(name);
    if row.life == Life::Paused {
        let_run(host, name)?;
    }
    if row.store == Some(luo::STORE) {
        withdraw_stale(host, name)?;
        return luo::suspend(host, row);
    }
    let store = survey.store.as_ref();
    let segment = store.and_then(|s| s.segments.iter().find(|x| Some(x.id.0) == row.segment));
    let (Some(store), Some(segment)) = (store, segment) else {
        return Err(HostError::Refused {
            name: name.clone(),
            why: "its RAM is in a memfd, which ends with its VMM: only VMs in a store can be suspended, see store = \"devdax\" and store = \"luo\"".into(),
        });
    };
    if let ExecView::Damaged { reason } = &segment.exec {
        return Err(HostError::Refused {
            name: name.clone(),
            why: format!(
                "its segment could not be resumed from ({reason}): let it run, or `hebe stop {name}`"
            ),
        });
    }
    withdraw_stale(host, name)?;
    notes::note(host, store, segment)?;
    let report = vmm::freeze(&socket, vmm::FREEZE_WAIT).map_err(|source| {
        // It may refuse because another order froze the VM meanwhile.
        let now = vmm::is_refusal(&source).then(|| host.store.view());
        if let Some(Ok(Some(now))) = now {
            notes::settle_one(host, &now, segment);
        }
        HostError::Vmm {
            name: name.clone(),
            source,
        }
    })?;
    vmm::quit(host, name, Some(VmmState::Frozen))?;
    wait_for_end(host, name, END_WAIT)?;
    Ok(report)
}

/// Removes what is left of a file of a VM that runs: it is older than the VM's
/// disk, and would stand beside the frozen state like a second one.
pub(crate) fn withdraw_stale(host: &Host, name: &VmName) -> Result<(), HostError> {
    let paths = SavedPaths::new(&host.layout, name);
    match paths.fact() {
        Some(_) => paths.withdraw(),
        None => Ok(()),
    }
}

pub(crate) fn let_run(host: &Host, name: &VmName) -> Result<(), HostError> {
    vmm::let_run(&host.layout.socket(name)).map_err(|source| HostError::Vmm {
        name: name.clone(),
        source,
    })
}

/// Gives a VM up: its segment, its saved file and its runtime directory.
pub fn drop_vm(host: &Host, name: &VmName) -> Result<(), HostError> {
    drop_as(host, name, true)
}

/// [`drop_vm`], of a VM that has no work to lose: one that is frozen, saved,
/// lost or damaged is refused.
///
/// # Errors
/// [`HostError::Refused`] also where it was frozen only just now.
pub fn drop_worthless(host: &Host, name: &VmName) -> Result<(), HostError> {
    drop_as(host, name, false)
}

fn drop_as(host: &Host, name: &VmName, meant: bool) -> Result<(), HostError> {
    let _not_all = host.lock_orders()?;
    let survey = listing::survey(host);
    let row = survey.row(host, name)?;
    // What is damaged may still be read by another release or kernel. Where that is
    // the definition alone, nothing is there to be lost.
    let damaged = row.state == VmState::Damaged && row.life != Life::Absent;
    let precious = row.life.is_precious() || damaged;
    // One that is up is stopped first, whatever is meant.
    if row.life.has_vmm() {
        admit(row, Order::Drop)?;
    }
    if precious && !meant {
        return Err(would_be_lost(name, row.state.as_str()));
    }
    let lock = lock(host, name)?;
    // Whoever held the lock before may have frozen it after that look.
    let store = host.store.view().ok().flatten();
    let segments = store.iter().flat_map(|s| &s.segments);
    let own = segments.filter(|s| s.name.as_ref() == Some(name));
    for segment in own.clone().filter(|_| !meant) {
        refuse_precious(host, name, segment)?;
    }
    own.clone().try_for_each(refuse_in_use)?;
    pending::settle(host, name)?;
    notes::give_up_elsewhere(host, name, store.as_ref(), true, "")?;
    SavedPaths::new(&host.layout, name).withdraw()?;
    saved::forget_lives(&host.layout, name, None);
    for segment in own {
        free_segment(host, segment)?;
    }
    overlays::forget(&host.layout, name, None);
    definitions::forget_transient(&host.layout, name);
    failed::forget(&host.layout, name);
    let dir = host.layout.vm_dir(name);
    lock.remove_dir().map_err(HostError::file("remove", &dir))
}

fn refuse_precious(host: &Host, name: &VmName, segment: &SegmentView) -> Result<(), HostError> {
    match &segment.exec {
        ExecView::Damaged { .. } => Err(would_be_lost(name, VmState::Damaged.as_str())),
        ExecView::Frozen { .. } if !notes::is_given_up(&host.layout, segment)? => {
            Err(would_be_lost(name, VmState::Frozen.as_str()))
        }
        _ => Ok(()),
    }
}

fn would_be_lost(name: &VmName, state: &str) -> HostError {
    HostError::Refused {
        name: name.clone(),
        why: format!(
            "it is {state} and would be lost for good: say `hebe drop {name} --yes` if it is to be"
        ),
    }
}

/// Frees the segments of VMs whose guests ended by themselves. Their exit
/// records die with this kernel, and without them the next one would take
/// such a VM for a crashed one.
pub fn reap(host: &Host) -> Result<Vec<VmName>, HostError> {
    let survey = listing::survey(host);
    let mut reaped = Vec::new();
    for row in survey.rows.values() {
        let dir = host.layout.vm_dir(&row.name);
        let ended = row.life == Life::Absent
            && ExitRecord::read(&dir).is_some_and(|record| record.is_clean_end());
        if !ended {
            continue;
        }
        if let Some(lock) = VmLock::take(&dir).map_err(HostError::file("lock", &dir))? {
            free(host, lock, &row.name)?;
            reaped.push(row.name.clone());
        }
    }
    Ok(reaped)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::Layout;

    /// As one is that waits in the kernel: here it is the test that holds the lock.
    #[test]
    fn of_a_vmm_that_outlives_its_kill_the_way_out_is_named() {
        let root = tempfile::tempdir().expect("dir");
        let host = Host {
            layout: Layout::below(root.path()),
            ..Host::here()
        };
        let name: VmName = "web".parse().expect("name");
        let mut child = std::process::Command::new("sleep")
            .arg("600")
            .spawn()
            .expect("sleep");
        let _held = lock(&host, &name).expect("free");
        let process = VmmProcess::hold(child.id(), |_| true);
        let killed = kill(&host, &name, process, Duration::ZERO);
        child.wait().expect("killed");
        let why = killed.expect_err("the lock is held").to_string();
        for word in [child.id().to_string(), "systemctl kexec".into()] {
            assert!(why.contains(&word), "{why}");
        }
        let killed = kill(&host, &name, None, Duration::ZERO);
        let why = killed.expect_err("nobody was found").to_string();
        assert!(why.contains("log"), "{why}");
    }
}
