//! Devices: PCI functions, virtio transports and queues, the serial port.

use serde::{Deserialize, Serialize};

use crate::{Section, SectionKind};

/// The PCI host bridge: config mechanism #1.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PciRootV1 {
    /// The latch at port 0xcf8.
    pub address: u32,
    /// Command register of the host bridge at 00:00.0.
    pub bridge_command: u16,
}

impl Section for PciRootV1 {
    const KIND: SectionKind = SectionKind::PciRoot;
    const VERSION: u32 = 1;
}

/// The 16550 serial port.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SerialV1 {
    /// Divisor latch, low byte.
    pub baud_divisor_low: u8,
    /// Divisor latch, high byte.
    pub baud_divisor_high: u8,
    /// Interrupt enable register.
    pub interrupt_enable: u8,
    /// Interrupt identification register.
    pub interrupt_identification: u8,
    /// Line control register.
    pub line_control: u8,
    /// Line status register.
    pub line_status: u8,
    /// Modem control register.
    pub modem_control: u8,
    /// Modem status register.
    pub modem_status: u8,
    /// Scratch register.
    pub scratch: u8,
    /// Received bytes that the guest has not read; at most 64.
    pub in_buffer: Vec<u8>,
}

impl Section for SerialV1 {
    const KIND: SectionKind = SectionKind::Serial;
    const VERSION: u32 = 1;
}

/// One virtio PCI function. The section's instance is the PCI slot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VirtioV1 {
    /// Configuration space and MSI-X.
    pub function: PciFunctionV1,
    /// The common configuration structure and the queues.
    pub transport: TransportV1,
    /// What belongs to the kind of device.
    pub device: DeviceV1,
}

impl Section for VirtioV1 {
    const KIND: SectionKind = SectionKind::Virtio;
    const VERSION: u32 = 1;
}

/// The writable part of a PCI function's configuration space.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PciFunctionV1 {
    /// Device number on bus 0.
    pub slot: u8,
    /// Command register.
    pub command: u16,
    /// Cache line size register.
    pub cache_line_size: u8,
    /// Interrupt line register.
    pub interrupt_line: u8,
    /// Base address register 0, address bits only.
    pub bar0: u32,
    /// `bar` of the configuration access capability.
    pub window_bar: u8,
    /// `offset` of the configuration access capability.
    pub window_offset: u32,
    /// `length` of the configuration access capability.
    pub window_length: u32,
    /// MSI-X.
    pub msix: MsixV1,
}

/// MSI-X capability, table and pending bits of one function.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MsixV1 {
    /// MSI-X enable.
    pub enabled: bool,
    /// Function mask.
    pub masked: bool,
    /// The table.
    pub entries: Vec<MsixEntryV1>,
}

/// One MSI-X table entry and its pending bit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MsixEntryV1 {
    /// Message address.
    pub address: u64,
    /// Message data.
    pub data: u32,
    /// Vector control, mask bit.
    pub masked: bool,
    /// Pending bit.
    pub pending: bool,
}

/// The common configuration structure (virtio 1.2, 4.1.4.3) and what the
/// device knows beside it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransportV1 {
    /// Device status.
    pub status: u8,
    /// Interrupt status.
    pub isr: u8,
    /// Configuration generation.
    pub config_generation: u8,
    /// MSI-X vector of configuration changes.
    pub config_vector: u16,
    /// `device_feature_select`.
    pub device_feature_select: u32,
    /// `driver_feature_select`.
    pub driver_feature_select: u32,
    /// What the driver accepted.
    pub driver_features: u64,
    /// `queue_select`.
    pub queue_select: u16,
    /// The queues, in order.
    pub queues: Vec<QueueV1>,
    /// Why the device stopped, if it did.
    pub stopped: Option<String>,
}

/// One split virtqueue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueV1 {
    /// Number of entries.
    pub size: u16,
    /// `queue_enable`.
    pub enabled: bool,
    /// MSI-X vector.
    pub vector: u16,
    /// Guest-physical address of the descriptor table.
    pub desc: u64,
    /// Guest-physical address of the available ring.
    pub avail: u64,
    /// Guest-physical address of the used ring.
    pub used: u64,
    /// Index of the next available entry that the device takes.
    pub next_avail: u16,
    /// Index of the next used entry that the device writes.
    pub next_used: u16,
}

/// What belongs to the kind of device. The order of the variants is frozen.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum DeviceV1 {
    /// Block device.
    Block(BlockV1),
    /// Network interface.
    Net(NetV1),
    /// Console with one port.
    Console(ConsoleV1),
    /// Entropy source.
    Rng(RngV1),
}

/// Block device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockV1 {
    /// Capacity in sectors of 512 bytes.
    pub sectors: u64,
    /// The guest cannot write.
    pub readonly: bool,
}

/// Network interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetV1 {
    /// The NIC's address.
    pub mac: [u8; 6],
    /// `status` of the device configuration.
    pub status: u16,
    /// IPv4 addresses that the guest claimed by ARP, the latest last; at most 8.
    pub ipv4: Vec<[u8; 4]>,
}

/// Console with one port: no state of its own. What a client typed and the
/// guest has not taken goes with the client's connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConsoleV1 {}

/// Entropy source: no state of its own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RngV1 {}
