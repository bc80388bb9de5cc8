//! What Linux is to carry, prepared while the VMs run and held until the jump:
//! by the reboot job, which leaves by itself, or by PID 1, which takes the host
//! down, in its file descriptor store ([`Carry::hand_over`]). Dropping it lets
//! everything go that nobody else holds.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use hebe_api::VmmState;
use hebe_flow::life::Life;
use hebe_flow::reboot::Fate;
use hebe_store::luo::{
    CarriedHost, CarriedVm, Carrier, Plan, SegmentFiles, VMS_MAX, host_session, vm_session,
};
use hebe_sys::fdstore::FdStore;
use hebe_sys::proc;
use hebe_types::{ByteSize, SegmentId, VmId, VmName};

use super::{STORE, asking, files_of, forget_running};
use crate::answering::{DIED, or_died};
use crate::host::{Host, HostError, Layout, LiveUpdateConfig};
use crate::listing::{Survey, VmRow, with_cause};
use crate::notes;
use crate::preflight::{Verdict, VmVerdict};
use crate::stores::{ExecView, StoreTrouble};
use crate::timeline::{CarriedRow, EventKind, Side, Timeline};
use crate::vmm;

/// Whose memory is to be carried, and who has it now.
#[derive(Clone, Debug)]
pub(crate) struct Candidate {
    pub(crate) name: VmName,
    vm: VmId,
    memory: ByteSize,
    /// The keeper holds it, under this number; otherwise its VMM does.
    kept: Option<SegmentId>,
    /// It runs, and is frozen by this reboot.
    pub(crate) runs: bool,
    /// By its balloon the guest gave memory back.
    pub(crate) gave_back: bool,
}

/// Every VM in store `luo` that is frozen, or will be, as `verdicts` say.
pub(crate) fn candidates(survey: &Survey, verdicts: &[VmVerdict]) -> Vec<Candidate> {
    let fate = |vm: &VmName| verdicts.iter().find(|v| v.vm == *vm)?.fate;
    candidates_of(survey, |vm| fate(vm) == Some(Fate::Keep))
}

/// Every VM in store `luo` that is frozen, or will be, as `keeps` says.
pub(crate) fn candidates_of(survey: &Survey, keeps: impl Fn(&VmName) -> bool) -> Vec<Candidate> {
    let rows = survey.rows.values().filter(|row| row.store == Some(STORE));
    rows.filter_map(|row| {
        let runs = keeps(&row.name);
        let name = row.name.clone();
        if runs || row.life == Life::Held {
            return Some(Candidate {
                name,
                vm: row.status.as_ref()?.id,
                memory: row.memory?,
                kept: None,
                runs,
                gave_back: gave_back(row),
            });
        }
        let mut segments = survey.store.iter().flat_map(|s| &s.segments);
        let kept = segments.find(|s| {
            let frozen = matches!(s.exec, ExecView::Frozen { .. });
            s.carried && frozen && s.name.as_ref() == Some(&row.name)
        })?;
        Some(Candidate {
            name,
            vm: kept.vm?,
            memory: kept.memory,
            kept: Some(kept.id),
            runs,
            // What it was before is not known: what is filled is said anyway.
            gave_back: false,
        })
    })
    .collect()
}

fn gave_back(row: &VmRow) -> bool {
    let balloon = row.status.as_ref().and_then(|s| s.balloon.as_ref());
    balloon.is_some_and(|b| b.inflated.0 > 0 || b.reported.0 > 0 || b.actual < b.memory)
}

impl Candidate {
    /// Ends who holds it here; it is frozen, and held elsewhere. Who does not end
    /// is ended by PID 1, later.
    fn end(&self, host: &Host) {
        let _ = match self.kept {
            Some(segment) => asking::release(&host.layout.keeper_socket(), segment)
                .map_err(|e| StoreTrouble::Keeper(e).into()),
            None if self.is_frozen(host) => vmm::quit(host, &self.name, None),
            None => Ok(()),
        };
    }

    /// Asked here, and not by the order to end: a VMM whose memory ends with it
    /// takes none that would have its VM stay frozen. Nobody else gives orders
    /// meanwhile.
    fn is_frozen(&self, host: &Host) -> bool {
        let status = vmm::status(&host.layout.socket(&self.name), vmm::STATUS_WAIT);
        status.is_ok_and(|s| s.id == self.vm && s.state == VmmState::Frozen)
    }

    /// The files that it lies in.
    pub(crate) fn files(&self, host: &Host) -> Result<SegmentFiles, HostError> {
        match self.kept {
            None => files_of(host, &self.name, self.vm),
            Some(segment) => Ok(asking::take(&host.layout.keeper_socket(), segment)
                .map_err(StoreTrouble::Keeper)?),
        }
    }
}

/// What preserving these files takes, as `config` wants it.
pub(crate) fn plan(files: &SegmentFiles, config: LiveUpdateConfig) -> Result<Plan, String> {
    let uses = files.measure().map_err(|e| with_cause(&e))?;
    let plan = Plan::new(&uses, config.holes.into());
    if let Some(limit) = config.fill_max {
        plan.within(limit, &files.spec().name)
            .map_err(|e| with_cause(&e))?;
    }
    Ok(plan)
}

/// Everything that is carried.
pub(crate) struct Carry {
    host: CarriedHost,
    vms: Vec<Arc<Mutex<CarriedVm>>>,
    /// Their memory, held here too: a VMM that is killed while its VM is frozen
    /// takes nothing along, should there be no jump.
    files: BTreeMap<VmName, Arc<SegmentFiles>>,
    /// Those that run, or ran when this was prepared.
    running: Vec<(VmName, VmId)>,
    /// Who else holds the sessions.
    store: Option<Arc<dyn FdStore>>,
    /// Who holds the memory in this kernel.
    holders: Vec<Candidate>,
}

/// VMs that could not be preserved, each with the reason.
pub(crate) type NotCarried = Vec<(VmName, String)>;

impl Carry {
    /// Preserves the memory of every VM in store `luo`, many at once, while
    /// they run. `Ok(None)` when there is none. Tells `say` what is done.
    ///
    /// # Errors
    /// One sentence. Nothing is preserved then, and all VMs run on.
    pub(crate) fn prepare(
        host: &Host,
        survey: &Survey,
        verdict: &Verdict,
        say: &(dyn Fn(&str) + Sync),
    ) -> Result<Option<Self>, String> {
        let vms = candidates(survey, &verdict.vms);
        if vms.is_empty() {
            return Ok(None);
        }
        for vm in &vms {
            notes::note_carried(host, &vm.name, vm.vm, vm.memory).map_err(|e| with_cause(&e))?;
        }
        let forget = |why| {
            let running = vms.iter().filter(|vm| vm.runs);
            forget_running(host, running.map(|vm| (&vm.name, vm.vm)));
            Err(why)
        };
        match Self::preserve(host, &vms, say) {
            Ok((carry, failed)) => match failed.into_iter().next() {
                None => Ok(Some(carry)),
                Some((vm, why)) => {
                    drop(carry);
                    forget(format!("{vm}: {why}"))
                }
            },
            Err(why) => forget(why),
        }
    }

    /// The same where the host goes down whatever happens: what can be preserved
    /// is, and `store` holds it as soon as that is done, while the VMs run. Gives
    /// those that could not be, too; they run on, and nothing of them is noted.
    ///
    /// # Errors
    /// One sentence. Nothing is preserved then, and all VMs run on.
    pub(crate) fn prepare_into(
        host: &Host,
        vms: &[Candidate],
        store: Arc<dyn FdStore>,
        say: &(dyn Fn(&str) + Sync),
    ) -> Result<(Self, NotCarried), String> {
        // What an order before left there would be in the way.
        clear(&*store).map_err(unheard)?;
        let mut failed = NotCarried::new();
        let mut noted = Vec::new();
        for vm in vms {
            match notes::note_carried(host, &vm.name, vm.vm, vm.memory) {
                Ok(()) => noted.push(vm.clone()),
                Err(error) => failed.push((vm.name.clone(), with_cause(&error))),
            }
        }
        let prepared = Self::preserve(host, &noted, say).and_then(|(mut carry, more)| {
            failed.extend(more);
            carry.hand_over(store).map(|()| carry)
        });
        let of = |lost: &dyn Fn(&VmName) -> bool| {
            let running = noted.iter().filter(|vm| vm.runs && lost(&vm.name));
            forget_running(host, running.map(|vm| (&vm.name, vm.vm)));
        };
        match prepared {
            Ok(carry) => {
                of(&|vm| failed.iter().any(|(name, _)| name == vm));
                Ok((carry, failed))
            }
            Err(why) => {
                of(&|_| true);
                Err(why)
            }
        }
    }

    fn preserve(
        host: &Host,
        vms: &[Candidate],
        say: &(dyn Fn(&str) + Sync),
    ) -> Result<(Self, NotCarried), String> {
        // Up to 65 files of each VM come in; best effort, each says if it fails.
        let _ = proc::raise_file_limit();
        let config = host.config().map_err(|e| with_cause(&e))?.live_update;
        let orchestrator = super::orchestrator(host).map_err(|e| with_cause(&e))?;
        let release = host.system.release();
        let carrier = Carrier::new(&*orchestrator, &release).map_err(|e| with_cause(&e))?;
        let slots = u32::try_from(vms.len()).unwrap_or(u32::MAX);
        let head = carrier.host(slots).map_err(|e| with_cause(&e))?;
        let one = |slot: u32, vm: &Candidate| {
            let files = vm.files(host).map_err(|e| with_cause(&e))?;
            let plan = plan(&files, config)?;
            say(&format!("preserving {}: {plan}", vm.name));
            let carried = carrier.vm(slot, &files, &plan);
            Ok((carried.map_err(|e| with_cause(&e))?, files))
        };
        let running = vms.iter().filter(|vm| vm.runs);
        let mut carry = Self {
            host: head,
            vms: Vec::new(),
            files: BTreeMap::new(),
            running: running.map(|vm| (vm.name.clone(), vm.vm)).collect(),
            store: None,
            holders: vms.to_vec(),
        };
        let mut failed = NotCarried::new();
        for (name, result) in many(vms, &one) {
            let entered = result.and_then(|(vm, files)| {
                carry.host.enter(&vm).map_err(|e| with_cause(&e))?;
                Ok((vm, files))
            });
            match entered {
                Ok((vm, files)) => {
                    carry.files.insert(name, Arc::new(files));
                    carry.vms.push(Arc::new(Mutex::new(vm)));
                }
                Err(why) => failed.push((name, why)),
            }
        }
        Ok((carry, failed))
    }

    /// Has `store` hold every session beside this: from here on this process may
    /// end, and what is preserved goes along all the same. All or nothing.
    fn hand_over(&mut self, store: Arc<dyn FdStore>) -> Result<(), String> {
        let put = || -> io::Result<usize> {
            let before = store.held()?;
            let (name, session) = self.host.session();
            store.put(&name.to_string(), session)?;
            for vm in &self.vms {
                let vm = locked(vm);
                let (name, session) = vm.session();
                store.put(&name.to_string(), session)?;
            }
            store.settle()?;
            // What it does not take it closes without a word.
            Ok(store.held()?.saturating_sub(before))
        };
        let wanted = self.vms.len() + 1;
        let why = match put() {
            Ok(taken) if taken == wanted => {
                self.store = Some(store);
                return Ok(());
            }
            Ok(taken) => format!(
                "systemd's file descriptor store took {taken} of {wanted} sessions: raise FileDescriptorStoreMax="
            ),
            Err(error) => unheard(error),
        };
        // Where that is not heard either, what is preserved stays so until PID 1
        // is asked again, or the host is rebooted.
        match clear(&*store) {
            Ok(()) => Err(why),
            Err(error) => Err(format!("{why}; {}", unheard(error))),
        }
    }

    /// The memory of a VM that is carried.
    pub(crate) fn files(&self, vm: &VmName) -> Option<Arc<SegmentFiles>> {
        self.files.get(vm).cloned()
    }

    /// Notes what it took.
    pub(crate) fn note(&self, timeline: &mut Timeline) {
        timeline.carried.clear();
        for vm in &self.vms {
            let vm = locked(vm);
            let (name, figures) = (vm.name(), vm.figures());
            let instants = [
                (figures.span.began, EventKind::PreserveBegan),
                (figures.span.ended, EventKind::Preserved),
            ];
            for (at, kind) in instants {
                timeline.note(at, Side::Before, Some(name), kind);
            }
            let memory = self.files.get(name).map(|files| files.spec().memory());
            timeline.carried.push(CarriedRow {
                vm: name.clone(),
                memory: memory.unwrap_or_default(),
                preserved: figures.preserved,
                filled: figures.filled,
                late_parts: figures.late.parts,
                retrieved: None,
            });
        }
    }

    /// Preserves what VMs began to use since they were prepared, of the parts
    /// that were left out as empty.
    pub(crate) fn complete(&self) -> Result<(), String> {
        let done: Vec<Result<(), String>> = thread::scope(|scope| {
            let vms = self.vms.iter();
            let workers: Vec<_> = vms
                .map(|vm| scope.spawn(move || complete(&mut locked(vm))))
                .collect();
            let joined = workers.into_iter().map(|w| w.join());
            joined
                .map(|r| r.unwrap_or_else(|_| Err(DIED.into())))
                .collect()
        });
        done.into_iter().collect()
    }

    /// What carries a VM.
    pub(crate) fn vm(&self, vm: &VmName) -> Option<Carried> {
        let found = self.vms.iter().find(|v| locked(v).name() == vm);
        found.map(|vm| Carried(Arc::clone(vm)))
    }

    /// Ends who holds the same memory in this kernel: somebody else does, and
    /// nothing should wait for them when the host goes down. Every VM must be
    /// frozen and complete. From here on there is no way back.
    ///
    /// # Errors
    /// Nobody else holds it, or that cannot be noted; nobody is ended.
    pub(crate) fn end_holders(&self, host: &Host) -> Result<(), String> {
        if self.store.is_none() {
            return Err("nobody else holds the memory of the VMs".into());
        }
        Given::note(host)?;
        for holder in &self.holders {
            if self.vm(&holder.name).is_some() {
                holder.end(host);
            }
        }
        Ok(())
    }

    /// Takes a VM out, which is kept in another way. Where that fails it goes
    /// along, and the next kernel has two states of it.
    pub(crate) fn give_up(&mut self, host: &Host, vm: &VmName) -> Result<(), String> {
        let Some(at) = self.vms.iter().position(|v| locked(v).name() == vm) else {
            return Ok(());
        };
        let carried = locked(&self.vms[at]);
        self.host.strike(&carried).map_err(|e| with_cause(&e))?;
        if let Some(store) = &self.store {
            let name = carried.session().0.to_string();
            let gone = store.remove(&name).and_then(|()| store.settle());
            gone.map_err(unheard)?;
        }
        drop(carried);
        self.vms.remove(at);
        self.files.remove(vm);
        let ran = self.running.iter().filter(|(name, _)| name == vm);
        forget_running(host, ran.map(|(name, vm)| (name, *vm)));
        Ok(())
    }

    /// Gives the next kernel the report.
    pub(crate) fn write_report(&mut self, bytes: &[u8]) -> Result<(), String> {
        self.host.write_report(bytes).map_err(|e| with_cause(&e))
    }

    /// Lets everything go: the VMs run on here.
    ///
    /// # Errors
    /// Somebody else holds it still: it stays preserved until that ends.
    pub(crate) fn forget(self, host: &Host) -> Result<(), String> {
        let Self {
            running,
            vms,
            host: head,
            store,
            ..
        } = self;
        let told = store
            .map_or(Ok(()), |store| clear(&*store))
            .map_err(unheard);
        drop((head, vms));
        forget_running(host, running.iter().map(|(name, vm)| (name, *vm)));
        told
    }
}

/// One VM that is carried.
#[derive(Clone, Debug)]
pub(crate) struct Carried(Arc<Mutex<CarriedVm>>);

impl Carried {
    /// Preserves what the VM, which is frozen now, began to use since.
    ///
    /// # Errors
    /// One sentence: it must not go along, see [`Carry::give_up`].
    pub(crate) fn complete(&self) -> Result<(), String> {
        complete(&mut locked(&self.0))
    }
}

/// A note that PID 1 holds all that is carried, and the VMMs may be gone: whoever
/// comes next in this boot must not prepare anew.
struct Given;

impl Given {
    fn path(layout: &Layout) -> PathBuf {
        layout.run.join("host").join("handed-over")
    }

    fn note(host: &Host) -> Result<(), String> {
        let path = Self::path(&host.layout);
        fs::write(&path, "").map_err(|e| format!("cannot write {}: {e}", path.display()))
    }
}

/// Whether an order before came so far that PID 1 holds everything. What was
/// frozen then and not ended, for that order was killed, is ended now.
pub(crate) fn was_handed_over(host: &Host, holders: &[Candidate]) -> bool {
    let was = Given::path(&host.layout).exists();
    if was {
        holders.iter().for_each(|holder| holder.end(host));
    }
    was
}

/// Takes every session of Hebe's out of a store, whoever put it there.
fn clear(store: &dyn FdStore) -> io::Result<()> {
    store.remove(&host_session().to_string())?;
    for slot in 0..VMS_MAX {
        store.remove(&vm_session(slot).to_string())?;
    }
    store.settle()
}

fn unheard(error: io::Error) -> String {
    format!("systemd does not do as it is asked about its file descriptor store: {error}")
}

fn locked(vm: &Mutex<CarriedVm>) -> MutexGuard<'_, CarriedVm> {
    vm.lock().unwrap_or_else(PoisonError::into_inner)
}

fn complete(vm: &mut CarriedVm) -> Result<(), String> {
    let name = vm.name().clone();
    let late = vm.complete();
    late.map(drop)
        .map_err(|e| format!("{name}: {}", with_cause(&e)))
}

/// Every VM by `one`, in slots counted from 0; as many at once as there are
/// processors.
fn many<T: Send>(
    vms: &[Candidate],
    one: &(dyn Fn(u32, &Candidate) -> Result<T, String> + Sync),
) -> Vec<(VmName, Result<T, String>)> {
    let workers = thread::available_parallelism().map_or(2, usize::from);
    let queue = Mutex::new((0u32..).zip(vms));
    let done = Mutex::new(Vec::new());
    let work = || loop {
        let next = queue.lock().unwrap_or_else(PoisonError::into_inner).next();
        let Some((slot, vm)) = next else { break };
        // One that cannot be had is no reason to lose the others.
        let result = (vm.name.clone(), or_died(|| one(slot, vm)));
        let mut done = done.lock().unwrap_or_else(PoisonError::into_inner);
        done.push(result);
    };
    thread::scope(|scope| {
        for _ in 1..workers.min(vms.len()) {
            // Where no thread can be started, the others do its part.
            let _ = thread::Builder::new().spawn_scoped(scope, work);
        }
        work();
    });
    done.into_inner().unwrap_or_else(PoisonError::into_inner)
}
