//! fio and iperf3, by which a VM's disk and network are measured: Debian's own,
//! with their libraries, on a disk for guests and in a folder of the host.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::apt;
use crate::assets::Assets;
use crate::progress::Progress;
use crate::{bundle, disk};

/// The folder in the host.
pub const HOST_FOLDER: &str = "/data/tools";
/// The folder in a guest with such a disk: where that is mounted.
pub const GUEST_FOLDER: &str = "/disk";
/// The disk's name among the guests' disks; all of them share it, read-only.
pub const DISK: &str = "tools";

const PROGRAMS: [&str; 2] = ["fio", "iperf3"];
/// Where unpacked packages have their libraries; fio's for Ceph, which it does
/// not use here, are found by their own path only.
const LIBRARIES: [&str; 3] = [
    "usr/lib/x86_64-linux-gnu",
    "lib/x86_64-linux-gnu",
    "usr/lib/x86_64-linux-gnu/ceph",
];
/// What the file system itself and its journal need, in MiB.
const SPARE_MIB: u64 = 24;

/// Puts the programs into `folder`: the machine's own where it has both, else
/// Debian's, unpacked in the cache.
pub fn place(assets: &Assets, folder: &Path, progress: &dyn Progress) -> Result<()> {
    let own: Option<Vec<PathBuf>> = PROGRAMS.iter().map(|p| apt::find_program(p)).collect();
    let (programs, libraries) = match own {
        Some(programs) => (programs, None),
        None => {
            let dir = fetched(assets, progress)?;
            let programs = PROGRAMS.iter().map(|name| dir.join("usr/bin").join(name));
            let libraries = std::env::join_paths(LIBRARIES.map(|l| dir.join(l)))?;
            (programs.collect(), Some(libraries))
        }
    };
    for (name, program) in PROGRAMS.iter().zip(&programs) {
        bundle::place(program, libraries.as_deref(), folder, name)?;
    }
    Ok(())
}

fn fetched(assets: &Assets, progress: &dyn Progress) -> Result<PathBuf> {
    if !assets.distribution().is_debian() {
        bail!("this is no Debian: install fio and iperf3, so that they are in PATH");
    }
    let whole = |dir: &Path| {
        let folder = dir.join("usr/bin");
        PROGRAMS.iter().all(|name| folder.join(name).is_file())
    };
    assets.filled("tools", progress, whole, |dir| {
        let codename = assets.distribution().codename.clone();
        let apt = assets.apt("tools", &[&codename], false, None, progress)?;
        progress.step("downloading fio and iperf3");
        let mut debs = Vec::new();
        for name in PROGRAMS {
            // What an earlier one needed is among them, too.
            debs = apt.download_with_missing(name)?;
        }
        apt::unpack(&debs, dir)
    })
}

/// Makes the guests' disk of a folder that [`place`] filled.
pub fn make_disk(image: &Path, folder: &Path, progress: &dyn Progress) -> Result<()> {
    let mib = size_of(folder)?.div_ceil(1 << 20);
    disk::make_ext4(image, mib + mib / 8 + SPARE_MIB, Some(folder), progress)
}

fn size_of(folder: &Path) -> Result<u64> {
    let read = || format!("cannot read {}", folder.display());
    let mut bytes = 0;
    for entry in fs::read_dir(folder).with_context(read)? {
        let entry = entry?;
        let metadata = entry.metadata()?;
        bytes += match metadata.is_dir() {
            true => size_of(&entry.path())?,
            false => metadata.len(),
        };
    }
    Ok(bytes)
}

/// The words that run one of the programs in a guest.
pub fn in_guest(program: &str) -> Vec<String> {
    bundle::argv(GUEST_FOLDER, program)
}

/// The words that run one of the programs in the host.
pub fn in_host(program: &str) -> Vec<String> {
    bundle::argv(HOST_FOLDER, program)
}
