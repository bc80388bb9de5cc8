//! `hebe-vmm` in its cage, as the kernel sees it.

use std::fs;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use hebe_api::{Request, Response, VmmState};
use hebe_block::{BlockBackend, BlockError};
use hebe_snapshot::SavedFile;
use hebe_state::StateReader;
use hebe_state::v1::machine::GenerationIdV1;

use crate::guest;
use crate::vmm::Vmm;

const DISK: &str = "disk.img";

/// A VMM with a disk, caged as `wish` says.
fn start(wish: &str) -> Vmm {
    let dir = tempfile::tempdir().expect("dir");
    let kernel = dir.path().join("kernel");
    fs::write(&kernel, guest::image(guest::IDLE)).expect("kernel");
    let disk = dir.path().join(DISK);
    fs::write(&disk, vec![0; 1 << 20]).expect("disk");
    let config = format!(
        "name = 'web'\nmemory = '8MiB'\nkernel = '{}'\n[[disk]]\npath = '{}'\n",
        kernel.display(),
        disk.display()
    );
    Vmm::start(dir, &config, |command| {
        command.args(["--cage", wish]);
        Vec::new()
    })
}

/// Saves its VM into a new file, which it is handed.
fn save(vmm: &Vmm, path: &Path) {
    let file = fs::File::create_new(path).expect("a new file");
    let request = Request::Save {
        name: "web's file".into(),
    };
    let saved = vmm.connect().call_with(&request, &[file.as_fd()]);
    assert!(matches!(saved, Ok(Response::Saved(_))), "{saved:?}");
}

/// A field of what /proc says of the thread.
fn field(task: &Path, name: &str) -> String {
    let status = fs::read_to_string(task.join("status")).expect("status");
    let line = status.lines().find(|l| l.starts_with(name));
    let line = line.unwrap_or_else(|| panic!("no {name} in {status}"));
    line.trim_start_matches(name).trim().to_owned()
}

fn numbers(text: &str) -> Vec<u32> {
    let words = text.split_whitespace();
    words.map(|word| word.parse().expect("a number")).collect()
}

/// A thread takes its name, and its own filters, after it began: that of the vCPU
/// and those of console, entropy and disk.
fn wait_for_threads(tasks: &str) {
    let until = Instant::now() + Duration::from_secs(120);
    let narrowed = |kind: &str| {
        let tasks = fs::read_dir(tasks).expect("tasks").flatten();
        let is_one = |task: PathBuf| {
            fs::read_to_string(task.join("comm")).is_ok_and(|name| name.starts_with(kind))
                && field(&task, "Seccomp_filters:") == "4"
        };
        tasks.filter(|task| is_one(task.path())).count()
    };
    while narrowed("vcpu") < 1 || narrowed("virtio-") < 3 {
        assert!(Instant::now() < until, "threads are not in their cages");
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn every_thread_of_a_vmm_is_in_the_cage_and_the_status_says_so() {
    if guest::cannot_run() {
        return;
    }
    let vmm = start("on");
    let status = vmm.status();
    let cage = status.cage.expect("a cage");
    for part in ["limits", "user", "capabilities", "seccomp"] {
        let is_on = cage.parts.iter().any(|p| p.name == part && p.on);
        assert!(is_on, "{part}: {cage}");
    }
    for open in cage.open() {
        assert!(vmm.log().contains(&open.detail), "{open:?} is not told");
    }
    let log = vmm.log();
    let ways = [": reads by io_uring", ": reads one by one, because "];
    assert!(ways.iter().any(|way| log.contains(way)), "{log}");
    assert_eq!(status.disk_rings, [log.contains(ways[0])]);
    let (mut vcpus, mut devices) = (0, 0);
    let tasks = format!("/proc/{}/task", vmm.child.id());
    wait_for_threads(&tasks);
    for task in fs::read_dir(tasks).expect("tasks") {
        let task = task.expect("task").path();
        // One that served a connection may be gone by now; one of KVM's own
        // takes after the vCPU that it was made for.
        let Ok(name) = fs::read_to_string(task.join("comm")) else {
            continue;
        };
        if name.starts_with("control") || name.starts_with("kvm-") {
            continue;
        }
        let on = (field(&task, "NoNewPrivs:"), field(&task, "Seccomp:"));
        assert_eq!(on, ("1".into(), "2".into()), "{name}");
        let layers: u32 = field(&task, "Seccomp_filters:").parse().expect("a number");
        let is_vcpu = name.starts_with("vcpu");
        let narrower = is_vcpu || name.starts_with("virtio-");
        assert_eq!(layers, if narrower { 4 } else { 3 }, "{name}");
        devices += u32::from(name.starts_with("virtio-"));
        // Real, effective and saved, and for files; no other group.
        let users: Vec<u32> = numbers(&field(&task, "Uid:"));
        assert!(
            users[..3].iter().all(|u| *u >= 1_900_000_000),
            "{name} {users:?}"
        );
        let groups: Vec<u32> = numbers(&field(&task, "Gid:"));
        assert!(
            groups.iter().all(|g| *g >= 1_900_000_000),
            "{name} {groups:?}"
        );
        assert_eq!(field(&task, "Groups:"), "", "{name}");
        vcpus += u32::from(is_vcpu);
        for set in ["CapInh:", "CapPrm:", "CapEff:", "CapAmb:"] {
            assert_eq!(field(&task, set), "0000000000000000", "{name} {set}");
        }
    }
    assert_eq!(vcpus, 1);
    assert!(devices >= 3, "console, entropy, disk: {devices}");
    let limits = format!("/proc/{}/limits", vmm.child.id());
    if let Ok(limits) = fs::read_to_string(limits) {
        let core = limits.lines().find(|l| l.starts_with("Max core file size"));
        let words: Vec<_> = core.expect("core").split_whitespace().collect();
        assert_eq!(words[4..6], ["0", "0"]);
    }
}

/// The kernel takes the ring of a disk down some time after its process is gone;
/// whoever resumes the VM opens the disk before that.
#[test]
fn the_disk_of_a_vmm_that_was_killed_is_free_at_once() {
    if guest::cannot_run() {
        return;
    }
    for _ in 0..5 {
        let mut vmm = start("on");
        let disk = vmm.dir.path().join(DISK);
        assert_eq!(vmm.status().state, VmmState::Running);
        let open = || BlockBackend::open(&disk, false);
        assert!(matches!(open(), Err(BlockError::Busy(_))));
        vmm.child.kill().expect("kill");
        vmm.child.wait().expect("wait");
        open().expect("nobody has it");
    }
}

#[test]
fn a_caged_vm_is_saved_frozen_thawed_and_ended() {
    if guest::cannot_run() {
        return;
    }
    let mut vmm = start("on");
    assert_eq!(vmm.status().state, VmmState::Running);
    let path = vmm.dir.path().join("web.part");
    save(&vmm, &path);
    let saved = SavedFile::open(&path).expect("a saved VM");
    saved.verify().expect("whole");
    for request in [Request::Unpause, Request::Freeze, Request::Thaw] {
        let answer = vmm.ask(&request);
        let good = matches!(answer, Ok(Response::Done | Response::Frozen(_)));
        assert!(good, "{request:?}: {answer:?}: {}", vmm.log());
    }
    let ended = vmm.ask(&Request::Quit { expected: None });
    assert!(matches!(ended, Ok(Response::Done)), "{ended:?}");
    assert_eq!(vmm.wait().1["reason"], "quit");
}

#[test]
fn a_vm_that_is_restored_leaves_word_of_what_it_uses() {
    if guest::cannot_run() {
        return;
    }
    let mut vmm = start("on");
    let path = vmm.dir.path().join("web.part");
    save(&vmm, &path);
    let ended = vmm.ask(&Request::Quit { expected: None });
    assert!(matches!(ended, Ok(Response::Done)), "{ended:?}");
    vmm.wait();
    let dir = tempfile::tempdir().expect("dir");
    let restored = Vmm::start(dir, "", |command| {
        command.arg("--restore").arg(&path);
        Vec::new()
    });
    assert_eq!(restored.status().state, VmmState::Running);
    let text = fs::read_to_string(restored.dir.path().join("config.toml")).expect("config");
    let disk = vmm.dir.path().join(DISK);
    assert!(text.contains(&disk.display().to_string()), "{text}");
}

/// The VM generation ID in a saved VM.
fn generation(path: &Path) -> GenerationIdV1 {
    let saved = SavedFile::open(path).expect("a saved VM");
    let mut reader = StateReader::parse(saved.state()).expect("parse");
    reader.take(0).expect("an ID")
}

#[test]
fn a_vm_that_is_restored_has_sockets_and_another_generation() {
    if guest::cannot_run() {
        return;
    }
    let mut vmm = Vmm::run(guest::IDLE, "generation_id = true\n[vsock]\n");
    let file = |vmm: &Vmm| vmm.dir.path().join("web.part");
    save(&vmm, &file(&vmm));
    let ended = vmm.ask(&Request::Quit { expected: None });
    assert!(matches!(ended, Ok(Response::Done)), "{ended:?}");
    vmm.wait();
    let mut seen = vec![generation(&file(&vmm))];
    // Two copies of one guest.
    for _ in 0..2 {
        let restored = Vmm::start(tempfile::tempdir().expect("dir"), "", |command| {
            command.arg("--restore").arg(file(&vmm));
            Vec::new()
        });
        assert_eq!(restored.status().state, VmmState::Running);
        UnixStream::connect(restored.dir.path().join("vsock.sock")).expect("sockets");
        save(&restored, &file(&restored));
        let own = generation(&file(&restored));
        assert!(!seen.contains(&own), "no two alike");
        seen.push(own);
    }
}

/// A guest that owns its VMM writes a state that names another disk.
#[test]
fn a_state_that_names_another_definition_is_refused_before_anything_is_opened() {
    if guest::cannot_run() {
        return;
    }
    let mut vmm = start("on");
    let path = vmm.dir.path().join("web.part");
    save(&vmm, &path);
    let ended = vmm.ask(&Request::Quit { expected: None });
    assert!(matches!(ended, Ok(Response::Done)), "{ended:?}");
    vmm.wait();
    let own = fs::read_to_string(vmm.dir.path().join("config.toml")).expect("config");
    let booted_with = own.replace(DISK, "innocent.img");
    for (text, refused) in [(own.as_str(), false), ("?", false), (&booted_with, true)] {
        let known = vmm.dir.path().join("web.toml");
        fs::write(&known, text).expect("what it was booted with");
        let dir = tempfile::tempdir().expect("dir");
        let mut restored = Vmm::start(dir, "", |command| {
            command.arg("--restore").arg(&path);
            command.arg("--expect").arg(&known);
            Vec::new()
        });
        if !refused {
            assert_eq!(restored.status().state, VmmState::Running);
            continue;
        }
        let (success, record) = restored.wait();
        assert!(!success);
        assert_eq!(record["ran"], false);
        let message = record["message"].to_string();
        assert!(message.contains("another definition"), "{message}");
    }
}

#[test]
fn a_vmm_without_a_cage_says_so_loudly() {
    if guest::cannot_run() {
        return;
    }
    let vmm = start("off");
    let status = vmm.status();
    let cage = status.cage.expect("a report");
    assert!(!cage.is_whole());
    assert!(cage.to_string().contains("--no-sandbox"), "{cage}");
    assert!(vmm.log().contains("NOT CAGED"), "{}", vmm.log());
}
