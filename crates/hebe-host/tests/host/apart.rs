//! VMs that were saved out of the store, under a kernel that has none; and what
//! the store says of them when it is there again.

use hebe_flow::resume::SavedFact;
use hebe_host::Host;
use hebe_host::listing::{self, VmState};
use hebe_host::ops::{self, ResumeOptions, StopOptions};
use hebe_host::resume_all::{Resumed, resume_all};
use hebe_host::saved::SavedPaths;
use hebe_host::stores::ExecView;
use hebe_sys::clock::stamp_now;
use hebe_types::{ByteSize, RebootMethod, VmId};

use crate::world::{World, name};

pub const CASES: &[crate::Case] = &[
    (
        "a_vm_saved_out_of_the_store_is_restored_where_there_is_none",
        goes_on,
    ),
    (
        "a_vm_that_is_to_be_in_the_store_alone_stays_saved_without_it",
        stays_saved,
    ),
    (
        "a_vm_that_ran_apart_from_the_store_never_meets_its_segment",
        old_segment,
    ),
    (
        "a_restore_apart_that_was_interrupted_needs_a_choice",
        interrupted,
    ),
    ("a_restore_apart_that_never_ran_keeps_its_file", never_ran),
    (
        "a_file_of_another_life_than_the_segments_is_kept",
        another_life,
    ),
];

const FORCE: StopOptions = StopOptions {
    timeout: std::time::Duration::ZERO,
    force: true,
};

/// VM `web`, saved by a reboot into a kernel without the store.
fn saved(more: &str) -> (World, Host, VmId) {
    let world = World::new();
    world.define("web", more);
    let id = ops::start(&world.host, &name("web")).expect("starts").id;
    world.reboot(RebootMethod::Saved);
    let bare = world.bare();
    (world, bare, id)
}

fn resumed(host: &Host) -> Resumed {
    let mut all = resume_all(host, stamp_now(), false).expect("not busy");
    all.vms.remove(&name("web")).expect("in the answer")
}

fn state(host: &Host) -> VmState {
    listing::survey(host).rows[&name("web")].state
}

fn paths(host: &Host) -> SavedPaths {
    SavedPaths::new(&host.layout, &name("web"))
}

/// Leaves a restore as a machine that stops in its midst does.
fn stop_in_restore(world: &World) {
    world.next_boot();
    std::fs::write(&paths(&world.host).restoring, "web").expect("left");
}

fn goes_on() {
    let (world, bare, id) = saved("");
    assert_eq!(resumed(&bare), Resumed::Restored);
    let row = listing::survey(&bare).rows.remove(&name("web"));
    let row = row.expect("listed");
    assert_eq!((row.state, row.store), (VmState::Running, Some("memfd")));
    assert_eq!(world.instance("web").expect("up").vm, id);
    assert_eq!(
        paths(&bare).fact(),
        None,
        "its memory is older than the disks"
    );
    // And back: what it left in the store does not stand in its way.
    world.reboot(RebootMethod::Saved);
    world.reserved();
    assert_eq!(resumed(&world.host), Resumed::Restored);
    assert_eq!(world.instance("web").expect("up").vm, id);
    assert_eq!(world.segments(), 0, "it is in a memfd until it boots");
}

fn stays_saved() {
    let (world, bare, id) = saved("store = \"devdax\"");
    let failed = resumed(&bare);
    assert!(
        matches!(&failed, Resumed::Failed { reason } if reason.contains("no store")),
        "{failed:?}"
    );
    assert_eq!(paths(&bare).fact(), Some(SavedFact::Complete));
    // The device of a range that is reserved may be on its way.
    world.define("web", "");
    *world.machine.cmdline.lock().expect("lock") = crate::world::RESERVED.into();
    assert!(matches!(resumed(&bare), Resumed::Failed { .. }));
    assert_eq!(state(&bare), VmState::Saved);
    assert_eq!(resumed(&world.host), Resumed::Restored);
    assert_eq!(world.instance("web").expect("up").vm, id);
    assert_eq!(world.segments(), 1);
}

fn old_segment() {
    for ended in [false, true] {
        let (world, bare, _) = saved("");
        assert_eq!(resumed(&bare), Resumed::Restored);
        if ended {
            ops::stop(&bare, &name("web"), FORCE).expect("stops");
        }
        world.reserved();
        let view = world.host.store.view().expect("view").expect("store");
        let segment = view.segment_of(&name("web")).expect("left").clone();
        assert!(!matches!(segment.exec, ExecView::Frozen { .. }));
        let resume = ops::resume(&world.host, &name("web"), ResumeOptions::default());
        assert!(resume.is_err(), "{resume:?}");
        let found = resumed(&world.host);
        let idle = matches!(found, Resumed::Lost { .. } | Resumed::Cleaned);
        assert!(idle, "{found:?}");
        ops::start(&world.host, &name("web")).expect("boots");
    }
}

/// Whatever the store shows of the life that was saved.
fn interrupted() {
    for made_anew in [false, true] {
        let (world, bare, id) = saved("");
        if made_anew {
            // A restore into the store that was stopped before it ran: the
            // segment alone would say that the file is as new as the disks.
            let store = &world.host.store;
            let view = store.view().expect("view").expect("store");
            let old = view.segment_of(&name("web")).expect("left").clone();
            store.drop_segment(old.id, old.vm).expect("freed");
            let made = store.create(id, &name("web"), ByteSize::mib(4));
            made.expect("made");
        }
        assert_eq!(resumed(&bare), Resumed::Restored);
        // It ran, and whoever restored it was killed before the file went.
        let info = hebe_host::saved::SavedInfo {
            vm: id,
            memory: ByteSize::mib(4),
            in_store: true,
            in_files: false,
            apart: true,
        };
        drop(paths(&bare).prepare(&info).expect("as it was"));
        stop_in_restore(&world);
        world.reserved();
        let found = resumed(&world.host);
        assert!(
            matches!(&found, Resumed::Left { reason } if reason.contains("--again")),
            "{made_anew}: {found:?}"
        );
        assert!(ops::start(&world.host, &name("web")).is_err());
        let left = paths(&world.host).fact();
        assert_eq!(left, Some(SavedFact::Restoring { into: None }));
        let again = ResumeOptions {
            again: true,
            ..ResumeOptions::default()
        };
        ops::resume(&world.host, &name("web"), again).expect("by order");
        assert_eq!(world.instance("web").expect("up").vm, id);
        assert_eq!((paths(&world.host).fact(), world.segments()), (None, 1));
    }
}

fn never_ran() {
    let (world, bare, id) = saved("");
    world.tell("web", "fail-start");
    assert!(matches!(resumed(&bare), Resumed::Failed { .. }));
    assert_eq!(paths(&bare).fact(), Some(SavedFact::Complete));
    world.tell("web", "");
    world.reserved();
    // Into the store now, and the file says so while that goes on.
    world.tell("web", "fail-start");
    assert!(matches!(resumed(&world.host), Resumed::Failed { .. }));
    world.tell("web", "");
    stop_in_restore(&world);
    let into = paths(&world.host).fact();
    assert_eq!(into, Some(SavedFact::Restoring { into: Some(id) }));
}

/// One life crashed in the store; a later one, elsewhere, was being restored
/// from its file.
fn another_life() {
    let world = World::new();
    world.start(&["web"]);
    world.next_boot();
    let bare = world.bare();
    let second = ops::start(&bare, &name("web")).expect("boots").id;
    world.reboot(RebootMethod::Saved);
    let file = paths(&bare);
    std::fs::rename(&file.complete, &file.restoring).expect("a restore began");
    world.reserved();
    let left = resumed(&world.host);
    assert!(matches!(left, Resumed::Left { .. }), "{left:?}");
    assert_eq!(state(&world.host), VmState::Saved);
    assert!(ops::start(&world.host, &name("web")).is_err());
    // Nor does one who stops what is not there take it away.
    let _ = ops::stop(&world.host, &name("web"), FORCE);
    assert!(file.restoring.exists(), "it may be all there is of the VM");
    let again = ResumeOptions {
        again: true,
        ..ResumeOptions::default()
    };
    ops::resume(&world.host, &name("web"), again).expect("by order");
    assert_eq!(world.instance("web").expect("up").vm, second);
}
