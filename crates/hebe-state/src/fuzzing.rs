//! What the fuzz targets call, and the tests over their corpora. Not part of
//! the API.

use crate::v1::devices::{PciRootV1, SerialV1};
use crate::v1::machine::{AcpiV1, ClockV1, IrqchipV1, VcpuV1, VmV1};
use crate::v2::devices::VirtioV2;
use crate::{Section, StateError, StateReader, StateWriter};

/// Reads a state to its end, each section as what it says it is. Returns the
/// virtio functions, which a VMM would now construct.
pub fn read_state(bytes: &[u8]) -> Result<Vec<VirtioV2>, StateError> {
    let mut reader = StateReader::parse(bytes)?;
    let functions = take_all::<VirtioV2>(&mut reader)?;
    take_all::<PciRootV1>(&mut reader)?;
    take_all::<SerialV1>(&mut reader)?;
    take_all::<VmV1>(&mut reader)?;
    take_all::<VcpuV1>(&mut reader)?;
    take_all::<IrqchipV1>(&mut reader)?;
    take_all::<ClockV1>(&mut reader)?;
    take_all::<AcpiV1>(&mut reader)?;
    reader.finish()?;
    Ok(functions)
}

fn take_all<S: Section>(reader: &mut StateReader<'_>) -> Result<Vec<S>, StateError> {
    let instances = reader.instances(S::KIND);
    instances.into_iter().map(|i| reader.take(i)).collect()
}

/// Packs sections into a container whose checksums are right, so that a
/// fuzzer gets past them. Input: kind, version, instance (a byte each), length
/// (two bytes, little-endian), payload; again and again.
pub fn seal(mut bytes: &[u8]) -> Vec<u8> {
    let mut writer = StateWriter::new();
    while let [kind, version, instance, a, b, rest @ ..] = bytes {
        let len = usize::from(u16::from_le_bytes([*a, *b])).min(rest.len());
        let (payload, next) = rest.split_at(len);
        let (kind, version) = (u32::from(*kind), u32::from(*version));
        writer.add_raw(kind, version, u32::from(*instance), payload);
        bytes = next;
    }
    writer.finish()
}
