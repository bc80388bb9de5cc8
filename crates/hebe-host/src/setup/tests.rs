//! Sample trees of hosts.

use std::cell::RefCell;

use super::*;

/// A Debian host of 16 GiB with GRUB and the package's units.
fn debian() -> tempfile::TempDir {
    let root = tempfile::tempdir().expect("dir");
    let write = |path: &str, text: &str| {
        let path = root.path().join(path);
        fs::create_dir_all(path.parent().expect("parent")).expect("mkdir");
        fs::write(path, text).expect("write");
    };
    write(
        "proc/cmdline",
        "BOOT_IMAGE=/boot/vmlinuz root=/dev/sda1 quiet\n",
    );
    for (n, start, end, kind) in [
        (0, "0x0", "0x9fbff", "System RAM"),
        (1, "0x100000", "0xbffdffff", "System RAM"),
        (2, "0xfeffc000", "0xfeffffff", "Reserved"),
        (3, "0x100000000", "0x43fffffff", "System RAM"),
    ] {
        write(&format!("sys/firmware/memmap/{n}/start"), start);
        write(&format!("sys/firmware/memmap/{n}/end"), end);
        write(&format!("sys/firmware/memmap/{n}/type"), kind);
    }
    write("etc/default/grub", "GRUB_TIMEOUT=5\n");
    for unit in UNITS {
        write(&format!("usr/lib/systemd/system/{unit}"), "[Unit]\n");
    }
    root
}

fn size(mib: u64) -> SetupOptions {
    SetupOptions {
        size: Some(ByteSize::mib(mib)),
        ..SetupOptions::default()
    }
}

/// Applies it, and plays what systemctl and the next boot do; the commands.
fn done(root: &Path, setup: &Setup) -> Vec<String> {
    let ran = RefCell::new(Vec::new());
    let run = |command: &[String]| {
        ran.borrow_mut().push(command.join(" "));
        Ok(())
    };
    apply(root, setup, &run).expect("applied");
    let wants = root.join("etc/systemd/system/multi-user.target.wants");
    fs::create_dir_all(&wants).expect("mkdir");
    for unit in UNITS {
        let _ = std::os::unix::fs::symlink("/x", wants.join(unit));
    }
    let cfg = fs::read_to_string(root.join(GRUB_FILE)).unwrap_or_default();
    let words = cfg
        .split(['"', ' ', '\n'])
        .filter(|w| w.starts_with("memmap="));
    let words: Vec<&str> = words.collect();
    fs::write(
        root.join("proc/cmdline"),
        format!("quiet {}\n", words.join(" ")),
    )
    .expect("write");
    ran.into_inner()
}

#[test]
fn a_host_is_made_ready_once() {
    let root = debian();
    let setup = plan(root.path(), &size(4096)).expect("a plan");
    assert_eq!(setup.words, ["memmap=4G!13G"]);
    let diff = setup.changes[0].diff();
    assert!(
        diff.contains("--- /dev/null\n+++ /etc/default/grub.d/hebe.cfg\n"),
        "{diff}"
    );
    assert!(
        diff.contains("\n+GRUB_CMDLINE_LINUX=\"$GRUB_CMDLINE_LINUX memmap=4G!13G\"\n"),
        "{diff}"
    );
    assert!(
        !root.path().join(GRUB_FILE).exists(),
        "a plan changes nothing"
    );
    let ran = done(root.path(), &setup);
    assert_eq!(ran[0], "update-grub");
    assert!(
        ran[1].starts_with("systemctl enable hebe-freeze.service"),
        "{ran:?}"
    );
    assert_eq!(ran[2], "systemctl start hebe-freeze.service");
    for again in [size(4096), SetupOptions::default()] {
        let setup = plan(root.path(), &again).expect("a plan");
        assert!(setup.is_done(), "{setup:?}");
        assert_eq!(
            setup.words,
            ["memmap=4G!13G"],
            "also where nobody says a size"
        );
    }
    let undo = SetupOptions {
        undo: true,
        ..SetupOptions::default()
    };
    let setup = plan(root.path(), &undo).expect("a plan");
    assert!(setup.changes[0].diff().contains("+++ /dev/null"));
    assert_eq!(done(root.path(), &setup), ["update-grub"]);
    assert!(!root.path().join(GRUB_FILE).exists());
    assert!(plan(root.path(), &undo).expect("a plan").is_done());
}

/// What a shell makes of the file is what the kernel is to be told.
#[test]
fn a_shell_reads_the_words_as_they_are() {
    let root = debian();
    let setup = plan(root.path(), &size(1024)).expect("a plan");
    done(root.path(), &setup);
    let script = format!(
        "GRUB_CMDLINE_LINUX=quiet; . {}; printf %s \"$GRUB_CMDLINE_LINUX\"",
        root.path().join(GRUB_FILE).display()
    );
    let output = std::process::Command::new("sh")
        .args(["-c", &script])
        .output()
        .expect("sh");
    assert_eq!(
        String::from_utf8_lossy(&output.stdout),
        "quiet memmap=1G!16G"
    );
}

#[test]
fn another_size_moves_the_range_and_says_so() {
    let root = debian();
    done(
        root.path(),
        &plan(root.path(), &size(4096)).expect("a plan"),
    );
    let setup = plan(root.path(), &size(8192)).expect("a plan");
    assert_eq!(setup.words, ["memmap=8G!9G"]);
    assert!(setup.notes.iter().any(|n| n.contains("moves")), "{setup:?}");
    let diff = setup.changes[0].diff();
    assert!(
        diff.contains("\n-GRUB") && diff.contains("\n+GRUB"),
        "{diff}"
    );
}

#[test]
fn what_somebody_else_reserved_stays() {
    let root = debian();
    fs::write(root.path().join("proc/cmdline"), "quiet memmap=2G!14G\n").expect("write");
    let setup = plan(root.path(), &SetupOptions::default()).expect("a plan");
    assert!(
        setup.words.is_empty() && setup.changes.is_empty(),
        "{setup:?}"
    );
    assert!(setup.notes[0].contains("stays"));
    let refused = plan(root.path(), &size(4096)).expect_err("refused");
    assert!(matches!(refused, SetupError::Reserved { .. }), "{refused}");
}

#[test]
fn for_live_update_nothing_is_reserved() {
    let root = debian();
    let luo = SetupOptions {
        luo: true,
        ..SetupOptions::default()
    };
    let setup = plan(root.path(), &luo).expect("a plan");
    assert_eq!(setup.words, ["kho=on", "liveupdate=on"]);
    assert_eq!(setup.changes.len(), 2);
    let ran = done(root.path(), &setup);
    assert!(ran[1].starts_with("systemd-tmpfiles"), "{ran:?}");
    assert!(plan(root.path(), &luo).expect("a plan").is_done());
}

#[test]
fn hosts_that_cannot_be_made_ready_are_told_the_words() {
    let root = debian();
    fs::remove_file(root.path().join("etc/default/grub")).expect("remove");
    let error = plan(root.path(), &size(1024)).expect_err("no GRUB");
    assert!(error.to_string().contains("memmap=1G!16G"), "{error}");
    let empty = tempfile::tempdir().expect("dir");
    assert!(matches!(
        plan(empty.path(), &SetupOptions::default()),
        Err(SetupError::Memory(_))
    ));
}

#[test]
fn a_command_that_fails_is_said() {
    let root = debian();
    let setup = plan(root.path(), &size(1024)).expect("a plan");
    let failed = apply(root.path(), &setup, &|_| Err("update-grub failed".into()));
    assert!(
        failed
            .expect_err("failed")
            .to_string()
            .contains("update-grub")
    );
    // Otherwise nobody would know that update-grub is still to be run.
    assert_eq!(plan(root.path(), &size(1024)).expect("a plan"), setup);
}
