//! Where bytes of an image come from.

use std::cell::Cell;
use std::io;
use std::rc::Rc;

use hebe_block::{BlockBackend, SECTOR_SIZE};

/// Most bytes read for one look at an image: the largest kernel and initrd
/// twice over.
const BYTES_MAX: u64 = 3 << 30;
/// Most reads: file systems of many blocks are read block by block.
const READS_MAX: u64 = 4 << 20;

/// A disk that can be read anywhere.
pub trait Source {
    /// Bytes of the disk.
    fn size(&self) -> u64;

    /// Fills `data` from byte `offset` on.
    ///
    /// # Errors
    /// What the host says, or that this reaches beyond the end.
    fn read_at(&self, data: &mut [u8], offset: u64) -> io::Result<()>;
}

impl Source for BlockBackend {
    fn size(&self) -> u64 {
        self.sectors().saturating_mul(SECTOR_SIZE)
    }

    fn read_at(&self, data: &mut [u8], offset: u64) -> io::Result<()> {
        BlockBackend::read_at(self, data, offset)
    }
}

impl Source for Vec<u8> {
    fn size(&self) -> u64 {
        self.len() as u64
    }

    fn read_at(&self, data: &mut [u8], offset: u64) -> io::Result<()> {
        let start = usize::try_from(offset).map_err(|_| beyond())?;
        let end = start.checked_add(data.len()).ok_or_else(beyond)?;
        data.copy_from_slice(self.get(start..end).ok_or_else(beyond)?);
        Ok(())
    }
}

fn beyond() -> io::Error {
    io::Error::new(
        io::ErrorKind::UnexpectedEof,
        "beyond the end of the disk image",
    )
}

/// A piece of a disk, a partition or all of it. Pieces of one disk share what
/// may still be read.
#[derive(Clone)]
pub(crate) struct Piece {
    source: Rc<dyn Source>,
    start: u64,
    len: u64,
    budget: Rc<Budget>,
}

struct Budget {
    bytes: Cell<u64>,
    reads: Cell<u64>,
}

impl Piece {
    /// All of it, with a fresh budget.
    pub(crate) fn whole(source: Rc<dyn Source>) -> Self {
        Self {
            start: 0,
            len: source.size(),
            source,
            budget: Rc::new(Budget {
                bytes: Cell::new(BYTES_MAX),
                reads: Cell::new(READS_MAX),
            }),
        }
    }

    /// `len` bytes from `start` on; `None` where that is not all inside.
    pub(crate) fn part(&self, start: u64, len: u64) -> Option<Self> {
        let end = start.checked_add(len)?;
        (len > 0 && end <= self.len).then(|| Self {
            start: self.start + start,
            len,
            ..self.clone()
        })
    }

    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    /// Fills `data` from byte `offset` of the piece on.
    pub(crate) fn read_at(&self, data: &mut [u8], offset: u64) -> io::Result<()> {
        let len = data.len() as u64;
        let end = offset.checked_add(len).ok_or_else(beyond)?;
        if end > self.len {
            return Err(beyond());
        }
        let spend = |what: &Cell<u64>, cost: u64| {
            let left = what.get().checked_sub(cost);
            left.map(|left| what.set(left))
                .ok_or_else(|| io::Error::other("far more had to be read than any image needs"))
        };
        spend(&self.budget.reads, 1)?;
        spend(&self.budget.bytes, len)?;
        self.source.read_at(data, self.start + offset)
    }

    /// `N` bytes at `offset`, where they are inside.
    pub(crate) fn bytes<const N: usize>(&self, offset: u64) -> Option<[u8; N]> {
        let mut data = [0; N];
        self.read_at(&mut data, offset).ok().map(|()| data)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_piece_reaches_neither_beyond_itself_nor_beyond_the_budget() {
        let whole = Piece::whole(Rc::new(vec![1u8, 2, 3, 4, 5, 6, 7, 8]));
        let part = whole.part(2, 4).expect("inside");
        assert_eq!(part.bytes::<4>(0), Some([3, 4, 5, 6]));
        assert_eq!(part.bytes::<4>(1), None);
        assert_eq!(part.bytes::<1>(u64::MAX), None);
        for (start, len) in [(0, 9), (8, 1), (u64::MAX, 2), (3, 0)] {
            assert!(whole.part(start, len).is_none(), "{start} {len}");
        }
        part.budget.reads.set(1);
        assert_eq!(part.bytes::<1>(0), Some([3]));
        assert_eq!(whole.bytes::<1>(0), None, "they share one budget");
    }
}
