//! The program itself: exit statuses, JSON and sentences, on a host without
//! VMs whose store is a plain file.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Output};
use std::thread;
use std::time::{Duration, Instant};

use hebe_store::{Access, Segment, Store, StoreError};
use hebe_types::{ByteSize, VmId};
use serde_json::Value;

struct Host {
    root: tempfile::TempDir,
}

/// A program that another test starts holds each lock of this process, too, until
/// it is itself: between `fork` and `exec`.
fn manage(path: &Path) -> Store {
    let until = Instant::now() + Duration::from_secs(120);
    loop {
        match Store::open(path, Access::Manage) {
            Err(StoreError::Busy(_)) if Instant::now() < until => {
                thread::sleep(Duration::from_millis(1));
            }
            opened => return opened.expect("store"),
        }
    }
}

impl Host {
    fn new() -> Self {
        let root = tempfile::tempdir().expect("dir");
        let store = fs::File::create(root.path().join("store")).expect("create");
        store.set_len(64 << 20).expect("size");
        Self { root }
    }

    fn path(&self, file: &str) -> String {
        self.root.path().join(file).display().to_string()
    }

    fn hebe(&self, arguments: &[&str]) -> Output {
        let root: &Path = self.root.path();
        Command::new(env!("CARGO_BIN_EXE_hebe"))
            .args(arguments)
            .env("HEBE_RUN_DIR", root.join("run"))
            .env("HEBE_CONFIG_DIR", root.join("etc"))
            .env("HEBE_STATE_DIR", root.join("state"))
            .env("HEBE_STORE", root.join("store"))
            .env("HEBE_VMM", "/no/such/hebe-vmm")
            .output()
            .expect("hebe runs")
    }

    fn json(&self, arguments: &[&str]) -> (i32, Value) {
        let output = self.hebe(&[&["--json"], arguments].concat());
        let value = serde_json::from_slice(&output.stdout).unwrap_or_else(|e| {
            panic!(
                "{arguments:?}: {e}: {}",
                String::from_utf8_lossy(&output.stdout)
            )
        });
        (output.status.code().expect("exited"), value)
    }

    /// A VM that is frozen in the store, and damaged there if asked for.
    fn freeze(&self, name: &str, damaged: bool) {
        let path = self.root.path().join("store");
        let mut store = manage(&path);
        let (name, memory) = (name.parse().expect("name"), ByteSize::mib(2));
        let vm = VmId([store.segments().expect("segments").len() as u8 + 1; 16]);
        let spec = store.create(vm, &name, memory).expect("segment");
        let open = fs::File::options().read(true).write(true).open(&path);
        let file = open.expect("open");
        let own = file.try_clone().expect("descriptor").into();
        let segment = Segment::map(own, &spec).expect("map");
        segment.exec().commit_frozen(b"state").expect("commit");
        if damaged {
            let end = spec.exec.offset + spec.exec.len;
            file.write_all_at(b"stray", end - 4096).expect("write");
        }
    }

    /// Exit status and the one sentence.
    fn fails(&self, arguments: &[&str]) -> (i32, String) {
        let output = self.hebe(arguments);
        let text = String::from_utf8(output.stderr).expect("text");
        (output.status.code().expect("exited"), text)
    }
}

#[test]
fn a_command_that_starts_vmms_without_a_cage_says_so_loudly() {
    let host = Host::new();
    let without = ["start", "web", "--no-sandbox"];
    let (_, loud) = host.fails(&without);
    assert!(loud.contains("WARNING: --no-sandbox"), "{loud}");
    let (_, quiet) = host.fails(&without[..2]);
    assert!(!quiet.contains("WARNING"), "{quiet}");
}

#[test]
fn a_store_is_made_listed_and_kept() {
    let host = Host::new();
    let (status, _) = host.fails(&["store", "list"]);
    assert_eq!(status, 1, "no store yet");
    let (status, made) = host.json(&["store", "init"]);
    assert_eq!((status, made["existing"].as_bool()), (0, Some(false)));
    let (status, made) = host.json(&["store", "init"]);
    assert_eq!((status, made["existing"].as_bool()), (0, Some(true)));
    let (status, list) = host.json(&["store", "list"]);
    assert_eq!(status, 0);
    assert_eq!(list["segments"], Value::Array(vec![]));
    let (status, text) = host.fails(&["store", "drop", "7"]);
    assert_eq!(status, 1);
    assert!(
        text.starts_with("hebe: ") && text.contains("store list"),
        "{text}"
    );
}

#[test]
fn an_empty_host_has_an_empty_list() {
    let host = Host::new();
    host.hebe(&["store", "init"]);
    let (status, list) = host.json(&["list"]);
    assert_eq!((status, &list["vms"]), (0, &Value::Array(vec![])));
    let (status, all) = host.json(&["resume", "--all"]);
    assert_eq!(status, 0);
    assert_eq!(all["vms"], serde_json::json!({}));
    let (status, all) = host.json(&["suspend", "--all"]);
    assert_eq!((status, &all), (0, &serde_json::json!({"vms": {}})));
    let (status, text) = host.fails(&["reboot", "--report"]);
    assert_eq!(status, 1);
    assert!(text.contains("no report"), "{text}");
}

#[test]
fn every_bad_input_is_one_sentence_and_leaves_nothing() {
    let host = Host::new();
    host.hebe(&["store", "init"]);
    let file = host.path("web.toml");
    let definition = |text: &str| fs::write(&file, text).expect("write");
    let run = || host.fails(&["run", &file]);
    let cases = [
        (
            "name = \"web\"\nmemory = \"0\"\nkernel = \"/k\"",
            "multiple of 2MiB",
        ),
        (
            "name = \"web\"\nmemory = \"3000000\"\nkernel = \"/k\"",
            "multiple of 2MiB",
        ),
        (
            "name = \"web\"\nmemory = \"4MiB\"\nvcpus = 9\nkernel = \"/k\"",
            "vcpus = 9",
        ),
        (
            "name = \"web\"\nmemory = \"4MiB\"\nkernel = \"/k\"",
            "kernel /k",
        ),
        (
            "name = \"web\"\nmemory = \"4MiB\"\nkernal = \"/k\"",
            "line 3",
        ),
        (
            "name = \"../web\"\nmemory = \"4MiB\"\nkernel = \"/k\"",
            "cannot name a VM",
        ),
        (
            "name = \"web\"\nmemory = \"4MiB\"\nkernel = \"/dev/null\"",
            "HEBE_VMM",
        ),
    ];
    for (text, expected) in cases {
        definition(text);
        let (status, sentence) = run();
        assert_eq!(status, 1, "{sentence}");
        assert!(sentence.contains(expected), "{sentence}");
        assert_eq!(sentence.lines().count(), 1, "{sentence}");
    }
    let (_, list) = host.json(&["list"]);
    assert_eq!(list["vms"], Value::Array(vec![]));
    let (_, store) = host.json(&["store", "list"]);
    assert_eq!(store["segments"], Value::Array(vec![]));
    let (status, sentence) = host.fails(&["start", "nobody"]);
    assert_eq!(status, 1);
    assert!(sentence.contains("etc/vms/nobody.toml"), "{sentence}");
    let (status, error) = host.json(&["show", "nobody"]);
    assert_eq!(status, 1);
    assert!(error["error"].is_string());
}

#[test]
fn a_dry_run_tells_and_a_check_remedies() {
    let host = Host::new();
    host.hebe(&["store", "init"]);
    let kernel = host.path("no-kernel");
    let (status, verdict) = host.json(&["reboot", "--dry-run", "--kernel", &kernel]);
    assert_eq!(status, 3);
    assert_eq!(verdict["passes"], false);
    assert_eq!(verdict["method"], "warm");
    let checks = verdict["checks"].as_array().expect("checks");
    let missing = checks.iter().find(|c| c["id"] == "kernel").expect("kernel");
    assert_eq!(missing["level"], "fail");
    assert!(missing["remedy"].is_string());
    let (status, check) = host.json(&["host", "check"]);
    assert_eq!(status, 3, "hebe-vmm is missing");
    for one in check["checks"].as_array().expect("checks") {
        assert_eq!(one["level"] == "ok", one["remedy"].is_null(), "{one}");
    }
}

#[test]
fn what_may_still_be_continued_is_dropped_with_yes_alone() {
    for orders in [vec!["drop"], vec!["store", "drop"]] {
        let host = Host::new();
        host.hebe(&["store", "init"]);
        host.freeze("web", false);
        host.freeze("db", true);
        for (vm, state) in [("web", "frozen"), ("db", "damaged")] {
            let plain = [orders.as_slice(), &[vm]].concat();
            let (status, sentence) = host.fails(&plain);
            assert_eq!(status, 1, "{sentence}");
            for word in [state, "lost for good", "--yes"] {
                assert!(sentence.contains(word), "{sentence}");
            }
            assert_eq!(sentence.lines().count(), 1, "{sentence}");
        }
        let (_, store) = host.json(&["store", "list"]);
        assert_eq!(store["segments"].as_array().map(Vec::len), Some(2));
        for vm in ["web", "db"] {
            let meant = [orders.as_slice(), &[vm, "--yes"]].concat();
            assert_eq!(host.fails(&meant).0, 0, "{meant:?}");
        }
        let (_, store) = host.json(&["store", "list"]);
        assert_eq!(store["segments"], Value::Array(vec![]));
    }
}

#[test]
fn a_cold_reboot_never_ignores_an_initramfs() {
    let host = Host::new();
    host.hebe(&["store", "init"]);
    let initrd = host.path("no-initrd");
    let cold = ["reboot", "--dry-run", "--method", "cold"];
    let (_, plain) = host.json(&cold);
    assert_eq!(plain["leave"], "reset");
    let (status, verdict) = host.json(&[&cold[..], &["--initrd", &initrd]].concat());
    assert_eq!((status, verdict["leave"].as_str()), (3, Some("kexec")));
    assert_eq!(verdict["next"]["initrd"], initrd);
    let both = host.fails(&[&cold[..], &["--initrd", &initrd, "--hard"]].concat());
    assert_eq!(both.0, 2, "{}", both.1);
}

#[test]
fn help_completions_and_manual_pages_are_there() {
    let host = Host::new();
    let help = host.hebe(&["reboot", "--help"]);
    let text = String::from_utf8(help.stdout).expect("text");
    assert!(text.contains("Examples:") && text.contains("--dry-run"));
    for (shell, word) in [
        ("bash", "_hebe"),
        ("zsh", "#compdef hebe"),
        ("fish", "complete -c hebe"),
    ] {
        let script = host.hebe(&["completions", shell]);
        let text = String::from_utf8_lossy(&script.stdout);
        assert!(text.contains(word) && text.contains("afresh"), "{shell}");
    }
    let page = host.hebe(&["man"]);
    let text = String::from_utf8(page.stdout).expect("text");
    assert!(
        text.contains(".TH hebe 1") && text.contains("HEBE_STATE_DIR"),
        "{text}"
    );
    let dir = host.path("man");
    assert_eq!(host.fails(&["man", "--dir", &dir]).0, 0);
    for (page, words) in [
        ("hebe.1", "hebe\\-reboot(1)"),
        ("hebe-reboot.1", "dry"),
        ("hebe-store-init.1", "namespace"),
        // An inventory keeps its lines.
        ("hebe-fleet-roll.1", ".SH NOTES\n.nf\n"),
    ] {
        let text = fs::read_to_string(Path::new(&dir).join(page)).expect(page);
        assert!(text.contains(words), "{page}: {text}");
    }
    assert_eq!(host.fails(&["reboot", "--method", "lukewarm"]).0, 2);
}

#[test]
fn a_wrong_command_line_is_told_as_json_too() {
    let host = Host::new();
    for (line, words) in [
        (&["reboot", "--method", "lukewarm"][..], "lukewarm"),
        (&["reboot", "--hard"][..], "--method saved"),
        (&["start"][..], "NAMES"),
        (&["console", "web"][..], "no JSON"),
    ] {
        let (status, answer) = host.json(line);
        assert_eq!(status, 2, "{line:?}");
        let error = answer["error"].as_str().expect("a sentence");
        assert!(error.contains(words), "{error}");
    }
}

/// One that fails does not keep the others from it, and each is answered.
#[test]
fn an_order_for_several_vms_answers_for_each() {
    let host = Host::new();
    host.hebe(&["store", "init"]);
    for orders in ["start", "stop", "suspend", "resume"] {
        let output = host.hebe(&["--json", orders, "b", "a", "b"]);
        assert_eq!(output.status.code(), Some(1));
        let answers = serde_json::Deserializer::from_slice(&output.stdout);
        let answers: Vec<Value> = answers
            .into_iter()
            .collect::<Result<_, _>>()
            .expect("documents");
        let named: Vec<bool> = answers
            .iter()
            .zip(["'b'", "'a'"])
            .map(|(a, name)| a["error"].as_str().is_some_and(|e| e.contains(name)))
            .collect();
        let names: Vec<_> = answers.iter().map(|a| a["name"].as_str()).collect();
        assert_eq!(names, [Some("b"), Some("a")], "{orders}");
        assert_eq!(named, [true, true], "{orders}: {answers:?}");
    }
}

/// A definition may be readable for everybody, and the runtime directory is not.
#[test]
fn who_may_not_look_is_not_told_that_no_vm_is_up() {
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::process::CommandExt;
    let host = Host::new();
    let everybody = |path: &Path| {
        let mode = fs::Permissions::from_mode(0o755);
        fs::set_permissions(path, mode).expect("chmod");
    };
    everybody(host.root.path());
    let vms = host.root.path().join("run/vms");
    fs::create_dir_all(&vms).expect("mkdir");
    everybody(&host.root.path().join("run"));
    fs::set_permissions(&vms, fs::Permissions::from_mode(0o000)).expect("chmod");
    for line in [
        &["list"][..],
        &["top", "--once"],
        &["show", "web"],
        &["console", "web"],
    ] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_hebe"));
        command.args(line).env("HEBE_RUN_DIR", host.path("run"));
        command.env("HEBE_CONFIG_DIR", host.path("etc"));
        if rustix::process::geteuid().is_root() {
            command.uid(65_534).gid(65_534);
        }
        let output = match command.output() {
            Ok(output) => output,
            Err(e) => {
                eprintln!("skipped here: nobody but root can run the program ({e})");
                return;
            }
        };
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{line:?}: {text}");
        assert!(text.contains("sudo") && output.stdout.is_empty(), "{text}");
    }
}

#[test]
fn a_refusal_is_one_document_and_says_its_reason_once() {
    let host = Host::new();
    // Where nothing keeps VMs, or there is no kernel to load.
    let (status, answer) = host.json(&["reboot", "--load", "--kernel", "/no/such"]);
    assert_eq!((status, &answer["result"]), (3, &"refused".into()));
    let image = host.path("no/such/dir/x.img");
    let (status, answer) = host.json(&["image", "build", &image, "--suite", "bookworm"]);
    assert_eq!(status, 1);
    let error = answer["error"].as_str().expect("a sentence");
    assert!(error.matches("os error").count() < 2, "{error}");
}

/// Nobody has it locked, and `--force` says nothing about that VM.
#[test]
fn an_image_takes_the_place_of_no_disk_of_a_vm_at_rest() {
    let host = Host::new();
    let disk = host.path("disk.img");
    fs::write(&disk, "mine").expect("disk");
    let state = host.root.path().join("state");
    let id = VmId([7; 16]);
    for (file, text) in [
        ("saved/web.hebe".to_owned(), "RAM and state".to_owned()),
        (
            "saved/web.json".to_owned(),
            serde_json::json!({"vm": id, "memory": ByteSize::mib(64), "in_store": false})
                .to_string(),
        ),
        (
            format!("lives/web.{id}.toml"),
            format!(
                "name = \"web\"\nmemory = \"64MiB\"\nkernel = \"/k\"\n[[disk]]\npath = \"{disk}\"\n"
            ),
        ),
    ] {
        let path = state.join(file);
        fs::create_dir_all(path.parent().expect("folder")).expect("mkdir");
        fs::write(path, text).expect("write");
    }
    let line = [
        "image", "build", &disk, "--force", "--mirror", "file:/m", "--suite", "s",
    ];
    let (status, answer) = host.json(&line);
    let error = answer["error"].as_str().expect("a sentence");
    assert_eq!(status, 1, "{error}");
    assert!(
        error.contains("'web'") && error.contains("saved in a file"),
        "{error}"
    );
    assert_eq!(fs::read(&disk).expect("disk"), b"mine");
    let folder = fs::read_dir(host.root.path()).expect("folder");
    let parts = folder
        .flatten()
        .filter(|e| e.file_name().to_string_lossy().contains("part"));
    assert_eq!(parts.count(), 0, "nothing was begun");
}

/// A file of half an answer is a failure.
#[test]
fn an_answer_that_does_not_fit_is_told() {
    let host = Host::new();
    for line in [&["completions", "bash"][..], &["list"]] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_hebe"));
        command.args(line).env("HEBE_RUN_DIR", host.path("run"));
        let full = fs::File::options().write(true).open("/dev/full");
        let output = command.stdout(full.expect("/dev/full")).output();
        let output = output.expect("hebe runs");
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{line:?}: {text}");
        assert!(text.contains("could not be written"), "{text}");
    }
}

/// Nothing is lost where nothing is there but a file that a person wrote, and no
/// order makes that file go.
#[test]
fn a_definition_that_cannot_be_read_is_for_a_person_to_mend() {
    let host = Host::new();
    host.hebe(&["store", "init"]);
    let vms = host.root.path().join("etc/vms");
    fs::create_dir_all(&vms).expect("mkdir");
    fs::write(vms.join("web.toml"), "name = 'web'\n").expect("write");
    let (_, answer) = host.json(&["reboot", "--dry-run"]);
    let checks = answer["checks"].as_array().expect("checks");
    let check = checks.iter().find(|c| c["id"] == "damaged:web");
    let check = check.unwrap_or_else(|| panic!("{answer}"));
    assert_eq!(
        check["remedy"],
        "correct its definition, or remove that file"
    );
    assert!(
        check["sentence"].as_str().expect("text").contains("memory"),
        "{check}"
    );
    // A reset may clear a store: nothing is said of it that only a jump keeps.
    let (_, answer) = host.json(&["reboot", "--dry-run", "--method", "saved", "--hard"]);
    let text = answer["checks"].to_string();
    assert!(text.contains("no VM needs the store"), "{text}");
    let output = host.hebe(&["drop", "web"]);
    let text = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert!(text.contains("its definition stays"), "{text}");
    assert!(vms.join("web.toml").exists());
}

#[test]
fn a_newcomer_is_told_what_is_so() {
    let host = Host::new();
    host.hebe(&["store", "init"]);
    let text = |arguments: &[&str]| {
        let output = host.hebe(arguments);
        let both = [output.stdout, output.stderr].concat();
        String::from_utf8(both).expect("text")
    };
    assert!(text(&["list"]).contains("hebe run --help"));
    let told = text(&["run", "--name", "x", "--disk", "/no/such.img"]);
    assert!(told.contains("VM 'x': disk /no/such.img"), "{told}");
    let tiny = host.path("tiny");
    fs::write(&tiny, vec![0; 1 << 20]).expect("write");
    let told = text(&["store", "init", &tiny]);
    assert!(told.contains("has 1MiB"), "{told}");
}
