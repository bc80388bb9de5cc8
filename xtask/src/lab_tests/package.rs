//! The Debian package on a lab host with systemd, put there as an operator does.

use std::fs;

use anyhow::{Context, Result, ensure};
use lab::binaries::{HEBE, HEBE_VMM, HEBED, Program, workspace_root};
use lab::scenario::Lab;
use lab::system::System;

use crate::deb;

/// What is packed, and has to be built for that.
pub const PROGRAMS: [Program; 3] = [HEBE, HEBE_VMM, HEBED];
/// Where the lab's programs are built.
pub const BUILT: &str = "target/lab/x86_64-unknown-linux-gnu/lab";
/// Units that a host with VMs needs, and that the package enables.
const ENABLED: [&str; 4] = [
    "hebe-freeze.service",
    "hebe-resume.service",
    "hebed.socket",
    "hebed.service",
];

/// A host for it, with what it recommends, and suggests for networks.
pub fn system() -> System {
    System::debian12().with(&["nftables", "passt"])
}

/// Installs the package, which from then on is all of the product that the
/// host has, and once more, as an upgrade.
pub fn install(lab: &Lab) -> Result<()> {
    put(lab)?;
    // It changes nothing.
    lab.machine.exec_ok(&["dpkg", "-i", "/data/hebe.deb"])?;
    active(lab)
}

/// Installs the package, once.
pub fn put(lab: &Lab) -> Result<()> {
    let root = workspace_root();
    let package = deb::pack(&root.join(BUILT), &root.join("target/lab/deb"))?;
    let bytes = fs::read(&package).context("no package")?;
    lab.machine.agent.put("/data/hebe.deb", 0o644, &bytes)?;
    for program in PROGRAMS {
        let path = format!("/data/bin/{}", program.name);
        lab.machine.exec_ok(&["rm", &path])?;
    }
    lab.machine.exec_ok(&["dpkg", "-i", "/data/hebe.deb"])?;
    active(lab)?;
    enabled(lab)
}

/// Has `hebe host setup` enable what somebody disabled. The lab reserves the
/// memory itself, and has no boot loader.
pub fn set_up(lab: &Lab) -> Result<()> {
    let words = [&["systemctl", "disable"], &ENABLED[..]].concat();
    lab.machine.exec_ok(&words)?;
    let order = ["hebe", "host", "setup", "--yes", "--json"];
    let done = super::json(lab, &order)?;
    ensure!(
        done["changed"] == true && done["commands"][0][1] == "enable",
        "{done}"
    );
    enabled(lab)?;
    let again = super::json(lab, &order)?;
    ensure!(again["changed"] == false, "done twice: {again}");
    lab.machine.exec_ok(&["hebe", "store", "init"])?;
    range_without_its_modules(lab)?;
    lab.machine.exec_ok(&["hebe", "host", "check"]).map(drop)
}

/// As after a kexec into a kernel whose initramfs knows nothing of Hebe: a resume
/// has the store there.
fn range_without_its_modules(lab: &Lab) -> Result<()> {
    let stores = || lab.machine.exec(&["hebe", "store", "list"]);
    // The third of them stays: its range is in use by the kernel itself.
    let unload = ["modprobe", "-r", "dax_pmem", "nd_pmem"];
    lab.machine.exec_ok(&unload)?;
    ensure!(!stores()?.ok(), "the store is there without its modules");
    lab.machine.exec_ok(&["hebe", "resume", "--all"])?;
    ensure!(stores()?.ok(), "{}", stores()?.all_text());
    Ok(())
}

/// While a VM runs the package stays, and all of it works.
pub fn is_not_removed(lab: &Lab) -> Result<()> {
    let order = ["dpkg", "--remove", "hebe"];
    super::refused(lab, &order, &["hebe: VMs run", "stop them first"])?;
    active(lab)?;
    enabled(lab)
}

fn active(lab: &Lab) -> Result<()> {
    let words = ["systemctl", "is-active", ENABLED[0], ENABLED[3]];
    let told = lab.machine.exec_ok(&words)?;
    ensure!(told.split_whitespace().all(|w| w == "active"), "{told}");
    Ok(())
}

fn enabled(lab: &Lab) -> Result<()> {
    let words = [&["systemctl", "is-enabled"], &ENABLED[..]].concat();
    let told = lab.machine.exec_ok(&words)?;
    ensure!(told.split_whitespace().all(|w| w == "enabled"), "{told}");
    Ok(())
}
