//! What a kernel's image says of live update: its release, and the versions of
//! the formats in which it hands memory over.
//!
//! A kernel that preserves memory writes into it by which formats it did so
//! (`kho-v4`, `luo-v5`, `memfd-v2` in Linux 7.3), and one that knows another
//! version takes nothing over. The words stand in the kernel's code, so they are
//! found in its image, which is unpacked for that as a boot loader would: the
//! payload of a bzImage (Documentation/arch/x86/boot.rst).

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::Path;

use ruzstd::decoding::StreamingDecoder;

/// What is in the way of a format's name in an image: its three families.
const FAMILIES: [&str; 3] = ["kho", "luo", "memfd"];
/// The longest name that is looked for, the NUL on both sides counted.
const NAME_LEN_MAX: usize = 16;
/// Most that an image is unpacked to: several times the largest known.
const UNPACKED_LEN_MAX: u64 = 1 << 30;
/// Kernels are packed with the largest window of all.
const WINDOW_LEN_MAX: u64 = 1 << 28;
/// Blocks of LZ4's legacy format are no longer than this when unpacked.
const LZ4_BLOCK_LEN: usize = 8 << 20;
const PIECE_LEN: usize = 1 << 16;

/// Names such as `luo-v5`, in order.
pub(super) type Formats = BTreeSet<String>;

/// The setup header of a bzImage.
fn head(image: &Path) -> Option<(File, Vec<u8>)> {
    let mut head = Vec::new();
    let mut file = File::open(image).ok()?;
    (&mut file).take(0x10000).read_to_end(&mut head).ok()?;
    (head.get(0x202..0x206)? == b"HdrS").then_some((file, head))
}

fn u16_at(head: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(head.get(at..at + 2)?.try_into().ok()?))
}

fn u32_at(head: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(head.get(at..at + 4)?.try_into().ok()?))
}

/// The release that a bzImage says it is (`kernel_version`).
pub(super) fn release(image: &Path) -> Option<String> {
    let (_, head) = head(image)?;
    let at = u16_at(&head, 0x20e)?;
    let text = head.get(usize::from(at) + 0x200..)?;
    let end = text.iter().position(|&b| b == 0 || b == b' ')?;
    let release = std::str::from_utf8(&text[..end]).ok()?;
    (at != 0 && !release.is_empty()).then(|| release.to_owned())
}

/// The formats that the kernel in a bzImage knows; none of them where it is
/// built without live update. `None` where the image cannot be unpacked here:
/// only zstd and LZ4 are.
pub(super) fn formats(image: &Path) -> Option<Formats> {
    let (mut file, head) = head(image)?;
    // Boot protocol 2.08 and newer.
    if u16_at(&head, 0x206)? < 0x208 {
        return None;
    }
    let sectors = match *head.get(0x1f1)? {
        0 => 4,
        sectors => u64::from(sectors),
    };
    let start = (sectors + 1) * 512 + u64::from(u32_at(&head, 0x248)?);
    let len = u64::from(u32_at(&head, 0x24c)?);
    file.seek(SeekFrom::Start(start)).ok()?;
    let mut payload = io::BufReader::new(file.take(len));
    let mut magic = [0; 4];
    payload.read_exact(&mut magic).ok()?;
    match magic {
        [0x28, 0xb5, 0x2f, 0xfd] => {
            let whole = io::Cursor::new(magic).chain(payload);
            let unpacked = StreamingDecoder::new_with_max_window_size(whole, WINDOW_LEN_MAX);
            search(unpacked.ok()?)
        }
        [0x02, 0x21, 0x4c, 0x18] => search(Lz4::new(payload)),
        _ => return None,
    }
    .ok()
}

/// Finds the names in what `unpacked` gives.
fn search(unpacked: impl Read) -> io::Result<Formats> {
    let mut unpacked = unpacked.take(UNPACKED_LEN_MAX);
    let mut found = Formats::new();
    // What a name may begin in, and the next piece.
    let mut window = vec![0; NAME_LEN_MAX + PIECE_LEN];
    loop {
        let mut len = 0;
        while len < PIECE_LEN {
            match unpacked.read(&mut window[NAME_LEN_MAX + len..])? {
                0 => break,
                n => len += n,
            }
        }
        names(&window[..NAME_LEN_MAX + len], &mut found);
        if len < PIECE_LEN {
            return Ok(found);
        }
        window.copy_within(PIECE_LEN.., 0);
    }
}

/// Every name that stands between two NULs.
fn names(bytes: &[u8], found: &mut Formats) {
    for at in memchr_dashes(bytes) {
        for family in FAMILIES {
            let Some(start) = at.checked_sub(family.len()) else {
                continue;
            };
            let free = start
                .checked_sub(1)
                .is_some_and(|before| bytes[before] == 0);
            if !free || &bytes[start..at] != family.as_bytes() {
                continue;
            }
            let rest = &bytes[at..];
            let Some(end) = rest.iter().take(NAME_LEN_MAX).position(|&b| b == 0) else {
                continue;
            };
            let version = &rest[2..end.max(2)];
            if rest[1] == b'v' && !version.is_empty() && version.iter().all(u8::is_ascii_digit) {
                let name = &bytes[start..at + end];
                found.insert(String::from_utf8_lossy(name).into_owned());
            }
        }
    }
}

/// Where a dash stands that something may follow.
fn memchr_dashes(bytes: &[u8]) -> impl Iterator<Item = usize> {
    let end = bytes.len().saturating_sub(2);
    let dashes = bytes[..end].iter().enumerate();
    dashes.filter(|(_, b)| **b == b'-').map(|(at, _)| at)
}

/// LZ4's legacy format, as the kernel's build makes it: blocks behind their
/// lengths, after the magic number, and at the end the unpacked length.
struct Lz4<R> {
    packed: R,
    block: Vec<u8>,
    given: usize,
}

impl<R: Read> Lz4<R> {
    fn new(packed: R) -> Self {
        Self {
            packed,
            block: Vec::new(),
            given: 0,
        }
    }

    /// Unpacks the next block; `false` when there is none.
    fn refill(&mut self) -> io::Result<bool> {
        let mut len = [0; 4];
        match self.packed.read_exact(&mut len) {
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(false),
            other => other?,
        }
        let len = u64::from(u32::from_le_bytes(len));
        let mut packed = Vec::new();
        let most = (LZ4_BLOCK_LEN + LZ4_BLOCK_LEN / 128) as u64;
        (&mut self.packed)
            .take(len.min(most))
            .read_to_end(&mut packed)?;
        if (packed.len() as u64) < len {
            // Not a block but the unpacked length.
            return Ok(false);
        }
        self.block.clear();
        self.given = 0;
        let whole = unpack(&packed, &mut self.block);
        whole
            .map(|()| true)
            .ok_or_else(|| io::ErrorKind::InvalidData.into())
    }
}

impl<R: Read> Read for Lz4<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        while self.given == self.block.len() {
            if !self.refill()? {
                return Ok(0);
            }
        }
        let len = buf.len().min(self.block.len() - self.given);
        buf[..len].copy_from_slice(&self.block[self.given..self.given + len]);
        self.given += len;
        Ok(len)
    }
}

/// One LZ4 block: literals and matches in turn, lengths in nibbles that 255s
/// extend. `None` for anything that is none.
fn unpack(packed: &[u8], out: &mut Vec<u8>) -> Option<()> {
    let mut bytes = packed;
    while let Some((&token, rest)) = bytes.split_first() {
        bytes = rest;
        let literals = extended(usize::from(token >> 4), &mut bytes)?;
        let (given, rest) = bytes.split_at_checked(literals)?;
        bytes = rest;
        out.extend_from_slice(given);
        if bytes.is_empty() {
            break;
        }
        let (distance, rest) = bytes.split_at_checked(2)?;
        let distance = usize::from(u16::from_le_bytes(distance.try_into().ok()?));
        bytes = rest;
        let len = extended(usize::from(token & 15), &mut bytes)? + 4;
        let from = out.len().checked_sub(distance).filter(|_| distance > 0)?;
        if out.len() + len > LZ4_BLOCK_LEN {
            return None;
        }
        // The match may reach into what it makes.
        for at in from..from + len {
            out.push(out[at]);
        }
    }
    Some(())
}

fn extended(nibble: usize, bytes: &mut &[u8]) -> Option<usize> {
    let mut len = nibble;
    if nibble == 15 {
        loop {
            let (&more, rest) = bytes.split_first()?;
            *bytes = rest;
            len += usize::from(more);
            if more != 255 {
                break;
            }
        }
    }
    (len <= LZ4_BLOCK_LEN).then_some(len)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A bzImage of that release with such a payload.
    pub(crate) fn bzimage(release: &str, payload: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0u8; 0x1000];
        bytes[0x1f1] = 1;
        bytes[0x202..0x206].copy_from_slice(b"HdrS");
        bytes[0x206..0x208].copy_from_slice(&0x20fu16.to_le_bytes());
        bytes[0x20e..0x210].copy_from_slice(&0x600u16.to_le_bytes());
        let text = format!("{release} (builder@host) #1 SMP\0");
        bytes[0x800..0x800 + text.len()].copy_from_slice(text.as_bytes());
        bytes[0x248..0x24c].copy_from_slice(&(0x1000u32 - 0x400).to_le_bytes());
        bytes[0x24c..0x250].copy_from_slice(&(payload.len() as u32).to_le_bytes());
        bytes.extend_from_slice(payload);
        bytes
    }

    /// Text as a payload of literals, in LZ4's legacy format.
    pub(crate) fn lz4(text: &[u8]) -> Vec<u8> {
        let mut block = vec![0xf0];
        let mut more = text.len() - 15;
        while more >= 255 {
            block.push(255);
            more -= 255;
        }
        block.push(more as u8);
        block.extend_from_slice(text);
        let mut all = vec![0x02, 0x21, 0x4c, 0x18];
        all.extend_from_slice(&(block.len() as u32).to_le_bytes());
        all.extend_from_slice(&block);
        all.extend_from_slice(&(text.len() as u32).to_le_bytes());
        all
    }

    fn found(payload: &[u8]) -> Option<Vec<String>> {
        let file = tempfile::NamedTempFile::new().expect("file");
        std::fs::write(file.path(), bzimage("7.3.4", payload)).expect("write");
        formats(file.path()).map(|found| found.into_iter().collect())
    }

    #[test]
    fn names_are_found_wherever_they_stand() {
        let mut text = vec![0u8; 3 * PIECE_LEN];
        let mut put =
            |at: usize, word: &str| text[at..at + word.len()].copy_from_slice(word.as_bytes());
        put(PIECE_LEN - 4, "luo-v5");
        put(2 * PIECE_LEN - 1, "memfd-v2");
        put(70_000, "kho-v14");
        put(80_000, "xkho-v7");
        put(80_100, "kho-v");
        put(80_200, "luo-v5a");
        put(80_300, "memfd-5");
        let names = found(&lz4(&text)).expect("unpacked");
        assert_eq!(names, ["kho-v14", "luo-v5", "memfd-v2"]);
        let zstd = ruzstd::encoding::compress_to_vec(
            &text[..],
            ruzstd::encoding::CompressionLevel::Fastest,
        );
        assert_eq!(found(&zstd).expect("unpacked"), names);
        assert_eq!(found(&lz4(&[0; 4096])), Some(Vec::new()));
    }

    #[test]
    fn a_match_reaches_into_what_it_makes() {
        let mut out = Vec::new();
        // "ab", then seven bytes from two before, then "c".
        unpack(&[0x23, b'a', b'b', 2, 0, 0x10, b'c'], &mut out).expect("a block");
        assert_eq!(out, b"ababababac");
    }

    #[test]
    fn what_is_no_packed_kernel_is_refused_and_never_panics() {
        assert_eq!(found(b"\x7fELF"), None);
        assert_eq!(found(b""), None);
        let mut good = lz4(b"a kernel's text, which is long enough");
        for at in 4..good.len() {
            for bit in [0x01, 0x80] {
                good[at] ^= bit;
                let _ = found(&good);
                good[at] ^= bit;
            }
        }
        let mut out = Vec::new();
        assert_eq!(unpack(&[0x03, 9, 0], &mut out), None);
        assert_eq!(unpack(&[0xf0, 255], &mut out), None);
    }
}
