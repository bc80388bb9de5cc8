//! Resuming one VM: from memory, from its file, or in the VMM that holds it.

use hebe_api::{VmStatus, VmmState};
use hebe_flow::life::{Life, Order};
use hebe_flow::resume::{SavedFact, given_up};
use hebe_types::VmName;

use crate::host::{Host, HostError};
use crate::launch::{LAUNCH_WAIT, Launch, LaunchError, launch};
use crate::listing::{self, Survey, VmRow};
use crate::luo;
use crate::notes;
use crate::ops::{END_WAIT, admit, let_run, lock, never_ran, wait_for_end};
use crate::saved::SavedPaths;
use crate::saving;
use crate::stores::{ExecView, StoreView};
use crate::vmm;

/// Where a VM that is both frozen and saved is to be resumed from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ResumeOptions {
    /// Decided by an operator; `None` refuses to choose.
    pub from: Option<ResumeFrom>,
    /// Use a file whose restore was interrupted.
    pub again: bool,
    /// Resume with disks that changed while the VM was suspended.
    pub accept_changed_disk: bool,
}

/// One of two states.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResumeFrom {
    /// The state frozen in the store.
    Memory,
    /// The saved file.
    File,
}

/// Resumes a VM: from memory, from its file, or in the VMM that holds it.
pub fn resume(host: &Host, name: &VmName, options: ResumeOptions) -> Result<VmStatus, HostError> {
    let _not_all = host.lock_orders()?;
    resume_one(host, name, options)
}

/// [`resume`], for one who holds the lock of all VMs or shares it.
pub(crate) fn resume_one(
    host: &Host,
    name: &VmName,
    options: ResumeOptions,
) -> Result<VmStatus, HostError> {
    let survey = listing::survey(host);
    let row = survey.row(host, name)?;
    let held = matches!(row.life, Life::Held | Life::SavedHeld | Life::Paused);
    if !held {
        admit(row, Order::Resume)?;
    }
    let paths = SavedPaths::new(&host.layout, name);
    match source(row.life, paths.fact(), options) {
        Err(why) => Err(HostError::Refused {
            name: name.clone(),
            why: why.replace("NAME", name.as_str()),
        }),
        // What continues in memory makes any file older than its disk.
        Ok(ResumeFrom::Memory) => {
            let aside = paths.set_aside()?;
            let accept = options.accept_changed_disk;
            let resumed = from_memory(host, &survey, row, held, accept);
            let back = resumed
                .as_ref()
                .is_err_and(|e| certainly_not_run(host, name, e));
            if aside && back {
                paths.put_back()?;
            }
            let status = resumed?;
            if paths.fact().is_some() {
                paths.withdraw()?;
            }
            Ok(status)
        }
        Ok(ResumeFrom::File) => {
            if held {
                // The memory of a VM in store `luo` ends with its VMM, which
                // takes no order that would have it stay frozen.
                let files = row.store == Some(luo::STORE);
                if files {
                    saving::check_file(host, name)?;
                }
                vmm::quit(host, name, (!files).then_some(VmmState::Frozen))?;
                wait_for_end(host, name, END_WAIT)?;
            }
            let meant = options.from == Some(ResumeFrom::File);
            saving::restore_with(host, name, meant, options.accept_changed_disk)
        }
    }
}

/// In the VMM that holds it, or in a new one.
fn from_memory(
    host: &Host,
    survey: &Survey,
    row: &VmRow,
    held: bool,
    accept_changed_disk: bool,
) -> Result<VmStatus, HostError> {
    let name = &row.name;
    if !held {
        let store = survey.store.as_ref();
        let choice = Choice {
            accept_changed_disk,
            is_expected: false,
        };
        let status = continue_with(host, name, store, choice)?;
        notes::forget_here(host, name, status.id);
        return Ok(status);
    }
    let_run(host, name)?;
    if let Some(vm) = row.status.as_ref().map(|s| s.id) {
        notes::forget_here(host, name, vm);
    }
    let status = vmm::status_of(host, name, vmm::STATUS_WAIT);
    status.map_err(|source| HostError::Vmm {
        name: name.clone(),
        source,
    })
}

/// Whether a VM that was to go on in memory did not: its VMM says so, or is gone
/// and left the state committed, which it withdraws before the guest runs.
fn certainly_not_run(host: &Host, name: &VmName, error: &HostError) -> bool {
    match error {
        HostError::Vmm { source, .. } => vmm::is_refusal(source),
        HostError::Launch(LaunchError::Unanswered { .. }) => false,
        // What its holder does with it nobody knows: it may run any moment.
        HostError::Busy(_) => false,
        _ if never_ran(host, name, error) => true,
        _ => {
            let view = host.store.view().ok().flatten();
            let segment = view.as_ref().and_then(|v| v.segment_of(name));
            segment.is_some_and(|s| matches!(s.exec, ExecView::Frozen { .. }))
        }
    }
}

/// Which state a VM is resumed from, or why none; what an operator asked for
/// is done or refused, and never passed over.
fn source(
    life: Life,
    file: Option<SavedFact>,
    options: ResumeOptions,
) -> Result<ResumeFrom, &'static str> {
    use ResumeFrom::{File, Memory};
    if options.again && !file.is_some_and(SavedFact::is_restoring) {
        return Err("no restore of it was interrupted: leave --again out");
    }
    let file = match (file, options.again) {
        (Some(SavedFact::Restoring { .. }), false) => Some(Err(
            "a restore of it was interrupted: if its guest did not run since, `hebe resume NAME --again` repeats it; if it did, its disk went on and the file must be given up with `hebe drop NAME --yes`",
        )),
        (file, _) => file.map(|_| Ok(File)),
    };
    let found = match (life, file, options.from) {
        // The VMM holds what the file holds, or what is newer.
        (Life::SavedHeld | Life::Paused, _, None) => Ok(Memory),
        (Life::SavedHeld | Life::Paused, _, Some(_)) => {
            Err("it stands still in its VMM, and is resumed there: leave --from out")
        }
        (Life::Held | Life::Frozen, None, Some(File)) => {
            Err("it is frozen in memory and has no saved file: leave --from out")
        }
        (Life::Held | Life::Frozen, None, _)
        | (Life::Held | Life::Frozen, Some(_), Some(Memory)) => Ok(Memory),
        (Life::Held | Life::Frozen, Some(_), None) => Err(
            "it is frozen in memory and saved in a file, and only one of them may run: say --from memory or --from file; the other is given up",
        ),
        (_, Some(_), Some(Memory)) => {
            Err("it is saved in a file, and no state of it is in memory: leave --from out")
        }
        (_, Some(file), _) => file,
        (_, None, _) => Err("there is nothing to resume: `hebe start NAME` boots it"),
    };
    let in_its_vmm = matches!(life, Life::SavedHeld | Life::Paused | Life::Held);
    if options.accept_changed_disk && in_its_vmm && found == Ok(Memory) {
        return Err("its VMM still has its disks: leave --accept-changed-disk out");
    }
    found
}

/// Starts a VMM around the segment that is frozen. Nothing else happens here,
/// because a whole host of VMs waits for it: no scrubbing, nothing durable. On
/// failure the VM stays frozen: its VMM withdraws the state only when it runs.
///
/// # Errors
/// [`HostError::Refused`] also for a state that was given up while its store was
/// not here: the VM's disks went on without it.
pub fn continue_frozen(
    host: &Host,
    name: &VmName,
    store: Option<&StoreView>,
) -> Result<VmStatus, HostError> {
    continue_with(host, name, store, Choice::default())
}

/// [`continue_frozen`]; with `is_expected` its part of the network `hebe0` is being
/// made already.
pub(crate) fn continue_expected(
    host: &Host,
    name: &VmName,
    store: Option<&StoreView>,
    is_expected: bool,
) -> Result<VmStatus, HostError> {
    let choice = Choice {
        is_expected,
        ..Choice::default()
    };
    continue_with(host, name, store, choice)
}

/// How a frozen VM goes on.
#[derive(Clone, Copy, Debug, Default)]
struct Choice {
    accept_changed_disk: bool,
    is_expected: bool,
}

/// [`continue_frozen`]; whether with disks that changed is up to the operator.
fn continue_with(
    host: &Host,
    name: &VmName,
    store: Option<&StoreView>,
    choice: Choice,
) -> Result<VmStatus, HostError> {
    let segment = store.and_then(|s| s.segment_of(name));
    let refused = |why: String| HostError::Refused {
        name: name.clone(),
        why,
    };
    let none = || refused("no segment holds a state of it: `hebe store list` shows them".into());
    let segment = segment.ok_or_else(none)?;
    let mut order = Launch::of_frozen(segment).ok_or_else(none)?;
    order.accept_changed_disk = choice.accept_changed_disk;
    order.is_expected = choice.is_expected;
    if segment.carried {
        order.memory = luo::memory_of_kept(host, segment)?;
    }
    let lock = lock(host, name)?;
    // Under the lock: whoever starts it afresh holds it meanwhile.
    if notes::is_given_up(&host.layout, segment)? {
        return Err(refused(given_up(name, segment.id)));
    }
    if let Some(why) = notes::unnoted(&host.layout, segment)? {
        return Err(refused(why));
    }
    let status = launch(host, &lock, &order, LAUNCH_WAIT)?;
    if segment.carried {
        luo::taken_over(host, segment);
    }
    Ok(status)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIVES: [Life; 7] = [
        Life::Absent,
        Life::Crashed,
        Life::Frozen,
        Life::Held,
        Life::Paused,
        Life::Saved,
        Life::SavedHeld,
    ];

    /// What is asked for is done or refused with the way out.
    #[test]
    fn no_choice_of_an_operator_is_passed_over() {
        let restoring = SavedFact::Restoring { into: None };
        let files = [None, Some(SavedFact::Complete), Some(restoring)];
        let choices = [None, Some(ResumeFrom::Memory), Some(ResumeFrom::File)];
        for life in LIVES {
            for file in files {
                for from in choices {
                    for again in [false, true] {
                        let options = ResumeOptions {
                            from,
                            again,
                            accept_changed_disk: false,
                        };
                        let found = source(life, file, options);
                        let text = format!("{life:?} {file:?} {from:?} {again}: {found:?}");
                        if let (Ok(found), Some(from)) = (found, from) {
                            assert_eq!(found, from, "{text}");
                        }
                        if found == Ok(ResumeFrom::File) {
                            let interrupted = file == Some(restoring);
                            assert!(file.is_some() && again == interrupted, "{text}");
                        }
                        if found.is_ok() {
                            assert!(!again || file == Some(restoring), "{text}");
                        }
                    }
                }
            }
        }
        let plain = ResumeOptions::default();
        assert_eq!(source(Life::Frozen, None, plain), Ok(ResumeFrom::Memory));
        let two = source(Life::Held, Some(SavedFact::Complete), plain);
        assert!(two.is_err_and(|why| why.contains("--from")));
        let file = source(Life::Saved, Some(SavedFact::Complete), plain);
        assert_eq!(file, Ok(ResumeFrom::File));
    }

    /// Its file must not count again: who holds it may be letting it run.
    #[test]
    fn a_vm_that_another_order_holds_may_run() {
        let root = tempfile::tempdir().expect("dir");
        let host = Host {
            layout: crate::host::Layout::below(root.path()),
            ..Host::here()
        };
        let name: VmName = "web".parse().expect("name");
        let busy = HostError::Busy(name.clone());
        assert!(!certainly_not_run(&host, &name, &busy));
        let missing = HostError::Store(crate::stores::StoreTrouble::None);
        assert!(
            certainly_not_run(&host, &name, &missing),
            "no VMM was started"
        );
    }

    #[test]
    fn disks_are_chosen_where_a_vmm_starts_and_nowhere_else() {
        let accept = ResumeOptions {
            accept_changed_disk: true,
            ..ResumeOptions::default()
        };
        let saved = Some(SavedFact::Complete);
        assert_eq!(source(Life::Frozen, None, accept), Ok(ResumeFrom::Memory));
        assert_eq!(source(Life::Saved, saved, accept), Ok(ResumeFrom::File));
        for life in [Life::Held, Life::SavedHeld, Life::Paused] {
            let refused = source(life, None, accept);
            assert!(refused.is_err_and(|why| why.contains("leave --accept-changed-disk out")));
        }
    }
}
