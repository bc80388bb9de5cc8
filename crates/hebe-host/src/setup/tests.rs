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
    let cfg = fs::read_to_string(root.join(grub::FILE)).unwrap_or_default();
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
        !root.path().join(grub::FILE).exists(),
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
    assert!(!root.path().join(grub::FILE).exists());
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
        root.path().join(grub::FILE).display()
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
        luo: Some(true),
        ..SetupOptions::default()
    };
    let setup = plan(root.path(), &luo).expect("a plan");
    assert_eq!(setup.words, ["kho=on", "liveupdate=on"]);
    assert_eq!(setup.changes.len(), 2);
    let ran = done(root.path(), &setup);
    assert!(ran[1].starts_with("systemd-tmpfiles"), "{ran:?}");
    for again in [luo, SetupOptions::default()] {
        let setup = plan(root.path(), &again).expect("a plan");
        assert!(setup.is_done(), "what was chosen stays chosen: {setup:?}");
    }
    let devdax = SetupOptions {
        luo: Some(false),
        ..SetupOptions::default()
    };
    for back in [devdax, size(1024)] {
        let setup = plan(root.path(), &back).expect("a plan");
        assert!(setup.words[0].starts_with("memmap="), "{setup:?}");
    }
}

#[test]
fn who_gives_the_range_up_is_told_what_that_means() {
    let root = debian();
    let config = |release: &str, text: &str| {
        let path = root.path().join("boot");
        fs::create_dir_all(&path).expect("mkdir");
        fs::write(path.join(format!("config-{release}")), text).expect("write");
    };
    config("6.1.0-50-amd64", "CONFIG_KEXEC=y\n");
    let first = plan(root.path(), &size(4096)).expect("a plan");
    assert!(first.given_up.is_empty(), "{first:?}");
    done(root.path(), &first);
    let luo = SetupOptions {
        luo: Some(true),
        ..SetupOptions::default()
    };
    let setup = plan(root.path(), &luo).expect("a plan");
    assert_eq!(setup.given_up, ["memmap=4G!13G"]);
    let said = setup.notes.join("\n");
    for word in [
        "memmap=4G!13G",
        "come back in ordinary memory",
        "stay saved",
        "Linux 6.1.0-50-amd64",
        "CONFIG_KEXEC_HANDOVER",
    ] {
        assert!(said.contains(word), "no {word} in: {said}");
    }
    let undo = SetupOptions {
        undo: true,
        ..SetupOptions::default()
    };
    for (change, word) in [(undo, "no longer"), (size(8192), "moves")] {
        let setup = plan(root.path(), &change).expect("a plan");
        assert_eq!(setup.given_up, ["memmap=4G!13G"], "{change:?}");
        assert!(setup.notes.iter().any(|n| n.contains(word)), "{setup:?}");
    }
    let options = "CONFIG_KEXEC_HANDOVER=y\nCONFIG_LIVEUPDATE=y\nCONFIG_LIVEUPDATE_MEMFD=y\n";
    config("7.3.0", options);
    let setup = plan(root.path(), &luo).expect("a plan");
    assert!(!setup.notes.join("\n").contains("CONFIG"), "{setup:?}");
}

/// As `update-grub` makes it, with what another system's entry looks like.
fn grub_cfg(root: &Path, default: &str, recovery: &str) {
    let path = root.join("boot/grub");
    fs::create_dir_all(&path).expect("mkdir");
    let text = format!(
        "### BEGIN /etc/grub.d/10_linux ###\n\tlinux\t/boot/vmlinuz root=/dev/sda1 ro {default}\n\tlinux /boot/vmlinuz single {recovery}\n### END /etc/grub.d/10_linux ###\n### BEGIN /etc/grub.d/30_os-prober ###\n\tlinux /other\n"
    );
    fs::write(path.join("grub.cfg"), text).expect("write");
}

#[test]
fn words_that_grub_did_not_take_over_are_said() {
    let root = debian();
    let words = ["memmap=1G!16G".to_owned()];
    let said = |words: &[String]| arrived(root.path(), words).expect_err("it is said");
    assert!(said(&words).contains("cannot be read"));
    grub_cfg(root.path(), "quiet", "");
    let text = said(&words);
    assert!(
        text.contains("memmap=1G!16G") && text.contains("anew"),
        "{text}"
    );
    grub_cfg(root.path(), "memmap=1G!16G quiet", "");
    assert!(said(&words).contains("anew"), "not in every entry");
    grub_cfg(root.path(), "memmap=11G!16G quiet", "memmap=11G!16G");
    said(&words);
    grub_cfg(root.path(), "memmap=1G!16G quiet", "memmap=1G!16G");
    assert_eq!(arrived(root.path(), &words), Ok(()));
    assert_eq!(arrived(root.path(), &[]), Ok(()));
    fs::write(root.path().join("boot/grub/grub.cfg"), "").expect("write");
    assert!(said(&words).contains("no entry"));
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
    let ran = RefCell::new(Vec::new());
    let failed = apply(root.path(), &setup, &|command| {
        let there = root.path().join(grub::FILE).exists();
        ran.borrow_mut().push((command.join(" "), there));
        Err("update-grub failed".into())
    });
    // GRUB's configuration is made anew of what is there again.
    let update = |there| (grub::UPDATE.to_owned(), there);
    assert_eq!(ran.into_inner(), [update(true), update(false)]);
    assert!(
        failed
            .expect_err("failed")
            .to_string()
            .contains("update-grub")
    );
    // Otherwise nobody would know that update-grub is still to be run.
    assert_eq!(plan(root.path(), &size(1024)).expect("a plan"), setup);
}
