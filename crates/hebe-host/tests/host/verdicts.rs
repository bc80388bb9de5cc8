//! Pre-flight: what is refused, and in which words; and the shapes of JSON.

use std::sync::atomic::Ordering;

use hebe_flow::reboot::Fate;
use hebe_host::ops;
use hebe_host::preflight::{Level, Verdict, preflight};
use hebe_host::reboot::{RebootEnd, reboot};
use hebe_host::saved::{SavedInfo, SavedPaths};
use hebe_types::RebootMethod;

use crate::world::{PATIENCE, RESERVED, World, name};

pub const CASES: &[crate::Case] = &[
    ("each_method_has_its_verdict_per_vm", verdicts),
    ("a_lost_reservation_is_refused", reservation),
    ("a_missing_kernel_is_refused", kernel),
    ("saved_vms_need_room_on_a_disk", room),
    ("a_missing_disk_is_refused", disk),
    ("a_reset_is_refused_while_a_vm_is_frozen", reset),
    ("vms_that_a_killed_manager_left_standing", left_standing),
    ("a_store_in_a_file_in_memory_is_refused", store_in_memory),
    ("what_this_process_may_not_do_is_found_out_first", may_not),
    ("a_running_vm_whose_segment_is_damaged", damaged_segment),
    (
        "a_vm_comes_back_with_what_it_was_started_with",
        started_with,
    ),
    ("a_paused_vm_is_told_that_it_will_run", paused),
    ("a_lost_vm_can_be_rebooted_back", lost),
    ("a_refused_reboot_touches_nothing", refused),
    ("the_json_of_lists_and_verdicts_keeps_its_shape", shapes),
];

fn verdict(world: &World, method: RebootMethod) -> Verdict {
    preflight(&world.host, &world.options(method), true).0
}

fn failed(verdict: &Verdict) -> Vec<&str> {
    let bad = verdict.checks.iter().filter(|c| c.level == Level::Fail);
    for check in bad.clone() {
        assert!(check.remedy.is_some(), "{check:?}");
    }
    bad.map(|c| c.id.as_str()).collect()
}

fn verdicts() {
    let world = World::new();
    world.start(&["web"]);
    world.define("anon", "store = \"memfd\"");
    ops::start(&world.host, &name("anon")).expect("starts");
    world.define("off", "");
    let of = |method| {
        let verdict = verdict(&world, method);
        assert!(verdict.passes(), "{}", verdict.why_not());
        let fate = |vm: &str| {
            let own = verdict.vms.iter().find(|v| v.vm == name(vm));
            own.expect("listed").fate
        };
        (fate("anon"), fate("off"), fate("web"))
    };
    let (keep, save, shut) = (Some(Fate::Keep), Some(Fate::Save), Some(Fate::ShutDown));
    assert_eq!(of(RebootMethod::Warm), (save, None, keep));
    assert_eq!(of(RebootMethod::Saved), (save, None, save));
    assert_eq!(of(RebootMethod::Cold), (shut, None, shut));
    let mut options = world.options(RebootMethod::Cold);
    options.kernel = None;
    let (cold, _) = preflight(&world.host, &options, true);
    assert_eq!(cold.leave, "reset");
}

fn reservation() {
    let world = World::new();
    world.start(&["web"]);
    let mut options = world.options(RebootMethod::Warm);
    for cmdline in ["quiet", "memmap=128M!4G", "memmap=256M!5G"] {
        options.cmdline = Some(cmdline.into());
        let (verdict, _) = preflight(&world.host, &options, true);
        assert_eq!(failed(&verdict), ["reservation"], "{cmdline}");
        assert!(verdict.why_not().contains("memmap=256M!4G"));
    }
    options.cmdline = None;
    options.append = Some(format!("{RESERVED} panic=1"));
    let (verdict, _) = preflight(&world.host, &options, true);
    assert!(verdict.passes(), "{}", verdict.why_not());
    let next = verdict.next.expect("kexec");
    assert_eq!(next.cmdline, format!("{RESERVED} panic=1"));
    options.append = Some("memmap=64M!8G".into());
    let (verdict, _) = preflight(&world.host, &options, true);
    assert_eq!(failed(&verdict), ["reservation"]);
}

fn kernel() {
    let world = World::new();
    let mut options = world.options(RebootMethod::Warm);
    options.kernel = Some("/no/such/kernel".into());
    let (verdict, _) = preflight(&world.host, &options, true);
    assert_eq!(failed(&verdict), ["kernel"]);
    world.machine.refuse_load.store(true, Ordering::Relaxed);
    let verdict = crate::verdicts::verdict(&world, RebootMethod::Warm);
    assert_eq!(failed(&verdict), ["kexec"]);
}

fn room() {
    let world = World::new();
    world.start(&["web"]);
    *world.machine.free.lock().expect("lock") = 1 << 20;
    let state = world.host.layout.state.clone();
    world.machine.volatile.lock().expect("lock").push(state);
    assert!(verdict(&world, RebootMethod::Warm).passes(), "not needed");
    let saved = verdict(&world, RebootMethod::Saved);
    assert_eq!(failed(&saved), ["state-dir", "disk-space"]);
    let cold = verdict(&world, RebootMethod::Cold);
    assert_eq!(failed(&cold), ["state-dir"]);
}

fn disk() {
    let world = World::new();
    let image = world.root.path().join("disk");
    std::fs::write(&image, "x").expect("write");
    world.define("web", &format!("[[disk]]\npath = \"{}\"", image.display()));
    ops::start(&world.host, &name("web")).expect("starts");
    assert!(verdict(&world, RebootMethod::Warm).passes());
    std::fs::remove_file(&image).expect("remove");
    let verdict = verdict(&world, RebootMethod::Warm);
    assert_eq!(failed(&verdict), ["files:web"]);
    ops::stop(
        &world.host,
        &name("web"),
        ops::StopOptions {
            timeout: PATIENCE,
            force: true,
        },
    )
    .expect("stops");
    let error = ops::start(&world.host, &name("web")).expect_err("no disk");
    assert!(error.to_string().contains("disk"), "{error}");
}

fn reset() {
    let world = World::new();
    world.start(&["web"]);
    ops::suspend(&world.host, &name("web")).expect("suspends");
    let mut options = world.options(RebootMethod::Saved);
    (options.hard, options.kernel) = (true, None);
    let (verdict, _) = preflight(&world.host, &options, true);
    assert_eq!(failed(&verdict), ["frozen:web"]);
    options = world.options(RebootMethod::Saved);
    assert!(preflight(&world.host, &options, true).0.passes());
}

/// Frozen or saved, with their VMMs alive, because no one told them to end.
fn left_standing() {
    let world = World::new();
    world.start(&["db", "web"]);
    let wait = PATIENCE;
    let layout = &world.host.layout;
    hebe_host::vmm::freeze(&layout.socket(&name("web")), wait).expect("freezes");
    let mut options = world.options(RebootMethod::Saved);
    (options.hard, options.kernel) = (true, None);
    let (verdict, _) = preflight(&world.host, &options, true);
    assert_eq!(failed(&verdict), ["frozen:web"]);
    let paths = SavedPaths::new(layout, &name("db"));
    let info = SavedInfo {
        vm: world.instance("db").expect("instance").vm,
        memory: hebe_types::ByteSize::mib(4),
        in_store: true,
        in_files: false,
        apart: false,
    };
    let part = paths.prepare(&info).expect("prepare");
    let socket = layout.socket(&name("db"));
    hebe_host::vmm::save(&socket, &part, &paths.part, wait).expect("saves");
    let verdict = crate::verdicts::verdict(&world, RebootMethod::Warm);
    assert_eq!(failed(&verdict), ["saved:db"]);
    paths.commit().expect("commit");
    let verdict = crate::verdicts::verdict(&world, RebootMethod::Warm);
    assert!(verdict.passes(), "{}", verdict.why_not());
}

fn store_in_memory() {
    let world = World::new();
    let root = world.root.path().to_owned();
    world.machine.volatile.lock().expect("lock").push(root);
    assert!(
        verdict(&world, RebootMethod::Warm).passes(),
        "nothing is in it"
    );
    world.start(&["web"]);
    assert_eq!(failed(&verdict(&world, RebootMethod::Warm)), ["store"]);
    ops::suspend(&world.host, &name("web")).expect("suspends");
    assert_eq!(failed(&verdict(&world, RebootMethod::Warm)), ["store"]);
}

fn may_not() {
    let world = World::new();
    world.start(&["web"]);
    let machine = &world.machine;
    for (flag, id) in [
        (&machine.not_root, "root"),
        (&machine.kexec_disabled, "kexec"),
        (&machine.read_only, "state-dir"),
    ] {
        flag.store(true, Ordering::Relaxed);
        assert_eq!(failed(&verdict(&world, RebootMethod::Warm)), [id]);
        flag.store(false, Ordering::Relaxed);
    }
    let config = world.host.layout.config.join("host.toml");
    let good = std::fs::read(&config).expect("read");
    std::fs::write(&config, "[service]\n").expect("write");
    let verdict = crate::verdicts::verdict(&world, RebootMethod::Warm);
    assert_eq!(failed(&verdict), ["host-config"]);
    std::fs::write(&config, good).expect("write");
    let mut options = world.options(RebootMethod::Warm);
    options.kernel = Some(world.root.path().to_owned());
    let (verdict, _) = preflight(&world.host, &options, true);
    assert_eq!(failed(&verdict), ["kernel"], "a directory is no kernel");
}

/// It would freeze, and not be found again.
fn damaged_segment() {
    use std::os::unix::fs::FileExt;
    let world = World::new();
    world.start(&["web"]);
    let view = world.host.store.view().expect("view").expect("store");
    let spec = &view.segment_of(&name("web")).expect("segment").spec;
    let spec: hebe_store::SegmentSpec = serde_json::from_str(spec).expect("spec");
    let path = world.root.path().join("store");
    let store = std::fs::File::options()
        .write(true)
        .open(path)
        .expect("open");
    let guard = spec.exec.offset + spec.exec.len - 4096;
    store.write_all_at(b"stray", guard).expect("damage");
    assert_eq!(
        failed(&verdict(&world, RebootMethod::Warm)),
        ["segment:web"]
    );
    assert!(verdict(&world, RebootMethod::Saved).passes());
    let error = ops::suspend(&world.host, &name("web")).expect_err("no way back");
    assert!(error.to_string().contains("hebe stop web"), "{error}");
    world.kill("web");
    let mut options = world.options(RebootMethod::Saved);
    (options.hard, options.kernel) = (true, None);
    let (reset, _) = preflight(&world.host, &options, true);
    assert_eq!(failed(&reset), ["segment:0"], "another release may read it");
}

/// Its definition counts from the next start on.
fn started_with() {
    let world = World::new();
    let image = world.root.path().join("disk");
    let disk = format!("[[disk]]\npath = \"{}\"", image.display());
    std::fs::write(&image, "x").expect("write");
    world.define("web", &disk);
    ops::start(&world.host, &name("web")).expect("starts");
    world.define("web", "[[disk]]\npath = \"/no/such/disk\"");
    assert!(verdict(&world, RebootMethod::Warm).passes());
    assert_eq!(failed(&verdict(&world, RebootMethod::Cold)), ["files:web"]);
    world.define("web", "");
    std::fs::remove_file(&image).expect("remove");
    assert_eq!(failed(&verdict(&world, RebootMethod::Warm)), ["files:web"]);
    assert!(verdict(&world, RebootMethod::Cold).passes());
    std::fs::write(&image, "x").expect("write");
    let kernel = world.root.path().join("kernel");
    std::fs::rename(&kernel, world.root.path().join("away")).expect("away");
    for method in [RebootMethod::Warm, RebootMethod::Saved] {
        let verdict = verdict(&world, method);
        let found = verdict.checks.iter().find(|c| c.id == "files:web");
        let found = found.expect("checked");
        assert_eq!(found.level, Level::Warn, "{found:?}");
        assert!(found.sentence.contains("reset"), "{found:?}");
    }
    let cold = verdict(&world, RebootMethod::Cold);
    assert!(failed(&cold).contains(&"files:web"), "it boots");
}

fn paused() {
    let world = World::new();
    world.start(&["web"]);
    let socket = world.host.layout.socket(&name("web"));
    let pause = hebe_api::Request::Pause;
    hebe_host::vmm::order(&socket, &pause, PATIENCE).expect("pauses");
    for method in [RebootMethod::Warm, RebootMethod::Saved, RebootMethod::Cold] {
        let verdict = verdict(&world, method);
        let sentence = &verdict.vms[0].sentence;
        assert!(sentence.contains("will run afterwards"), "{sentence}");
    }
}

/// The way out of a kernel without the reservation is one with it.
fn lost() {
    let world = World::new();
    world.start(&["web"]);
    world.reboot(RebootMethod::Warm);
    let bare = world.bare();
    let mut options = world.options(RebootMethod::Warm);
    for (words, fails) in [
        ("memmap=256M!4G", &[][..]),
        ("memmap=256M!5G", &["reservation"][..]),
        ("memmap=256M!4G memmap=64M!8G", &["reservation"][..]),
    ] {
        options.append = Some(words.into());
        let (verdict, _) = preflight(&bare, &options, true);
        assert_eq!(failed(&verdict), fails, "{words}");
    }
    let mut options = world.options(RebootMethod::Cold);
    options.kernel = None;
    let (reset, _) = preflight(&bare, &options, true);
    assert_eq!(
        failed(&reset),
        ["lost:web"],
        "memory may not outlive a reset"
    );
}

fn refused() {
    let world = World::new();
    world.start(&["web"]);
    world.forget_events();
    let mut options = world.options(RebootMethod::Warm);
    options.cmdline = Some("quiet".into());
    let end = reboot(&world.host, &options, &|_| {}).expect_err("refused");
    assert!(matches!(end, RebootEnd::Refused(why) if why.contains("memmap")));
    assert!(world.events().is_empty(), "{:?}", world.events());
}

fn shapes() {
    let world = World::new();
    world.start(&["web"]);
    let survey = hebe_host::listing::survey(&world.host);
    let row = serde_json::to_value(&survey.rows[&name("web")]).expect("json");
    assert_eq!(row["name"], "web");
    assert_eq!(row["state"], "running");
    assert_eq!(row["memory"], "4MiB");
    assert_eq!(row["store"], "devdax");
    assert!(row["pid"].is_u64() && row["segment"].is_u64());
    let verdict = serde_json::to_value(verdict(&world, RebootMethod::Warm)).expect("json");
    assert_eq!(verdict["method"], "warm");
    assert_eq!(verdict["leave"], "kexec");
    assert_eq!(verdict["vms"][0]["fate"], "keep");
    for check in verdict["checks"].as_array().expect("checks") {
        assert!(check["id"].is_string() && check["sentence"].is_string());
        assert!(["ok", "warn", "fail"].contains(&check["level"].as_str().expect("level")));
    }
    let store = serde_json::to_value(world.host.store.view().expect("view")).expect("json");
    assert_eq!(store["segments"][0]["exec"], "running");
    assert_eq!(store["segments"][0]["name"], "web");
}
