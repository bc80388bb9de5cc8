//! The container: header, sections, checksums.
//!
//! ```text
//! header   magic "HEBESTAT" (8) | format u32 | sections u32 | total length u64 | crc32 of these u32
//! section  kind u32 | version u32 | instance u32 | crc32 of payload u32 | length u64 | crc32 of these u32
//!          payload
//! ```
//! All numbers little-endian. The input is untrusted: every length is checked
//! against what is left before it is used.

use std::fmt;

use serde::Serialize;
use serde::de::DeserializeOwned;

const MAGIC: &[u8; 8] = b"HEBESTAT";
const FORMAT: u32 = 1;
const HEADER_LEN: usize = 28;
const SECTION_HEADER_LEN: usize = 28;
/// Most sections in one state: bounds the work on hostile input.
const SECTIONS_MAX: u32 = 1024;

/// What a section holds. Numbers are for ever; a retired one is never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u32)]
pub enum SectionKind {
    /// Identity, definition and counters of the VM.
    Vm = 1,
    /// One vCPU.
    Vcpu = 2,
    /// PIC, IOAPIC.
    Irqchip = 3,
    /// kvmclock and wall clock at suspend.
    Clock = 4,
    /// ACPI registers.
    Acpi = 5,
    /// PCI host bridge.
    PciRoot = 6,
    /// 16550 serial port.
    Serial = 7,
    /// One virtio PCI function: config space, transport, queues, device.
    Virtio = 8,
    /// What the guest told of a panic.
    Pvpanic = 9,
    /// VM generation ID.
    GenerationId = 10,
    /// Real-time clock.
    Rtc = 11,
}

impl SectionKind {
    fn from_number(number: u32) -> Option<Self> {
        [
            Self::Vm,
            Self::Vcpu,
            Self::Irqchip,
            Self::Clock,
            Self::Acpi,
            Self::PciRoot,
            Self::Serial,
            Self::Virtio,
            Self::Pvpanic,
            Self::GenerationId,
            Self::Rtc,
        ]
        .into_iter()
        .find(|kind| *kind as u32 == number)
    }
}

impl fmt::Display for SectionKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// A struct that is stored as one kind of section, in one version.
pub trait Section: Serialize + DeserializeOwned {
    /// Which kind.
    const KIND: SectionKind;
    /// Which version of it.
    const VERSION: u32;

    /// Decodes the payload of a section that has `version`. A struct that can
    /// be made from older versions says so here; by default it knows its own
    /// alone.
    ///
    /// # Errors
    /// [`DecodeError`].
    fn decode(version: u32, payload: &[u8]) -> Result<Self, DecodeError> {
        if version == Self::VERSION {
            decode_whole(payload)
        } else {
            Err(DecodeError::Version)
        }
    }
}

/// Why a payload is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DecodeError {
    /// Its version is not one of those that this release reads.
    Version,
    /// It is no such struct, or more than one.
    Payload,
}

/// A payload that is `T` and nothing more.
pub(crate) fn decode_whole<T: DeserializeOwned>(payload: &[u8]) -> Result<T, DecodeError> {
    match postcard::take_from_bytes(payload) {
        Ok((value, [])) => Ok(value),
        _ => Err(DecodeError::Payload),
    }
}

/// Why a state is refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum StateError {
    /// Not a state at all.
    #[error("this is not an execution state of Hebe")]
    Foreign,
    /// A container format that this release does not know.
    #[error(
        "the state has container format {0}, and this release reads {FORMAT}: use the release that wrote it, or a newer one"
    )]
    Format(u32),
    /// The bytes end before the state does.
    #[error("the state is cut short")]
    Truncated,
    /// A header's checksum is wrong.
    #[error("the state's {0} header is damaged")]
    HeaderDamaged(&'static str),
    /// A payload's checksum is wrong.
    #[error("section {kind} {instance} is damaged")]
    Damaged {
        /// Which kind.
        kind: SectionKind,
        /// Which instance.
        instance: u32,
    },
    /// A kind that this release does not know.
    #[error(
        "the state has a section of kind {kind} (version {version}) that this release does not know: use the release that wrote it, or a newer one"
    )]
    UnknownKind {
        /// The unknown number.
        kind: u32,
        /// Its version.
        version: u32,
    },
    /// A version that this release does not know.
    #[error(
        "section {kind} has version {version}, and this release reads up to {known}: use the release that wrote it, or a newer one"
    )]
    UnknownVersion {
        /// Which kind.
        kind: SectionKind,
        /// The unknown version.
        version: u32,
        /// The newest that this release reads.
        known: u32,
    },
    /// A section twice.
    #[error("section {kind} {instance} is there twice")]
    Duplicate {
        /// Which kind.
        kind: SectionKind,
        /// Which instance.
        instance: u32,
    },
    /// A section that must be there is not.
    #[error("section {kind} {instance} is missing")]
    Missing {
        /// Which kind.
        kind: SectionKind,
        /// Which instance.
        instance: u32,
    },
    /// A payload does not decode.
    #[error("section {kind} {instance} does not decode")]
    Undecodable {
        /// Which kind.
        kind: SectionKind,
        /// Which instance.
        instance: u32,
    },
    /// Sections that nobody asked for: the VM would lose them.
    #[error("section {kind} {instance} fits nothing in this VM")]
    LeftOver {
        /// Which kind.
        kind: SectionKind,
        /// Which instance.
        instance: u32,
    },
}

/// Builds a state.
#[derive(Debug, Default)]
pub struct StateWriter {
    sections: u32,
    body: Vec<u8>,
}

impl StateWriter {
    /// An empty state.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a section.
    ///
    /// # Panics
    /// Never for the structs under [`crate::v1`]: plain data always encodes.
    pub fn add<S: Section>(&mut self, instance: u32, section: &S) {
        let payload = postcard::to_stdvec(section).expect("plain data encodes");
        self.add_raw(S::KIND as u32, S::VERSION, instance, &payload);
    }

    pub(crate) fn add_raw(&mut self, kind: u32, version: u32, instance: u32, payload: &[u8]) {
        let mut header = Vec::with_capacity(SECTION_HEADER_LEN);
        for word in [kind, version, instance, crc32fast::hash(payload)] {
            header.extend_from_slice(&word.to_le_bytes());
        }
        header.extend_from_slice(&(payload.len() as u64).to_le_bytes());
        let crc = crc32fast::hash(&header);
        header.extend_from_slice(&crc.to_le_bytes());
        self.body.extend_from_slice(&header);
        self.body.extend_from_slice(payload);
        self.sections += 1;
    }

    /// The finished state.
    pub fn finish(self) -> Vec<u8> {
        let mut state = Vec::with_capacity(HEADER_LEN + self.body.len());
        state.extend_from_slice(MAGIC);
        state.extend_from_slice(&FORMAT.to_le_bytes());
        state.extend_from_slice(&self.sections.to_le_bytes());
        state.extend_from_slice(&((HEADER_LEN + self.body.len()) as u64).to_le_bytes());
        let crc = crc32fast::hash(&state);
        state.extend_from_slice(&crc.to_le_bytes());
        state.extend_from_slice(&self.body);
        state
    }
}

/// A state whose container has been checked: every checksum fits, every kind
/// is known, nothing is there twice.
#[derive(Debug)]
pub struct StateReader<'a> {
    sections: Vec<RawSection<'a>>,
}

#[derive(Debug)]
struct RawSection<'a> {
    kind: SectionKind,
    version: u32,
    instance: u32,
    payload: &'a [u8],
    taken: bool,
}

impl<'a> StateReader<'a> {
    /// Checks the container. Bytes after the state's own length are ignored:
    /// a save area is longer than what is in it.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, StateError> {
        if bytes.len() < MAGIC.len() || &bytes[..MAGIC.len()] != MAGIC {
            return Err(StateError::Foreign);
        }
        if bytes.len() < HEADER_LEN {
            return Err(StateError::Truncated);
        }
        if u32_at(bytes, 24) != crc32fast::hash(&bytes[..24]) {
            return Err(StateError::HeaderDamaged("outer"));
        }
        let format = u32_at(bytes, 8);
        if format != FORMAT {
            return Err(StateError::Format(format));
        }
        let count = u32_at(bytes, 12);
        let total = usize::try_from(u64_at(bytes, 16)).map_err(|_| StateError::Truncated)?;
        if total < HEADER_LEN || total > bytes.len() {
            return Err(StateError::Truncated);
        }
        if count > SECTIONS_MAX {
            return Err(StateError::HeaderDamaged("outer"));
        }
        let mut rest = &bytes[HEADER_LEN..total];
        let mut reader = Self {
            sections: Vec::new(),
        };
        for _ in 0..count {
            let section;
            (section, rest) = split_section(rest)?;
            if reader.find(section.kind, section.instance).is_some() {
                return Err(StateError::Duplicate {
                    kind: section.kind,
                    instance: section.instance,
                });
            }
            reader.sections.push(section);
        }
        if !rest.is_empty() {
            return Err(StateError::HeaderDamaged("outer"));
        }
        Ok(reader)
    }

    fn find(&self, kind: SectionKind, instance: u32) -> Option<usize> {
        self.sections
            .iter()
            .position(|s| s.kind == kind && s.instance == instance)
    }

    /// Takes the section out, decoded.
    pub fn take<S: Section>(&mut self, instance: u32) -> Result<S, StateError> {
        let kind = S::KIND;
        let index = self
            .find(kind, instance)
            .ok_or(StateError::Missing { kind, instance })?;
        let section = &mut self.sections[index];
        let value = S::decode(section.version, section.payload).map_err(|e| match e {
            DecodeError::Version => StateError::UnknownVersion {
                kind,
                version: section.version,
                known: S::VERSION,
            },
            DecodeError::Payload => StateError::Undecodable { kind, instance },
        })?;
        section.taken = true;
        Ok(value)
    }

    /// The instances of one kind, ascending.
    pub fn instances(&self, kind: SectionKind) -> Vec<u32> {
        let mut instances: Vec<u32> = self
            .sections
            .iter()
            .filter(|s| s.kind == kind)
            .map(|s| s.instance)
            .collect();
        instances.sort_unstable();
        instances
    }

    /// Ends the reading; refuses if a section was never taken.
    pub fn finish(self) -> Result<(), StateError> {
        match self.sections.iter().find(|s| !s.taken) {
            None => Ok(()),
            Some(s) => Err(StateError::LeftOver {
                kind: s.kind,
                instance: s.instance,
            }),
        }
    }
}

fn split_section(bytes: &[u8]) -> Result<(RawSection<'_>, &[u8]), StateError> {
    if bytes.len() < SECTION_HEADER_LEN {
        return Err(StateError::Truncated);
    }
    let (header, rest) = bytes.split_at(SECTION_HEADER_LEN);
    if u32_at(header, 24) != crc32fast::hash(&header[..24]) {
        return Err(StateError::HeaderDamaged("section"));
    }
    let (number, version, instance) = (u32_at(header, 0), u32_at(header, 4), u32_at(header, 8));
    let kind = SectionKind::from_number(number).ok_or(StateError::UnknownKind {
        kind: number,
        version,
    })?;
    let len = usize::try_from(u64_at(header, 16)).map_err(|_| StateError::Truncated)?;
    if len > rest.len() {
        return Err(StateError::Truncated);
    }
    let (payload, rest) = rest.split_at(len);
    if crc32fast::hash(payload) != u32_at(header, 12) {
        return Err(StateError::Damaged { kind, instance });
    }
    Ok((
        RawSection {
            kind,
            version,
            instance,
            payload,
            taken: false,
        },
        rest,
    ))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut word = [0; 4];
    word.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(word)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(word)
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Probe {
        words: Vec<u32>,
    }

    impl Section for Probe {
        const KIND: SectionKind = SectionKind::Clock;
        const VERSION: u32 = 1;
    }

    fn sample() -> Vec<u8> {
        let mut writer = StateWriter::new();
        writer.add(
            0,
            &Probe {
                words: vec![1, 2, 3],
            },
        );
        writer.add(7, &Probe { words: vec![] });
        writer.finish()
    }

    #[test]
    fn a_state_round_trips() {
        let state = sample();
        let mut reader = StateReader::parse(&state).expect("parse");
        assert_eq!(reader.instances(SectionKind::Clock), [0, 7]);
        assert_eq!(
            reader.take::<Probe>(0),
            Ok(Probe {
                words: vec![1, 2, 3]
            })
        );
        assert_eq!(reader.take::<Probe>(7), Ok(Probe { words: vec![] }));
        assert_eq!(reader.finish(), Ok(()));
    }

    #[test]
    fn a_section_that_nobody_takes_is_refused() {
        let state = sample();
        let mut reader = StateReader::parse(&state).expect("parse");
        reader.take::<Probe>(0).expect("take");
        let left = StateError::LeftOver {
            kind: SectionKind::Clock,
            instance: 7,
        };
        assert_eq!(reader.finish(), Err(left));
    }

    #[test]
    fn every_single_bit_flip_is_noticed() {
        let state = sample();
        for bit in 0..state.len() * 8 {
            let mut bad = state.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(StateReader::parse(&bad).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn every_truncation_is_noticed() {
        let state = sample();
        for len in 0..state.len() {
            assert!(StateReader::parse(&state[..len]).is_err(), "{len} bytes");
        }
    }

    #[test]
    fn unknown_kinds_and_versions_are_refused_by_name() {
        let mut writer = StateWriter::new();
        writer.add_raw(4711, 3, 0, b"?");
        let refused = StateReader::parse(&writer.finish())
            .expect_err("unknown kind")
            .to_string();
        assert!(refused.contains("4711"), "{refused}");

        let mut writer = StateWriter::new();
        writer.add_raw(SectionKind::Clock as u32, 2, 0, b"?");
        let state = writer.finish();
        let mut reader = StateReader::parse(&state).expect("parse");
        let refused = reader
            .take::<Probe>(0)
            .expect_err("unknown version")
            .to_string();
        assert!(
            refused.contains("Clock") && refused.contains("version 2"),
            "{refused}"
        );
    }

    #[test]
    fn a_section_twice_is_refused() {
        let mut writer = StateWriter::new();
        writer.add(0, &Probe { words: vec![] });
        writer.add(0, &Probe { words: vec![] });
        assert!(matches!(
            StateReader::parse(&writer.finish()),
            Err(StateError::Duplicate { .. })
        ));
    }
}
