//! A small piece of state, kept in two copies and changed atomically.
//!
//! ```text
//! copy   magic (8) | version u32 | payload length u32 | generation u64 | zero u32 | crc32 u32 | payload
//! ```
//! All numbers little-endian; the checksum covers the 28 bytes before it and
//! the payload.
//!
//! **Writing** generation g + 1 over g: first *heal* (make both copies g, if
//! an earlier writer was stopped half-way), then write copy A, then copy B. A
//! copy is written by clearing its magic, writing the rest, and writing the
//! magic last, with a fence between the three, so that a copy that is cut off
//! is invalid for certain and not only by its checksum.
//!
//! **Reading.** Because A is always written first and completely,
//! - A valid: A is the newest (B is g or g − 1, or being written);
//! - A invalid, B valid: B is the newest *completed* change. Either A is being
//!   written or was cut off, so the change never returned to its caller and
//!   nothing relies on it; or A was damaged after both were equal.
//!
//! So with one damaged copy, at rest, nothing is lost; and a generation that a
//! completed write replaced is in neither copy and can never win again. Both
//! copies invalid, or two valid copies that this protocol cannot leave behind,
//! are reported as damage. A crash alone leaves old or new, never damage.
//!
//! **Giving up** what is damaged must not let one of two contradicting copies
//! win when it is cut off: [`replace`] first turns the magic of both copies,
//! one atomic word each, into a mark that reads as damage whatever the other
//! copy says.

use std::io;

use crate::media::Media;

/// Bytes before the payload.
pub(crate) const COPY_HEADER_LEN: usize = 32;
/// Room for one copy.
pub(crate) const COPY_LEN_MAX: usize = 4096;

/// Stands in place of the magic while a damaged piece is given up.
const CONDEMNED: [u8; 8] = *b"HEBEGONE";

/// Where a mirrored piece lives, and what marks it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place {
    /// Offset of copy A, one page.
    pub a: u64,
    /// Offset of copy B, one page.
    pub b: u64,
    /// First eight bytes of a valid copy.
    pub magic: [u8; 8],
    /// The newest version that this release knows.
    pub version: u32,
    /// Length of the payload in that version, a multiple of 8.
    pub payload_len: usize,
}

/// What one copy holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Copy {
    /// Nothing but zeros.
    Blank,
    /// Damaged, half-written, or never written.
    Invalid,
    /// Being given up.
    Condemned,
    /// Intact, and of a version that this release does not know.
    Newer(u32),
    /// Intact.
    Good {
        /// Number of the change that wrote it.
        generation: u64,
        /// Contents.
        payload: Vec<u8>,
    },
}

/// What both copies together say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Reading {
    /// Never written.
    Blank,
    /// Damaged, and why.
    Damaged(&'static str),
    /// Of a version that this release does not know.
    Newer(u32),
    /// The newest completed (or completely written) change.
    Valid {
        /// Number of the change.
        generation: u64,
        /// Contents.
        payload: Vec<u8>,
        /// Both copies are the same.
        healthy: bool,
    },
}

/// Encodes one copy.
pub(crate) fn encode(place: &Place, generation: u64, payload: &[u8]) -> Vec<u8> {
    debug_assert_eq!(payload.len(), place.payload_len);
    let mut bytes = Vec::with_capacity(COPY_HEADER_LEN + payload.len());
    bytes.extend_from_slice(&place.magic);
    bytes.extend_from_slice(&place.version.to_le_bytes());
    bytes.extend_from_slice(&(payload.len() as u32).to_le_bytes());
    bytes.extend_from_slice(&generation.to_le_bytes());
    bytes.extend_from_slice(&[0; 4]);
    let crc = checksum(&bytes, payload);
    bytes.extend_from_slice(&crc.to_le_bytes());
    bytes.extend_from_slice(payload);
    bytes
}

fn checksum(header: &[u8], payload: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(header);
    hasher.update(payload);
    hasher.finalize()
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let word = bytes[at..].first_chunk().copied().unwrap_or_default();
    u32::from_le_bytes(word)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let word = bytes[at..].first_chunk().copied().unwrap_or_default();
    u64::from_le_bytes(word)
}

/// Decodes one page. Untrusted input: every field is checked.
pub(crate) fn decode(place: &Place, page: &[u8; COPY_LEN_MAX]) -> Copy {
    if page[..8] == CONDEMNED {
        return Copy::Condemned;
    }
    if page[..8] != place.magic {
        let blank = page.iter().all(|byte| *byte == 0);
        return if blank { Copy::Blank } else { Copy::Invalid };
    }
    let (version, len) = (u32_at(page, 8), u32_at(page, 12) as usize);
    let generation = u64_at(page, 16);
    let Some(payload) = page[COPY_HEADER_LEN..].get(..len) else {
        return Copy::Invalid;
    };
    let reserved = u32_at(page, 24);
    if u32_at(page, 28) != checksum(&page[..28], payload)
        || generation == 0
        || generation == u64::MAX
    {
        return Copy::Invalid;
    }
    if version != place.version {
        return Copy::Newer(version);
    }
    if len != place.payload_len || reserved != 0 {
        return Copy::Invalid;
    }
    Copy::Good {
        generation,
        payload: payload.to_vec(),
    }
}

/// What two copies together say; see the module's head for why.
pub(crate) fn decide(a: Copy, b: Copy) -> Reading {
    let alone = |generation, payload| Reading::Valid {
        generation,
        payload,
        healthy: false,
    };
    match (a, b) {
        (Copy::Condemned, _) | (_, Copy::Condemned) => {
            Reading::Damaged("giving it up was not finished")
        }
        (Copy::Newer(version), _) | (_, Copy::Newer(version)) => Reading::Newer(version),
        (
            Copy::Good {
                generation,
                payload,
            },
            Copy::Good {
                generation: b_generation,
                payload: b_payload,
            },
        ) => {
            if generation == b_generation && payload == b_payload {
                Reading::Valid {
                    generation,
                    payload,
                    healthy: true,
                }
            } else if b_generation.checked_add(1) == Some(generation) {
                alone(generation, payload)
            } else {
                Reading::Damaged("its two copies contradict each other")
            }
        }
        (
            Copy::Good {
                generation,
                payload,
            },
            Copy::Blank | Copy::Invalid,
        )
        | (
            Copy::Blank | Copy::Invalid,
            Copy::Good {
                generation,
                payload,
            },
        ) => alone(generation, payload),
        // The first write was cut off in copy A.
        (Copy::Blank | Copy::Invalid, Copy::Blank) => Reading::Blank,
        (Copy::Blank | Copy::Invalid, Copy::Invalid) => {
            Reading::Damaged("both of its copies are damaged")
        }
    }
}

/// Reads both copies. A writer may be at work in another process: what looks
/// damaged, or would be decided from one copy, is read again until it stands
/// still.
pub(crate) fn read(media: &impl Media, place: &Place) -> io::Result<Reading> {
    const TRIES_MAX: usize = 16;
    let mut last = None;
    for _ in 0..TRIES_MAX {
        let mut pages = [[0u8; COPY_LEN_MAX]; 2];
        media.load(place.a, &mut pages[0])?;
        media.load(place.b, &mut pages[1])?;
        let reading = decide(decode(place, &pages[0]), decode(place, &pages[1]));
        if matches!(reading, Reading::Valid { healthy: true, .. }) || last == Some(pages) {
            return Ok(reading);
        }
        last = Some(pages);
    }
    Ok(Reading::Damaged("it kept changing while it was read"))
}

/// Writes one copy; see the module's head for the order.
pub(crate) fn write_copy(media: &impl Media, at: u64, copy: &[u8]) -> io::Result<()> {
    media.store(at, &[0; 8])?;
    media.fence();
    media.store(at + 8, &copy[8..])?;
    media.fence();
    media.store(at, &copy[..8])?;
    media.fence();
    Ok(())
}

/// Writes both copies without regard to what was there; for formatting.
pub(crate) fn write_first(media: &impl Media, place: &Place, payload: &[u8]) -> io::Result<()> {
    let copy = encode(place, 1, payload);
    write_copy(media, place.a, &copy)?;
    write_copy(media, place.b, &copy)
}

/// Makes both copies equal to the newest, if they are not.
pub(crate) fn heal(media: &impl Media, place: &Place, reading: &Reading) -> io::Result<()> {
    let Reading::Valid {
        generation,
        payload,
        healthy: false,
    } = reading
    else {
        return Ok(());
    };
    let copy = encode(place, *generation, payload);
    let mut page = [0u8; COPY_LEN_MAX];
    media.load(place.a, &mut page)?;
    let stale = if page[..copy.len()] == copy {
        place.b
    } else {
        place.a
    };
    write_copy(media, stale, &copy)
}

/// Replaces what `current` says by `payload`, as one atomic change. What
/// cannot be read is not replaced: see [`replace`].
pub(crate) fn update(
    media: &impl Media,
    place: &Place,
    current: &Reading,
    payload: &[u8],
) -> io::Result<u64> {
    let generation = match current {
        Reading::Valid { generation, .. } => generation + 1,
        Reading::Blank => 1,
        Reading::Damaged(_) | Reading::Newer(_) => return Err(io::ErrorKind::InvalidData.into()),
    };
    heal(media, place, current)?;
    let copy = encode(place, generation, payload);
    write_copy(media, place.a, &copy)?;
    write_copy(media, place.b, &copy)?;
    Ok(generation)
}

/// Gives up what is there, readable or not, for `payload`.
pub(crate) fn replace(media: &impl Media, place: &Place, payload: &[u8]) -> io::Result<()> {
    for at in [place.a, place.b] {
        media.store(at, &CONDEMNED)?;
        media.fence();
    }
    write_first(media, place, payload)
}
