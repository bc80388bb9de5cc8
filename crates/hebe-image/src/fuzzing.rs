//! What the fuzz target and the corpus test share.

use std::io;
use std::rc::Rc;

use crate::source::Source;
use crate::{Limits, bls, grub, grubenv, load};

/// Largest disk that an input describes.
const DISK_MAX: u64 = 64 << 20;

/// A disk of zeros with patches: an input can be small and reach far.
struct Patched {
    len: u64,
    patches: Vec<(u64, Vec<u8>)>,
}

impl Source for Patched {
    fn size(&self) -> u64 {
        self.len
    }

    fn read_at(&self, data: &mut [u8], offset: u64) -> io::Result<()> {
        let end = offset.checked_add(data.len() as u64);
        if end.is_none_or(|end| end > self.len) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        data.fill(0);
        for (at, bytes) in &self.patches {
            for (byte, place) in bytes.iter().zip(*at..) {
                if let Some(i) = place.checked_sub(offset)
                    && let Some(to) = data.get_mut(i as usize)
                {
                    *to = *byte;
                }
            }
        }
        Ok(())
    }
}

/// Looks at one input, as three things by its first byte: a disk as patches
/// (offset u32, length u16, bytes), a configuration of GRUB, or an entry and
/// an environment block. Returns whether a disk booted.
pub fn look_at(input: &[u8]) -> bool {
    let Some((kind, rest)) = input.split_first() else {
        return false;
    };
    match kind % 3 {
        0 => {
            let limits = Limits {
                kernel: 1 << 20,
                initrd: 1 << 20,
            };
            let disk = Rc::new(patched(rest));
            load(disk, limits, &mut io::sink(), &mut io::sink()).is_ok()
        }
        1 => {
            let text = String::from_utf8_lossy(rest);
            let place = grub::Place::default();
            let _ = grub::choose(&text, &place, &Bare(&text));
            false
        }
        _ => {
            let text = String::from_utf8_lossy(rest);
            let variables = grubenv::parse(&text);
            let mut entries: Vec<bls::Entry> = text
                .split("\n\n")
                .filter_map(|text| bls::parse("a.conf", text, &variables))
                .collect();
            let _ = bls::choose(&mut entries, bls::default_of(&text));
            false
        }
    }
}

fn patched(mut rest: &[u8]) -> Patched {
    let mut patches = Vec::new();
    let mut len = 0;
    while let Some((head, after)) = rest.split_at_checked(6) {
        let at = u64::from(u32::from_le_bytes([head[0], head[1], head[2], head[3]])) % DISK_MAX;
        let wanted = usize::from(u16::from_le_bytes([head[4], head[5]]));
        let (bytes, after) = after.split_at(wanted.min(after.len()));
        patches.push((at, bytes.to_vec()));
        len = (at + bytes.len() as u64).max(len);
        rest = after;
    }
    let len = (len + (1 << 20)).next_multiple_of(512);
    Patched { len, patches }
}

/// One volume, of which every file is the configuration itself.
struct Bare<'a>(&'a str);

impl grub::Disk for Bare<'_> {
    fn named(&self, device: &str) -> Option<usize> {
        (device == "hd0").then_some(0)
    }
    fn with_uuid(&self, uuid: &str) -> Option<usize> {
        (!uuid.is_empty()).then_some(0)
    }
    fn with_label(&self, _: &str) -> Option<usize> {
        None
    }
    fn with_file(&self, path: &str) -> Option<usize> {
        path.starts_with('/').then_some(0)
    }
    fn has_file(&self, place: &grub::Place) -> bool {
        place.path.len().is_multiple_of(2)
    }
    fn text(&self, _: &grub::Place) -> Option<String> {
        Some(self.0.to_owned())
    }
}
