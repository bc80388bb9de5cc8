//! What was frozen in which store: notes on the host's disk, for the boot in
//! which that store is not there.
//!
//! A VM that is frozen is resumed from its segment alone; of its note only that
//! it is there is needed, see below. But a kernel that was booted without the reservation finds no store,
//! and would take the VM for one that is merely stopped. Its memory may still
//! be there, so two things must not happen:
//!
//! - nobody boots it by mistake: that needs an order that says so
//!   (`hebe start NAME --afresh`);
//! - once it was booted, or given up, its frozen state must never be resumed
//!   when the store comes back: its disks went on (old RAM never meets a newer
//!   disk).
//!
//! ```text
//!          before it is frozen            given up: durable before the VM boots
//!   – ────────────────────────▶ noted ─────────────────────────────▶ given up
//!   ▲                             │                                     │
//!   └── it runs again, or its segment is gone ◀── its segment is freed ─┘
//! ```
//!
//! One file per life of a VM, `frozen/NAME.ID.json`, so that orders for
//! different VMs never write the same file. A note that outlives its reason is
//! harmless: it counts only where its store is not the one that is here.
//!
//! Because it is written before each freeze, a frozen VM without a note is a
//! proof that this directory is not the one: not mounted yet, for one. Nothing
//! here would say that the VM was given up, so it is not resumed unasked.

use std::fs;
use std::io;
use std::path::PathBuf;

use hebe_types::{ByteSize, VmId, VmName};
use serde::{Deserialize, Serialize};

use crate::cmdline;
use crate::files;
use crate::host::{Host, HostError, Layout};
use crate::listing::with_cause;
use crate::luo::arrivals::Arrivals;
use crate::luo::ended_here;
use crate::stores::{ExecView, SegmentView, StoreView};

const VERSION: u32 = 1;
/// Stands for a store's id where memory is carried by Linux itself.
const CARRIED: &str = "luo";

/// One frozen VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FrozenNote {
    /// Layout of this file.
    version: u32,
    /// Its name.
    pub name: VmName,
    /// Its identity.
    pub vm: VmId,
    /// Guest RAM.
    pub memory: ByteSize,
    /// The id of the store that it was frozen in.
    pub store: String,
    /// The store's device then.
    pub path: PathBuf,
    /// The words of the kernel's command line that reserved the store.
    pub reserved: Vec<String>,
    /// When this was noted: nanoseconds since 1970.
    pub noted_ns: u64,
    /// Its frozen memory must not be continued any more.
    pub given_up: bool,
}

fn dir(layout: &Layout) -> PathBuf {
    layout.state.join("frozen")
}

fn path(layout: &Layout, name: &VmName, vm: VmId) -> PathBuf {
    dir(layout).join(format!("{name}.{vm}.json"))
}

/// Notes that a VM is about to be frozen in its segment, or is; durable when
/// this returns without error.
///
/// # Errors
/// [`HostError::Refused`] where the same life of the VM was given up in another
/// store, which must not be forgotten; the file cannot be written.
pub fn note(host: &Host, store: &StoreView, segment: &SegmentView) -> Result<(), HostError> {
    let (Some(name), Some(vm)) = (&segment.name, segment.vm) else {
        return Ok(());
    };
    let store_id = id_of(store);
    keep_word(host, name, vm, &store_id)?;
    let note = FrozenNote {
        version: VERSION,
        name: name.clone(),
        vm,
        memory: segment.memory,
        store: store_id,
        path: store.path.clone(),
        reserved: reserved(host, store),
        noted_ns: host.system.stamp().realtime_ns,
        given_up: false,
    };
    note.write(&host.layout)
}

/// Refuses to replace the word that the same life of a VM was given up in
/// another store than `store`.
fn keep_word(host: &Host, name: &VmName, vm: VmId, store: &str) -> Result<(), HostError> {
    let given_up = read(&host.layout, name, vm)?.filter(|n| n.given_up && n.store != store);
    let Some(old) = given_up else {
        return Ok(());
    };
    Err(HostError::Refused {
        name: name.clone(),
        why: format!(
            "its memory in store {} was given up, and a note of this state would replace the word of that: shut it down and `hebe start {name}`, or save it to a file",
            old.store
        ),
    })
}

/// [`note`], for a VM whose memory Linux carries.
///
/// # Errors
/// As [`note`].
pub(crate) fn note_carried(
    host: &Host,
    name: &VmName,
    vm: VmId,
    memory: ByteSize,
) -> Result<(), HostError> {
    keep_word(host, name, vm, CARRIED)?;
    let note = FrozenNote {
        version: VERSION,
        name: name.clone(),
        vm,
        memory,
        store: CARRIED.to_owned(),
        path: PathBuf::new(),
        reserved: Vec::new(),
        noted_ns: host.system.stamp().realtime_ns,
        given_up: false,
    };
    note.write(&host.layout)
}

fn id_of(store: &StoreView) -> String {
    VmId(store.uuid).to_string()
}

/// The words that reserve the store; all there are where its place is unknown.
fn reserved(host: &Host, store: &StoreView) -> Vec<String> {
    let all = cmdline::reservations(&host.system.cmdline());
    let covers = |r: &&cmdline::Reservation| {
        let place = store.phys_range;
        place.is_none_or(|(start, len)| cmdline::covers(r, start, len))
    };
    all.iter().filter(covers).map(cmdline::written).collect()
}

/// The note of one life of a VM, if there is one.
///
/// # Errors
/// There is one, and it cannot be read.
pub fn read(layout: &Layout, name: &VmName, vm: VmId) -> Result<Option<FrozenNote>, HostError> {
    let path = path(layout, name, vm);
    let read: io::Result<Option<FrozenNote>> = files::read_json(&path);
    let known = |note: FrozenNote| {
        let newer = "it is of another release";
        let same = note.version == VERSION && note.vm == vm;
        same.then_some(note).ok_or_else(|| io::Error::other(newer))
    };
    let checked = read.and_then(|note| note.map(known).transpose());
    checked.map_err(|error| HostError::Refused {
        name: name.clone(),
        why: format!(
            "{} cannot be read ({}), so nobody knows whether it was started afresh since it was frozen: if it was not, remove that file, and `hebe resume {name} --unnoted`",
            path.display(),
            with_cause(&error)
        ),
    })
}

/// Every note. One that cannot be read counts as noted, in a store that is not
/// here. None where they cannot be listed: for whoever shows them.
pub fn all(layout: &Layout) -> Vec<FrozenNote> {
    listed(layout).unwrap_or_default()
}

/// [`all`], for whoever boots a VM where there is none.
///
/// # Errors
/// They cannot be listed, though there may be some.
fn listed(layout: &Layout) -> Result<Vec<FrozenNote>, HostError> {
    let dir = dir(layout);
    let failed = || HostError::file("list the notes in", &dir);
    let entries = match fs::read_dir(&dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(failed()(e)),
    };
    let mut notes = Vec::new();
    for entry in entries {
        let file = entry.map_err(failed())?.file_name();
        notes.extend(file.to_str().and_then(|file| named(layout, file)));
    }
    Ok(notes)
}

/// The note that has this name.
fn named(layout: &Layout, file: &str) -> Option<FrozenNote> {
    let (name, vm) = file.strip_suffix(".json")?.split_once('.')?;
    let (name, vm) = (name.parse().ok()?, hebe_sys::proc::parse_uuid(vm)?);
    match read(layout, &name, VmId(vm)) {
        Ok(note) => note.filter(|n| !n.is_carried() || !ended_here(layout, &n.name, n.vm)),
        Err(_) => Some(FrozenNote::unreadable(name, VmId(vm))),
    }
}

/// Forgets a life of a VM: it runs again, or its segment is gone. A file that
/// cannot be removed is harmless, see the module's head.
pub fn forget(layout: &Layout, name: &VmName, vm: VmId) {
    let _ = files::remove_durably(&path(layout, name, vm));
}

/// [`forget`], of a life that goes on in the store that is here: what was given
/// up in another one stays so.
pub(crate) fn forget_here(host: &Host, name: &VmName, vm: VmId) {
    if let Ok(Some(note)) = read(&host.layout, name, vm)
        && note.given_up
    {
        let here = host.store.view().ok().flatten();
        if here.as_ref().map(id_of) != Some(note.store) {
            return;
        }
    }
    forget(&host.layout, name, vm);
}

/// Forgets what the store that is here shows to be over: whose segment is gone,
/// or holds no state any more. Only for one who holds the lock of all VMs: one
/// that another order is about to freeze is noted and holds no state yet.
pub fn settle(layout: &Layout, store: &StoreView) {
    for note in all(layout) {
        if note.store == id_of(store) && is_over(store, note.vm) {
            forget(layout, &note.name, note.vm);
        }
    }
}

/// [`settle`], of the one VM that was to be frozen in `segment`: it refused.
pub(crate) fn settle_one(host: &Host, store: &StoreView, segment: &SegmentView) {
    if let (Some(name), Some(vm)) = (&segment.name, segment.vm)
        && is_over(store, vm)
    {
        forget_here(host, name, vm);
    }
}

/// Whether a store holds no state of that life of a VM, for certain.
fn is_over(store: &StoreView, vm: VmId) -> bool {
    let own = store.segments.iter().find(|s| s.vm == Some(vm));
    let kept =
        own.is_some_and(|s| matches!(s.exec, ExecView::Frozen { .. } | ExecView::Damaged { .. }));
    // A damaged record names no VM that could be compared.
    let unknown = store.segments.iter().any(|s| s.vm.is_none());
    !kept && !unknown
}

/// Forgets everything in a store that was made anew.
pub fn forget_store(layout: &Layout, uuid: [u8; 16]) {
    let gone = VmId(uuid).to_string();
    for note in all(layout).iter().filter(|n| n.store == gone) {
        forget(layout, &note.name, note.vm);
    }
}

/// Of these notes those whose VM may still be frozen in a store that is not
/// here, or behind a record of this one that cannot be read.
pub fn elsewhere<'a>(
    notes: &'a [FrozenNote],
    store: Option<&'a StoreView>,
) -> impl Iterator<Item = &'a FrozenNote> {
    let here = store.map(id_of);
    let unknown = store.is_some_and(|s| s.segments.iter().any(|x| x.vm.is_none()));
    notes.iter().filter(move |note| {
        let listed = || store.is_some_and(|s| s.segments.iter().any(|x| x.vm == Some(note.vm)));
        let away = unknown || Some(&note.store) != here.as_ref();
        !note.given_up && away && !listed()
    })
}

/// Refuses to bring a VM to life while its memory may be frozen in a store that
/// is not here; or, where an operator said so, gives that memory up for good.
/// Gives the notes that it marked. The caller holds the VM's lock.
///
/// # Errors
/// [`HostError::Refused`] with `way`, the order that says so; the notes cannot be
/// listed, or the mark not be written.
pub(crate) fn give_up_elsewhere(
    host: &Host,
    name: &VmName,
    store: Option<&StoreView>,
    meant: bool,
    way: &str,
) -> Result<Vec<FrozenNote>, HostError> {
    let notes = listed(&host.layout)?;
    let own = elsewhere(&notes, store).filter(|n| n.name == *name);
    let mut marked = Vec::new();
    for note in own {
        if !meant {
            return Err(HostError::Refused {
                name: name.clone(),
                why: note.sentence(host, way),
            });
        }
        let mark = FrozenNote {
            given_up: true,
            ..note.clone()
        };
        mark.write(&host.layout)?;
        marked.push(note.clone());
    }
    Ok(marked)
}

/// Undoes [`give_up_elsewhere`] for a VM that certainly never ran.
pub(crate) fn take_back(host: &Host, marked: &[FrozenNote]) {
    for note in marked {
        // The mark stays where it cannot be removed: safe, and said by nobody.
        let _ = note.write(&host.layout);
    }
}

/// Whether the state in a segment must not be continued any more.
pub(crate) fn is_given_up(layout: &Layout, segment: &SegmentView) -> Result<bool, HostError> {
    let (Some(name), Some(vm)) = (&segment.name, segment.vm) else {
        return Ok(false);
    };
    Ok(read(layout, name, vm)?.is_some_and(|note| note.given_up))
}

/// Why the state in a segment is not continued without an order that says so:
/// it was frozen under another state directory than this one.
pub(crate) fn unnoted(layout: &Layout, segment: &SegmentView) -> Result<Option<String>, HostError> {
    let (Some(name), Some(vm)) = (&segment.name, segment.vm) else {
        return Ok(None);
    };
    if layout.unnoted || read(layout, name, vm)?.is_some() {
        return Ok(None);
    }
    Ok(Some(format!(
        "nothing in {} says that it was frozen, which is noted there before that is done: the state directory is not mounted, or is another one, and only there stands whether the VM was started afresh since; mount it and `hebe resume {name}`, or say `hebe resume {name} --unnoted` if its disks certainly did not go on without it",
        dir(layout).display()
    )))
}

/// The orders that give up a VM that is frozen elsewhere.
pub(crate) fn afresh(name: &VmName) -> String {
    format!("`hebe start {name} --afresh` or `hebe drop {name} --yes`")
}

impl FrozenNote {
    fn unreadable(name: VmName, vm: VmId) -> Self {
        Self {
            version: VERSION,
            name,
            vm,
            memory: ByteSize(0),
            store: "unknown (its note cannot be read)".into(),
            path: PathBuf::new(),
            reserved: Vec::new(),
            noted_ns: 0,
            given_up: false,
        }
    }

    /// Its memory was to be carried by Linux.
    pub(crate) fn is_carried(&self) -> bool {
        self.store == CARRIED
    }

    fn write(&self, layout: &Layout) -> Result<(), HostError> {
        let path = path(layout, &self.name, self.vm);
        files::write_json(&path, self).map_err(HostError::file("write", &path))
    }

    /// What is said of the VM where its store is not here, with the ways out;
    /// `way_out` is the order that gives its memory up.
    pub fn sentence(&self, host: &Host, way_out: &str) -> String {
        let Self { store, .. } = self;
        let asked = || Arrivals::read(host).is_some_and(|arrivals| arrivals.complete);
        if self.is_carried() && host.system.live_update().is_ok() && !asked() {
            return format!(
                "it was frozen in memory that Linux was to carry into this kernel, and nobody has asked the kernel for it yet: `hebe resume --all` does; {way_out} give it up for good"
            );
        }
        if self.is_carried() {
            return format!(
                "it was frozen in memory that Linux was to carry into this kernel, and did not arrive, or its VMM ended since (`dmesg | grep -iE 'kho|luo'` may say why): that memory is gone; boot it anew with {way_out}"
            );
        }
        let here = host.store.view().ok().flatten();
        if here.is_some_and(|here| id_of(&here) == *store) {
            return format!(
                "its memory was frozen in this store, and its record may be one of those that cannot be read (`hebe store list` shows them): read it with the release or kernel that wrote it, or give that memory up for good with {way_out}"
            );
        }
        let running = cmdline::reservations(&host.system.cmdline());
        let running: Vec<String> = running.iter().map(cmdline::written).collect();
        let way = if self.reserved.is_empty() {
            "bring that store back".to_owned()
        } else if self.reserved.iter().all(|word| running.contains(word)) {
            "see `hebe host check` for what hides it".to_owned()
        } else {
            format!("boot the kernel with {}", self.reserved.join(" "))
        };
        format!(
            "its memory was frozen in store {store}, which this kernel does not have: {way} to continue it, or give that memory up for good with {way_out}"
        )
    }
}
