//! ACPI tables of a hardware-reduced machine (ACPI 6.5, 4.1): no PIC, PIT,
//! RTC or keyboard controller that a guest would probe at the price of many
//! exits; one PCI root; power-off, reset and a power button.

use acpi_tables::Aml;
use acpi_tables::aml::{
    self, AddressSpace, AddressSpaceCacheable, And, Device, EISAName, Field, FieldAccessType,
    FieldEntry, FieldLockRule, FieldUpdateRule, IO, If, Interrupt, Local, Method, Name, Notify,
    OpRegion, OpRegionSpace, Package, Path, ResourceTemplate, Scope, Store,
};
use acpi_tables::fadt::{FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace as GasSpace, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use vm_memory::{Bytes, GuestAddress};

use crate::layout;

const OEM: [u8; 6] = *b"HEBE  ";
const TABLE: [u8; 8] = *b"HEBEVMM ";
const REVISION: u32 = 1;

/// `IAPC_BOOT_ARCH`: no VGA, no CMOS clock.
const BOOT_ARCH_NO_VGA: u16 = 1 << 2;
const BOOT_ARCH_NO_CMOS: u16 = 1 << 5;

/// The tables could not be written.
#[derive(Debug, thiserror::Error)]
pub enum AcpiError {
    /// They outgrew their place.
    #[error("the ACPI tables take {0} bytes: more than there is room for")]
    TooLong(usize),
    /// Guest RAM does not reach there.
    #[error("the VM has too little memory for its ACPI tables")]
    Memory(#[source] vm_memory::GuestMemoryError),
}

/// What the tables tell of.
#[derive(Clone, Copy, Debug, Default)]
pub struct AcpiPlan {
    /// Processors.
    pub vcpus: u8,
    /// A serial port.
    pub serial: bool,
    /// A real-time clock.
    pub rtc: bool,
    /// A device that takes word of a panic.
    pub pvpanic: bool,
    /// A VM generation ID, which is written too.
    pub generation_id: Option<[u8; 16]>,
}

/// Writes all tables and returns the address of the RSDP.
pub fn write_acpi(ram: &vm_memory::GuestMemoryMmap<()>, plan: &AcpiPlan) -> Result<u64, AcpiError> {
    let mut image = Image {
        bytes: vec![0; Rsdp::len().next_multiple_of(16)],
    };
    let dsdt = image.append(&dsdt(plan));
    let fadt = image.append(&to_bytes(&fadt(dsdt, plan.rtc)));
    let madt = image.append(&to_bytes(&madt(plan.vcpus)));
    let mut xsdt = XSDT::new(OEM, TABLE, REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = image.append(&to_bytes(&xsdt));
    let rsdp = to_bytes(&Rsdp::new(OEM, xsdt));
    image.bytes[..rsdp.len()].copy_from_slice(&rsdp);
    if image.bytes.len() > layout::ACPI_LEN_MAX {
        return Err(AcpiError::TooLong(image.bytes.len()));
    }
    ram.write_slice(&image.bytes, GuestAddress(layout::ACPI))
        .map_err(AcpiError::Memory)?;
    if let Some(id) = &plan.generation_id {
        ram.write_slice(id, GuestAddress(layout::GENERATION_ID))
            .map_err(AcpiError::Memory)?;
    }
    Ok(layout::ACPI)
}

struct Image {
    bytes: Vec<u8>,
}

impl Image {
    fn append(&mut self, table: &[u8]) -> u64 {
        let at = self.bytes.len().next_multiple_of(16);
        self.bytes.resize(at, 0);
        self.bytes.extend_from_slice(table);
        layout::ACPI + at as u64
    }
}

fn to_bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

fn port(address: u16) -> GAS {
    GAS::new(
        GasSpace::SystemIo,
        8,
        0,
        AccessSize::ByteAccess,
        u64::from(address),
    )
}

fn fadt(dsdt: u64, rtc: bool) -> impl Aml {
    let mut fadt = FADTBuilder::new(OEM, TABLE, REVISION)
        .dsdt_64(dsdt)
        .preferred_pm_profile(PmProfile::PerformanceServer)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Wbinvd)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    fadt.reset_reg = port(layout::PORT_RESET);
    fadt.reset_value = layout::RESET_VALUE;
    fadt.sleep_control_reg = port(layout::PORT_SLEEP_CONTROL);
    fadt.sleep_status_reg = port(layout::PORT_SLEEP_STATUS);
    let no_clock = if rtc { 0 } else { BOOT_ARCH_NO_CMOS };
    fadt.iapc_boot_arch = (BOOT_ARCH_NO_VGA | no_clock).into();
    if rtc {
        fadt.century = layout::RTC_CENTURY;
    }
    fadt.finalize()
}

fn madt(vcpus: u8) -> impl Aml {
    let lapic = LocalInterruptController::Address(layout::LAPIC);
    let mut madt = MADT::new(OEM, TABLE, REVISION, lapic);
    for index in 0..vcpus {
        madt.add_structure(ProcessorLocalApic::new(
            index,
            index,
            EnabledStatus::Enabled,
        ));
    }
    madt.add_structure(IoApic::new(0, layout::IOAPIC, 0));
    madt
}

fn dsdt(plan: &AcpiPlan) -> Vec<u8> {
    let mut body = Vec::new();
    pci_root().to_aml_bytes_into(&mut body);
    let has_id = plan.generation_id.is_some();
    if has_id {
        generation_id(&mut body);
    }
    events(&mut body, has_id);
    if plan.serial {
        serial_port(&mut body);
    }
    if plan.pvpanic {
        pvpanic(&mut body);
    }
    if plan.rtc {
        clock(&mut body);
    }
    // \_S5: the sleep type for power-off.
    let sleep_type = layout::SLEEP_TYPE_OFF;
    Name::new("_S5_".into(), &Package::new(vec![&sleep_type])).to_aml_bytes(&mut body);
    let mut table = Sdt::new(*b"DSDT", 36, 6, OEM, TABLE, REVISION);
    table.append_slice(&body);
    table.as_slice().to_vec()
}

/// AML that was built already.
struct Built(Vec<u8>);

impl Built {
    fn to_aml_bytes_into(&self, sink: &mut Vec<u8>) {
        sink.extend_from_slice(&self.0);
    }
}

fn scope_sb(children: Vec<&dyn Aml>) -> Built {
    Built(to_bytes(&Scope::new("_SB_".into(), children)))
}

fn pci_root() -> Built {
    let memory = AddressSpace::new_memory(
        AddressSpaceCacheable::NotCacheable,
        true,
        layout::PCI_WINDOW_START as u32,
        layout::PCI_WINDOW_LAST as u32,
        None,
    );
    let bus = AddressSpace::new_bus_number(0u16, 0u16);
    let config = IO::new(0xcf8, 0xcf8, 1, 8);
    let ports = AddressSpace::new_io(0xd00u16, 0xffffu16, None);
    let resources = ResourceTemplate::new(vec![&bus, &config, &ports, &memory]);
    let hid = EISAName::new("PNP0A03");
    let hid = Name::new("_HID".into(), &hid);
    let bbn = Name::new("_BBN".into(), &aml::ZERO);
    let seg = Name::new("_SEG".into(), &aml::ZERO);
    let uid = Name::new("_UID".into(), &aml::ZERO);
    let crs = Name::new("_CRS".into(), &resources);
    let root = Device::new("PCI0".into(), vec![&hid, &bbn, &seg, &uid, &crs]);
    scope_sb(vec![&root])
}

/// A generic event device (ACPI 6.5, 5.6.9) that notifies the power button,
/// and the VM generation ID where there is one. Without, each event is the
/// power button's, in the very bytes that older guests have.
fn events(body: &mut Vec<u8>, has_id: bool) {
    let hid = Name::new("_HID".into(), &"ACPI0013");
    let uid = Name::new("_UID".into(), &aml::ZERO);
    let interrupt = Interrupt::new(true, true, false, false, layout::IRQ_EVENTS);
    let resources = ResourceTemplate::new(vec![&interrupt]);
    let crs = Name::new("_CRS".into(), &resources);
    let region = OpRegion::new(
        "EVTR".into(),
        OpRegionSpace::SystemIO,
        &layout::PORT_EVENTS,
        &1u8,
    );
    let field = Field::new(
        "EVTR".into(),
        FieldAccessType::Byte,
        FieldLockRule::NoLock,
        FieldUpdateRule::WriteAsZeroes,
        vec![FieldEntry::Named(*b"EVTS", 8)],
    );
    let pending = Local(0);
    let events = Path::new("EVTS");
    let fetch = Store::new(&pending, &events);
    let button = Path::new("\\_SB_.PWRB");
    let notify = Notify::new(&button, &0x80u8);
    let of_button = And::new(&aml::ZERO, &pending, &layout::EVENT_POWER_BUTTON);
    let if_button = If::new(&of_button, vec![&notify]);
    let id = Path::new("\\_SB_.VGEN");
    let notify_id = Notify::new(&id, &0x80u8);
    let of_id = And::new(&aml::ZERO, &pending, &layout::EVENT_GENERATION);
    let if_id = If::new(&of_id, vec![&notify_id]);
    let told: Vec<&dyn Aml> = if has_id {
        vec![&fetch, &if_button, &if_id]
    } else {
        vec![&fetch, &notify]
    };
    let handler = Method::new("_EVT".into(), 1, true, told);
    let device = Device::new(
        "GED_".into(),
        vec![&hid, &uid, &crs, &region, &field, &handler],
    );
    let button_hid = EISAName::new("PNP0C0C");
    let button_hid = Name::new("_HID".into(), &button_hid);
    let button = Device::new("PWRB".into(), vec![&button_hid]);
    scope_sb(vec![&button, &device]).to_aml_bytes_into(body);
}

fn serial_port(body: &mut Vec<u8>) {
    let hid = EISAName::new("PNP0501");
    let hid = Name::new("_HID".into(), &hid);
    let uid = Name::new("_UID".into(), &aml::ZERO);
    let ddn = Name::new("_DDN".into(), &"COM1");
    let interrupt = Interrupt::new(true, true, false, false, layout::IRQ_SERIAL);
    let ports = IO::new(layout::PORT_SERIAL, layout::PORT_SERIAL, 0, 8);
    let resources = ResourceTemplate::new(vec![&interrupt, &ports]);
    let crs = Name::new("_CRS".into(), &resources);
    let device = Device::new("COM1".into(), vec![&hid, &uid, &ddn, &crs]);
    scope_sb(vec![&device]).to_aml_bytes_into(body);
}

/// Without an interrupt: it wakes nobody.
fn clock(body: &mut Vec<u8>) {
    let hid = EISAName::new("PNP0B00");
    let hid = Name::new("_HID".into(), &hid);
    let ports = IO::new(layout::PORT_RTC, layout::PORT_RTC, 1, 2);
    let resources = ResourceTemplate::new(vec![&ports]);
    let crs = Name::new("_CRS".into(), &resources);
    let device = Device::new("RTC_".into(), vec![&hid, &crs]);
    scope_sb(vec![&device]).to_aml_bytes_into(body);
}

/// Takes word of a panic (the `pvpanic` interface of QEMU, docs/specs).
fn pvpanic(body: &mut Vec<u8>) {
    let hid = Name::new("_HID".into(), &"QEMU0001");
    let ports = IO::new(layout::PORT_PVPANIC, layout::PORT_PVPANIC, 1, 1);
    let resources = ResourceTemplate::new(vec![&ports]);
    let crs = Name::new("_CRS".into(), &resources);
    let status = Name::new("_STA".into(), &0xfu8);
    let device = Device::new("PEVT".into(), vec![&hid, &crs, &status]);
    scope_sb(vec![&device]).to_aml_bytes_into(body);
}

/// Where the VM generation ID lies (Virtual Machine Generation ID, Microsoft
/// 2012): `ADDR` gives the low and the high half of its address.
fn generation_id(body: &mut Vec<u8>) {
    let hid = Name::new("_HID".into(), &"HEBE0001");
    let cid = Name::new("_CID".into(), &"VM_Gen_Counter");
    let ddn = Name::new("_DDN".into(), &"VM_Gen_Counter");
    let (low, high) = (layout::GENERATION_ID as u32, aml::ZERO);
    let address = Package::new(vec![&low, &high]);
    let address = Name::new("ADDR".into(), &address);
    let device = Device::new("VGEN".into(), vec![&hid, &cid, &ddn, &address]);
    scope_sb(vec![&device]).to_aml_bytes_into(body);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(vcpus: u8, serial: bool) -> AcpiPlan {
        AcpiPlan {
            vcpus,
            serial,
            rtc: true,
            pvpanic: true,
            generation_id: Some(*b"sixteen bytes id"),
        }
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |a, b| a.wrapping_add(*b))
    }

    #[test]
    fn the_tables_hang_together_and_their_checksums_are_right() {
        let ranges = [(GuestAddress(0), 2 << 20)];
        let ram = vm_memory::GuestMemoryMmap::<()>::from_ranges(&ranges).expect("map");
        let rsdp = write_acpi(&ram, &all(3, true)).expect("write");
        let read = |address: u64, len: usize| {
            let mut bytes = vec![0; len];
            ram.read_slice(&mut bytes, GuestAddress(address))
                .expect("inside RAM");
            bytes
        };
        let u32_at =
            |b: &[u8], at: usize| u32::from_le_bytes([b[at], b[at + 1], b[at + 2], b[at + 3]]);
        let u64_at =
            |b: &[u8], at: usize| u64::from(u32_at(b, at)) | u64::from(u32_at(b, at + 4)) << 32;
        let table = |address: u64| {
            let len = u32_at(&read(address, 8), 4) as usize;
            let bytes = read(address, len);
            assert_eq!(sum(&bytes), 0, "checksum of the table at {address:#x}");
            bytes
        };
        let root = read(rsdp, 36);
        assert_eq!(&root[..8], b"RSD PTR ");
        assert_eq!((sum(&root[..20]), sum(&root)), (0, 0));
        let xsdt = table(u64_at(&root, 24));
        let fadt = table(u64_at(&xsdt, 36));
        assert_eq!(&fadt[..4], b"FACP");
        assert_ne!(u32_at(&fadt, 112) & 1 << 20, 0, "hardware-reduced");
        let dsdt = table(u64_at(&fadt, 140));
        assert_eq!(&dsdt[..4], b"DSDT");
        let names = |name: &[u8]| dsdt.windows(name.len()).any(|w| w == name);
        // EISA id PNP0B00, and the FADT's word of a clock.
        assert!(names(&[0x41, 0xd0, 0x0b, 0x00]));
        assert_eq!(fadt[108], layout::RTC_CENTURY);
        assert_eq!(fadt[109] & 1 << 5, 0, "there is a CMOS clock");
        assert!(names(b"QEMU0001") && names(b"VM_Gen_Counter\0"));
        assert_eq!(read(layout::GENERATION_ID, 16), b"sixteen bytes id");
        let madt = table(u64_at(&xsdt, 44));
        let (mut at, mut processors) = (44, 0);
        while at < madt.len() {
            processors += usize::from(madt[at] == 0);
            at += usize::from(madt[at + 1]);
        }
        assert_eq!(processors, 3);
    }

    /// FNV-1a.
    fn digest(bytes: &[u8]) -> u64 {
        bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
            (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
        })
    }

    /// Guests of earlier releases are resumed with the tables that they have,
    /// and a VM without newer devices boots with the same.
    #[test]
    fn without_newer_devices_the_tables_are_what_they_always_were() {
        for (serial, known) in [
            (true, 0xdd18_a2f7_4174_79a7),
            (false, 0x4cc2_94af_32e4_35a5),
        ] {
            let ranges = [(GuestAddress(0), 2 << 20)];
            let ram = vm_memory::GuestMemoryMmap::<()>::from_ranges(&ranges).expect("map");
            let plan = AcpiPlan {
                vcpus: 3,
                serial,
                ..AcpiPlan::default()
            };
            write_acpi(&ram, &plan).expect("write");
            let mut bytes = vec![0; 0x1_0000];
            ram.read_slice(&mut bytes, GuestAddress(layout::ACPI))
                .expect("inside RAM");
            assert_eq!(digest(&bytes), known, "{serial} {:#x}", digest(&bytes));
        }
    }
}
