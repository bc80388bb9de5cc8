//! The package in a Debian system with GRUB and initramfs-tools, by Debian's
//! own `dpkg`, `update-grub` and `update-initramfs`.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use lab::binaries::{Binaries, workspace_root};
use lab::tree::{self, Tree};
use serde_json::Value;

use crate::deb;
use crate::lab_tests::package::{BUILT, PROGRAMS};
use crate::test::Scene;

const SUITE: &str = "bookworm";
const PACKAGES: [&str; 5] = [
    "systemd-sysv",
    "initramfs-tools",
    "zstd",
    "linux-image-cloud-amd64",
    "grub-pc",
];
const SCRIPT: &str = include_str!("package_check.sh");
/// What `hebe host setup --size 4GiB` tells the kernel of the script's machine.
const WORDS: &str = "memmap=4G!13G";
/// Loaded in the initramfs, in this order: the reserved range is a device before
/// anything else is looked for.
const LOADED: [&str; 4] = ["nd_e820", "nd_pmem", "device_dax", "dax_pmem"];
/// There as well.
const INSIDE: [&str; 5] = ["kvm", "kvm-amd", "kvm-intel", "tun", "bridge"];

pub fn run(scene: &Scene) -> Result<()> {
    let tree = Tree::cached(scene.assets, SUITE, &PACKAGES, scene.progress)?;
    Binaries::build(&PROGRAMS, &[], scene.progress)?;
    let root = workspace_root();
    let package = deb::pack(&root.join(BUILT), &root.join("target/lab/deb-check"))?;
    let folder = tempfile::tempdir_in(root.join("target"))?;
    scene.progress.step("the package in a Debian tree");
    let made = tree.run(folder.path(), &[("/hebe.deb", &package)], SCRIPT);
    let judged = made.and_then(|()| judge(&folder.path().join("out")));
    tree::remove(folder.path())?;
    judged
}

fn judge(out: &Path) -> Result<()> {
    let text = |name: &str| {
        let path: PathBuf = out.join(name);
        fs::read_to_string(&path).with_context(|| format!("the script wrote no {name}"))
    };
    let json = |name: &str| -> Result<Value> { Ok(serde_json::from_str(&text(name)?)?) };
    let audit = text("audit")?;
    ensure!(audit.is_empty(), "dpkg is not content: {audit}");
    let enabled = text("enabled")?;
    let all = enabled.lines().filter(|line| *line == "enabled").count();
    ensure!(all == 4, "not every unit is enabled: {enabled}");
    ensure!(text("group")?.starts_with("hebe:"), "there is no group");

    grub(&text("before.cfg")?, 0)?;
    let refused = text("refused")?;
    let told = refused.lines().last().unwrap_or_default();
    ensure!(
        told.contains(WORDS) && told.contains("anew"),
        "words that do not arrive: {refused}"
    );
    grub(&text("refused.cfg")?, 0)?;
    let setup = json("setup.json")?;
    ensure!(
        setup["changed"] == true && setup["words"][0] == WORDS,
        "{setup}"
    );
    grub(&text("with.cfg")?, 1)?;
    let again = json("again.json")?;
    ensure!(again["changed"] == false, "done twice: {again}");
    grub(&text("later.cfg")?, 1)?;
    ensure!(json("undo.json")?["changed"] == true, "nothing was undone");
    ensure!(
        text("without.cfg")? == text("before.cfg")?,
        "`--undo` leaves GRUB another configuration than it was"
    );

    let modules = text("modules")?;
    let loaded: Vec<&str> = modules.lines().filter(|m| LOADED.contains(m)).collect();
    ensure!(loaded == LOADED, "loaded in the initramfs: {modules}");
    let before = text("initrd.before")?;
    let with = text("initrd.with")?;
    for name in LOADED.into_iter().chain(INSIDE) {
        ensure!(has_module(&with, name), "no {name} in the initramfs");
    }
    ensure!(
        !has_module(&before, "nd_e820"),
        "the initramfs has what the hook is for without it"
    );
    ensure!(
        text("initrd.after")? == before,
        "the initramfs is not what it was when the package is gone"
    );
    let left = text("left")?;
    // Made by its own script, and taken away by no package (Debian's policy, 9.2.2).
    let left: Vec<&str> = left.lines().filter(|path| *path != "/hebe.deb").collect();
    ensure!(left.is_empty(), "left behind: {left:?}");
    Ok(())
}

/// Every entry of the configuration that boots a kernel has the words so often.
fn grub(cfg: &str, times: usize) -> Result<()> {
    let is_linux = |line: &&str| line.split_whitespace().next() == Some("linux");
    let lines: Vec<&str> = cfg.lines().filter(is_linux).collect();
    // The default, the same in the submenu, and its recovery mode.
    ensure!(lines.len() == 3, "{} entries in: {cfg}", lines.len());
    for line in lines {
        let found = line
            .split_whitespace()
            .filter(|word| *word == WORDS)
            .count();
        ensure!(found == times, "{found} times {WORDS} in: {line}");
        let any = line.matches("memmap=").count();
        ensure!(any == times, "other words of that kind in: {line}");
    }
    Ok(())
}

fn has_module(listing: &str, name: &str) -> bool {
    let file = format!("/{name}.ko");
    listing
        .lines()
        .any(|line| line.ends_with(&file) || line.contains(&format!("{file}.")))
}
