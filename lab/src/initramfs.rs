//! The initramfs of lab hosts and of their guests.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::apt::{self, Tool};
use crate::assets::Kernel;
use crate::binaries::Binaries;
use crate::cpio::Archive;
use crate::machine::Accelerator;
use crate::modules::{ModuleIndex, read_module};
use crate::progress::Progress;

/// KVM. `?` marks what some kernels do not have.
const HOST_KVM: [&str; 4] = ["irqbypass?", "kvm", "kvm-amd", "kvm-intel"];
/// What else a host needs before VMs can be resumed. The reserved range comes
/// first: the kernel probes it beside whatever is loaded after it.
const HOST_EARLY: [&str; 11] = [
    "libnvdimm",
    "nd_btt?",
    "nd_pmem",
    "device_dax",
    "dax_pmem",
    "nd_e820",
    "virtio_pci",
    "virtio_net",
    "virtio_blk",
    "tun",
    "bridge",
];
/// What a host needs to read its disk.
const HOST_DISK: [&str; 2] = ["ext4", "crc32c_generic?"];
/// What can wait until the VMs run.
const HOST_LATE: [&str; 3] = ["loop?", "vhost_net?", "virtio_rng?"];
/// What a guest needs.
const GUEST: [&str; 10] = [
    "button?",
    "evdev?",
    "virtio_pci",
    "virtio_net",
    "virtio_blk",
    "virtio_console?",
    "virtio_rng?",
    "virtio_balloon?",
    "ext4",
    "crc32c_generic?",
];

/// What a guest needs for the devices that its agent and its host look at.
const GUEST_AGENT: [&str; 3] = ["vmw_vsock_virtio_transport", "vmgenid?", "pvpanic-mmio?"];

/// Builds a host's initramfs. It is compressed: kexec checks the hash of every
/// byte inside the pause, on one processor, while a kernel unpacks its
/// initramfs beside the start of its drivers.
pub fn host(
    kernel: &Kernel,
    binaries: &Binaries,
    tools: Option<&Path>,
    progress: &dyn Progress,
) -> Result<Vec<u8>> {
    let mut archive = base(binaries)?;
    add_programs(&mut archive, &binaries.product)?;
    if let Some(busybox) = tools {
        archive.file("/bin/busybox", 0o755, &read(busybox)?);
    }
    let early: Vec<&str> = HOST_EARLY.into_iter().chain(HOST_DISK).collect();
    add_modules(
        &mut archive,
        kernel,
        &[("kvm", &HOST_KVM), ("early", &early), ("late", &HOST_LATE)],
    )?;
    compressed(&archive.finish(), progress)
}

fn compressed(archive: &[u8], progress: &dyn Progress) -> Result<Vec<u8>> {
    let tool = Tool {
        program: "zstd",
        package: "zstd",
    };
    apt::ensure_tools(&[tool], progress)?;
    let mut file = tempfile::NamedTempFile::new().context("no room for an initramfs")?;
    file.write_all(archive)
        .context("no room for an initramfs")?;
    let output = Command::new("zstd")
        .args(["-q", "-9", "-c"])
        .arg(file.path())
        .stdin(Stdio::null())
        .output()
        .context("cannot run zstd")?;
    if !output.status.success() {
        bail!(
            "zstd failed: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(output.stdout)
}

/// Builds a guest's initramfs, as it is: unpacking costs a guest of an emulated
/// machine more than the bytes do.
pub fn guest(kernel: &Kernel, binaries: &Binaries) -> Result<Vec<u8>> {
    let mut archive = base(binaries)?;
    add_programs(&mut archive, &binaries.guest)?;
    let agent: &[&str] = match binaries.guest.is_empty() {
        true => &[],
        false => &GUEST_AGENT,
    };
    add_modules(&mut archive, kernel, &[("early", &GUEST), ("agent", agent)])?;
    Ok(archive.finish())
}

fn add_programs(archive: &mut Archive, programs: &[PathBuf]) -> Result<()> {
    for program in programs {
        let name = program.file_name().context("a program without a name")?;
        archive.file(
            &format!("/bin/{}", name.to_string_lossy()),
            0o755,
            &read(program)?,
        );
    }
    Ok(())
}

fn base(binaries: &Binaries) -> Result<Archive> {
    let mut archive = Archive::new();
    for folder in [
        "/dev", "/proc", "/sys", "/run", "/tmp", "/root", "/etc", "/var/lib", "/bin",
    ] {
        archive.folder(folder);
    }
    archive.character_device("/dev/console", 0o600, 5, 1);
    archive.file("/init", 0o755, &read(&binaries.init)?);
    Ok(archive)
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}

/// The processor feature without which a module is of no use.
fn condition(path: &str) -> &'static str {
    match path {
        p if p.contains("kvm-amd") || p.contains("/ccp") => "svm",
        p if p.contains("kvm-intel") => "vmx",
        _ => "-",
    }
}

/// Whether the machine's processor has the feature.
fn processor_has(feature: &str) -> bool {
    match Accelerator::detect() {
        Accelerator::Tcg => feature == "svm",
        Accelerator::Kvm => fs::read_to_string("/proc/cpuinfo")
            .is_ok_and(|text| text.split_whitespace().any(|word| word == feature)),
    }
}

/// Adds module files and `/lab/modules`, the list that init loads them by.
/// Those of another processor stay out.
fn add_modules(archive: &mut Archive, kernel: &Kernel, groups: &[(&str, &[&str])]) -> Result<()> {
    let Some(dir) = &kernel.modules else {
        return Ok(());
    };
    let index = ModuleIndex::read(dir)?;
    let mut list = String::new();
    let mut added = std::collections::HashSet::new();
    for (group, wanted) in groups {
        for path in index.load_order(wanted)? {
            let condition = condition(&path);
            if condition != "-" && !processor_has(condition) {
                continue;
            }
            let file: PathBuf = dir.join(&path);
            let plain = path.rsplit('/').next().unwrap_or(&path);
            let plain = plain.split(".ko").next().unwrap_or(plain);
            let inside = format!("/lab/ko/{plain}.ko");
            if added.insert(inside.clone()) {
                archive.file(&inside, 0o644, &read_module(&file)?);
                list.push_str(&format!("{group} {condition} {inside}\n"));
            }
        }
    }
    archive.file("/lab/modules", 0o644, list.as_bytes());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::progress::Silent;

    #[test]
    fn a_compressed_archive_is_a_small_zstd_frame() {
        let small = compressed(&[7; 100_000], &Silent).expect("zstd");
        assert_eq!(small[..4], 0xfd2f_b528_u32.to_le_bytes());
        assert!(small.len() < 1000, "{}", small.len());
    }
}
