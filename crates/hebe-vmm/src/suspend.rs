//! On-memory suspend, its undoing, and saving to a file.
//!
//! The phases of a freeze, in order; whatever fails before the commit lets
//! the VM run again:
//!
//! 1. presync: disks are flushed while the guest still runs, and a freeze that
//!    could not be resumed with them is refused;
//! 2. stop the vCPUs, each with its last I/O instruction completed;
//! 3. drain the devices, all of them side by side, and make their disks durable;
//! 4. save registers, controllers, clocks and devices into one buffer;
//! 5. commit the buffer into the segment, data first, then the flag.
//!
//! Once the devices are drained, guest RAM is neither read nor written:
//! the meter that devices keep is read before and after, and the report
//! carries the difference.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use hebe_api::{Deadline, FreezeReport, RamMeter, SaveReport, VmmState};
use hebe_devices::VirtioPci;
use hebe_snapshot::RamView;
use hebe_state::StateWriter;
use hebe_state::v1::machine::VmV1;
use hebe_sys::clock::stamp_now;
use hebe_types::Stamp;

use crate::parts;
use crate::vm::{Vm, VmError};

impl Vm {
    /// Stops vCPUs and devices; nothing is committed.
    pub fn pause(&mut self) -> Result<(), VmError> {
        self.expect_state(VmmState::Running, "paused")?;
        self.stop().map(drop)
    }

    /// Lets a paused or saved VM run again.
    pub fn unpause(&mut self) -> Result<(), VmError> {
        if self.quitting {
            return Err(VmError::Quitting);
        }
        self.expect_whole()?;
        if !matches!(self.state, VmmState::Paused | VmmState::Saved) {
            return Err(VmError::NotNow {
                state: self.state,
                wanted: "unpaused",
            });
        }
        self.release();
        Ok(())
    }

    /// On-memory suspend: afterwards the segment holds everything, and
    /// this process may end.
    pub fn freeze(&mut self) -> Result<FreezeReport, VmError> {
        self.freeze_until(None)
    }

    /// [`Vm::freeze`], for a client that waits `until` then: if disks held the
    /// freeze up for longer than that, the VM runs on. A client that goes away
    /// later than the last look, during the commit, leaves a frozen VM. That
    /// is safe: it is listed as frozen, and is thawed or resumed by order.
    pub fn freeze_until(&mut self, until: Option<Deadline>) -> Result<FreezeReport, VmError> {
        self.expect_state(self.suspended_from(), "frozen")?;
        let asked = stamp_now();
        self.presync()?;
        let (vcpus_stopped, devices_drained) = self.stop()?;
        let before = self.meter();
        match self.commit(until) {
            Ok((saved, state_bytes)) => {
                let committed = stamp_now();
                self.state = VmmState::Frozen;
                let ram_touched = difference(self.meter(), before);
                Ok(FreezeReport {
                    asked,
                    vcpus_stopped,
                    devices_drained,
                    saved,
                    committed,
                    state_bytes,
                    ram_touched,
                })
            }
            Err(error) => {
                self.release();
                Err(error)
            }
        }
    }

    /// Undoes a freeze: the committed state is withdrawn before anything runs.
    pub fn thaw(&mut self) -> Result<(), VmError> {
        self.expect_state(VmmState::Frozen, "thawed")?;
        self.start()
    }

    /// Writes RAM and state into `file`, which messages call `name`; the VM
    /// stays stopped. For a client that waits `until` then: if writing took
    /// longer than that, the file loses its contents and the VM runs on.
    pub fn save_until(
        &mut self,
        file: &File,
        name: &Path,
        until: Option<Deadline>,
    ) -> Result<SaveReport, VmError> {
        self.expect_state(self.suspended_from(), "saved")?;
        let asked = stamp_now();
        self.presync()?;
        let (vcpus_stopped, _) = self.stop()?;
        let written = self.write_file(file, name).and_then(|bytes| {
            in_time(until).inspect_err(|_| {
                // Nobody takes it for a saved VM: it has its name from whoever
                // asked, and does not get the one that would make it that.
                let _ = file.set_len(0);
            })?;
            Ok(bytes)
        });
        match written {
            Ok(bytes_written) => {
                self.state = VmmState::Saved;
                Ok(SaveReport {
                    asked,
                    vcpus_stopped,
                    durable: stamp_now(),
                    bytes_written,
                })
            }
            Err(error) => {
                self.release();
                Err(error)
            }
        }
    }

    fn suspended_from(&self) -> VmmState {
        if self.stands_by {
            VmmState::Paused
        } else {
            VmmState::Running
        }
    }

    fn expect_whole(&self) -> Result<(), VmError> {
        match &self.failed {
            Some(why) => Err(VmError::Broken(why.clone())),
            None => Ok(()),
        }
    }

    fn expect_state(&self, expected: VmmState, wanted: &'static str) -> Result<(), VmError> {
        self.expect_whole()?;
        if self.state != expected {
            return Err(VmError::NotNow {
                state: self.state,
                wanted,
            });
        }
        if self.quitting {
            return Err(VmError::Quitting);
        }
        if self.board.is_ending() {
            return Err(VmError::Ending);
        }
        Ok(())
    }

    fn presync(&self) -> Result<(), VmError> {
        for device in &self.devices {
            device.presync()?;
        }
        Ok(())
    }

    /// vCPUs, then devices: a stopped vCPU rings no doorbell. On failure all
    /// run again.
    fn stop(&mut self) -> Result<(Stamp, Stamp), VmError> {
        let stopped = self.vcpus.pause().map_err(VmError::from);
        let vcpus_stopped = stamp_now();
        let result = stopped.and_then(|()| {
            if self.board.is_ending() {
                return Err(VmError::Ending);
            }
            // They drain, and make disks durable, side by side.
            self.devices.iter().for_each(|device| device.ask_to_pause());
            let pause = |result: Result<(), VmError>, device: &Arc<VirtioPci>| {
                result.and(device.pause().map_err(VmError::from))
            };
            self.devices.iter().fold(Ok(()), pause)?;
            if let Some(serial) = &self.board.serial {
                serial.pause();
            }
            Ok(())
        });
        if let Err(error) = result {
            self.release();
            return Err(error);
        }
        self.state = VmmState::Paused;
        Ok((vcpus_stopped, stamp_now()))
    }

    /// Builds and commits the state; returns when it was built, and its length.
    fn commit(&self, until: Option<Deadline>) -> Result<(Stamp, u64), VmError> {
        let state = self.build_state()?;
        let saved = stamp_now();
        in_time(until)?;
        self.segment.exec().commit_frozen(&state)?;
        Ok((saved, state.len() as u64))
    }

    fn build_state(&self) -> Result<Vec<u8>, VmError> {
        let vcpus = self.vcpus.save()?;
        let now = stamp_now();
        let tsc_khz = vcpus.first().map_or(0, |v| v.tsc_khz);
        let clock = self.machine.save_clock(now.realtime_ns, now.tsc, tsc_khz)?;
        let mut writer = StateWriter::new();
        writer.add(0, &self.describe()?);
        for (index, vcpu) in (0..).zip(&vcpus) {
            writer.add(index, vcpu);
        }
        writer.add(0, &self.machine.save_irqchip()?);
        writer.add(0, &clock);
        writer.add(0, &self.board.acpi.save());
        writer.add(0, &self.board.pci.save());
        if let Some(serial) = &self.board.serial {
            writer.add(0, &serial.save());
        }
        if let Some(pvpanic) = &self.board.pvpanic {
            writer.add(0, &pvpanic.save());
        }
        if let Some(rtc) = &self.board.rtc {
            writer.add(0, &rtc.save());
        }
        if self.identity.config.generation_id {
            writer.add(0, &self.held.generation.save()?);
        }
        for device in &self.devices {
            writer.add(u32::from(device.slot()), &device.save()?);
        }
        Ok(writer.finish())
    }

    fn describe(&self) -> Result<VmV1, VmError> {
        let config_toml =
            toml::to_string(&self.identity.config).map_err(|e| VmError::Mismatch(e.to_string()))?;
        Ok(VmV1 {
            id: self.identity.id.0,
            config_toml,
            resumes: self.resumes,
            release: env!("CARGO_PKG_VERSION").to_owned(),
            host_kernel: rustix::system::uname()
                .release()
                .to_string_lossy()
                .into_owned(),
        })
    }

    fn write_file(&self, file: &File, name: &Path) -> Result<u64, VmError> {
        let state = self.build_state()?;
        // What the guest gave back is not read: that would take memory for it.
        let used = |gpa, len| self.segment.used_run(gpa, len);
        let views = self.segment.ram().iter().map(parts::ram_view);
        let views: Vec<RamView> = views.map(|view| view.with_holes(&used)).collect();
        Ok(hebe_snapshot::save_into(file, name, &state, &views)?.bytes_written)
    }
}

fn in_time(until: Option<Deadline>) -> Result<(), VmError> {
    match until {
        Some(until) if until.has_passed() => Err(VmError::Expired),
        _ => Ok(()),
    }
}

fn difference(after: RamMeter, before: RamMeter) -> RamMeter {
    RamMeter {
        ring_bytes: after.ring_bytes - before.ring_bytes,
        data_bytes: after.data_bytes - before.data_bytes,
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::net::UnixStream;
    use std::sync::mpsc;
    use std::time::Duration;

    use hebe_block::BlockBackend;
    use hebe_devices::DeviceError;
    use hebe_state::{SectionKind, StateReader};
    use hebe_store::{ExecStatus, Segment};
    use hebe_types::DiskConfig;

    use super::*;
    use crate::guest;
    use crate::held::{GivenNets, Held};
    use crate::parts::Disks;
    use crate::testing::{self, running};
    use crate::vm::{Found, Origin};

    #[test]
    fn a_suspend_that_outlasts_its_client_lets_the_vm_run_on() {
        if guest::cannot_run() {
            return;
        }
        let dir = tempfile::tempdir().expect("dir");
        let (events, _inbox) = mpsc::channel();
        let (mut vm, segment) = running(dir.path(), "", &events).expect("vm");
        let late = Some(Deadline::after(Duration::ZERO));
        let path = dir.path().join("web.part");
        let file = File::create(&path).expect("a file");
        let is_late = |result| matches!(result, Err(VmError::Expired));
        assert!(is_late(vm.freeze_until(late).map(drop)));
        assert!(is_late(vm.save_until(&file, &path, late).map(drop)));
        assert_eq!(file.metadata().expect("metadata").len(), 0);
        assert_eq!(vm.state(), VmmState::Running);
        let status = segment.exec().status();
        assert!(matches!(status, ExecStatus::Running { .. }), "{status:?}");
        let in_time = Some(Deadline::after(Duration::from_secs(600)));
        vm.freeze_until(in_time).expect("in time");
        let status = segment.exec().status();
        assert!(matches!(status, ExecStatus::Frozen { .. }), "{status:?}");
    }

    #[test]
    fn saving_takes_no_memory_for_what_the_guest_does_not_use() {
        if guest::cannot_run() {
            return;
        }
        let dir = tempfile::tempdir().expect("dir");
        let (events, _inbox) = mpsc::channel();
        let (mut vm, segment) = running(dir.path(), "", &events).expect("vm");
        vm.pause().expect("pause");
        let used = segment.resident().expect("files of its own");
        assert!(used < hebe_types::ByteSize::mib(8), "{used}");
        vm.unpause().expect("unpause");
        let path = dir.path().join("web.part");
        let file = File::create(&path).expect("a file");
        vm.save_until(&file, &path, None).expect("saved");
        assert_eq!(segment.resident(), Some(used));
    }

    #[test]
    fn a_vm_is_resumed_without_its_kernel_and_a_boot_says_what_it_lacks() {
        if guest::cannot_run() {
            return;
        }
        let dir = tempfile::tempdir().expect("dir");
        let (events, _inbox) = mpsc::channel();
        let (mut vm, segment) = running(dir.path(), "", &events).expect("vm");
        vm.freeze().expect("freeze");
        let state = segment.exec().load().expect("state");
        let id = vm.status().id;
        drop(vm);
        fs::remove_file(dir.path().join("kernel")).expect("remove");
        let run_dir = dir.path().to_owned();
        let mut vm = Vm::resume(id, run_dir, segment, &state, &events).expect("resumed");
        vm.start().expect("it runs");
        let held = vm.held.clone();
        let (identity, segment) = vm.dismantle();
        let refused = Vm::boot_with(held, identity, segment, &events).err();
        let refused = refused.expect("no kernel").to_string();
        assert!(
            refused.contains("kernel") && refused.contains("resumed"),
            "{refused}"
        );
    }

    #[test]
    fn a_disk_that_grew_under_its_vm_is_resumed_with_the_size_that_the_guest_knows() {
        if guest::cannot_run() {
            return;
        }
        let dir = tempfile::tempdir().expect("dir");
        let disk = dir.path().join("disk.img");
        fs::write(&disk, vec![0; 1 << 20]).expect("disk");
        let more = format!("[[disk]]\npath = '{}'\n", disk.display());
        let (events, _inbox) = mpsc::channel();
        let (mut vm, segment) = running(dir.path(), &more, &events).expect("vm");
        let id = vm.status().id;
        for len in [2 << 20, 3 << 20] {
            let file = fs::File::options().write(true).open(&disk).expect("open");
            file.set_len(len).expect("grow");
            vm.freeze().expect("freeze");
            drop(vm);
            let state = segment.exec().load().expect("state");
            let (run_dir, segment) = (dir.path().to_owned(), segment.clone());
            vm = Vm::resume(id, run_dir, segment, &state, &events).expect("as it was left");
            vm.start().expect("it runs");
        }
        // Where the disk is not found again, the VM is not frozen.
        fs::rename(&disk, dir.path().join("moved")).expect("rename");
        let refused = vm.freeze().expect_err("certain to be lost").to_string();
        assert!(
            refused.contains("disk.img") && refused.contains("renamed"),
            "{refused}"
        );
        assert_eq!(vm.state(), VmmState::Running);
    }

    #[test]
    fn a_vm_has_sockets_only_if_asked_and_they_are_there_again_after_a_resume() {
        if guest::cannot_run() {
            return;
        }
        for (more, slots) in [("", vec![1, 2]), ("[vsock]\n", vec![1, 2, 28])] {
            let dir = tempfile::tempdir().expect("dir");
            let socket = dir.path().join("vsock.sock");
            let (events, _inbox) = mpsc::channel();
            let (mut vm, segment) = running(dir.path(), more, &events).expect("vm");
            let reached = |socket: &Path| UnixStream::connect(socket).is_ok();
            assert_eq!(reached(&socket), slots.len() == 3);
            vm.freeze().expect("freeze");
            let id = vm.status().id;
            drop(vm);
            assert!(!reached(&socket), "its VMM ended");
            let state = segment.exec().load().expect("state");
            let reader = StateReader::parse(&state).expect("parse");
            assert_eq!(reader.instances(SectionKind::Virtio), slots);
            let run_dir = dir.path().to_owned();
            let mut vm = Vm::resume(id, run_dir, segment, &state, &events).expect("resumed");
            vm.start().expect("it runs");
            assert_eq!(reached(&socket), slots.len() == 3);
        }
    }

    /// Writes 1 to port 0x505, and halts.
    const PANICS: &[u8] = &[0x66, 0xba, 0x05, 0x05, 0xb0, 0x01, 0xee, 0xf4, 0xeb, 0xfd];

    #[test]
    fn a_panic_is_told_and_known_after_a_resume_and_only_where_it_is_asked_for() {
        if guest::cannot_run() {
            return;
        }
        for (more, told) in [("", false), ("pvpanic = true\n", true)] {
            let dir = tempfile::tempdir().expect("dir");
            let (events, _inbox) = mpsc::channel();
            let running = testing::running_code(PANICS, dir.path(), more, &events);
            let (mut vm, segment) = running.expect("vm");
            let until = std::time::Instant::now() + Duration::from_secs(120);
            while vm.status().guest_panicked != told {
                assert!(std::time::Instant::now() < until, "nothing is told");
                std::thread::sleep(Duration::from_millis(5));
            }
            vm.freeze().expect("freeze");
            let id = vm.status().id;
            drop(vm);
            let state = segment.exec().load().expect("state");
            let reader = StateReader::parse(&state).expect("parse");
            let sections = reader.instances(SectionKind::Pvpanic).len();
            assert_eq!(sections, usize::from(told));
            let run_dir = dir.path().to_owned();
            let vm = Vm::resume(id, run_dir, segment, &state, &events).expect("resumed");
            assert_eq!(vm.status().guest_panicked, told);
            // A guest that boots again has not panicked.
            let held = vm.held.clone();
            let (mut identity, segment) = vm.dismantle();
            identity.config.cmdline = "again".into();
            let vm = Vm::boot_with(held, identity, segment, &events).expect("booted");
            assert!(!vm.status().guest_panicked);
        }
    }

    /// Loads a code segment whose L bit is set, in 32-bit mode, where that bit
    /// means nothing (and that of 32 bits is clear), tells that it did by port
    /// 0x505, and halts: `ljmp 0x10, 1f; 1: mov dx, 0x505; mov al, 1; out dx, al;
    /// 2: hlt; data32 jmp 2b`.
    const LOADS_A_LONG_SEGMENT: &[u8] = &[
        0xea, 0x07, 0, 0x10, 0, 0x10, 0, 0xba, 0x05, 0x05, 0xb0, 0x01, 0xee, 0xf4, 0x66, 0xeb, 0xfc,
    ];

    #[test]
    fn a_guest_with_a_segment_that_kvm_does_not_take_back_is_resumed() {
        if guest::cannot_run() {
            return;
        }
        let dir = tempfile::tempdir().expect("dir");
        let (events, _inbox) = mpsc::channel();
        let (code, more) = (LOADS_A_LONG_SEGMENT, "pvpanic = true\n");
        let (mut vm, segment) = testing::running_code(code, dir.path(), more, &events).expect("vm");
        let until = std::time::Instant::now() + Duration::from_secs(120);
        while !vm.status().guest_panicked {
            assert!(std::time::Instant::now() < until, "nothing is told");
            std::thread::sleep(Duration::from_millis(5));
        }
        vm.freeze().expect("freeze");
        let id = vm.status().id;
        drop(vm);
        let state = segment.exec().load().expect("state");
        let run_dir = dir.path().to_owned();
        let mut vm = Vm::resume(id, run_dir, segment, &state, &events).expect("resumed");
        vm.start().expect("it runs");
    }

    /// Reads register 9 of the clock, the year, into EAX over and over: what
    /// it read last is in AL. `mov al, 9; out 0x70, al; in al, 0x71; jmp`.
    const READS_THE_YEAR: &[u8] = &[0xb0, 0x09, 0xe6, 0x70, 0xe4, 0x71, 0xeb, 0xf8];

    #[test]
    fn a_clock_is_there_only_where_it_is_asked_for_and_goes_on_after_a_resume() {
        if guest::cannot_run() {
            return;
        }
        for (more, clocks) in [("", 0), ("rtc = true\n", 1)] {
            let dir = tempfile::tempdir().expect("dir");
            let (events, _inbox) = mpsc::channel();
            let running = testing::running_code(READS_THE_YEAR, dir.path(), more, &events);
            let (mut vm, segment) = running.expect("vm");
            assert_eq!(usize::from(vm.board.rtc.is_some()), clocks);
            vm.freeze().expect("freeze");
            let id = vm.status().id;
            drop(vm);
            let state = segment.exec().load().expect("state");
            let reader = StateReader::parse(&state).expect("parse");
            assert_eq!(reader.instances(SectionKind::Rtc).len(), clocks);
            let run_dir = dir.path().to_owned();
            let mut vm = Vm::resume(id, run_dir, segment, &state, &events).expect("resumed");
            assert_eq!(usize::from(vm.board.rtc.is_some()), clocks);
            vm.start().expect("it runs");
        }
    }

    /// The VM generation ID that the guest finds.
    fn generation(segment: &Segment) -> [u8; 16] {
        let low = segment.ram().iter().find(|m| m.gpa.0 == 0).expect("RAM");
        let mut id = [0; 16];
        // SAFETY: guest RAM reaches beyond 1 MiB, and the VM, which halts,
        // does not write there.
        unsafe {
            let at = low
                .host
                .as_ptr()
                .add(hebe_boot::layout::GENERATION_ID as usize);
            at.copy_to_nonoverlapping(id.as_mut_ptr(), 16);
        }
        id
    }

    #[test]
    fn a_generation_changes_only_where_the_state_may_have_a_copy() {
        if guest::cannot_run() {
            return;
        }
        let dir = tempfile::tempdir().expect("dir");
        let (events, _inbox) = mpsc::channel();
        let (mut vm, segment) = running(dir.path(), "generation_id = true\n", &events).expect("vm");
        let first = generation(&segment);
        assert_ne!(first, [0; 16]);
        let id = vm.status().id;
        let mut known = first;
        for copied in [false, false, true, false, true] {
            vm.freeze().expect("freeze");
            drop(vm);
            let state = segment.exec().load().expect("state");
            let run_dir = dir.path().to_owned();
            let found = Found::read(id, run_dir, &segment, &state).expect("found");
            let held =
                Arc::new(Held::open_to_resume(&found.identity, GivenNets::new()).expect("held"));
            let origin = Origin {
                disks: Disks::Same,
                copied,
            };
            let resumed = Vm::resume_found(origin, found, held, segment.clone(), &events);
            vm = resumed.expect("resumed");
            let now = generation(&segment);
            assert_eq!(now != known, copied, "memory keeps it, a copy does not");
            let told = vm.board.acpi.save().pending_events;
            let event = hebe_boot::layout::EVENT_GENERATION;
            // This guest fetches no event: what was told once stays.
            assert!(!copied || told & event != 0);
            known = now;
            vm.start().expect("it runs");
        }
        assert_ne!(known, first);
        // A reset is the same guest.
        let held = vm.held.clone();
        let (identity, segment) = vm.dismantle();
        let _vm = Vm::boot_with(held, identity, segment.clone(), &events).expect("booted");
        assert_eq!(generation(&segment), known);
    }

    #[test]
    fn old_memory_is_not_resumed_with_a_newer_disk_unless_ordered() {
        if guest::cannot_run() {
            return;
        }
        let dir = tempfile::tempdir().expect("dir");
        let disk = dir.path().join("disk.img");
        fs::write(&disk, vec![0; 1 << 20]).expect("disk");
        let more = format!("[[disk]]\npath = '{}'\n", disk.display());
        let (events, _inbox) = mpsc::channel();
        let (mut vm, segment) = running(dir.path(), &more, &events).expect("vm");
        vm.freeze().expect("freeze");
        let state = segment.exec().load().expect("state");
        let id = vm.status().id;
        drop(vm);
        let resume = |disks| {
            let (run_dir, segment) = (dir.path().to_owned(), segment.clone());
            Vm::resume_with(disks, id, run_dir, segment, &state, &events)
        };
        drop(resume(Disks::Same).expect("the disk that it had"));
        let replace = |bytes: &[u8]| {
            let copy = dir.path().join("copy");
            fs::write(&copy, bytes).expect("copy");
            fs::rename(&copy, &disk).expect("rename");
        };
        replace(&vec![0; 1 << 20]);
        match resume(Disks::Same).err() {
            Some(VmError::Device(DeviceError::DiskChanged { path, .. })) => {
                assert_eq!(path, disk);
            }
            other => panic!("{other:?}"),
        }
        let status = segment.exec().status();
        assert!(matches!(status, ExecStatus::Frozen { .. }), "{status:?}");
        drop(resume(Disks::Any).expect("as ordered"));
        replace(&vec![0; 1 << 19]);
        let other_size = resume(Disks::Any).err().expect("refused").to_string();
        assert!(other_size.contains("sectors"), "{other_size}");
    }

    #[test]
    fn what_is_written_over_a_disk_is_the_vms_disk_over_a_suspend() {
        if guest::cannot_run() {
            return;
        }
        let dir = tempfile::tempdir().expect("dir");
        let (base, over) = (dir.path().join("base.img"), dir.path().join("over"));
        fs::write(&base, vec![7; 1 << 20]).expect("disk");
        let below = DiskConfig::raw(base.clone(), false);
        hebe_block::make_overlay(&over, &below).expect("image");
        let more = format!(
            "[[disk]]\npath = '{}'\nformat = 'qcow2'\nbacking = ['{}']\n",
            over.display(),
            base.display()
        );
        let (events, _inbox) = mpsc::channel();
        let (mut vm, segment) = running(dir.path(), &more, &events).expect("vm");
        let others = BlockBackend::open(&base, true).expect("readers share the disk");
        assert!(BlockBackend::open(&base, false).is_err(), "nobody writes");
        drop(others);
        vm.freeze().expect("freeze");
        let state = segment.exec().load().expect("state");
        let id = vm.status().id;
        drop(vm);
        let resume = || {
            let (run_dir, segment) = (dir.path().to_owned(), segment.clone());
            Vm::resume_with(Disks::Same, id, run_dir, segment, &state, &events)
        };
        drop(resume().expect("the disk that it had"));
        let changed = |what: &Path| match resume().err() {
            Some(VmError::Device(DeviceError::DiskChanged { .. })) => {}
            other => panic!("{}: {other:?}", what.display()),
        };
        let replace = |what: &Path| {
            let copy = dir.path().join("copy");
            fs::copy(what, &copy).expect("copy");
            fs::rename(what, dir.path().join("kept")).expect("keep");
            fs::rename(&copy, what).expect("another");
            changed(what);
            fs::rename(dir.path().join("kept"), what).expect("back");
            drop(resume().expect("back again"));
        };
        replace(&over);
        replace(&base);
        fs::remove_file(&over).expect("remove");
        assert!(resume().is_err(), "a disk that is missing");
        assert!(fs::read(&base).expect("disk").iter().all(|b| *b == 7));
    }
}
