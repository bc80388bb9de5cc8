//! Where things lie in guest-physical memory and in port space.
//!
//! ```text
//! 0x0000_0500  GDT                     0x000a_0000  reserved up to 1 MiB
//! 0x0000_6000  PVH start info          0x000e_0000  ACPI tables, RSDP first
//! 0x0000_7000  Linux boot parameters   0x0010_0000  kernel
//! 0x0000_9000  page tables             below the hole: initrd
//! 0x0002_0000  command line            0xc000_0000  PCI memory window
//! ```

/// Global descriptor table; the vCPU's first segments come from it.
pub const GDT: u64 = 0x500;
/// PVH start info, followed by its module list and memory map.
pub const PVH_INFO: u64 = 0x6000;
/// Linux boot parameters ("zero page").
pub const BOOT_PARAMS: u64 = 0x7000;
/// Six pages of page tables that map the first 4 GiB onto themselves.
pub const PAGE_TABLES: u64 = 0x9000;
/// Kernel command line.
pub const CMDLINE: u64 = 0x2_0000;
/// Most bytes of the command line, with its terminator.
pub const CMDLINE_LEN_MAX: usize = 2048;
/// End of the low RAM that the guest may use.
pub const LOW_RAM_END: u64 = 0xa_0000;
/// ACPI tables, inside the range that PCs reserve for firmware.
pub const ACPI: u64 = 0xe_0000;
/// Room for the ACPI tables.
pub const ACPI_LEN_MAX: usize = 0xf000;
/// VM generation ID, 16 bytes in a page of their own, where the VM has one.
pub const GENERATION_ID: u64 = 0xe_f000;
/// First byte of RAM above the firmware's range.
pub const HIGH_RAM_START: u64 = 0x10_0000;

/// PCI memory window, first byte.
pub const PCI_WINDOW_START: u64 = hebe_types::MMIO_HOLE_START;
/// PCI memory window, last byte. IOAPIC and LAPIC follow.
pub const PCI_WINDOW_LAST: u64 = 0xfdff_ffff;
/// IOAPIC registers.
pub const IOAPIC: u32 = 0xfec0_0000;
/// LAPIC registers.
pub const LAPIC: u32 = 0xfee0_0000;

/// ACPI sleep control register (ACPI 6.5, 4.8.3.7), one byte.
pub const PORT_SLEEP_CONTROL: u16 = 0x600;
/// ACPI sleep status register, one byte.
pub const PORT_SLEEP_STATUS: u16 = 0x601;
/// ACPI reset register, one byte.
pub const PORT_RESET: u16 = 0x602;
/// Value that resets when written to [`PORT_RESET`].
pub const RESET_VALUE: u8 = 1;
/// Pending events of the generic event device, one byte; reading clears it.
pub const PORT_EVENTS: u16 = 0x603;
/// Event bit: the power button was pressed.
pub const EVENT_POWER_BUTTON: u8 = 1;
/// Event bit: the VM generation ID changed.
pub const EVENT_GENERATION: u8 = 2;
/// Sleep type that `_S5` names.
pub const SLEEP_TYPE_OFF: u8 = 5;
/// Interrupt of the generic event device, edge-triggered.
pub const IRQ_EVENTS: u32 = 5;
/// Where a guest tells that its kernel panicked, one byte.
pub const PORT_PVPANIC: u16 = 0x505;
/// Index and data of the real-time clock, one byte each.
pub const PORT_RTC: u16 = 0x70;
/// Register that holds the century.
pub const RTC_CENTURY: u8 = 0x32;
/// First serial port.
pub const PORT_SERIAL: u16 = 0x3f8;
/// Interrupt of the first serial port.
pub const IRQ_SERIAL: u32 = 4;
