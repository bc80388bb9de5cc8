//! Entropy source (virtio 1.2, 5.4) on the host's random number generator.

use std::io;

use hebe_state::v1::devices::RngV1;
use hebe_state::v2::devices::DeviceV2;
use rustix::rand::{GetRandomFlags, getrandom};

use super::device::{Counters, Device, Next, Queues, Served, Stop};
use super::queue::{Chain, QueueError, VirtQueue};

/// Bytes drawn at a time.
const CHUNK: usize = 4096;
/// Most bytes given to one request; a device may give less than asked.
const REQUEST_MAX: usize = 64 << 10;
const QUEUE: usize = 0;

#[derive(Default)]
pub(crate) struct Rng {
    counters: Counters,
}

impl Rng {
    fn serve(&mut self, queue: &VirtQueue, chain: &Chain) -> Result<u32, Stop> {
        if chain.readable().remaining() != 0 {
            return Err(Stop::Request {
                queue: QUEUE,
                reason: "a request for entropy has a readable segment",
            });
        }
        let mut to = chain.writable();
        let mut chunk = [0; CHUNK];
        let mut given = 0;
        while given < REQUEST_MAX {
            let drawn = match getrandom(&mut chunk[..], GetRandomFlags::empty()) {
                Ok(drawn) => drawn,
                Err(rustix::io::Errno::INTR) => continue,
                Err(_) => break,
            };
            let written = to.write(queue.ram(), &chunk[..drawn]);
            let written = written.map_err(|error: QueueError| Stop::Queue {
                queue: QUEUE,
                error,
            })?;
            given += written;
            if written < drawn {
                break;
            }
        }
        self.counters.requests += 1;
        self.counters.bytes_in += given as u64;
        Ok(given as u32)
    }
}

impl Device for Rng {
    fn features(&self) -> u64 {
        0
    }

    fn queues(&self) -> usize {
        1
    }

    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    fn kicked(&mut self, index: usize, queues: &mut Queues) -> Result<Next, Stop> {
        queues.serve(index, |queue, chain| {
            self.serve(queue, chain).map(Served::Done)
        })
    }

    fn counters(&self) -> Counters {
        self.counters
    }

    fn save(&self) -> io::Result<DeviceV2> {
        Ok(DeviceV2::Rng(RngV1 {}))
    }
}
