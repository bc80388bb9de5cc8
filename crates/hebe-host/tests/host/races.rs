//! Orders that meet: what one saw is not what it finds.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use hebe_api::VmmState;
use hebe_host::definitions;
use hebe_host::listing::VmState;
use hebe_host::resume_all::{Resumed, resume_all};
use hebe_host::segments::drop_listed;
use hebe_host::stores::{ExecView, NewSegment, SegmentView, StoreAccess, StoreTrouble, StoreView};
use hebe_host::{Host, HostError, notes, ops, saving, vmm};
use hebe_sys::clock::stamp_now;
use hebe_types::{ByteSize, RebootMethod, SegmentId, VmId, VmName};

use crate::world::{World, name};

pub const CASES: &[crate::Case] = &[
    (
        "a_vm_that_is_frozen_after_the_look_is_dropped_by_order_only",
        frozen_after_the_look,
    ),
    (
        "a_segment_that_is_frozen_after_the_look_is_dropped_by_order_only",
        segment_frozen_after_the_look,
    ),
    (
        "of_two_runs_of_one_name_the_second_replaces_nothing_of_the_first",
        second_run,
    ),
    (
        "a_suspend_that_is_refused_leaves_the_notes_of_others",
        note_of_another,
    ),
    (
        "a_vm_that_comes_to_rest_while_another_boots_keeps_its_disk",
        at_rest_while_another_boots,
    ),
];

/// A store in which something happens, once.
struct Meanwhile {
    inner: Arc<dyn StoreAccess>,
    after: Moment,
    then: Mutex<Option<Box<dyn FnOnce() + Send>>>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Moment {
    /// Right after the first look at it.
    Look,
    /// A VMM is about to be started.
    Launch,
}

impl Meanwhile {
    fn come_to(&self, moment: Moment) {
        if moment == self.after
            && let Some(then) = self.then.lock().expect("lock").take()
        {
            then();
        }
    }
}

impl StoreAccess for Meanwhile {
    fn view(&self) -> Result<Option<StoreView>, StoreTrouble> {
        let seen = self.inner.view();
        self.come_to(Moment::Look);
        seen
    }
    fn create(&self, vm: VmId, name: &VmName, size: ByteSize) -> Result<NewSegment, StoreTrouble> {
        self.inner.create(vm, name, size)
    }
    fn drop_segment(&self, id: SegmentId, vm: Option<VmId>) -> Result<(), StoreTrouble> {
        self.inner.drop_segment(id, vm)
    }
    fn device(&self) -> Result<OwnedFd, StoreTrouble> {
        self.come_to(Moment::Launch);
        self.inner.device()
    }
    fn read_report(&self) -> Result<Option<Vec<u8>>, StoreTrouble> {
        self.inner.read_report()
    }
    fn write_report(&self, bytes: &[u8]) -> Result<(), StoreTrouble> {
        self.inner.write_report(bytes)
    }
    fn hold(&self) -> Result<(), StoreTrouble> {
        self.inner.hold()
    }
    fn release(&self) {
        self.inner.release();
    }
}

fn same(host: &Host) -> Host {
    Host {
        layout: host.layout.clone(),
        store: Arc::clone(&host.store),
        system: Arc::clone(&host.system),
    }
}

/// The host, in which `then` happens right after the first look at the store.
fn meanwhile(world: &World, then: impl FnOnce(&Host) + Send + 'static) -> Host {
    after(Moment::Look, world, then)
}

fn after(moment: Moment, world: &World, then: impl FnOnce(&Host) + Send + 'static) -> Host {
    let other = same(&world.host);
    let mut host = same(&world.host);
    host.store = Arc::new(Meanwhile {
        inner: Arc::clone(&world.host.store),
        after: moment,
        then: Mutex::new(Some(Box::new(move || then(&other)))),
    });
    host
}

fn frozen_after_the_look() {
    let world = World::new();
    world.start(&["web"]);
    let host = meanwhile(&world, |other| {
        ops::suspend(other, &name("web")).expect("suspends");
    });
    let error = ops::drop_worthless(&host, &name("web")).expect_err("it is frozen");
    let text = error.to_string();
    assert!(text.contains("frozen") && text.contains("--yes"), "{text}");
    assert_eq!(world.state("web"), VmState::Frozen);
    ops::drop_vm(&world.host, &name("web")).expect("meant");
    assert_eq!(world.segments(), 0);
}

fn segment_frozen_after_the_look() {
    let world = World::new();
    world.start(&["web"]);
    let view = world.host.store.view().expect("view").expect("store");
    ops::suspend(&world.host, &name("web")).expect("suspends");
    let worthless = |now: &SegmentView| match now.exec {
        ExecView::Frozen { .. } => Err(HostError::OrdersBusy),
        _ => Ok(()),
    };
    let dropped = drop_listed(&world.host, &view.segments[0], worthless);
    assert!(matches!(dropped, Err(HostError::OrdersBusy)));
    assert_eq!(world.state("web"), VmState::Frozen);
    drop_listed(&world.host, &view.segments[0], |_| Ok::<_, HostError>(())).expect("meant");
    assert_eq!(world.segments(), 0);
    let again = drop_listed(&world.host, &view.segments[0], worthless);
    assert!(matches!(again, Err(HostError::Store(_))), "{again:?}");
}

/// The first VM of that name boots, or boots and is frozen, after the second
/// order's look.
fn second_run() {
    for suspended in [false, true] {
        let world = World::new();
        world.define("web", "");
        let own = definitions::expected_path(&world.host.layout, &name("web"));
        let mut config = definitions::read_own(&own).expect("a definition");
        std::fs::remove_file(own).expect("not in /etc");
        config.store = hebe_types::StoreKind::Devdax;
        let first = config.clone();
        let host = meanwhile(&world, move |other| {
            ops::run_with(other, &first, Some(&[1; 512])).expect("runs");
            if suspended {
                ops::suspend(other, &name("web")).expect("suspends");
            }
        });
        config.vcpus = 2;
        let second = ops::run_with(&host, &config, Some(&[2; 512]));
        assert!(second.is_err(), "{second:?}");
        let seed = definitions::seed_path(&host.layout, &name("web"));
        let seed = std::fs::read(seed).expect("its disk");
        assert_eq!(seed, [1; 512], "the first VM has another disk");
        let (_, kept) = definitions::load(&host.layout, &name("web")).expect("its definition");
        assert_eq!(kept.vcpus, 1);
        let state = world.state("web");
        let wanted = [VmState::Running, VmState::Frozen][usize::from(suspended)];
        assert_eq!(state, wanted);
    }
}

/// Two orders to suspend at once: the one noted its VM and is about to freeze it,
/// and the other one's VM refuses.
fn note_of_another() {
    let world = World::new();
    world.start(&["db", "web"]);
    world.tell("web", "refuse-freeze");
    let view = world.host.store.view().expect("view").expect("store");
    let db = view.segment_of(&name("db")).expect("segment");
    notes::note(&world.host, &view, db).expect("noted");
    ops::suspend(&world.host, &name("web")).expect_err("it refuses");
    vmm::freeze(&world.host.layout.socket(&name("db")), vmm::FREEZE_WAIT).expect("freezes");
    let noted = notes::all(&world.host.layout);
    let noted: Vec<_> = noted.iter().map(|note| note.name.clone()).collect();
    assert_eq!(noted, [name("db")], "and not its own");
    world.next_boot();
    let all = resume_all(&world.host, stamp_now(), false).expect("not busy");
    assert_eq!(
        all.vms[&name("db")],
        Resumed::Resumed,
        "without a word more"
    );
}

/// The look before a boot finds a VM that runs with the same disk. By the time that
/// the disk is locked, that one is frozen, or saved.
fn at_rest_while_another_boots() {
    for (how, state) in [
        (RebootMethod::Warm, VmState::Frozen),
        (RebootMethod::Saved, VmState::Saved),
    ] {
        let world = World::new();
        let disk = world.root.path().join("disk.img");
        std::fs::write(&disk, vec![7; 1 << 20]).expect("disk");
        let disk = format!("[[disk]]\npath = \"{}\"\n", disk.display());
        world.define("db", &disk);
        world.define("web", &disk);
        ops::start(&world.host, &name("web")).expect("starts");
        let host = after(Moment::Launch, &world, move |other| match how {
            RebootMethod::Saved => save(other),
            _ => drop(ops::suspend(other, &name("web")).expect("suspends")),
        });
        let why = ops::start(&host, &name("db")).expect_err("its disk is taken");
        let why = why.to_string();
        for word in ["'db'", "disk.img", "web", "hebe drop web --yes"] {
            assert!(why.contains(word), "{why}");
        }
        assert!(!world.events().contains(&"db runs".to_owned()), "{how:?}");
        assert!(!host.layout.vm_dir(&name("db")).exists(), "nothing is left");
        assert_eq!(world.state("db"), VmState::Stopped);
        assert_eq!(world.state("web"), state);
        ops::resume(&world.host, &name("web"), ops::ResumeOptions::default()).expect("as it was");
    }
}

/// As a reboot does it, which holds all orders up.
fn save(host: &Host) {
    let web = name("web");
    saving::save_held(host, &web, None).expect("saves");
    vmm::quit(host, &web, Some(VmmState::Saved)).expect("ends");
    drop(ops::wait_for_end(host, &web, Duration::from_secs(20)).expect("ended"));
}
