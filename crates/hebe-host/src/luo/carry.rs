//! The reboot job's part: what Linux is to carry, prepared while the VMs run
//! and held until the jump. Dropping it lets everything go.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use hebe_flow::life::Life;
use hebe_flow::reboot::Fate;
use hebe_store::luo::{CarriedHost, CarriedVm, Carrier, Plan, SegmentFiles};
use hebe_sys::proc;
use hebe_types::{ByteSize, SegmentId, VmId, VmName};

use super::{STORE, asking, files_of, forget_running};
use crate::host::{Host, HostError, LiveUpdateConfig};
use crate::listing::{Survey, with_cause};
use crate::notes;
use crate::preflight::{Verdict, VmVerdict};
use crate::stores::{ExecView, StoreTrouble};
use crate::timeline::{CarriedRow, EventKind, Side, Timeline};

/// Whose memory is to be carried, and who has it now.
#[derive(Clone, Debug)]
pub(crate) struct Candidate {
    pub(crate) name: VmName,
    vm: VmId,
    memory: ByteSize,
    /// The keeper holds it, under this number; otherwise its VMM does.
    kept: Option<SegmentId>,
    /// It runs, and is frozen by this reboot.
    runs: bool,
}

/// Every VM in store `luo` that is frozen, or will be.
pub(crate) fn candidates(survey: &Survey, verdicts: &[VmVerdict]) -> Vec<Candidate> {
    let rows = survey.rows.values().filter(|row| row.store == Some(STORE));
    rows.filter_map(|row| {
        let fate = verdicts.iter().find(|v| v.vm == row.name)?.fate;
        let runs = fate == Some(Fate::Keep);
        let name = row.name.clone();
        if runs || row.life == Life::Held {
            return Some(Candidate {
                name,
                vm: row.status.as_ref()?.id,
                memory: row.memory?,
                kept: None,
                runs,
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
        })
    })
    .collect()
}

impl Candidate {
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
    vms: Vec<CarriedVm>,
    /// Their memory, held here too: a VMM that is killed while its VM is frozen
    /// takes nothing along, should there be no jump.
    files: BTreeMap<VmName, Arc<SegmentFiles>>,
    /// Those that run, or ran when this was prepared.
    running: Vec<(VmName, VmId)>,
}

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
        let running = vms.iter().filter(|vm| vm.runs);
        let running = running.map(|vm| (vm.name.clone(), vm.vm)).collect();
        match Self::preserve(host, &vms, running, say) {
            Ok(carry) => Ok(Some(carry)),
            Err(why) => {
                let running = vms.iter().filter(|vm| vm.runs);
                forget_running(host, running.map(|vm| (&vm.name, vm.vm)));
                Err(why)
            }
        }
    }

    fn preserve(
        host: &Host,
        vms: &[Candidate],
        running: Vec<(VmName, VmId)>,
        say: &(dyn Fn(&str) + Sync),
    ) -> Result<Self, String> {
        // Up to 65 files of each VM come in; best effort, each says if it fails.
        let _ = proc::raise_file_limit();
        let config = host.config().map_err(|e| with_cause(&e))?.live_update;
        let orchestrator = super::orchestrator(host).map_err(|e| with_cause(&e))?;
        let release = host.system.release();
        let carrier = Carrier::new(&*orchestrator, &release).map_err(|e| with_cause(&e))?;
        let slots = u32::try_from(vms.len()).unwrap_or(u32::MAX);
        let head = carrier.host(slots).map_err(|e| with_cause(&e))?;
        let one = |slot: u32, vm: &Candidate| -> Result<(CarriedVm, SegmentFiles), String> {
            let of = |why: String| format!("{}: {why}", vm.name);
            let files = vm.files(host).map_err(|e| of(with_cause(&e)))?;
            let plan = plan(&files, config).map_err(of)?;
            say(&format!("preserving {}: {plan}", vm.name));
            let carried = carrier.vm(slot, &files, &plan);
            Ok((carried.map_err(|e| of(with_cause(&e)))?, files))
        };
        let mut carry = Self {
            host: head,
            vms: Vec::new(),
            files: BTreeMap::new(),
            running,
        };
        for (vm, files) in many(vms, &one)? {
            carry.host.enter(&vm).map_err(|e| with_cause(&e))?;
            carry.files.insert(vm.name().clone(), Arc::new(files));
            carry.vms.push(vm);
        }
        Ok(carry)
    }

    /// The memory of a VM that is carried.
    pub(crate) fn files(&self, vm: &VmName) -> Option<Arc<SegmentFiles>> {
        self.files.get(vm).cloned()
    }

    /// Notes what it took.
    pub(crate) fn note(&self, timeline: &mut Timeline) {
        timeline.carried.clear();
        for vm in &self.vms {
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
    pub(crate) fn complete(&mut self) -> Result<(), String> {
        let done: Vec<Result<(), String>> = thread::scope(|scope| {
            let workers: Vec<_> = self
                .vms
                .iter_mut()
                .map(|vm| scope.spawn(move || complete(vm)))
                .collect();
            let joined = workers.into_iter().map(|w| w.join());
            joined
                .map(|r| r.unwrap_or_else(|_| Err(DIED.into())))
                .collect()
        });
        done.into_iter().collect()
    }

    /// Gives the next kernel the report.
    pub(crate) fn write_report(&mut self, bytes: &[u8]) -> Result<(), String> {
        self.host.write_report(bytes).map_err(|e| with_cause(&e))
    }

    /// Lets everything go: the VMs run on here.
    pub(crate) fn forget(self, host: &Host) {
        let Self { running, vms, .. } = self;
        drop(vms);
        forget_running(host, running.iter().map(|(name, vm)| (name, *vm)));
    }
}

const DIED: &str = "the thread that preserves it ended: please report this";

fn complete(vm: &mut CarriedVm) -> Result<(), String> {
    let name = vm.name().clone();
    let late = vm.complete();
    late.map(drop)
        .map_err(|e| format!("{name}: {}", with_cause(&e)))
}

/// Every VM by `one`, in slots counted from 0; as many at once as there are
/// processors. The first error is the answer.
fn many<T: Send>(
    vms: &[Candidate],
    one: &(dyn Fn(u32, &Candidate) -> Result<T, String> + Sync),
) -> Result<Vec<T>, String> {
    let workers = thread::available_parallelism().map_or(2, usize::from);
    let queue = Mutex::new((0u32..).zip(vms));
    let done = Mutex::new(Vec::new());
    let work = || loop {
        let next = queue.lock().unwrap_or_else(PoisonError::into_inner).next();
        let Some((slot, vm)) = next else { break };
        let result = one(slot, vm);
        let failed = result.is_err();
        let mut done = done.lock().unwrap_or_else(PoisonError::into_inner);
        done.push(result);
        if failed {
            break;
        }
    };
    thread::scope(|scope| {
        for _ in 1..workers.min(vms.len()) {
            scope.spawn(work);
        }
        work();
    });
    let done = done.into_inner().unwrap_or_else(PoisonError::into_inner);
    done.into_iter().collect()
}
