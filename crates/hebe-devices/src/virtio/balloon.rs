//! Balloon (virtio 1.2, 5.5): the guest gives memory back to the host.
//!
//! ```text
//! inflate   pages that the guest keeps off from now on      ─► given back
//! deflate   pages that it uses again                        ─► nothing to do
//! stats     one buffer, held until somebody asks for news
//! reports   ranges that the guest freed                     ─► given back
//! ```
//! A page that was given back reads as zeros when it is used again, and the
//! host then has memory for it: nobody has to be told. So pages out of the
//! balloon need no work here, and which ones are in it is not kept.
//!
//! **What a guest expects of such a page.** Of one that was in the balloon,
//! nothing: its driver fills it anew where it must (5.5.6.1). Of one that it
//! reported, zeros, or its poison value where it says so (5.5.6.6): where that
//! is not zero, reports are answered and nothing is given back.
//!
//! **Where nothing can be given back** (a reserved range; memory that the
//! kernel is about to carry over a reboot, where it says EPERM) the guest is
//! answered as ever: the host took no advantage of what it was offered.
//!
//! **Queues.** The standard (1.2, 5.5.2) numbers all that there may be: 0 inflate,
//! 1 deflate, 2 statistics, 3 hints of free pages, 4 reports, whatever of it was
//! negotiated. Linux numbers only those that it uses, one behind the other
//! (`queue_idx` in drivers/virtio/virtio_pci_common.c counts no queue without a
//! name), and QEMU does as well: without hints reports are number 3 there, and
//! without statistics, too, number 2. So it was still in March 2026 ("virtio_pci:
//! fix vq info pointer lookup via wrong index"); drivers that count as the standard
//! does were proposed in 2024 ("virtio: fix vq # for balloon"), and in 2025 a
//! standard that counts as Linux does (all on Linux's lists). A driver of
//! either kind may come. Hints are offered to none, which leaves no
//! doubt: here every queue behind those of inflation, deflation and, where
//! negotiated, statistics takes reports.

use std::io;
use std::sync::Arc;

use hebe_state::v2::devices::{BalloonV2, DeviceV2};
use vm_memory::GuestAddress;

use super::device::{Counters, Device, Next, Queues, Served, Stop};
use super::queue::{Chain, QueueError, VirtQueue};
use crate::Reclaim;

const F_STATS: u64 = 1 << 1;
const F_DEFLATE_ON_OOM: u64 = 1 << 2;
const F_PAGE_POISON: u64 = 1 << 4;
const F_REPORTING: u64 = 1 << 5;

const INFLATE: usize = 0;
const DEFLATE: usize = 1;
const STATS: usize = 2;
/// With the queue that no driver is offered (free page hints).
const QUEUES: usize = 5;

/// What the queues count in, whatever a page is in the guest.
const PAGE: u64 = 4096;
/// Most page numbers of one request: Linux sends 256. Bounds how long a pause
/// waits for it.
const PAGES_MAX: usize = 4096;
/// Most bytes of one report that are given back; the rest stays as it is.
const REPORT_MAX: u64 = 1 << 30;
/// Statistics that are known by a number from 0.
pub(crate) const TAGS: usize = 16;
/// A number of 16 bits, and a value of 64.
const STAT_LEN: usize = 10;
/// Most of them in one buffer.
const STATS_MAX: usize = 64;

/// `struct virtio_balloon_config`.
const CONFIG_LEN: usize = 16;
const ACTUAL_AT: usize = 4;
const POISON_AT: usize = 12;

/// What a balloon did since it was made or restored, and how it stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BalloonFigures {
    /// Pages of 4 KiB that the host wants in it.
    pub wanted_pages: u32,
    /// Pages that are in it, by the guest's word.
    pub actual_pages: u32,
    /// The driver is there.
    pub active: bool,
    /// It reports free memory.
    pub reporting: bool,
    /// Bytes that were inflated and given back.
    pub inflated: u64,
    /// Bytes that were reported and given back.
    pub reported: u64,
    /// Bytes that were offered and not given back.
    pub kept: u64,
    /// How often the guest gave statistics.
    pub answers: u64,
    /// The last ones, by their number in the standard (5.5.6.3).
    pub statistics: [Option<u64>; TAGS],
}

pub(crate) struct Balloon {
    reclaim: Arc<dyn Reclaim>,
    ram_pages: u32,
    offered: u64,
    /// What the driver accepted.
    accepted: u64,
    poison: u32,
    /// The buffer at the head of the statistics' queue was read, and stays
    /// there until news is wanted.
    held: bool,
    /// News is wanted.
    asked: bool,
    requests: u64,
    figures: BalloonFigures,
}

impl Balloon {
    /// For a guest with `ram` bytes of RAM.
    pub(crate) fn new(
        reclaim: Arc<dyn Reclaim>,
        ram: u64,
        deflate_on_oom: bool,
        reporting: bool,
    ) -> Self {
        let mut offered = F_STATS;
        if deflate_on_oom {
            offered |= F_DEFLATE_ON_OOM;
        }
        if reporting {
            offered |= F_REPORTING | F_PAGE_POISON;
        }
        Self {
            reclaim,
            ram_pages: u32::try_from(ram / PAGE).unwrap_or(u32::MAX),
            offered,
            accepted: 0,
            poison: 0,
            held: false,
            asked: false,
            requests: 0,
            figures: BalloonFigures::default(),
        }
    }

    /// As saved. No more is wanted than there is.
    pub(crate) fn restored(self, state: &BalloonV2) -> Self {
        Self {
            poison: state.poison,
            figures: BalloonFigures {
                wanted_pages: state.wanted_pages.min(self.ram_pages),
                actual_pages: state.actual_pages,
                ..self.figures
            },
            ..self
        }
    }

    /// Wants so many pages in it from now on.
    pub(crate) fn want(&mut self, pages: u32) {
        self.figures.wanted_pages = pages.min(self.ram_pages);
    }

    /// Wants news of the guest: the queue to be kicked for it, if there is one.
    pub(crate) fn ask(&mut self) -> Option<usize> {
        let has = self.accepted & F_STATS != 0;
        self.asked = has;
        has.then_some(STATS)
    }

    pub(crate) fn figures(&self, active: bool) -> BalloonFigures {
        BalloonFigures {
            active,
            reporting: active && self.accepted & F_REPORTING != 0,
            ..self.figures
        }
    }

    /// Gives one range back; returns the bytes.
    fn give(&mut self, queue: &VirtQueue, addr: u64, len: u64) -> u64 {
        queue.ram().meter().given(len);
        // What fails leaves the page as it is, which is right, too.
        let given = self.reclaim.give_back(addr, len).unwrap_or(0).min(len);
        self.figures.kept += len - given;
        given
    }

    fn inflate(&mut self, queue: &VirtQueue, chain: &Chain) -> Result<u32, Stop> {
        let pages = page_numbers(INFLATE, queue, chain)?;
        for (addr, len) in runs(&pages) {
            check_ram(INFLATE, queue, addr, len)?;
            let given = self.give(queue, addr, len);
            self.figures.inflated += given;
        }
        self.requests += 1;
        Ok(0)
    }

    fn deflate(&mut self, queue: &VirtQueue, chain: &Chain) -> Result<u32, Stop> {
        let pages = page_numbers(DEFLATE, queue, chain)?;
        for (addr, len) in runs(&pages) {
            check_ram(DEFLATE, queue, addr, len)?;
        }
        self.requests += 1;
        Ok(0)
    }

    /// A report: the segments themselves are what is free. Each lies in RAM.
    fn report(&mut self, index: usize, queue: &VirtQueue, chain: &Chain) -> Result<u32, Stop> {
        if chain.readable().remaining() != 0 {
            return Err(Stop::Request {
                queue: index,
                reason: "a report of free memory has a readable segment",
            });
        }
        let poisoned = self.accepted & F_PAGE_POISON != 0 && self.poison != 0;
        let mut left = if poisoned { 0 } else { REPORT_MAX };
        for segment in chain.writable_segments() {
            let len = u64::from(segment.len);
            let taken = len.min(left);
            left -= taken;
            self.figures.kept += len - taken;
            if taken > 0 {
                let given = self.give(queue, segment.addr.0, taken);
                self.figures.reported += given;
            }
        }
        self.requests += 1;
        Ok(0)
    }

    fn statistics(&mut self, queue: &VirtQueue, chain: &Chain) -> Result<Served, Stop> {
        if self.held {
            if !self.asked {
                return Ok(Served::Later);
            }
            (self.held, self.asked) = (false, false);
            return Ok(Served::Done(0));
        }
        let broken = |error: QueueError| Stop::Queue {
            queue: STATS,
            error,
        };
        let mut bytes = [0; STAT_LEN * STATS_MAX];
        let len = chain.readable().read(queue.ram(), &mut bytes);
        let len = len.map_err(broken)?;
        let mut statistics = [None; TAGS];
        for [tag @ .., a, b, c, d, e, f, g, h] in bytes[..len].as_chunks::<STAT_LEN>().0 {
            let known = statistics.get_mut(usize::from(u16::from_le_bytes(*tag)));
            if let Some(place) = known {
                let value = u64::from_le_bytes([*a, *b, *c, *d, *e, *f, *g, *h]);
                // All ones: the guest does not know.
                *place = (value != u64::MAX).then_some(value);
            }
        }
        // The first buffer of a driver says nothing yet.
        if statistics.iter().any(Option::is_some) {
            self.figures.statistics = statistics;
            self.figures.answers += 1;
        }
        (self.held, self.asked) = (true, false);
        Ok(Served::Later)
    }
}

/// The page numbers of a request, in ascending order, each once.
fn page_numbers(index: usize, queue: &VirtQueue, chain: &Chain) -> Result<Vec<u32>, Stop> {
    let refuse = |reason| {
        Err(Stop::Request {
            queue: index,
            reason,
        })
    };
    if chain.writable().remaining() != 0 {
        return refuse("a request of pages has a writable segment");
    }
    let len = chain.readable().remaining();
    if len > 4 * PAGES_MAX as u64 {
        return refuse("a request of pages names more than 4096");
    }
    if !len.is_multiple_of(4) {
        return refuse("a request of pages is not whole page numbers");
    }
    let mut bytes = vec![0; len as usize];
    let read = chain.readable().read(queue.ram(), &mut bytes);
    read.map_err(|error| Stop::Queue {
        queue: index,
        error,
    })?;
    let (numbers, _) = bytes.as_chunks::<4>();
    let mut pages: Vec<u32> = numbers.iter().map(|b| u32::from_le_bytes(*b)).collect();
    pages.sort_unstable();
    pages.dedup();
    Ok(pages)
}

/// Neighbours together: address and length of each run.
fn runs(pages: &[u32]) -> impl Iterator<Item = (u64, u64)> {
    let runs = pages.chunk_by(|a, b| a.checked_add(1) == Some(*b));
    runs.map(|run| (u64::from(run[0]) * PAGE, run.len() as u64 * PAGE))
}

fn check_ram(index: usize, queue: &VirtQueue, addr: u64, len: u64) -> Result<(), Stop> {
    if queue.ram().contains(GuestAddress(addr), len) {
        return Ok(());
    }
    Err(Stop::Request {
        queue: index,
        reason: "a page number is not one of guest RAM",
    })
}

impl Device for Balloon {
    fn features(&self) -> u64 {
        self.offered
    }

    fn queues(&self) -> usize {
        QUEUES
    }

    fn config(&self) -> Vec<u8> {
        let figures = &self.figures;
        [figures.wanted_pages, figures.actual_pages, 0, self.poison]
            .map(u32::to_le_bytes)
            .concat()
    }

    fn config_is_writable(&self) -> bool {
        true
    }

    fn config_written(&mut self, at: usize, data: &[u8]) {
        let mut image = [0; CONFIG_LEN];
        image.copy_from_slice(&self.config());
        for (byte, value) in image.iter_mut().skip(at).zip(data) {
            *byte = *value;
        }
        let word = |at: usize| {
            u32::from_le_bytes([image[at], image[at + 1], image[at + 2], image[at + 3]])
        };
        self.figures.actual_pages = word(ACTUAL_AT);
        self.poison = word(POISON_AT);
    }

    fn activate(&mut self, features: u64) {
        self.accepted = features;
        (self.held, self.asked) = (false, false);
    }

    fn reset(&mut self) {
        self.accepted = 0;
        self.poison = 0;
        self.figures.actual_pages = 0;
        self.figures.statistics = [None; TAGS];
        (self.held, self.asked) = (false, false);
    }

    fn kicked(&mut self, index: usize, queues: &mut Queues) -> Result<Next, Stop> {
        let accepted = |feature| self.accepted & feature != 0;
        match index {
            INFLATE => queues.serve(index, |queue, chain| {
                self.inflate(queue, chain).map(Served::Done)
            }),
            DEFLATE => queues.serve(index, |queue, chain| {
                self.deflate(queue, chain).map(Served::Done)
            }),
            STATS if accepted(F_STATS) => {
                queues.serve(index, |queue, chain| self.statistics(queue, chain))
            }
            _ if accepted(F_REPORTING) => queues.serve(index, |queue, chain| {
                self.report(index, queue, chain).map(Served::Done)
            }),
            _ => queues.serve(index, |_, _| {
                Err(Stop::Request {
                    queue: index,
                    reason: "nothing was negotiated that this queue is for",
                })
            }),
        }
    }

    fn balloon(&mut self) -> Option<&mut Balloon> {
        Some(self)
    }

    fn counters(&self) -> Counters {
        Counters {
            requests: self.requests,
            bytes_in: 0,
            bytes_out: self.figures.inflated + self.figures.reported,
            dropped: 0,
        }
    }

    fn save(&self) -> io::Result<DeviceV2> {
        Ok(DeviceV2::Balloon(BalloonV2 {
            wanted_pages: self.figures.wanted_pages,
            actual_pages: self.figures.actual_pages,
            poison: self.poison,
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_are_one_run_and_numbers_do_not_overflow() {
        let runs = |pages: &[u32]| super::runs(pages).collect::<Vec<_>>();
        assert_eq!(runs(&[]), []);
        assert_eq!(
            runs(&[1, 2, 3, 7, u32::MAX - 1, u32::MAX]),
            [
                (PAGE, 3 * PAGE),
                (7 * PAGE, PAGE),
                ((u64::from(u32::MAX) - 1) * PAGE, 2 * PAGE)
            ]
        );
    }
}
