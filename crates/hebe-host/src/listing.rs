//! What VMs there are, and how each is: merged from definitions, runtime
//! directories, the store and saved files.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::thread;

use hebe_api::{VmStatus, VmmState};
use hebe_flow::life::Life;
use hebe_flow::resume::SavedFact;
use hebe_types::{ByteSize, VmConfig, VmName};
use serde::Serialize;

use crate::answering::DIED;
use crate::definitions::{self, DefinitionError};
use crate::failed::{self, Failed};
use crate::files;
use crate::host::{Host, HostError, Layout};
use crate::launch::{ExitRecord, Instance, killed_by_cage, last_words};
use crate::limits::killed;
use crate::lock::VmLock;
use crate::luo;
use crate::notes::{self, FrozenNote};
use crate::saved;
use crate::segments;
use crate::stores::{ExecView, SegmentView, StoreView};
use crate::vmm;

/// How a VM is, in an operator's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum VmState {
    /// Its guest runs.
    Running,
    /// Its vCPUs are stopped; its VMM lives.
    Paused,
    /// Suspended on memory.
    Frozen,
    /// Written to a file.
    Saved,
    /// Defined, and nothing of it is up.
    Stopped,
    /// It ran when its VMM or host stopped.
    Crashed,
    /// Something of it cannot be read.
    Damaged,
    /// Its VMM lives and does not answer.
    Unresponsive,
    /// Frozen in a store that this kernel does not have.
    Lost,
}

impl VmState {
    /// As written in lists.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Frozen => "frozen",
            Self::Saved => "saved",
            Self::Stopped => "stopped",
            Self::Crashed => "crashed",
            Self::Damaged => "damaged",
            Self::Unresponsive => "unresponsive",
            Self::Lost => "lost",
        }
    }
}

/// One line of the list.
#[derive(Clone, Debug, Serialize)]
pub struct VmRow {
    /// Name.
    pub name: VmName,
    /// State.
    pub state: VmState,
    /// More about the state, where there is more to say.
    pub detail: Option<String>,
    /// Guest RAM, where known.
    pub memory: Option<ByteSize>,
    /// Where its RAM is or would be: `devdax`, `luo` or `memfd`.
    pub store: Option<&'static str>,
    /// Its segment, where it has one.
    pub segment: Option<u32>,
    /// Its VMM's process.
    pub pid: Option<u32>,
    /// Its identity.
    pub id: Option<String>,
    /// Where it stands for orders.
    pub life: Life,
    /// What its VMM says.
    #[serde(serialize_with = "shown")]
    pub status: Option<VmStatus>,
}

/// What a VMM says, as people and programs get to read it: with the identity as it
/// is written elsewhere. Between `hebe` and a VMM, which may be of other releases,
/// it is a list of bytes, and stays so.
fn shown<S: serde::Serializer>(
    status: &Option<VmStatus>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    let Some(status) = status else {
        return serializer.serialize_none();
    };
    let mut value = serde_json::to_value(status).map_err(serde::ser::Error::custom)?;
    value["id"] = status.id.to_string().into();
    value.serialize(serializer)
}

/// Everything that is known about the host's VMs.
pub struct Survey {
    /// The store, if there is one and it can be read.
    pub store: Option<StoreView>,
    /// Why the store cannot be read.
    pub store_trouble: Option<String>,
    /// The VMs, by name.
    pub rows: BTreeMap<VmName, VmRow>,
    /// Definitions.
    pub definitions: BTreeMap<VmName, Result<VmConfig, DefinitionError>>,
}

impl Survey {
    /// The row of one VM.
    pub fn row(&self, host: &Host, name: &VmName) -> Result<&VmRow, HostError> {
        self.rows.get(name).ok_or_else(|| HostError::NoSuchVm {
            name: name.clone(),
            expected: definitions::expected_path(&host.layout, name),
        })
    }
}

/// Looks at everything, changes nothing. Running VMMs are asked all at once.
pub fn survey(host: &Host) -> Survey {
    let (store, store_trouble) = match host.store.view() {
        Ok(view) => (view, None),
        Err(error) => (None, Some(with_cause(&error))),
    };
    let definitions = definitions::all(&host.layout);
    let saved = saved::all(&host.layout);
    let noted = notes::all(&host.layout);
    let failed = failed::all(&host.layout);
    let elsewhere: BTreeMap<&VmName, &FrozenNote> = notes::elsewhere(&noted, store.as_ref())
        .map(|note| (&note.name, note))
        .collect();
    let mut names: BTreeSet<VmName> = definitions.keys().cloned().collect();
    names.extend(saved.keys().cloned());
    names.extend(elsewhere.keys().copied().cloned());
    names.extend(failed.keys().cloned());
    // One that is left out here is found by a reboot's last look.
    names.extend(run_dirs(host).unwrap_or_default());
    let segments = store.iter().flat_map(|s| &s.segments);
    names.extend(segments.filter_map(|s| s.name.clone()));
    let look = |name: &VmName| {
        let known = Known {
            store: store.as_ref(),
            saved: saved.get(name).copied(),
            definition: definitions.get(name),
            elsewhere: elsewhere.get(name).copied(),
            failed: failed.get(name),
        };
        row(host, name.clone(), &known)
    };
    let look = &look;
    let rows = thread::scope(|scope| {
        let workers = names.iter().map(|name| {
            let worker = thread::Builder::new().spawn_scoped(scope, move || look(name));
            (name, worker)
        });
        let workers: Vec<_> = workers.collect();
        let row = |(name, worker): (&VmName, io::Result<thread::ScopedJoinHandle<VmRow>>)| {
            let row = match worker {
                Ok(worker) => worker.join().unwrap_or_else(|_| unseen(name)),
                // No thread can be had: one after the other then.
                Err(_) => look(name),
            };
            (name.clone(), row)
        };
        workers.into_iter().map(row).collect()
    });
    Survey {
        store,
        store_trouble,
        rows,
        definitions,
    }
}

/// Names of VMs as names of files tell them, in no time: nothing is opened, and
/// nobody is asked. A VM that the store alone knows is not among them.
pub fn names(layout: &Layout) -> BTreeSet<VmName> {
    let places: [(PathBuf, &[&str]); 5] = [
        (layout.config.join("vms"), &[".toml"]),
        (layout.state.join("vms"), &[".toml"]),
        (layout.state.join("saved"), &[".hebe", ".restoring"]),
        (layout.state.join("frozen"), &[".json"]),
        (layout.run.join("vms"), &[""]),
    ];
    let mut names = BTreeSet::new();
    for (dir, endings) in places {
        for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
            let file = entry.file_name();
            let file = file.to_str().unwrap_or_default();
            // No name has a dot; an id may follow it.
            let stem = file.split('.').next().unwrap_or_default();
            if endings.iter().any(|ending| file.ends_with(ending)) {
                names.extend(stem.parse::<VmName>());
            }
        }
    }
    names
}

/// Of a VM at which looking panicked. Left out, it would be thought not to be
/// there, and kept by nobody.
fn unseen(name: &VmName) -> VmRow {
    VmRow {
        name: name.clone(),
        state: VmState::Unresponsive,
        detail: Some(DIED.into()),
        memory: None,
        store: None,
        segment: None,
        pid: None,
        id: None,
        life: Life::Starting,
        status: None,
    }
}

/// An error and its causes, as one sentence.
pub fn with_cause(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        let more = inner.to_string();
        if !text.contains(&more) {
            text.push_str(&format!(" ({more})"));
        }
        cause = inner.source();
    }
    text
}

/// VMs that have a runtime directory.
///
/// # Errors
/// They cannot be listed, though there may be some.
pub(crate) fn run_dirs(host: &Host) -> io::Result<Vec<VmName>> {
    let entries = match fs::read_dir(host.layout.run.join("vms")) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(e),
    };
    let mut names = Vec::new();
    for entry in entries {
        names.extend(entry?.file_name().to_str().and_then(|n| n.parse().ok()));
    }
    Ok(names)
}

type Definition = Result<VmConfig, DefinitionError>;

/// What is known of one VM, besides what its runtime directory and its VMM say.
struct Known<'a> {
    store: Option<&'a StoreView>,
    saved: Option<SavedFact>,
    definition: Option<&'a Definition>,
    elsewhere: Option<&'a FrozenNote>,
    failed: Option<&'a Failed>,
}

fn row(host: &Host, name: VmName, known: &Known) -> VmRow {
    let dir = host.layout.vm_dir(&name);
    let instance = Instance::read(&dir);
    let up = VmLock::is_held(&dir);
    let answer = up.then(|| vmm::status_of(host, &name, vmm::STATUS_WAIT));
    let status = answer.as_ref().and_then(|a| a.as_ref().ok()).cloned();
    let own = |s: &&SegmentView| {
        // A segment of another life is not the one that this VM runs in.
        let running = status.as_ref().map(|status| status.id);
        s.vm.is_none() || running.is_none() || s.vm == running
    };
    let segment = known.store.and_then(|s| s.segment_of(&name)).filter(own);
    let mut row = VmRow {
        state: VmState::Stopped,
        detail: None,
        memory: memory_of(segment, instance.as_ref(), known),
        store: where_is_ram(host, segment, instance.as_ref(), known),
        segment: segment.filter(|s| !s.carried).map(|s| s.id.0),
        pid: status.as_ref().map(|s| s.pid),
        id: (status.as_ref().map(|s| s.id))
            .or(segment.and_then(|s| s.vm))
            .or(instance.as_ref().map(|i| i.vm))
            .map(|id| id.to_string()),
        life: Life::Absent,
        status,
        name,
    };
    let (state, life, detail) = match answer {
        Some(Ok(status)) => alive(&status),
        Some(Err(error)) => (
            VmState::Unresponsive,
            Life::Starting,
            Some(with_cause(&error)),
        ),
        None => match segments::stranded(host, known.store, &row.name) {
            Some((pid, why)) => {
                row.pid = pid;
                (VmState::Unresponsive, Life::Starting, Some(why.to_string()))
            }
            None => at_rest(host, &row.name, segment, instance.as_ref(), known),
        },
    };
    (row.state, row.life, row.detail) = (state, life, detail);
    row
}

fn memory_of(
    segment: Option<&SegmentView>,
    instance: Option<&Instance>,
    known: &Known,
) -> Option<ByteSize> {
    let defined = || Some(known.definition?.as_ref().ok()?.memory);
    let noted = known.elsewhere.map(|note| note.memory);
    segment
        .map(|s| s.memory)
        .filter(|m| m.0 > 0)
        .or(instance.map(|i| i.memory))
        .or(noted.filter(|m| m.0 > 0))
        .or_else(defined)
}

fn where_is_ram(
    host: &Host,
    segment: Option<&SegmentView>,
    instance: Option<&Instance>,
    known: &Known,
) -> Option<&'static str> {
    use hebe_types::StoreKind;
    if let Some(segment) = segment {
        return Some(if segment.carried {
            luo::STORE
        } else {
            "devdax"
        });
    }
    if let Some(instance) = instance {
        return Some(match instance.segment {
            Some(_) => "devdax",
            None if instance.files => luo::STORE,
            None => "memfd",
        });
    }
    let config = known.definition?.as_ref().ok()?;
    let device = known.store.filter(|s| !s.kept_only);
    Some(match (config.store, device) {
        (StoreKind::Devdax, _) | (StoreKind::Auto, Some(_)) => "devdax",
        (StoreKind::Luo, _) => luo::STORE,
        (StoreKind::Auto, None) if luo::may_be_chosen(host, config) => luo::STORE,
        (StoreKind::Memfd, _) | (StoreKind::Auto, None) => "memfd",
    })
}

type Found = (VmState, Life, Option<String>);

fn alive(status: &VmStatus) -> Found {
    let (state, life) = match status.state {
        VmmState::Running => (VmState::Running, Life::Running),
        VmmState::Paused => (VmState::Paused, Life::Paused),
        VmmState::Frozen => (VmState::Frozen, Life::Held),
        VmmState::Saved => (VmState::Saved, Life::SavedHeld),
    };
    let stands = matches!(life, Life::Running | Life::Paused);
    let life = match status.failed {
        Some(_) if stands => Life::Failed,
        _ => life,
    };
    let detail = if let Some(why) = &status.failed {
        Some(format!("failed, and cannot run again: {why}"))
    } else if status.guest_panicked {
        Some("its guest's kernel panicked".into())
    } else if status.stopped_devices.is_empty() {
        None
    } else {
        Some(format!(
            "devices stopped: {}",
            status.stopped_devices.join("; ")
        ))
    };
    (state, life, detail)
}

fn at_rest(
    host: &Host,
    name: &VmName,
    segment: Option<&SegmentView>,
    instance: Option<&Instance>,
    known: &Known,
) -> Found {
    let dir = &host.layout.vm_dir(name);
    let segments = known.store.iter().flat_map(|s| &s.segments);
    if segments.filter(|s| s.name.as_ref() == Some(name)).count() > 1 {
        let text = "several segments bear this name: `hebe store list` shows them";
        return (VmState::Damaged, Life::Crashed, Some(text.into()));
    }
    if let Some(found) = given_up(host, name, segment, known.saved) {
        return found;
    }
    if let Some(found) = from_persistent(segment, known.saved) {
        return found;
    }
    if let (None, Some(note)) = (segment, known.elsewhere) {
        let text = note.sentence(host, &notes::afresh(name));
        return (VmState::Lost, Life::Lost, Some(text));
    }
    let last = segment.and_then(|s| s.vm).or(instance.map(|i| i.vm));
    if let Some(failed) = known.failed.filter(|failed| failed.is_of(last)) {
        let text = failed.sentence.clone();
        return (VmState::Crashed, Life::Crashed, Some(text));
    }
    let was_up = instance.is_some();
    let exit = ExitRecord::read(dir);
    let ran = matches!(segment.map(|s| &s.exec), Some(ExecView::Running { .. }))
        || (was_up && segment.is_none());
    match (ran, exit) {
        (_, Some(record)) if record.is_clean_end() => {
            let text = record.words().to_owned();
            (VmState::Stopped, Life::Absent, Some(text))
        }
        (true, Some(_)) => (VmState::Crashed, Life::Crashed, Some(last_words(dir, None))),
        (true, None) => {
            let text = killed_by_cage(&files::tail(&dir.join("log"), 1))
                .or_else(|| out_of_memory(host, dir))
                .unwrap_or_else(|| "its VMM or the host stopped while it ran".into());
            (VmState::Crashed, Life::Crashed, Some(text))
        }
        (false, _) => match known.definition {
            Some(Err(error)) => (VmState::Damaged, Life::Absent, Some(error.to_string())),
            _ => (VmState::Stopped, Life::Absent, None),
        },
    }
}

/// What the kernel says of the VMM that this VM had last.
fn out_of_memory(host: &Host, dir: &Path) -> Option<String> {
    let why = host.system.out_of_memory(killed::noted(dir)?)?;
    Some(why.words().to_owned())
}

/// A state that must not be continued any more, or of which that cannot be told.
fn given_up(
    host: &Host,
    name: &VmName,
    segment: Option<&SegmentView>,
    saved: Option<SavedFact>,
) -> Option<Found> {
    let frozen = |s: &&SegmentView| matches!(s.exec, ExecView::Frozen { .. });
    let segment = segment.filter(frozen)?;
    match (notes::is_given_up(&host.layout, segment), saved) {
        (Ok(false), Some(_)) => None,
        (Ok(false), None) => match notes::unnoted(&host.layout, segment) {
            Ok(Some(text)) => Some((VmState::Frozen, Life::Frozen, Some(text))),
            _ => None,
        },
        (Ok(true), None) => {
            let text = hebe_flow::resume::given_up(name, segment.id);
            Some((VmState::Crashed, Life::Crashed, Some(text)))
        }
        // The file is all that counts.
        (Ok(true), saved) => from_persistent(None, saved),
        (Err(error), _) => Some((VmState::Frozen, Life::Frozen, Some(with_cause(&error)))),
    }
}

/// What segment and file alone decide.
fn from_persistent(segment: Option<&SegmentView>, saved: Option<SavedFact>) -> Option<Found> {
    let frozen = (VmState::Frozen, Life::Frozen);
    match (segment.map(|s| &s.exec), saved) {
        (Some(ExecView::Damaged { reason }), _) => {
            Some((VmState::Damaged, Life::Crashed, Some(reason.clone())))
        }
        (Some(ExecView::Frozen { .. }), None) => Some((frozen.0, frozen.1, None)),
        (Some(ExecView::Frozen { .. }), Some(_)) => {
            let text = "frozen in memory and saved in a file: only one of them may be continued";
            Some((frozen.0, frozen.1, Some(text.into())))
        }
        (Some(ExecView::Running { .. } | ExecView::Ended), Some(fact))
            if fact.is_restoring_into(segment.and_then(|s| s.vm)) =>
        {
            let text = "it ran after its restore and stopped without a state";
            Some((VmState::Crashed, Life::Crashed, Some(text.into())))
        }
        (_, Some(SavedFact::Complete)) => Some((VmState::Saved, Life::Saved, None)),
        (_, Some(SavedFact::Restoring { .. })) => {
            let text = "a restore was interrupted";
            Some((VmState::Saved, Life::Saved, Some(text.into())))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_told_by_files_alone() {
        let dir = tempfile::tempdir().expect("dir");
        let layout = Layout::below(dir.path());
        assert!(names(&layout).is_empty(), "nothing is there");
        let file = |place: &Path, name: &str| {
            fs::create_dir_all(place).expect("mkdir");
            fs::write(place.join(name), "no definition").expect("write");
        };
        let id = hebe_types::VmId([7; 16]);
        file(&layout.config.join("vms"), "a.toml");
        file(&layout.config.join("vms"), "no.toml.bak");
        file(&layout.config.join("vms"), "No.toml");
        file(&layout.state.join("vms"), "b.toml");
        file(&layout.state.join("saved"), "c.hebe");
        file(&layout.state.join("saved"), "c2.hebe.part");
        file(&layout.state.join("frozen"), &format!("d.{id}.json"));
        fs::create_dir_all(layout.vm_dir(&"e".parse().expect("name"))).expect("mkdir");
        let told: Vec<String> = names(&layout).iter().map(ToString::to_string).collect();
        assert_eq!(told, ["a", "b", "c", "d", "e"]);
    }
}
