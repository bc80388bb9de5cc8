//! Memory that a guest gives back to the host: holes in the files that its
//! RAM lies in. Whoever touches such a page again finds zeros.
//!
//! A reserved range has nobody to give memory to, and a hole in it would have
//! to be written: nothing is done there.

use std::io;

use hebe_types::{ByteSize, Extent, GRANULE, Gpa};
use rustix::fs::{FallocateFlags, SeekFrom, fallocate, seek};
use rustix::io::Errno;

use crate::Segment;
use crate::segment::pieces;

/// What an ordinary file can give back at least.
const PAGE: u64 = 4096;

impl Segment {
    /// What memory is given back in: aligned pieces of so many bytes; `None`
    /// where none can be.
    pub fn gives_back(&self) -> Option<u64> {
        match (self.own_files().is_empty(), self.is_huge()) {
            (true, _) => None,
            (_, true) => Some(GRANULE),
            (_, false) => Some(PAGE),
        }
    }

    /// Gives the memory of a range of guest RAM back, as far as whole pages lie
    /// in it. Returns how many bytes these are; afterwards they read as zeros.
    /// The guest must not rely on what is in them.
    ///
    /// # Errors
    /// EPERM while the kernel is to carry this memory over a reboot (store
    /// `luo`, prepared); EINVAL for what is not this segment's RAM. Any error
    /// leaves a part of the range, or all of it, as it was.
    pub fn give_back(&self, gpa: Gpa, len: u64) -> io::Result<u64> {
        let Some(page) = self.gives_back() else {
            return Ok(0);
        };
        let invalid = || io::Error::from(io::ErrorKind::InvalidInput);
        let end = gpa.0.checked_add(len).ok_or_else(invalid)?;
        let first = gpa.0.next_multiple_of(page);
        let last = end / page * page;
        let files = self.own_files();
        let mut at = first;
        while at < last {
            let placed = self.spec().ram.iter().find_map(|p| {
                let into = at.checked_sub(p.gpa.0)?;
                let left = p.place.len.checked_sub(into).filter(|left| *left > 0)?;
                Some((p.place.offset + into, left))
            });
            let (offset, left) = placed.ok_or_else(invalid)?;
            let len = left.min(last - at);
            for (fd, _, hole) in pieces(&files, Extent { offset, len }) {
                let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                fallocate(fd, flags, hole.offset, hole.len)?;
            }
            at += len;
        }
        Ok(last.saturating_sub(first))
    }

    /// Of a range of guest RAM, the first run that has memory; `None` where it
    /// has none. In a store all of it has. Nothing is touched. While the VM
    /// runs that is a guess.
    pub fn used_run(&self, gpa: Gpa, len: u64) -> Option<(Gpa, u64)> {
        let files = self.own_files();
        let placed = self.spec().ram.iter().find_map(|p| {
            let into = gpa.0.checked_sub(p.gpa.0)?;
            let left = p.place.len.checked_sub(into).filter(|left| *left > 0)?;
            Some((p.place.offset + into, left.min(len)))
        });
        let Some((offset, len)) = placed.filter(|_| !files.is_empty()) else {
            return Some((gpa, len));
        };
        for (fd, done, place) in pieces(&files, Extent { offset, len }) {
            let end = place.offset + place.len;
            let start = match seek(fd, SeekFrom::Data(place.offset)) {
                Ok(start) if start < end => start,
                // The next data lies behind, or there is none.
                Ok(_) | Err(Errno::NXIO) => continue,
                Err(_) => place.offset,
            };
            let hole = seek(fd, SeekFrom::Hole(start)).unwrap_or(end).min(end);
            let into = done + (start - place.offset);
            return Some((Gpa(gpa.0 + into), hole.max(start) - start));
        }
        None
    }

    /// Bytes that this segment's files have memory for, swapped-out ones
    /// counted; `None` for one in a store.
    pub fn resident(&self) -> Option<ByteSize> {
        let files = self.own_files();
        if files.is_empty() {
            return None;
        }
        let allocated = files.iter().map(|(fd, _)| crate::luo::allocated(*fd));
        let sum = allocated.sum::<Result<u64, _>>().ok()?;
        Some(ByteSize(sum))
    }
}

#[cfg(test)]
mod tests {
    use hebe_types::{VmId, VmName};

    use super::*;
    use crate::luo::SegmentFiles;
    use crate::{Access, FormatOptions, Store};

    const MIB: u64 = 1 << 20;

    fn name() -> VmName {
        "web".parse().expect("name")
    }

    fn vm() -> VmId {
        VmId([7; 16])
    }

    /// Reads or writes the byte at a guest-physical address.
    fn byte(segment: &Segment, gpa: u64, write: Option<u8>) -> u8 {
        let ram = segment.ram().iter().find(|m| {
            let into = gpa.checked_sub(m.gpa.0);
            into.is_some_and(|into| into < m.len)
        });
        let ram = ram.expect("RAM");
        // SAFETY: within the mapping, which nobody else uses.
        unsafe {
            let at = ram.host.as_ptr().add((gpa - ram.gpa.0) as usize);
            if let Some(value) = write {
                at.write_volatile(value);
            }
            at.read_volatile()
        }
    }

    fn luo_segment(memory: ByteSize) -> Segment {
        let files = SegmentFiles::create(vm(), &name(), memory).expect("files");
        let copies = files.fds().map(|fd| fd.try_clone_to_owned().expect("copy"));
        Segment::map_files(copies.collect(), files.spec()).expect("map")
    }

    fn fill(segment: &Segment) {
        for ram in segment.ram() {
            for gpa in (ram.gpa.0..ram.gpa.0 + ram.len).step_by(PAGE as usize) {
                byte(segment, gpa, Some(0x5a));
            }
        }
    }

    #[test]
    fn what_is_given_back_is_gone_and_reads_as_zeros_and_the_rest_stays() {
        let memory = ByteSize::mib(48);
        let memfd = Segment::new_memfd(vm(), &name(), memory, false).expect("memfd");
        for segment in [memfd, luo_segment(memory)] {
            assert_eq!(segment.gives_back(), Some(PAGE));
            fill(&segment);
            let full = segment.resident().expect("files of its own");
            // Over the border of two files of store luo.
            let (from, len) = (15 * MIB, 2 * MIB);
            assert_eq!(segment.give_back(Gpa(from), len).expect("given"), len);
            let left = segment.resident().expect("files of its own");
            assert_eq!(full.0 - left.0, len);
            for gpa in [from - 1, from, from + len - 1, from + len] {
                let inside = (from..from + len).contains(&gpa);
                let page = gpa / PAGE * PAGE;
                assert_eq!(byte(&segment, page, None), if inside { 0 } else { 0x5a });
            }
            byte(&segment, from, Some(1));
            assert_eq!(byte(&segment, from, None), 1, "it can be used again");
        }
    }

    #[test]
    fn only_whole_pages_of_its_own_ram_are_given_back() {
        let segment = luo_segment(ByteSize::mib(32));
        fill(&segment);
        let full = segment.resident();
        let given = |from: u64, len: u64| segment.give_back(Gpa(from), len).ok();
        assert_eq!(given(MIB + 1, PAGE - 1), Some(0), "no whole page");
        assert_eq!(given(MIB + 1, 2 * PAGE), Some(PAGE));
        assert_eq!(full.map(|f| f.0 - PAGE), segment.resident().map(|r| r.0));
        assert_eq!(byte(&segment, MIB, None), 0x5a);
        assert_eq!(byte(&segment, MIB + PAGE, None), 0);
        assert_eq!(byte(&segment, MIB + 2 * PAGE, None), 0x5a);
        assert_eq!(given(MIB, 0), Some(0));
        assert_eq!(given(32 * MIB, PAGE), None, "beyond its RAM");
        assert_eq!(given(u64::MAX - PAGE, 2 * PAGE), None);
    }

    #[test]
    fn runs_with_memory_are_found_without_giving_any_other_page_memory() {
        let segment = luo_segment(ByteSize::mib(48));
        assert_eq!(segment.used_run(Gpa(0), 48 * MIB), None);
        // In two files, one page at a border.
        for page in [3 * MIB, 3 * MIB + PAGE, 16 * MIB - PAGE, 40 * MIB] {
            byte(&segment, page, Some(1));
        }
        let used = segment.resident();
        let run = |from: u64, len: u64| segment.used_run(Gpa(from), len);
        let first = Some((Gpa(3 * MIB), 2 * PAGE));
        assert_eq!(run(0, 48 * MIB), first);
        assert_eq!(run(3 * MIB + PAGE, MIB), Some((Gpa(3 * MIB + PAGE), PAGE)));
        assert_eq!(run(3 * MIB, PAGE), Some((Gpa(3 * MIB), PAGE)));
        assert_eq!(run(4 * MIB, MIB), None);
        assert_eq!(run(4 * MIB, 40 * MIB), Some((Gpa(16 * MIB - PAGE), PAGE)));
        assert_eq!(run(16 * MIB, 32 * MIB), Some((Gpa(40 * MIB), PAGE)));
        assert_eq!(segment.resident(), used);
    }

    #[test]
    fn ram_above_the_hole_for_devices_is_found_in_its_file() {
        let segment = luo_segment(ByteSize::gib(4));
        let above = segment.ram().last().expect("two ranges").gpa.0;
        assert!(above >= 1 << 32);
        byte(&segment, above, Some(9));
        byte(&segment, above + PAGE, Some(9));
        assert_eq!(segment.give_back(Gpa(above), PAGE).expect("given"), PAGE);
        assert_eq!(byte(&segment, above, None), 0);
        assert_eq!(byte(&segment, above + PAGE, None), 9);
        // Neither is the hole itself RAM.
        assert!(segment.give_back(Gpa(above - PAGE), PAGE).is_err());
    }

    #[test]
    fn a_reserved_range_gives_nothing_back_and_is_not_written() {
        let file = tempfile::NamedTempFile::new().expect("file");
        file.as_file().set_len(64 * MIB).expect("length");
        Store::format(file.path(), FormatOptions::default()).expect("format");
        let mut store = Store::open(file.path(), Access::Manage).expect("open");
        let spec = store
            .create(vm(), &name(), ByteSize::mib(8))
            .expect("segment");
        let device = std::fs::File::options()
            .read(true)
            .write(true)
            .open(file.path());
        let segment = Segment::map(device.expect("open").into(), &spec).expect("map");
        byte(&segment, MIB, Some(3));
        assert_eq!(segment.gives_back(), None);
        assert_eq!(segment.resident(), None);
        assert_eq!(segment.give_back(Gpa(MIB), PAGE).expect("nothing"), 0);
        assert_eq!(byte(&segment, MIB, None), 3);
    }
}
