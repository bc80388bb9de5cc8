//! What the kinds of device have in common.

use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use hebe_block::BlockBackend;
use hebe_state::v2::devices::DeviceV2;
use hebe_types::Stamp;

use super::balloon::Balloon;
use super::queue::{Chain, QueueError, VirtQueue};
use super::shared::Shared;

/// `VIRTIO_F_INDIRECT_DESC`.
pub(crate) const F_INDIRECT_DESC: u64 = 1 << 28;
/// `VIRTIO_F_EVENT_IDX`.
pub(crate) const F_EVENT_IDX: u64 = 1 << 29;
/// `VIRTIO_F_VERSION_1`.
pub(crate) const F_VERSION_1: u64 = 1 << 32;

/// Why a device stops until the driver resets it. Always the guest's doing.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Stop {
    #[error("queue {queue}: {error}")]
    Queue { queue: usize, error: QueueError },
    #[error("queue {queue}: {reason}")]
    Request { queue: usize, reason: &'static str },
}

/// What a device did since it was made or restored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Requests, or frames, that were handled.
    pub requests: u64,
    /// Bytes that went to the guest.
    pub bytes_in: u64,
    /// Bytes that came from the guest.
    pub bytes_out: u64,
    /// Frames that were dropped, requests that failed.
    pub dropped: u64,
}

/// What the worker does next for a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// Nothing until a kick or the back end says so.
    Wait,
    /// Call again: work is left.
    Again,
}

/// The queues of an active device, and how it tells the driver.
pub(crate) struct Queues {
    pub(crate) list: Vec<Option<VirtQueue>>,
    shared: Arc<Shared>,
    /// How many wait for the engine: with one, stop between two requests.
    hold: Arc<AtomicUsize>,
    /// Those that have work left which no kick will tell of: a bit for each.
    again: u64,
}

impl Queues {
    pub(crate) fn new(count: usize, shared: Arc<Shared>, hold: Arc<AtomicUsize>) -> Self {
        Self {
            list: (0..count).map(|_| None).collect(),
            shared,
            hold,
            again: 0,
        }
    }

    /// Interrupts, status and configuration.
    pub(crate) fn shared(&self) -> Arc<Shared> {
        Arc::clone(&self.shared)
    }

    /// Handles the chains of a queue, each to its end: `handle` returns the
    /// number of bytes that it wrote into the chain. At most one queue full
    /// at a time, so that nobody waits for the engine longer than that.
    pub(crate) fn serve(
        &mut self,
        index: usize,
        mut handle: impl FnMut(&mut VirtQueue, &mut Chain) -> Result<Served, Stop>,
    ) -> Result<Next, Stop> {
        let stop = |error| Stop::Queue {
            queue: index,
            error,
        };
        let Some(queue) = self.list.get_mut(index).and_then(Option::as_mut) else {
            return Ok(Next::Wait);
        };
        let mut budget = queue.size();
        let mut next = Next::Again;
        queue.disable_kicks().map_err(stop)?;
        while budget > 0 && self.hold.load(Ordering::Relaxed) == 0 {
            budget -= 1;
            let Some(mut chain) = queue.pop().map_err(stop)? else {
                if queue.enable_kicks().map_err(stop)? {
                    continue;
                }
                next = Next::Wait;
                break;
            };
            match handle(queue, &mut chain)? {
                Served::Done(len) => queue.push_used(chain.head, len).map_err(stop)?,
                Served::All | Served::UnderWay => {}
                Served::Later => {
                    queue.unpop();
                    next = Next::Wait;
                    break;
                }
            }
        }
        self.tell(index)?;
        Ok(next)
    }

    /// Gives a chain of a queue back that was under way, as `handle` says: its
    /// head, and how many bytes were written into it.
    pub(crate) fn give_back(
        &mut self,
        index: usize,
        handle: impl FnOnce(&mut VirtQueue) -> Result<(u16, u32), QueueError>,
    ) -> Result<(), Stop> {
        let Some(queue) = self.list.get_mut(index).and_then(Option::as_mut) else {
            return Ok(());
        };
        let stop = |error| Stop::Queue {
            queue: index,
            error,
        };
        let (head, len) = handle(queue).map_err(stop)?;
        queue.push_used(head, len).map_err(stop)
    }

    /// Tells the driver of what was given back in a queue, if it wants to know.
    pub(crate) fn tell(&mut self, index: usize) -> Result<(), Stop> {
        let Some(queue) = self.list.get_mut(index).and_then(Option::as_mut) else {
            return Ok(());
        };
        let wanted = queue.wants_interrupt().map_err(|error| Stop::Queue {
            queue: index,
            error,
        })?;
        if wanted {
            self.shared.queue_interrupt(index);
        }
        Ok(())
    }

    /// Has the worker look at a queue again.
    pub(crate) fn look_again(&mut self, index: usize) {
        self.again |= 1 << index;
    }

    /// Those that are to be looked at again, each told once.
    pub(crate) fn take_again(&mut self) -> impl Iterator<Item = usize> + use<> {
        let again = std::mem::take(&mut self.again);
        (0..u64::BITS as usize).filter(move |index| again >> index & 1 != 0)
    }
}

/// What became of a chain.
pub(crate) enum Served {
    /// Handled; so many bytes were written into it.
    Done(u32),
    /// Handled, and given back already, with others that it took.
    All,
    /// Begun; it is given back when it has ended.
    UnderWay,
    /// Not now: it stays in the ring.
    Later,
}

/// A kind of device, driven by its worker.
pub(crate) trait Device: Send {
    /// Feature bits beside those of the ring.
    fn features(&self) -> u64;
    /// Number of queues.
    fn queues(&self) -> usize;
    /// The device configuration.
    fn config(&self) -> Vec<u8>;
    /// The driver may write into the configuration.
    fn config_is_writable(&self) -> bool {
        false
    }
    /// It wrote there, `at` bytes from its beginning.
    fn config_written(&mut self, _at: usize, _data: &[u8]) {}
    /// The balloon, if it is one.
    fn balloon(&mut self) -> Option<&mut Balloon> {
        None
    }
    /// The driver is ready and accepted `features`.
    fn activate(&mut self, _features: u64) {}
    /// The driver reset the device: it is not active any more, and of what is
    /// under way no queue hears.
    fn reset(&mut self) {}
    /// The device stopped: of what is under way no queue hears.
    fn forget(&mut self) {}
    /// Requests that were begun and have not ended, those of before a reset
    /// among them. While there are any, the back end is listened to.
    fn under_way(&self) -> usize {
        0
    }
    /// The worker ends: waits for what is under way, of which no queue hears.
    fn end(&mut self) {}
    /// A queue was kicked.
    fn kicked(&mut self, queue: usize, queues: &mut Queues) -> Result<Next, Stop>;
    /// What to wait on for input, now.
    fn backend(&self) -> Option<RawFd> {
        None
    }
    /// The back end has input.
    fn backend_ready(&mut self, _queues: &mut Queues) -> Result<Next, Stop> {
        Ok(Next::Wait)
    }
    /// What must be flushed before the host may go away.
    fn disk(&self) -> Option<Arc<BlockBackend>> {
        None
    }
    /// The device goes on after a pause.
    fn resumed(&mut self) {}
    /// Tells the network where the guest is. True if the configuration
    /// changed.
    fn announce(&mut self) -> io::Result<bool> {
        Ok(false)
    }
    /// When the first frame left after start or resume.
    fn first_tx(&self) -> Option<Stamp> {
        None
    }
    fn counters(&self) -> Counters;
    /// Only while the device is paused. Fails where the back end cannot say
    /// what it is.
    fn save(&self) -> io::Result<DeviceV2>;
}
