//! Virtio devices: a disk says what it is on the host.

use serde::{Deserialize, Serialize};

use crate::container::decode_whole;
use crate::v1::devices::{ConsoleV1, DeviceV1, NetV1, PciFunctionV1, RngV1, TransportV1, VirtioV1};
use crate::{DecodeError, Section, SectionKind};

/// One virtio PCI function. The section's instance is the PCI slot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VirtioV2 {
    /// Configuration space and MSI-X.
    pub function: PciFunctionV1,
    /// The common configuration structure and the queues.
    pub transport: TransportV1,
    /// What belongs to the kind of device.
    pub device: DeviceV2,
}

impl Section for VirtioV2 {
    const KIND: SectionKind = SectionKind::Virtio;
    const VERSION: u32 = 2;

    fn decode(version: u32, payload: &[u8]) -> Result<Self, DecodeError> {
        match version {
            1 => VirtioV1::decode(version, payload).map(Self::from),
            Self::VERSION => decode_whole(payload),
            _ => Err(DecodeError::Version),
        }
    }
}

impl VirtioV2 {
    /// Forgets which disk it was: any of the same size will do.
    pub fn accept_any_disk(&mut self) {
        if let DeviceV2::Block(block) = &mut self.device {
            block.identity = None;
        }
    }
}

impl From<VirtioV1> for VirtioV2 {
    fn from(old: VirtioV1) -> Self {
        Self {
            function: old.function,
            transport: old.transport,
            device: match old.device {
                DeviceV1::Block(block) => DeviceV2::Block(BlockV2 {
                    sectors: block.sectors,
                    readonly: block.readonly,
                    identity: None,
                }),
                DeviceV1::Net(net) => DeviceV2::Net(net),
                DeviceV1::Console(console) => DeviceV2::Console(console),
                DeviceV1::Rng(rng) => DeviceV2::Rng(rng),
            },
        }
    }
}

/// What belongs to the kind of device. The order of the variants is frozen.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum DeviceV2 {
    /// Block device.
    Block(BlockV2),
    /// Network interface.
    Net(NetV1),
    /// Console with one port.
    Console(ConsoleV1),
    /// Entropy source.
    Rng(RngV1),
    /// Sockets. Later than the others: a release that does not know it
    /// refuses the state.
    Vsock(VsockV2),
    /// Balloon. Later than the others, as [`DeviceV2::Vsock`].
    Balloon(BalloonV2),
}

/// Balloon: which pages are in it is the guest's to know.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonV2 {
    /// `num_pages`: pages of 4 KiB that the host wants in it.
    pub wanted_pages: u32,
    /// `actual`: pages that the guest says are in it.
    pub actual_pages: u32,
    /// `poison_val`: what the guest fills free pages with.
    pub poison: u32,
}

/// Sockets between host and guest. Connections do not outlive their VMM, and
/// the driver is told so after a resume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VsockV2 {
    /// The guest's context id.
    pub cid: u64,
}

/// Block device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockV2 {
    /// Capacity in sectors of 512 bytes.
    pub sectors: u64,
    /// The guest cannot write.
    pub readonly: bool,
    /// Which disk of the host it was, and in which state it was left; `None`
    /// where that is not known, as in version 1.
    pub identity: Option<DiskIdentityV2>,
}

/// What tells a disk from another one, and from itself after somebody else
/// wrote to it. All of it outlives a reload of the host kernel, which may
/// number devices anew. The order of the variants is frozen.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum DiskIdentityV2 {
    /// A regular file, when everything was on disk.
    File {
        /// Inode number.
        inode: u64,
        /// Last change of its contents: seconds since 1970.
        mtime_s: i64,
        /// The rest of it, in nanoseconds.
        mtime_ns: u32,
    },
    /// A block device.
    Device {
        /// What its driver tells it from others by, if anything.
        id: Option<String>,
    },
    /// An image and the files behind it, the image first. Later than the others:
    /// a release that does not know it refuses the state.
    Chain {
        /// Each as [`DiskIdentityV2::File`] has it.
        files: Vec<DiskFileV2>,
    },
}

/// A file of a chain, when everything was on disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskFileV2 {
    /// Inode number.
    pub inode: u64,
    /// Last change of its contents: seconds since 1970.
    pub mtime_s: i64,
    /// The rest of it, in nanoseconds.
    pub mtime_ns: u32,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{hex, unhex};
    use crate::v1::devices::{BlockV1, MsixEntryV1, MsixV1, QueueV1};
    use crate::{StateError, StateReader, StateWriter};

    /// What this release writes for [`samples`]. Never edited: a change of a
    /// struct is a new version beside this one.
    const GOLDEN: &str = include_str!("../../golden/devices-v2.hex");
    /// Version 1.
    const GOLDEN_V1: &str = include_str!("../../golden/devices-v1.hex");

    fn samples() -> Vec<VirtioV2> {
        let block = |identity| {
            DeviceV2::Block(BlockV2 {
                sectors: 0x0123_4567_89ab,
                readonly: true,
                identity,
            })
        };
        let file = DiskIdentityV2::File {
            inode: 0x1122_3344_5566,
            mtime_s: 1_764_000_000,
            mtime_ns: 987_654_321,
        };
        let device = DiskIdentityV2::Device {
            id: Some("dm/uuid=LVM-0123".to_owned()),
        };
        let plain = DiskIdentityV2::Device { id: None };
        let kinds = [
            block(Some(file)),
            block(Some(device)),
            block(Some(plain)),
            block(None),
            DeviceV2::Net(NetV1 {
                mac: [0x52, 0x54, 0, 1, 2, 3],
                status: 3,
                ipv4: vec![[10, 0, 0, 7]],
            }),
            DeviceV2::Console(ConsoleV1 {}),
            DeviceV2::Rng(RngV1 {}),
        ];
        (1u8..).zip(kinds).map(function).collect()
    }

    fn function((slot, device): (u8, DeviceV2)) -> VirtioV2 {
        let entry = MsixEntryV1 {
            address: 0xfee0_1000,
            data: 0x4021,
            masked: false,
            pending: true,
        };
        VirtioV2 {
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
                    entries: vec![entry],
                },
            },
            transport: TransportV1 {
                status: 0x0f,
                isr: 1,
                config_generation: 2,
                config_vector: 0,
                device_feature_select: 1,
                driver_feature_select: 1,
                driver_features: 1 << 32,
                queue_select: 1,
                queues: vec![QueueV1 {
                    size: 256,
                    enabled: true,
                    vector: 1,
                    desc: 0x1_0000_0000,
                    avail: 0x1000,
                    used: 0x2000,
                    next_avail: 0xfffe,
                    next_used: 0xfffd,
                }],
                stopped: None,
            },
            device,
        }
    }

    fn encode(functions: &[VirtioV2]) -> Vec<u8> {
        let mut writer = StateWriter::new();
        for function in functions {
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
        let bytes = unhex(GOLDEN);
        let mut reader = StateReader::parse(&bytes).expect("parse");
        for function in samples() {
            let instance = u32::from(function.function.slot);
            assert_eq!(reader.take(instance), Ok(function));
        }
        assert_eq!(reader.finish(), Ok(()));
    }

    #[test]
    fn version_1_is_read_as_a_disk_that_is_not_known() {
        let bytes = unhex(GOLDEN_V1);
        let mut reader = StateReader::parse(&bytes).expect("parse");
        let mut old = StateReader::parse(&bytes).expect("parse");
        for instance in reader.instances(SectionKind::Virtio) {
            let new: VirtioV2 = reader.take(instance).expect("read");
            let old: VirtioV1 = old.take(instance).expect("read");
            assert_eq!(
                (&new.function, &new.transport),
                (&old.function, &old.transport)
            );
            let same = match (&new.device, &old.device) {
                (DeviceV2::Block(new), DeviceV1::Block(old)) => {
                    let BlockV1 { sectors, readonly } = *old;
                    let identity = None;
                    *new == BlockV2 {
                        sectors,
                        readonly,
                        identity,
                    }
                }
                (DeviceV2::Net(new), DeviceV1::Net(old)) => new == old,
                (DeviceV2::Console(new), DeviceV1::Console(old)) => new == old,
                (DeviceV2::Rng(new), DeviceV1::Rng(old)) => new == old,
                _ => false,
            };
            assert!(same, "{new:?}, {old:?}");
        }
    }

    #[test]
    fn a_version_is_not_read_as_another_one() {
        let payload = |function: &VirtioV2| postcard::to_stdvec(function).expect("encode");
        for (version, refused) in [
            (
                1,
                StateError::Undecodable {
                    kind: SectionKind::Virtio,
                    instance: 1,
                },
            ),
            (
                3,
                StateError::UnknownVersion {
                    kind: SectionKind::Virtio,
                    version: 3,
                    known: 2,
                },
            ),
        ] {
            let mut writer = StateWriter::new();
            writer.add_raw(8, version, 1, &payload(&samples()[0]));
            let state = writer.finish();
            let mut reader = StateReader::parse(&state).expect("parse");
            assert_eq!(reader.take::<VirtioV2>(1), Err(refused));
        }
    }

    #[test]
    fn a_chain_of_files_is_the_third_kind_of_disk() {
        let file = |inode| DiskFileV2 {
            inode,
            mtime_s: -1,
            mtime_ns: 3,
        };
        let files = vec![file(1), file(300)];
        let chain = DiskIdentityV2::Chain { files };
        let bytes = postcard::to_stdvec(&chain).expect("encode");
        assert_eq!(bytes, [2, 2, 1, 1, 3, 0xac, 2, 1, 3]);
        assert_eq!(postcard::from_bytes(&bytes), Ok(chain));
    }

    #[test]
    fn sockets_are_the_fifth_kind_of_device() {
        let device = DeviceV2::Vsock(VsockV2 { cid: 300 });
        let bytes = postcard::to_stdvec(&device).expect("encode");
        assert_eq!(bytes, [4, 0xac, 2]);
        assert_eq!(postcard::from_bytes(&bytes), Ok(device));
    }

    /// What this release writes for a balloon. Never edited.
    const GOLDEN_BALLOON: &str = include_str!("../../golden/balloon-v2.hex");

    #[test]
    fn a_balloon_is_the_sixth_kind_of_device() {
        let device = DeviceV2::Balloon(BalloonV2 {
            wanted_pages: 0x0001_2345,
            actual_pages: 300,
            poison: 0xaaaa_aaaa,
        });
        let encoded = encode(&[function((29, device.clone()))]);
        assert!(
            encoded == unhex(GOLDEN_BALLOON),
            "encoded now:\n{}",
            hex(&encoded)
        );
        let bytes = unhex(GOLDEN_BALLOON);
        let mut reader = StateReader::parse(&bytes).expect("parse");
        assert_eq!(reader.take(29), Ok(function((29, device))));
        assert_eq!(reader.finish(), Ok(()));
    }

    #[test]
    fn cut_payloads_do_not_decode_and_do_not_panic() {
        for function in samples() {
            let payload = postcard::to_stdvec(&function).expect("encode");
            for len in 0..payload.len() {
                let cut = VirtioV2::decode(2, &payload[..len]);
                assert_eq!(cut, Err(DecodeError::Payload), "{len} bytes");
            }
        }
    }
}
