//! The balloon's back end, and orders that concern it.

use std::io;
use std::sync::Arc;

use hebe_api::{BalloonStatus, GuestMemory, VmmState};
use hebe_devices::{BalloonFigures, Reclaim};
use hebe_store::Segment;
use hebe_types::{ByteSize, Gpa};

use crate::vm::{Vm, VmError};

/// What the queues of a balloon count in.
const PAGE: u64 = 4096;

/// Gives the memory of a VM's segment back, as far as that can be done.
pub(crate) struct Giver(pub(crate) Arc<Segment>);

impl Reclaim for Giver {
    fn give_back(&self, addr: u64, len: u64) -> io::Result<u64> {
        self.0.give_back(Gpa(addr), len)
    }
}

impl Vm {
    /// Sets the balloon, so that the guest is left with `target` of RAM, asks
    /// the guest how it is, and says how the balloon stands.
    pub(crate) fn balloon(&mut self, target: Option<ByteSize>) -> Result<BalloonStatus, VmError> {
        let device = self.devices.iter().find(|d| d.balloon().is_some());
        let device = device.ok_or(VmError::NoBalloon)?;
        let runs = self.state == VmmState::Running;
        if let Some(target) = target {
            let memory = self.identity.config.memory;
            if target > memory {
                return Err(VmError::BalloonTarget { target, memory });
            }
            // A state that is committed, or in a file, would not know of it.
            if !runs {
                return Err(VmError::NotNow {
                    state: self.state,
                    wanted: "given another balloon",
                });
            }
            let pages = (memory.bytes() - target.bytes()) / PAGE;
            device.set_balloon(u32::try_from(pages).unwrap_or(u32::MAX));
        }
        if runs {
            device.ask_statistics();
        }
        self.balloon_status().ok_or(VmError::NoBalloon)
    }

    /// The balloon as it is, if there is one. Asks nothing of the guest.
    pub(crate) fn balloon_status(&self) -> Option<BalloonStatus> {
        let figures = self.devices.iter().find_map(|d| d.balloon())?;
        let memory = self.identity.config.memory;
        Some(status(&figures, memory, &self.segment))
    }
}

fn status(figures: &BalloonFigures, memory: ByteSize, segment: &Segment) -> BalloonStatus {
    let without = |pages: u32| ByteSize(memory.bytes().saturating_sub(u64::from(pages) * PAGE));
    BalloonStatus {
        memory,
        target: without(figures.wanted_pages),
        actual: without(figures.actual_pages),
        active: figures.active,
        reporting: figures.reporting,
        gives_back: segment.gives_back().is_some(),
        inflated: ByteSize(figures.inflated),
        reported: ByteSize(figures.reported),
        kept: ByteSize(figures.kept),
        resident: segment.resident(),
        answers: figures.answers,
        guest: guest_memory(&figures.statistics),
    }
}

/// By the numbers of the standard (virtio 1.2, 5.5.6.3), and Linux's beyond.
fn guest_memory(statistics: &[Option<u64>]) -> GuestMemory {
    let number = |tag: usize| statistics.get(tag).copied().flatten();
    GuestMemory {
        swapped_in: number(0),
        swapped_out: number(1),
        major_faults: number(2),
        minor_faults: number(3),
        free: number(4),
        total: number(5),
        available: number(6),
        caches: number(7),
        oom_kills: number(10),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use hebe_state::{SectionKind, StateReader};

    use super::*;
    use crate::guest;
    use crate::testing::running;

    #[test]
    fn a_balloon_is_set_while_its_vm_runs_and_known_after_a_resume() {
        if guest::cannot_run() {
            return;
        }
        let dir = tempfile::tempdir().expect("dir");
        let (events, _inbox) = mpsc::channel();
        let (mut vm, segment) = running(dir.path(), "[balloon]\n", &events).expect("vm");
        let status = vm.balloon(Some(ByteSize::mib(6))).expect("set");
        assert_eq!(status.target, ByteSize::mib(6));
        assert_eq!(status.actual, ByteSize::mib(8), "this guest has no driver");
        assert!(!status.active && status.gives_back);
        assert!(status.resident.is_some_and(|r| r > ByteSize(0)));
        let refused = vm.balloon(Some(ByteSize::mib(9))).expect_err("too much");
        assert!(refused.to_string().contains("8MiB"), "{refused}");
        vm.freeze().expect("freeze");
        assert!(vm.balloon(Some(ByteSize::mib(7))).is_err());
        assert_eq!(vm.balloon(None).expect("status").target, ByteSize::mib(6));
        let id = vm.status().id;
        assert!(vm.status().balloon.is_some());
        drop(vm);
        let state = segment.exec().load().expect("state");
        let reader = StateReader::parse(&state).expect("parse");
        assert_eq!(reader.instances(SectionKind::Virtio), [1, 2, 29]);
        let run_dir = dir.path().to_owned();
        let mut vm = Vm::resume(id, run_dir, segment, &state, &events).expect("resumed");
        vm.start().expect("it runs");
        assert_eq!(vm.balloon(None).expect("status").target, ByteSize::mib(6));
    }

    #[test]
    fn a_vm_without_a_balloon_says_so() {
        if guest::cannot_run() {
            return;
        }
        let dir = tempfile::tempdir().expect("dir");
        let (events, _inbox) = mpsc::channel();
        let (mut vm, _segment) = running(dir.path(), "", &events).expect("vm");
        assert!(vm.status().balloon.is_none());
        let refused = vm.balloon(None).expect_err("none").to_string();
        assert!(refused.contains("[balloon]"), "{refused}");
    }
}
