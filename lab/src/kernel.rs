//! The lab's own small kernel, built from Debian's source package.
//!
//! It has no modules and what stock kernels leave off (Live Update
//! Orchestrator), and boots in half the time. Nothing needs it but the tests
//! that say so.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::apt::{self, Tool};
use crate::assets::{Assets, Kernel, KernelName};
use crate::progress::Progress;

/// The options that differ from `allnoconfig`.
const FRAGMENT: &str = include_str!("../kernel.fragment");
/// The suite and the package of the source.
const SOURCE: (&str, &str) = ("trixie-backports", "linux-source");

/// What a kernel build needs.
const TOOLS: [Tool; 9] = [
    Tool {
        program: "make",
        package: "make",
    },
    Tool {
        program: "gcc",
        package: "gcc",
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

/// The kernel of `lab/kernel.fragment`: cached, or built now (about 12 minutes on two
/// processors). A changed fragment is built anew.
pub fn build(assets: &Assets, jobs: u32, progress: &dyn Progress) -> Result<Kernel> {
    let same = |dir: &Path| {
        fs::read_to_string(dir.join("fragment")).is_ok_and(|built_from| built_from == FRAGMENT)
    };
    let name = format!("kernel-{}", KernelName::Lab);
    assets.cached(&name, progress, same, |dir| {
        build_in(assets, dir, jobs, progress)
    })?;
    assets.kernel(KernelName::Lab, progress)
}

fn build_in(assets: &Assets, dir: &Path, jobs: u32, progress: &dyn Progress) -> Result<()> {
    apt::ensure_tools(&TOOLS, progress)?;
    let (suite, package) = SOURCE;
    let apt = assets
        .apt(suite, &[suite], false, None, progress)?
        .ignoring_installed()?;
    progress.step(&format!(
        "downloading {package} {}",
        apt.candidate(package)?
    ));
    let packages = apt.closure(package, "linux-source-")?;
    let work = dir.join("work");
    let debs = apt.download(&packages, &work.join("debs"))?;
    drop(apt);
    progress.step("unpacking the kernel's source");
    apt::unpack(&debs, &work)?;
    let archive = only_archive(&work.join("usr/src"))?;
    let source = work.join("source");
    fs::create_dir_all(&source)?;
    apt::run(
        Command::new("tar")
            .args(["--strip-components=1", "-xf"])
            .arg(archive)
            .arg("-C")
            .arg(&source),
    )?;
    let fragment = work.join("fragment");
    fs::write(&fragment, FRAGMENT)?;
    let make = || {
        let mut command = Command::new("make");
        command
            .current_dir(&source)
            .stdin(Stdio::null())
            .env("KCONFIG_ALLCONFIG", &fragment);
        command
    };
    apt::run(make().arg("allnoconfig"))?;
    check_config(&fs::read_to_string(source.join(".config"))?)?;
    progress.step("building the lab's kernel (about 12 minutes on two processors)");
    apt::run(make().arg(format!("-j{jobs}")).arg("bzImage"))?;
    let release = apt::run(make().args(["-s", "kernelrelease"]))?;
    fs::copy(source.join("arch/x86/boot/bzImage"), dir.join("bzImage"))?;
    fs::write(dir.join("release"), release.trim())?;
    fs::write(dir.join("fragment"), FRAGMENT)?;
    fs::remove_dir_all(&work).context("cannot remove the build folder")
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
    fn an_option_that_was_dropped_is_named() {
        let config = "CONFIG_A=y\n# CONFIG_B is not set\n";
        assert_eq!(
            missing_options("CONFIG_A=y\nCONFIG_B=y\nCONFIG_C=n\n", config),
            ["CONFIG_B=y"]
        );
    }
}
