//! The report area: one opaque text that survives the reload (the timeline of
//! a reboot), in two slots written in turn.
//!
//! ```text
//! slot   header (one page, as a copy of the `mirror` module) | text
//! ```
//! A report is not what anybody is resumed from, so a damaged newer one may
//! give way to the older one.

use std::io;

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::layout::{REPORT_LEN_MAX, REPORT_SLOTS};
use crate::media::Media;
use crate::mirror::{self, COPY_LEN_MAX, Copy, Place};

const HEADER: Place = Place {
    a: 0,
    b: 0,
    magic: *b"HEBEREPT",
    version: 1,
    payload_len: size_of::<ReportV1>(),
};

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct ReportV1 {
    len: U64,
    crc: U32,
    reserved: U32,
}

fn read_slot(media: &impl Media, at: u64) -> io::Result<Option<(u64, Vec<u8>)>> {
    let mut page = [0u8; COPY_LEN_MAX];
    media.load(at, &mut page)?;
    let Copy::Good {
        generation,
        payload,
    } = mirror::decode(&HEADER, &page)
    else {
        return Ok(None);
    };
    let Ok(header) = ReportV1::read_from_bytes(&payload) else {
        return Ok(None);
    };
    let len = header.len.get() as usize;
    if len > REPORT_LEN_MAX {
        return Ok(None);
    }
    let mut text = vec![0; len];
    media.load(at + COPY_LEN_MAX as u64, &mut text)?;
    Ok((crc32fast::hash(&text) == header.crc.get()).then_some((generation, text)))
}

/// The newest intact report, and which slot the next one goes to.
fn newest(media: &impl Media) -> io::Result<(u64, usize, Option<Vec<u8>>)> {
    let mut best = (0, 0, None);
    for (slot, at) in REPORT_SLOTS.into_iter().enumerate() {
        if let Some((generation, text)) = read_slot(media, at)?
            && generation > best.0
        {
            best = (generation, 1 - slot, Some(text));
        }
    }
    Ok(best)
}

/// The newest intact report, if any.
pub(crate) fn read(media: &impl Media) -> io::Result<Option<Vec<u8>>> {
    Ok(newest(media)?.2)
}

/// Replaces the report. The caller checked the length.
pub(crate) fn write(media: &impl Media, text: &[u8]) -> io::Result<()> {
    let (generation, slot, _) = newest(media)?;
    let at = REPORT_SLOTS[slot];
    let header = ReportV1 {
        len: U64::new(text.len() as u64),
        crc: U32::new(crc32fast::hash(text)),
        reserved: U32::ZERO,
    };
    let mut padded = text.to_vec();
    padded.resize(text.len().next_multiple_of(8), 0);
    // The slot's old header must not describe the new text.
    media.store(at, &[0; 8])?;
    media.fence();
    media.store(at + COPY_LEN_MAX as u64, &padded)?;
    media.fence();
    let copy = mirror::encode(&HEADER, generation + 1, header.as_bytes());
    mirror::write_copy(media, at, &copy)
}

/// Forgets both reports; for formatting.
pub(crate) fn clear(media: &impl Media) -> io::Result<()> {
    for at in REPORT_SLOTS {
        media.store(at, &[0; 8])?;
    }
    media.fence();
    Ok(())
}
