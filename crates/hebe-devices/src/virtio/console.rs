//! Console with one port (virtio 1.2, 5.3) on a [`ConsoleHub`]. Output never
//! waits for a reader: the hub is bounded and drops the slow.

use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;

use hebe_state::v1::devices::ConsoleV1;
use hebe_state::v2::devices::DeviceV2;

use super::device::{Counters, Device, Next, Queues, Served, Stop};
use super::queue::{Chain, QueueError, VirtQueue};
use crate::ConsoleHub;

const RX: usize = 0;
const TX: usize = 1;
/// Bytes copied at a time.
const CHUNK: usize = 4096;
/// Most bytes of one output request.
const OUTPUT_MAX: u64 = 1 << 20;

pub(crate) struct Console {
    hub: Arc<ConsoleHub>,
    takes_input: bool,
    /// The receive queue had a buffer when it was last looked at.
    has_room: bool,
    counters: Counters,
}

impl Console {
    pub(crate) fn new(hub: Arc<ConsoleHub>, takes_input: bool) -> Self {
        Self {
            hub,
            takes_input,
            has_room: false,
            counters: Counters::default(),
        }
    }

    pub(crate) fn restore(_state: &ConsoleV1, hub: Arc<ConsoleHub>, takes_input: bool) -> Self {
        Self::new(hub, takes_input)
    }

    fn output(&mut self, queue: &VirtQueue, chain: &Chain) -> Result<u32, Stop> {
        let mut from = chain.readable();
        if chain.writable().remaining() != 0 || from.remaining() > OUTPUT_MAX {
            return Err(Stop::Request {
                queue: TX,
                reason: "console output is writable or longer than 1 MiB",
            });
        }
        let mut chunk = [0; CHUNK];
        self.counters.requests += 1;
        loop {
            let got = from.read(queue.ram(), &mut chunk);
            let got = got.map_err(|error: QueueError| Stop::Queue { queue: TX, error })?;
            if got == 0 {
                return Ok(0);
            }
            self.counters.bytes_out += got as u64;
            self.hub.write_output(&chunk[..got]);
        }
    }

    fn input(&mut self, queues: &mut Queues) -> Result<Next, Stop> {
        if !self.takes_input {
            return Ok(Next::Wait);
        }
        self.hub.clear_input_event();
        let (hub, counters, mut starved) = (&self.hub, &mut self.counters, false);
        let next = queues.serve(RX, |queue, chain| {
            if chain.readable().remaining() != 0 {
                return Err(Stop::Request {
                    queue: RX,
                    reason: "an input buffer has a readable segment",
                });
            }
            let mut to = chain.writable();
            let mut chunk = [0; CHUNK];
            let want = to.remaining().min(CHUNK as u64) as usize;
            let got = hub.take_input(&mut chunk[..want]);
            if got == 0 {
                starved = true;
                return Ok(Served::Later);
            }
            let written = to.write(queue.ram(), &chunk[..got]);
            written.map_err(|error| Stop::Queue { queue: RX, error })?;
            counters.bytes_in += got as u64;
            Ok(Served::Done(got as u32))
        })?;
        // With a buffer left the hub's event brings us back; without one the
        // driver's kick does.
        self.has_room = starved || next == Next::Again;
        Ok(next)
    }
}

impl Device for Console {
    fn features(&self) -> u64 {
        0
    }

    fn queues(&self) -> usize {
        2
    }

    /// `struct virtio_console_config`: no size, one port.
    fn config(&self) -> Vec<u8> {
        vec![0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]
    }

    fn reset(&mut self) {
        self.has_room = false;
    }

    fn kicked(&mut self, index: usize, queues: &mut Queues) -> Result<Next, Stop> {
        match index {
            RX => self.input(queues),
            _ => queues.serve(TX, |queue, chain| {
                self.output(queue, chain).map(Served::Done)
            }),
        }
    }

    fn backend(&self) -> Option<RawFd> {
        (self.takes_input && self.has_room).then(|| self.hub.input_fd())
    }

    fn backend_ready(&mut self, queues: &mut Queues) -> Result<Next, Stop> {
        self.input(queues)
    }

    fn counters(&self) -> Counters {
        self.counters
    }

    fn save(&self) -> io::Result<DeviceV2> {
        Ok(DeviceV2::Console(ConsoleV1 {}))
    }
}
