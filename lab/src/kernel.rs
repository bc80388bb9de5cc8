//! The lab's own small kernel, built from Debian's source package.
//!
//! It has no modules and what stock kernels leave off (Live Update
//! Orchestrator), and boots in half the time. Nothing needs it but the tests
//! that say so.

use std::fs::{self, File};
use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::apt::{self, Tool};
use crate::assets::{self, Assets, Kernel, KernelName};
use crate::building;
use crate::progress::Progress;

/// The options that differ from `allnoconfig`.
const FRAGMENT: &str = include_str!("../kernel.fragment");
/// The suite and the package of the source.
const SOURCE: (&str, &str) = ("trixie-backports", "linux-source");

/// What a kernel build needs.
const TOOLS: [Tool; 10] = [
    Tool {
        program: "make",
        package: "make",
    },
    Tool {
        program: "gcc",
        package: "gcc",
    },
    Tool {
        program: "/usr/include/stdio.h",
        package: "libc6-dev",
    },
    Tool {
        program: "flex",
        package: "flex",
    },
    Tool {
        program: "bison",
        package: "bison",
    },
    Tool {
        program: "bc",
        package: "bc",
    },
    Tool {
        program: "perl",
        package: "perl",
    },
    Tool {
        program: "xz",
        package: "xz-utils",
    },
    Tool {
        program: "lz4",
        package: "lz4",
    },
    Tool {
        program: "/usr/include/libelf.h",
        package: "libelf-dev",
    },
];

/// The variable that names a kernel built elsewhere from this fragment.
pub const PREBUILT: &str = "HEBE_LAB_KERNEL";

/// The kernel of `lab/kernel.fragment`: the one that [`PREBUILT`] names, the
/// cached one, or one built now (about 12 minutes on two processors). A changed
/// fragment is built anew, and a build that was ended goes on where it was.
pub fn build(assets: &Assets, jobs: usize, progress: &dyn Progress) -> Result<Kernel> {
    if let Some(image) = std::env::var_os(PREBUILT).filter(|v| !v.is_empty()) {
        return assets::named_kernel(KernelName::Lab, Path::new(&image), None)
            .with_context(|| format!("{PREBUILT} names no kernel"));
    }
    let dir = assets.resumed(&folder(), progress, is_of_fragment, |dir| {
        build_in(assets, dir, jobs, progress)
    })?;
    assets::cached_kernel(KernelName::Lab, &dir)
}

fn folder() -> String {
    format!("kernel-{}", KernelName::Lab)
}

fn is_of_fragment(dir: &Path) -> bool {
    fs::read_to_string(dir.join("fragment")).is_ok_and(|built_from| built_from == FRAGMENT)
}

/// `work/source` is complete once `work/unpacked` is there; make itself knows
/// what of it is built.
fn build_in(assets: &Assets, dir: &Path, jobs: usize, progress: &dyn Progress) -> Result<()> {
    assets.needs_debian(PREBUILT)?;
    apt::ensure_tools(&TOOLS, progress)?;
    let work = dir.join("work");
    if work.join("unpacked").exists() {
        progress.step("going on with a build that was ended");
    } else {
        fetch_source(assets, &work, progress)?;
    }
    let source = work.join("source");
    let fragment = work.join("fragment");
    fs::write(&fragment, FRAGMENT).context("cannot write the fragment")?;
    let make = || {
        let mut command = Command::new("make");
        command
            .current_dir(&source)
            .stdin(Stdio::null())
            .env("LC_ALL", "C.UTF-8")
            .env("KCONFIG_ALLCONFIG", &fragment);
        command
    };
    apt::run(make().arg("allnoconfig"))?;
    check_config(&fs::read_to_string(source.join(".config"))?)?;
    progress.step("building the lab's kernel (about 12 minutes on two processors)");
    let mut command = make();
    command.arg(format!("-j{jobs}")).arg("bzImage");
    building::run_logged(
        &mut command,
        &work.join("build.log"),
        "building the lab's kernel",
        progress,
    )?;
    let image = dir.join("bzImage");
    fs::copy(source.join("arch/x86/boot/bzImage"), &image).context("cannot keep the image")?;
    fs::write(dir.join("release"), release_of(&image)?)?;
    fs::write(dir.join("fragment"), FRAGMENT)?;
    fs::remove_dir_all(&work).context("cannot remove the build folder")
}

fn fetch_source(assets: &Assets, work: &Path, progress: &dyn Progress) -> Result<()> {
    if work.exists() {
        fs::remove_dir_all(work).context("cannot remove what an ended run left")?;
    }
    let (suite, package) = SOURCE;
    let apt = assets
        .apt(suite, &[suite], false, None, progress)?
        .ignoring_installed()?;
    let version = apt.candidate(package)?;
    progress.step(&format!("downloading {package} {version} (160 MB)"));
    let packages = apt.closure(package, "linux-source-")?;
    let debs = apt.download(&packages, &work.join("debs"))?;
    drop(apt);
    progress.step("unpacking the kernel's source (1.7 GB, removed after the build)");
    apt::unpack(&debs, work)?;
    let archive = only_archive(&work.join("usr/src"))?;
    let source = work.join("source");
    fs::create_dir_all(&source).context("cannot create the source folder")?;
    apt::run(
        Command::new("tar")
            .args(["--strip-components=1", "-xf"])
            .arg(archive)
            .arg("-C")
            .arg(&source),
    )?;
    for used in ["debs", "usr"] {
        fs::remove_dir_all(work.join(used)).context("cannot remove unpacked packages")?;
    }
    fs::write(work.join("unpacked"), version).context("cannot note what was unpacked")
}

/// What a bzImage says of itself: the first word of the string that offset
/// 0x20e of the boot header points at, 0x200 bytes early (x86 boot protocol).
pub fn release_of(image: &Path) -> Result<String> {
    let no_kernel = || format!("{} is not a bzImage", image.display());
    let mut head = Vec::new();
    File::open(image)
        .with_context(|| format!("cannot open {}", image.display()))?
        .take(0x1_0000)
        .read_to_end(&mut head)
        .with_context(|| format!("cannot read {}", image.display()))?;
    if head.get(0x202..0x206) != Some(b"HdrS") {
        bail!(no_kernel());
    }
    let at = 0x200 + usize::from(u16::from_le_bytes([head[0x20e], head[0x20f]]));
    let text = head.get(at..).with_context(no_kernel)?;
    let end = text.iter().position(|b| b" \0".contains(b));
    let release = end.and_then(|end| std::str::from_utf8(&text[..end]).ok());
    Ok(release
        .filter(|r| !r.is_empty())
        .with_context(no_kernel)?
        .to_owned())
}

fn only_archive(dir: &Path) -> Result<std::path::PathBuf> {
    let found = fs::read_dir(dir)
        .with_context(|| format!("cannot read {}", dir.display()))?
        .filter_map(|e| Some(e.ok()?.path()))
        .find(|p| p.to_string_lossy().contains(".tar."));
    found.with_context(|| format!("no source archive in {}", dir.display()))
}

/// Fails when the kernel's configuration left out an option of the fragment.
fn check_config(config: &str) -> Result<()> {
    let missing = missing_options(FRAGMENT, config);
    if !missing.is_empty() {
        bail!(
            "this kernel source does not take these options of lab/kernel.fragment: {}",
            missing.join(", ")
        );
    }
    Ok(())
}

fn missing_options<'a>(fragment: &'a str, config: &str) -> Vec<&'a str> {
    let set: std::collections::HashSet<&str> = config.lines().map(str::trim).collect();
    fragment
        .lines()
        .map(str::trim)
        .filter(|l| l.ends_with("=y") && !set.contains(l))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_tells_its_release() {
        let folder = tempfile::tempdir().expect("folder");
        let path = folder.path().join("bzImage");
        let mut image = vec![0; 0x4000];
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x20e..0x210].copy_from_slice(&0x3000_u16.to_le_bytes());
        image[0x3200..0x320f].copy_from_slice(b"7.3.4-lab (u@h)");
        fs::write(&path, &image).expect("write");
        assert_eq!(release_of(&path).expect("release"), "7.3.4-lab");
        fs::write(&path, &image[..0x3000]).expect("write");
        assert!(release_of(&path).is_err(), "cut short");
        fs::write(&path, "no kernel").expect("write");
        assert!(release_of(&path).is_err());
    }

    #[test]
    fn an_option_that_was_dropped_is_named() {
        let config = "CONFIG_A=y\n# CONFIG_B is not set\n";
        assert_eq!(
            missing_options("CONFIG_A=y\nCONFIG_B=y\nCONFIG_C=n\n", config),
            ["CONFIG_B=y"]
        );
    }
}
