//! A media in memory that remembers every write, so that tests can stop the
//! world between any two of them, and in the middle of one.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::io;
use std::rc::Rc;

use hebe_types::Extent;

use crate::media::Media;

const PAGE: u64 = 4096;

/// One persistent write.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Op {
    Store { offset: u64, bytes: Vec<u8> },
    Scrub(Extent),
    Fence,
}

/// Sparse bytes, cheap to copy.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Image {
    pages: BTreeMap<u64, Rc<[u8; PAGE as usize]>>,
}

impl Image {
    pub(crate) fn read(&self, offset: u64, buf: &mut [u8]) {
        let mut done = 0;
        while done < buf.len() {
            let at = offset + done as u64;
            let (page, inside) = (at / PAGE, (at % PAGE) as usize);
            let n = (buf.len() - done).min(PAGE as usize - inside);
            match self.pages.get(&page) {
                Some(bytes) => buf[done..done + n].copy_from_slice(&bytes[inside..inside + n]),
                None => buf[done..done + n].fill(0),
            }
            done += n;
        }
    }

    pub(crate) fn write(&mut self, offset: u64, bytes: &[u8]) {
        let mut done = 0;
        while done < bytes.len() {
            let at = offset + done as u64;
            let (page, inside) = (at / PAGE, (at % PAGE) as usize);
            let n = (bytes.len() - done).min(PAGE as usize - inside);
            let slot = self.pages.entry(page).or_insert_with(|| Rc::new([0; 4096]));
            Rc::make_mut(slot)[inside..inside + n].copy_from_slice(&bytes[done..done + n]);
            done += n;
        }
    }

    pub(crate) fn bytes(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut out = vec![0; len];
        self.read(offset, &mut out);
        out
    }

    pub(crate) fn flip(&mut self, offset: u64, bit: u8) {
        let byte = self.bytes(offset, 1)[0] ^ (1 << bit);
        self.write(offset, &[byte]);
    }

    /// Whether an extent of whole pages reads as zero.
    pub(crate) fn is_zero(&self, extent: Extent) -> bool {
        let pages = extent.offset / PAGE..(extent.offset + extent.len) / PAGE;
        self.pages
            .range(pages)
            .all(|(_, bytes)| bytes.iter().all(|b| *b == 0))
    }

    /// Applies a write, or only its first `words` words of eight bytes (for a
    /// scrub: pages).
    fn apply(&mut self, op: &Op, words: usize) {
        match op {
            Op::Store { offset, bytes } => {
                let n = bytes.len().min(words.saturating_mul(8));
                self.write(*offset, &bytes[..n]);
            }
            Op::Scrub(extent) => {
                let first = extent.offset / PAGE;
                let count = (extent.len / PAGE).min(words as u64);
                self.pages
                    .retain(|page, _| !(first..first + count).contains(page));
            }
            Op::Fence => {}
        }
    }
}

/// A media over an [`Image`].
#[derive(Clone, Debug, Default)]
pub(crate) struct TestMedia {
    pub image: RefCell<Image>,
    pub log: RefCell<Vec<Op>>,
    /// Scrubs fail, as a worn device's would.
    pub scrub_fails: Cell<bool>,
}

impl TestMedia {
    pub(crate) fn over(image: &Image) -> Self {
        Self {
            image: RefCell::new(image.clone()),
            ..Self::default()
        }
    }

    fn run(&self, op: Op) {
        self.image.borrow_mut().apply(&op, usize::MAX);
        self.log.borrow_mut().push(op);
    }

    pub(crate) fn snapshot(&self) -> Image {
        self.image.borrow().clone()
    }
}

impl Media for TestMedia {
    fn load(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.image.borrow().read(offset, buf);
        Ok(())
    }

    fn store(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        assert!(offset.is_multiple_of(8) && bytes.len().is_multiple_of(8));
        self.run(Op::Store {
            offset,
            bytes: bytes.to_vec(),
        });
        Ok(())
    }

    fn scrub(&self, extent: Extent) -> io::Result<()> {
        if self.scrub_fails.get() {
            return Err(io::ErrorKind::Other.into());
        }
        self.run(Op::Scrub(extent));
        Ok(())
    }

    fn fence(&self) {
        self.run(Op::Fence);
    }
}

/// Calls `look` with the image after every prefix of `log`, torn ones
/// included: each long write is cut after its first and last words and at
/// places in between.
pub(crate) fn every_cut(start: &Image, log: &[Op], mut look: impl FnMut(&Image, &str)) {
    let mut image = start.clone();
    look(&image, "before the first write");
    for (i, op) in log.iter().enumerate() {
        let words = match op {
            Op::Store { bytes, .. } => bytes.len() / 8,
            Op::Scrub(extent) => (extent.len / PAGE) as usize,
            Op::Fence => 0,
        };
        for cut in 1..words {
            if cut <= 14 || cut + 3 >= words || cut % 61 == 0 {
                let mut torn = image.clone();
                torn.apply(op, cut);
                look(&torn, &format!("in write {i}, after {cut} of {words}"));
            }
        }
        image.apply(op, usize::MAX);
        if words > 0 {
            look(&image, &format!("after write {i}"));
        }
    }
}

/// As [`every_cut`], between whole writes only.
pub(crate) fn whole_cuts(start: &Image, log: &[Op]) -> Vec<Image> {
    let mut image = start.clone();
    let mut out = vec![image.clone()];
    for op in log.iter().filter(|op| **op != Op::Fence) {
        image.apply(op, usize::MAX);
        out.push(image.clone());
    }
    out
}

/// Applies a prefix: `full` whole writes and `words` words of the next.
pub(crate) fn cut_at(start: &Image, log: &[Op], full: usize, words: usize) -> Image {
    let mut image = start.clone();
    for op in &log[..full.min(log.len())] {
        image.apply(op, usize::MAX);
    }
    if let Some(op) = log.get(full) {
        image.apply(op, words);
    }
    image
}
