//! Loading a kernel: bzImage by the 64-bit Linux boot protocol, ELF by PVH.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use hebe_types::{MMIO_HOLE_END, MMIO_HOLE_START, RamRange};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::loader::elf::PvhBootCapability;
use linux_loader::loader::elf::start_info::{
    hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use linux_loader::loader::{self, KernelLoader, bzimage::BzImage, elf::Elf};
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use crate::layout;

/// `E820_TYPE_RAM`, `E820_TYPE_RESERVED`.
const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;
/// Boot protocol: kernel takes 64-bit entry at +0x200.
const XLF_KERNEL_64: u16 = 1;
const PVH_MAGIC: u32 = 0x336e_c578;
/// <asm-generic/fcntl.h>
const O_NONBLOCK: i32 = 0o4000;

/// Why a guest cannot be booted.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// A file cannot be read.
    #[error("{what} {} cannot be read", path.display())]
    Unreadable {
        /// Kernel or initrd.
        what: &'static str,
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Neither a bzImage nor an ELF kernel with PVH entry.
    #[error("{} is not a kernel that Hebe can boot: it takes a 64-bit bzImage, or an ELF kernel with a PVH entry note", .0.display())]
    NotAKernel(PathBuf),
    /// The loader refused.
    #[error("kernel {} cannot be loaded: it is damaged, or the VM has too little memory for it", path.display())]
    Load {
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: loader::Error,
    },
    /// Kernel and initrd together need more RAM.
    #[error(
        "the VM has too little memory for its kernel and its initrd of {0} bytes: give it more"
    )]
    InitrdTooLarge(u64),
    /// Guest RAM does not reach.
    #[error("the VM has too little memory to boot: give it at least 2MiB")]
    Memory(#[from] GuestMemoryError),
}

/// Where the first vCPU begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// 64-bit Linux boot protocol.
    Linux64 {
        /// First instruction.
        rip: u64,
        /// Address of the boot parameters.
        boot_params: u64,
        /// Top-level page table.
        cr3: u64,
    },
    /// PVH.
    Pvh {
        /// First instruction.
        eip: u64,
        /// Address of the start info.
        start_info: u64,
    },
}

/// A kernel or initrd that is open: it can be read as often as the guest
/// boots, by a process that cannot open it any more.
#[derive(Debug)]
pub struct BootFile {
    what: &'static str,
    path: PathBuf,
    file: File,
}

impl BootFile {
    /// Opens a bzImage or an ELF kernel.
    ///
    /// # Errors
    /// [`BootError::Unreadable`].
    pub fn kernel(path: &Path) -> Result<Self, BootError> {
        Self::open("kernel", path)
    }

    /// Opens an initial RAM file system.
    ///
    /// # Errors
    /// [`BootError::Unreadable`].
    pub fn initrd(path: &Path) -> Result<Self, BootError> {
        Self::open("initrd", path)
    }

    /// A kernel in `file`, of which `path` says where it comes from.
    pub fn kernel_in(file: File, path: PathBuf) -> Self {
        let what = "kernel";
        Self { what, path, file }
    }

    /// An initial RAM file system in `file`, of which `path` says where it
    /// comes from.
    pub fn initrd_in(file: File, path: PathBuf) -> Self {
        let what = "initrd";
        Self { what, path, file }
    }

    /// Where it lies.
    pub fn file(&self) -> &File {
        &self.file
    }

    fn open(what: &'static str, path: &Path) -> Result<Self, BootError> {
        let file = OpenOptions::new()
            .read(true)
            // A FIFO must be refused, not waited for.
            .custom_flags(O_NONBLOCK)
            .open(path)
            .map_err(|source| BootError::Unreadable {
                what,
                path: path.to_owned(),
                source,
            })?;
        let path = path.to_owned();
        Ok(Self { what, path, file })
    }

    /// Another descriptor of it, at its beginning.
    fn rewound(&self) -> Result<File, BootError> {
        let again = || {
            let mut file = self.file.try_clone()?;
            file.rewind()?;
            Ok(file)
        };
        again().map_err(|source| self.unreadable(source))
    }

    fn unreadable(&self, source: io::Error) -> BootError {
        BootError::Unreadable {
            what: self.what,
            path: self.path.clone(),
            source,
        }
    }
}

/// What to boot.
#[derive(Clone, Debug)]
pub struct BootPlan<'a> {
    /// bzImage or ELF.
    pub kernel: &'a BootFile,
    /// Initial RAM file system.
    pub initrd: Option<&'a BootFile>,
    /// Command line without terminator.
    pub cmdline: &'a str,
    /// Address of the ACPI root pointer, from [`crate::write_acpi`].
    pub rsdp: u64,
    /// The guest's RAM.
    pub ranges: &'a [RamRange],
}

/// Puts kernel, initrd, command line and boot data into `ram`.
pub fn load(plan: &BootPlan, ram: &GuestMemoryMmap<()>) -> Result<Entry, BootError> {
    let mut file = plan.kernel.rewound()?;
    let mut magic = [0; 4];
    file.read_exact(&mut magic)
        .and_then(|()| file.rewind())
        .map_err(|_| BootError::NotAKernel(plan.kernel.path.clone()))?;
    write_cmdline(plan.cmdline, ram)?;
    write_gdt(ram)?;
    if &magic == b"\x7fELF" {
        load_pvh(plan, &mut file, ram)
    } else {
        load_bzimage(plan, &mut file, ram)
    }
}

fn write_cmdline(cmdline: &str, ram: &GuestMemoryMmap<()>) -> Result<(), BootError> {
    let mut bytes = cmdline.as_bytes().to_vec();
    bytes.truncate(layout::CMDLINE_LEN_MAX - 1);
    bytes.push(0);
    Ok(ram.write_slice(&bytes, GuestAddress(layout::CMDLINE))?)
}

/// Null, null, flat code, flat data: selectors 0x10 and 0x18, as the boot
/// protocols want them.
fn write_gdt(ram: &GuestMemoryMmap<()>) -> Result<(), BootError> {
    let table: [u64; 4] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];
    let bytes: Vec<u8> = table.iter().flat_map(|entry| entry.to_le_bytes()).collect();
    Ok(ram.write_slice(&bytes, GuestAddress(layout::GDT))?)
}

fn load_bzimage(
    plan: &BootPlan,
    file: &mut File,
    ram: &GuestMemoryMmap<()>,
) -> Result<Entry, BootError> {
    let start = GuestAddress(layout::HIGH_RAM_START);
    let loaded = BzImage::load(ram, None, file, Some(start)).map_err(|source| match source {
        loader::Error::Bzimage(loader::bzimage::Error::InvalidBzImage) => {
            BootError::NotAKernel(plan.kernel.path.clone())
        }
        source => BootError::Load {
            path: plan.kernel.path.clone(),
            source,
        },
    })?;
    let mut header: setup_header = loaded
        .setup_header
        .ok_or_else(|| BootError::NotAKernel(plan.kernel.path.clone()))?;
    if header.xloadflags & XLF_KERNEL_64 == 0 {
        return Err(BootError::NotAKernel(plan.kernel.path.clone()));
    }
    // The kernel unpacks itself at its preferred address and uses `init_size`
    // bytes there: the initrd must not lie in its way.
    let pref = header.pref_address;
    let kernel_end = loaded.kernel_end.max(pref + u64::from(header.init_size));
    let initrd = load_initrd(plan, kernel_end, u64::from(header.initrd_addr_max), ram)?;
    header.type_of_loader = 0xff;
    header.cmd_line_ptr = layout::CMDLINE as u32;
    if let Some((address, len)) = initrd {
        header.ramdisk_image = address as u32;
        header.ramdisk_size = len as u32;
    }
    let mut params = boot_params {
        hdr: header,
        acpi_rsdp_addr: plan.rsdp,
        ..Default::default()
    };
    for (i, (address, size, type_)) in memory_map(plan.ranges).into_iter().enumerate() {
        params.e820_table[i] = boot_e820_entry {
            addr: address,
            size,
            r#type: type_,
        };
        params.e820_entries = i as u8 + 1;
    }
    ram.write_obj(params, GuestAddress(layout::BOOT_PARAMS))?;
    write_page_tables(ram)?;
    Ok(Entry::Linux64 {
        rip: loaded.kernel_load.0 + 0x200,
        boot_params: layout::BOOT_PARAMS,
        cr3: layout::PAGE_TABLES,
    })
}

fn load_pvh(
    plan: &BootPlan,
    file: &mut File,
    ram: &GuestMemoryMmap<()>,
) -> Result<Entry, BootError> {
    let start = GuestAddress(layout::HIGH_RAM_START);
    let loaded = Elf::load(ram, None, file, Some(start)).map_err(|source| BootError::Load {
        path: plan.kernel.path.clone(),
        source,
    })?;
    let PvhBootCapability::PvhEntryPresent(entry) = loaded.pvh_boot_cap else {
        return Err(BootError::NotAKernel(plan.kernel.path.clone()));
    };
    let initrd = load_initrd(plan, loaded.kernel_end, u64::from(u32::MAX), ram)?;
    let map = memory_map(plan.ranges);
    let modules = layout::PVH_INFO + size_of::<hvm_start_info>() as u64;
    let map_address = modules + size_of::<hvm_modlist_entry>() as u64;
    let info = hvm_start_info {
        magic: PVH_MAGIC,
        version: 1,
        nr_modules: u32::from(initrd.is_some()),
        modlist_paddr: if initrd.is_some() { modules } else { 0 },
        cmdline_paddr: layout::CMDLINE,
        rsdp_paddr: plan.rsdp,
        memmap_paddr: map_address,
        memmap_entries: map.len() as u32,
        ..Default::default()
    };
    ram.write_obj(Pvh(info), GuestAddress(layout::PVH_INFO))?;
    if let Some((paddr, size)) = initrd {
        let module = hvm_modlist_entry {
            paddr,
            size,
            ..Default::default()
        };
        ram.write_obj(Pvh(module), GuestAddress(modules))?;
    }
    for (i, (addr, size, type_)) in map.into_iter().enumerate() {
        let entry = hvm_memmap_table_entry {
            addr,
            size,
            type_,
            reserved: 0,
        };
        let at = map_address + (i * size_of::<hvm_memmap_table_entry>()) as u64;
        ram.write_obj(Pvh(entry), GuestAddress(at))?;
    }
    Ok(Entry::Pvh {
        eip: entry.0,
        start_info: layout::PVH_INFO,
    })
}

/// The PVH structs, which are plain integers without padding.
#[derive(Clone, Copy, Default)]
#[repr(transparent)]
struct Pvh<T>(T);

// SAFETY: integers alone, no padding (sizes 56, 32, 24 are the sums of the
// fields'), any bytes are a value.
unsafe impl ByteValued for Pvh<hvm_start_info> {}
// SAFETY: as above.
unsafe impl ByteValued for Pvh<hvm_modlist_entry> {}
// SAFETY: as above.
unsafe impl ByteValued for Pvh<hvm_memmap_table_entry> {}

/// Places the initrd as high as it may lie, above the kernel.
fn load_initrd(
    plan: &BootPlan,
    kernel_end: u64,
    address_max: u64,
    ram: &GuestMemoryMmap<()>,
) -> Result<Option<(u64, u64)>, BootError> {
    let Some(initrd) = plan.initrd else {
        return Ok(None);
    };
    let mut file = initrd.rewound()?;
    let len = file.metadata().map_err(|e| initrd.unreadable(e))?.len();
    let low_end = plan
        .ranges
        .iter()
        .filter(|r| r.gpa.0 < MMIO_HOLE_START)
        .map(|r| r.gpa.0 + r.len)
        .max()
        .unwrap_or(0);
    let end = low_end.min(address_max.saturating_add(1));
    let address = end
        .checked_sub(len)
        .map(|a| a & !0xfff)
        .filter(|a| *a >= kernel_end);
    let Some(address) = address else {
        return Err(BootError::InitrdTooLarge(len));
    };
    ram.read_exact_volatile_from(GuestAddress(address), &mut file, len as usize)?;
    Ok(Some((address, len)))
}

/// RAM below 640 KiB and above 1 MiB; firmware's range between reserved.
fn memory_map(ranges: &[RamRange]) -> Vec<(u64, u64, u32)> {
    let mut map = vec![
        (0, layout::LOW_RAM_END, E820_RAM),
        (
            layout::LOW_RAM_END,
            layout::HIGH_RAM_START - layout::LOW_RAM_END,
            E820_RESERVED,
        ),
    ];
    for range in ranges {
        let start = range.gpa.0.max(layout::HIGH_RAM_START);
        let end = range.gpa.0 + range.len;
        debug_assert!(end <= MMIO_HOLE_START || range.gpa.0 >= MMIO_HOLE_END);
        if end > start {
            map.push((start, end - start, E820_RAM));
        }
    }
    map
}

/// Identity map of the first 4 GiB with 2 MiB pages.
fn write_page_tables(ram: &GuestMemoryMmap<()>) -> Result<(), BootError> {
    const PRESENT_WRITABLE: u64 = 0b11;
    const LARGE: u64 = 1 << 7;
    let page = |n: u64| layout::PAGE_TABLES + n * 0x1000;
    ram.write_obj(page(1) | PRESENT_WRITABLE, GuestAddress(page(0)))?;
    for gib in 0..4 {
        ram.write_obj(
            page(2 + gib) | PRESENT_WRITABLE,
            GuestAddress(page(1) + gib * 8),
        )?;
        let entries = (0..512u64)
            .flat_map(|i| ((gib << 30 | i << 21) | PRESENT_WRITABLE | LARGE).to_le_bytes());
        ram.write_slice(&entries.collect::<Vec<u8>>(), GuestAddress(page(2 + gib)))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use hebe_types::{ByteSize, ram_ranges};

    use super::*;

    #[test]
    fn the_memory_map_covers_all_ram_but_the_firmware_range() {
        for size in [ByteSize::mib(2), ByteSize::mib(256), ByteSize::gib(5)] {
            let ranges = ram_ranges(size);
            let map = memory_map(&ranges);
            let ram: u64 = map.iter().filter(|e| e.2 == E820_RAM).map(|e| e.1).sum();
            assert_eq!(
                ram,
                size.bytes() - (layout::HIGH_RAM_START - layout::LOW_RAM_END)
            );
            for pair in map.windows(2) {
                assert!(pair[0].0 + pair[0].1 <= pair[1].0, "sorted, no overlap");
            }
        }
    }

    #[test]
    fn what_is_not_a_kernel_is_refused_by_name() {
        let dir = std::env::temp_dir().join(format!("hebe-boot-{}", std::process::id()));
        std::fs::create_dir_all(&dir).expect("temp dir");
        let path = dir.join("not-a-kernel");
        std::fs::write(&path, vec![7u8; 4096]).expect("write");
        let ranges = ram_ranges(ByteSize::mib(16));
        let ram = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 16 << 20)]).expect("map");
        let kernel = BootFile::kernel(&path).expect("open");
        let plan = BootPlan {
            kernel: &kernel,
            initrd: None,
            cmdline: "",
            rsdp: 0,
            ranges: &ranges,
        };
        let refused = load(&plan, &ram).expect_err("refused").to_string();
        assert!(refused.contains("not-a-kernel"), "{refused}");
        let absent = BootFile::kernel(Path::new("/no/such/kernel"));
        assert!(matches!(absent, Err(BootError::Unreadable { .. })));
        std::fs::remove_dir_all(&dir).expect("clean up");
    }
}
