//! The emulator: QEMU built from Debian's source package with one correction.
//!
//! QEMU's emulation of AMD-V delivers some interrupts twice. `helper_vmrun`
//! leaves the vector of an interrupt that the hypervisor injected in
//! `exception_index` after it has delivered it; if the emulating thread is then
//! asked to leave its loop before the guest's next exit or exception, the loop
//! takes the left vector for an exception that still has to be delivered, and
//! delivers it again, whatever the interrupt flag says. A guest, and sometimes
//! the host, then ends by triple fault. 10.0.2 and 10.0.13 have it;
//! `suspend-loop` in an emulated host showed it after 7 s and, with the
//! correction, not in 180 s.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::apt::{self, Tool};
use crate::assets::Assets;
use crate::building;
use crate::progress::Progress;

/// The suite of the source, of the firmware and of meson: Debian 12's meson is
/// too old for this QEMU.
const SUITE: &str = "trixie";
/// Data that is not built from the source package, and the build system.
const PACKAGES: [&str; 4] = ["seabios", "ipxe-qemu", "qemu-system-data", "meson"];
const TARGET: &str = "qemu-system-x86_64";

/// What is corrected, and where: [`ADDED`] comes after the only line that is
/// [`DELIVERY`].
const CORRECTED_FILE: &str = "target/i386/tcg/system/svm_helper.c";
const DELIVERY: &str = "do_interrupt_x86_hardirq(env, vector, 1);";
const ADDED: &str = "cs->exception_index = -1; /* delivered */";

/// What the build needs.
const TOOLS: [Tool; 12] = [
    tool("dpkg-source", "dpkg-dev"),
    tool("gcc", "gcc"),
    tool("make", "make"),
    tool("/usr/include/stdio.h", "libc6-dev"),
    tool("ninja", "ninja-build"),
    tool("pkg-config", "pkg-config"),
    tool("/usr/bin/python3", "python3"),
    tool("/usr/lib/python3/dist-packages/distlib", "python3-distlib"),
    tool("/usr/include/glib-2.0/glib.h", "libglib2.0-dev"),
    tool("/usr/include/slirp/libslirp.h", "libslirp-dev"),
    tool("/usr/include/zlib.h", "zlib1g-dev"),
    tool("strip", "binutils"),
];

/// The lab's machines need a q35 board, user networking and virtio devices.
const OPTIONS: [&str; 11] = [
    "--python=/usr/bin/python3",
    "--target-list=x86_64-softmmu",
    "--without-default-features",
    "--enable-system",
    "--enable-tcg",
    "--enable-slirp",
    "--disable-debug-info",
    "--disable-fdt",
    "--disable-tools",
    "--disable-guest-agent",
    "--disable-install-blobs",
];

const fn tool(program: &'static str, package: &'static str) -> Tool {
    Tool { program, package }
}

/// Whether `dir` holds an emulator with this correction.
pub fn is_of_patch(dir: &Path) -> bool {
    fs::read_to_string(dir.join("correction")).is_ok_and(|text| text == ADDED)
}

/// Builds the emulator in `dir`: `usr/bin` and the firmware in `usr/share`.
/// `work/unpacked` marks a complete source; ninja itself knows what is built.
pub fn build_in(assets: &Assets, dir: &Path, jobs: usize, progress: &dyn Progress) -> Result<()> {
    assets.needs_debian("--qemu")?;
    apt::ensure_tools(&TOOLS, progress)?;
    ensure_venv(progress)?;
    let work = dir.join("work");
    if work.join("unpacked").exists() {
        progress.step("going on with a build that was ended");
    } else {
        fetch(assets, dir, &work, progress)?;
    }
    let build = work.join("build");
    // The folder of meson's modules; QEMU's configure asks Python for it.
    let modules = work.join("meson/usr/lib/python3/dist-packages");
    let within = |program: &Path| {
        let mut command = Command::new(program);
        command
            .current_dir(&build)
            .stdin(Stdio::null())
            .env("LC_ALL", "C.UTF-8")
            .env("PYTHONPATH", &modules);
        command
    };
    if !build.join("build.ninja").exists() {
        if build.exists() {
            fs::remove_dir_all(&build).context("cannot remove what an ended run left")?;
        }
        fs::create_dir_all(&build).context("cannot create the build folder")?;
        progress.step("configuring QEMU");
        apt::run(within(&work.join("source/configure")).args(OPTIONS))?;
    }
    progress.step("building QEMU (about 5 minutes on two processors, once)");
    let mut ninja = within(Path::new("ninja"));
    ninja.arg(format!("-j{jobs}")).arg(TARGET);
    let log = work.join("build.log");
    building::run_logged(&mut ninja, &log, "building QEMU", progress)?;
    let programs = dir.join("usr/bin");
    fs::create_dir_all(&programs).context("cannot create usr/bin")?;
    let built = [build.join(TARGET), programs.join(TARGET)];
    apt::run(
        Command::new("strip")
            .arg("-o")
            .arg(&built[1])
            .arg(&built[0]),
    )?;
    fs::remove_dir_all(&work).context("cannot remove the build folder")?;
    fs::write(dir.join("correction"), ADDED).context("cannot note what was corrected")
}

/// QEMU's configure makes a virtual environment; Debian packs what Python needs
/// for that apart, under a path with Python's version.
fn ensure_venv(progress: &dyn Progress) -> Result<()> {
    let import = || apt::run(Command::new("/usr/bin/python3").args(["-c", "import ensurepip"]));
    if import().is_ok() {
        return Ok(());
    }
    apt::ensure_tools(&[tool("python3-venv", "python3-venv")], progress)?;
    import().map(drop)
}

fn fetch(assets: &Assets, dir: &Path, work: &Path, progress: &dyn Progress) -> Result<()> {
    if dir.exists() {
        fs::remove_dir_all(dir).context("cannot remove what an ended run left")?;
    }
    fs::create_dir_all(work).context("cannot create the work folder")?;
    let apt = assets
        .apt("emulator", &[SUITE], true, None, progress)?
        .ignoring_installed()?;
    progress.step(&format!(
        "downloading QEMU's source {} (40 MB)",
        apt.candidate("qemu-system-x86")?
    ));
    let downloads = work.join("downloads");
    apt.download_source("qemu", &downloads)?;
    let debs = apt.download(&PACKAGES.map(str::to_owned), &downloads)?;
    drop(apt);
    progress.step("unpacking QEMU's source");
    let (meson, firmware): (Vec<_>, Vec<_>) = debs.into_iter().partition(|deb| {
        deb.file_name()
            .is_some_and(|n| n.to_string_lossy().starts_with("meson_"))
    });
    apt::unpack(&meson, &work.join("meson"))?;
    apt::unpack(&firmware, dir)?;
    let description = only_description(&downloads)?;
    let source = work.join("source");
    apt::run(
        Command::new("dpkg-source")
            .args(["--no-check", "-x"])
            .args([&description, &source]),
    )?;
    let file = source.join(CORRECTED_FILE);
    let text = fs::read_to_string(&file).context("QEMU's source has no AMD-V emulation")?;
    fs::write(&file, corrected(&text)?).context("cannot correct QEMU's source")?;
    fs::remove_dir_all(&downloads).context("cannot remove the downloads")?;
    fs::write(work.join("unpacked"), "").context("cannot note what was unpacked")
}

fn only_description(dir: &Path) -> Result<std::path::PathBuf> {
    let found = fs::read_dir(dir)
        .with_context(|| format!("cannot read {}", dir.display()))?
        .filter_map(|e| Some(e.ok()?.path()))
        .find(|p| p.extension().is_some_and(|e| e == "dsc"));
    found.context("QEMU's source package has no .dsc file")
}

/// The source with [`ADDED`] after [`DELIVERY`]; an error where that line is
/// not there exactly once.
fn corrected(source: &str) -> Result<String> {
    let places: Vec<usize> = source.match_indices(DELIVERY).map(|(at, _)| at).collect();
    let [at] = places[..] else {
        bail!("QEMU's source delivers injected interrupts in another way than the lab knows");
    };
    let (before, after) = source.split_at(at + DELIVERY.len());
    Ok(format!("{before}\n            {ADDED}{after}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_is_added_after_the_delivery() {
        let source = format!("case A:\n    {DELIVERY}\n    break;\n");
        let expected = format!("case A:\n    {DELIVERY}\n            {ADDED}\n    break;\n");
        assert_eq!(corrected(&source).expect("corrected"), expected);
    }

    #[test]
    fn a_source_of_another_shape_is_refused() {
        assert!(corrected("break;").is_err());
        assert!(corrected(&format!("{DELIVERY}\n{DELIVERY}\n")).is_err());
    }
}
