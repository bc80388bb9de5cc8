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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{hex, unhex};
    use crate::{StateReader, StateWriter};

    /// What version 1 is for [`samples`]. Never edited: a change of a
    /// struct is a new version beside this one.
    const GOLDEN: &str = include_str!("../../golden/devices-v1.hex");

    struct Samples {
        root: PciRootV1,
        serial: SerialV1,
        functions: Vec<VirtioV1>,
    }

    fn samples() -> Samples {
        let kinds = [
            DeviceV1::Block(BlockV1 {
                sectors: 0x0123_4567_89ab,
                readonly: true,
            }),
            DeviceV1::Net(NetV1 {
                mac: [0x52, 0x54, 0, 1, 2, 3],
                status: 3,
                ipv4: vec![[10, 0, 0, 7], [192, 168, 1, 2]],
            }),
            DeviceV1::Console(ConsoleV1 {}),
            DeviceV1::Rng(RngV1 {}),
        ];
        Samples {
            root: PciRootV1 {
                address: 0x8000_1810,
                bridge_command: 6,
            },
            serial: SerialV1 {
                baud_divisor_low: 0x0c,
                baud_divisor_high: 1,
                interrupt_enable: 5,
                interrupt_identification: 2,
                line_control: 0x83,
                line_status: 0x61,
                modem_control: 0x0b,
                modem_status: 0xb0,
                scratch: 0x5a,
                in_buffer: b"typed".to_vec(),
            },
            functions: (1u8..).zip(kinds).map(function).collect(),
        }
    }

    fn function((slot, device): (u8, DeviceV1)) -> VirtioV1 {
        let wide = u64::from(slot);
        VirtioV1 {
            function: PciFunctionV1 {
                slot,
                command: 0x0406,
                cache_line_size: 0x10,
                interrupt_line: 11,
                bar0: 0xd000_0000 + (u32::from(slot) << 16),
                window_bar: 0,
                window_offset: 0x3000,
                window_length: 4,
                msix: MsixV1 {
                    enabled: true,
                    masked: false,
                    entries: vec![
                        MsixEntryV1::default(),
                        MsixEntryV1 {
                            address: 0xfee0_1000,
                            data: 0x4021,
                            masked: true,
                            pending: true,
                        },
                    ],
                },
            },
            transport: TransportV1 {
                status: 0x4f,
                isr: 1,
                config_generation: 2,
                config_vector: 0,
                device_feature_select: 1,
                driver_feature_select: 1,
                driver_features: 1 << 32 | 1 << 29 | wide,
                queue_select: 1,
                queues: vec![
                    QueueV1 {
                        size: 256,
                        enabled: true,
                        vector: 1,
                        desc: 0x1_0000_0000 + wide,
                        avail: 0x1000,
                        used: 0x2000,
                        next_avail: 0xfffe,
                        next_used: 0xfffd,
                    },
                    QueueV1::default(),
                ],
                stopped: (slot == 4).then(|| "queue 0: a descriptor chain loops".to_owned()),
            },
            device,
        }
    }

    fn encode(samples: &Samples) -> Vec<u8> {
        let mut writer = StateWriter::new();
        writer.add(0, &samples.root);
        writer.add(0, &samples.serial);
        for function in &samples.functions {
            writer.add(u32::from(function.function.slot), function);
        }
        writer.finish()
    }

    #[test]
    fn the_encoding_is_the_golden_one() {
        let encoded = encode(&samples());
        assert!(encoded == unhex(GOLDEN), "encoded now:\n{}", hex(&encoded));
    }

    #[test]
    fn the_golden_bytes_decode_to_the_same_values() {
        let (bytes, samples) = (unhex(GOLDEN), samples());
        let mut reader = StateReader::parse(&bytes).expect("parse");
        assert_eq!(reader.take(0), Ok(samples.root));
        assert_eq!(reader.take(0), Ok(samples.serial));
        assert_eq!(reader.instances(SectionKind::Virtio), [1, 2, 3, 4]);
        for function in samples.functions {
            let instance = u32::from(function.function.slot);
            assert_eq!(reader.take(instance), Ok(function));
        }
        assert_eq!(reader.finish(), Ok(()));
    }

    #[test]
    fn cut_payloads_do_not_decode_and_do_not_panic() {
        for function in samples().functions {
            let payload = postcard::to_stdvec(&function).expect("encode");
            for len in 0..payload.len() {
                let cut = postcard::take_from_bytes::<VirtioV1>(&payload[..len]);
                assert!(cut.is_err(), "{len} bytes");
            }
        }
    }
}
