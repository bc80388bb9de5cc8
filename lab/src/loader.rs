//! Hosts that start as real machines do.
//!
//! ```text
//!  SeaBIOS ─► boot sector, GRUB between it and the first partition (msdos label)
//!          ─► /boot/grub/grub.cfg ─► Debian's kernel and initramfs ─► systemd
//! ```
//!
//! Nothing of the lab's takes part in that: Debian's own `grub-install`,
//! `update-grub` and `update-initramfs` made what is started. The lab comes in
//! behind, with its agent as a unit of systemd and its disk at `/data`. The image
//! is made once: out of packages like every other; then a host of the lab that has
//! it as its root runs `grub-install`, as an installer would.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use hebe_image::build::{FileIn, Order};

use crate::assets::Assets;
use crate::machine::SystemDisk;
use crate::progress::Progress;
use crate::scenario::{Lab, LabOptions};
use crate::system::{self, System};

/// Bytes of the disk; it takes what is in it.
const SIZE: u64 = 3 << 30;
/// Bytes of a sector.
const SECTOR: u64 = 512;
/// Where the builder of images puts the partition, and what it keeps free behind
/// it for the spare table, in sectors.
const FIRST: u64 = 2048;
const TAIL: u64 = 2048;
/// Sectors of a GPT and of its header, which lie behind the first sector and at
/// the end.
const GPT_SECTORS: u64 = 33;
/// Counted up when these images are made in another way than [`INSTALL`] says.
const FORMAT: u32 = 1;

/// Where a host says what its initramfs saw, before systemd runs: modules, and
/// devices in `/dev`.
pub const INITRAMFS_MODULES: &str = "/run/lab.modules";
/// See [`INITRAMFS_MODULES`].
pub const INITRAMFS_DEVICES: &str = "/run/lab.devices";
/// The file with the words that the machine's owner has for GRUB.
pub const GRUB_FILE: &str = "/etc/default/grub.d/10-lab.cfg";

/// The lab's disk.
const DATA: &str = "[Unit]\nDescription=Disk of the lab\n\n[Mount]\nWhat=/dev/vdb\nWhere=/data\nType=ext4\n\n[Install]\nWantedBy=local-fs.target\n";
/// As an owner has it whose machine has a serial line and no screen.
const GRUB: &str = "GRUB_TIMEOUT=1
GRUB_TERMINAL=serial
GRUB_SERIAL_COMMAND=\"serial --unit=0 --speed=115200\"
GRUB_DISABLE_OS_PROBER=true
GRUB_CMDLINE_LINUX_DEFAULT=\"console=ttyS0 loglevel=4\"
GRUB_CMDLINE_LINUX=\"panic=0 tsc=reliable cryptomgr.notests systemd.show_status=error systemd.log_target=journal\"
";
/// A script of initramfs-tools, just before the root's init is run.
const SCRIPT: &str = "#!/bin/sh
[ \"$1\" = prereqs ] && exit 0
cat /proc/modules > /run/lab.modules
for node in /dev/* ${rootmnt}/dev/*; do echo ${node##*/}; done > /run/lab.devices
";
/// What the installer of a real machine does in the end.
const INSTALL: &str = "set -eu
grub-install /dev/vda
update-grub
grub-script-check /boot/grub/grub.cfg
";

/// What is in such an image besides what every image has.
pub(crate) fn files() -> Vec<FileIn> {
    vec![
        FileIn::text("/etc/systemd/system/data.mount", DATA),
        FileIn::text(GRUB_FILE, GRUB),
        FileIn {
            mode: 0o755,
            ..FileIn::text("/etc/initramfs-tools/scripts/init-bottom/lab", SCRIPT)
        },
    ]
}

/// The image in the cache, made at first use.
///
/// # Errors
/// Also an [`EmulatorFailure`](crate::machine::EmulatorFailure).
pub(crate) fn cached_image(
    assets: &Assets,
    order: &Order,
    progress: &dyn Progress,
) -> Result<PathBuf> {
    let order = Order {
        size: SIZE,
        ..order.clone()
    };
    let all = format!("{FORMAT} {INSTALL} {}", system::fingerprint(&order));
    let number = system::number_of(&all);
    let name = format!("loader-{}-{number:08x}", order.suite);
    let file = |dir: &Path| dir.join("disk.img");
    let fill = |dir: &Path| {
        let image = file(dir);
        system::make_image("starting system's", &order, &image, progress)?;
        let disk = File::options().read(true).write(true).open(&image);
        relabel(&disk.context("cannot open an image")?, SIZE)?;
        install(assets, &order.suite, image, progress)
    };
    let dir = assets.filled(&name, progress, |dir| file(dir).is_file(), fill)?;
    Ok(file(&dir))
}

/// An msdos label in the place of the GPT: what Debian's installer makes on a
/// machine with a BIOS and such a disk. GRUB fits between it and the partition.
fn relabel(disk: &File, len: u64) -> Result<()> {
    let sectors = len / SECTOR;
    let mut first = [0; SECTOR as usize];
    let record = &mut first[446..462];
    // To be booted from, Linux; cylinders that nobody reads any more.
    record[..8].copy_from_slice(&[0x80, 0xfe, 0xff, 0xff, 0x83, 0xfe, 0xff, 0xff]);
    let field = |value: u64| u32::try_from(value).map(u32::to_le_bytes);
    record[8..12].copy_from_slice(&field(FIRST)?);
    record[12..].copy_from_slice(&field(sectors - FIRST - TAIL)?);
    first[510..].copy_from_slice(&[0x55, 0xaa]);
    let nothing = vec![0; (GPT_SECTORS * SECTOR) as usize];
    disk.write_all_at(&first, 0)?;
    disk.write_all_at(&nothing, SECTOR)?;
    disk.write_all_at(&nothing, (sectors - GPT_SECTORS) * SECTOR)?;
    disk.sync_all().context("cannot write an image")
}

/// Has Debian install GRUB on a disk, in a host of the lab that has it as its root.
fn install(assets: &Assets, suite: &str, image: PathBuf, progress: &dyn Progress) -> Result<()> {
    let options = LabOptions {
        system: Some(System::of_suite(suite)),
        guest_kernels: Vec::new(),
        guests: 0,
        reserve_mib: 0,
        product: Vec::new(),
        disk_mib: 1024,
        ..LabOptions::default()
    };
    let disk = SystemDisk { image, kept: true };
    let lab = Lab::boot_on(assets, options, Some(disk), progress)?;
    progress.step("installing GRUB");
    lab.machine.exec_ok(&["sh", "-c", INSTALL])?;
    // Places of the lab that only this boot has.
    let script = "rmdir /etc/hebe/* /etc/hebe /var/lib/hebe 2>/dev/null; :";
    lab.machine.exec_ok(&["sh", "-c", script])?;
    // GRUB reads no journal: the file system has to be left in order.
    lab.machine.shut_down_by_systemd()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_partition_stays_where_it_is_under_another_label() {
        let len = 8 << 20;
        let file = tempfile::tempfile().expect("file");
        file.set_len(len).expect("len");
        file.write_all_at(b"EFI PART", SECTOR).expect("written");
        file.write_all_at(b"EFI PART", len - SECTOR)
            .expect("written");
        file.write_all_at(b"here", FIRST * SECTOR).expect("written");
        relabel(&file, len).expect("relabelled");
        let mut disk = vec![0; len as usize];
        file.read_exact_at(&mut disk, 0).expect("read");
        assert_eq!(disk[510..512], [0x55, 0xaa]);
        assert!(!disk.windows(8).any(|w| w == b"EFI PART"));
        assert_eq!(disk[(FIRST * SECTOR) as usize..][..4], *b"here");
        let sector = |at: usize| u32::from_le_bytes(disk[at..at + 4].try_into().expect("four"));
        assert_eq!(sector(446 + 8), 2048);
        assert_eq!(u64::from(sector(446 + 12)), len / SECTOR - 4096);
    }
}
