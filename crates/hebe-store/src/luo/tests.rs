//! Over the tests' own kernel: everything that a live update can do to a VM.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Mutex;

use hebe_sys::luo::fake::{FakeDevice, FakeKernel, Fault};
use hebe_sys::luo::{Incoming, Orchestrator, Outgoing, SessionName};
use hebe_types::{GRANULE, VmId};
use proptest::prelude::*;

use super::*;
use crate::{ExecStatus, Segment, SegmentSpec};

/// Three parts: 16, 16 and 8 MiB.
const MEMORY: ByteSize = ByteSize::mib(40);
const PART: u64 = 16 << 20;
const STATE: &[u8] = b"registers and all that";

fn vm_name(slot: u32) -> VmName {
    format!("vm{slot}").parse().expect("name")
}

fn files(slot: u32) -> SegmentFiles {
    SegmentFiles::create(VmId([slot as u8 + 1; 16]), &vm_name(slot), MEMORY).expect("files")
}

fn copies(files: &SegmentFiles) -> Vec<OwnedFd> {
    files
        .fds()
        .map(|fd| fd.try_clone_to_owned().expect("dup"))
        .collect()
}

/// Writes where the VM's RAM is, as its guest would.
fn write(files: &SegmentFiles, offset: u64, byte: u8) {
    let part = &files.parts()[(offset / PART) as usize];
    rustix::io::pwrite(part, &[byte; 4096], offset % PART).expect("write");
}

fn read(files: &SegmentFiles, offset: u64) -> u8 {
    let part = &files.parts()[(offset / PART) as usize];
    let mut page = [0xff; 4096];
    rustix::io::pread(part, &mut page, offset % PART).expect("read");
    assert!(page.iter().all(|b| *b == page[0]), "torn");
    page[0]
}

fn freeze(files: &SegmentFiles) {
    let segment = Segment::map_files(copies(files), files.spec()).expect("map");
    segment.exec().mark_running([7; 16], 1).expect("running");
    segment.exec().commit_frozen(STATE).expect("frozen");
}

/// A VM whose first and last part hold something.
fn used(slot: u32) -> SegmentFiles {
    let files = files(slot);
    write(&files, 0x3000, slot as u8 + 10);
    write(&files, 2 * PART + 4096, slot as u8 + 20);
    freeze(&files);
    files
}

fn plan(files: &SegmentFiles, policy: HolePolicy) -> Plan {
    Plan::new(&files.measure().expect("measure"), policy)
}

/// Sessions, held until the jump.
type Sent = (CarriedHost, Vec<CarriedVm>);

/// Prepares everything, or fails with the first reason.
fn send(device: &FakeDevice, all: &[SegmentFiles]) -> Result<Sent, CarryError> {
    let carrier = Carrier::new(device, "7.3.4-old")?;
    let mut host = carrier.host(all.len() as u32)?;
    let mut vms = Vec::new();
    for (slot, files) in (0..).zip(all) {
        vms.push(carrier.vm(slot, files, &plan(files, HolePolicy::Trim))?);
    }
    for vm in &mut vms {
        host.enter(vm)?;
        vm.complete()?;
    }
    host.write_report(b"timeline")?;
    Ok((host, vms))
}

/// A machine that has left for its next kernel with so many VMs.
fn jumped(vms: u32, before: impl FnOnce(&FakeKernel)) -> FakeKernel {
    let kernel = FakeKernel::default();
    let device = kernel.open().expect("old");
    let all: Vec<SegmentFiles> = (0..vms).map(used).collect();
    let sent = send(&device, &all).expect("sent");
    before(&kernel);
    kernel.kexec();
    drop((sent, device, all));
    kernel
}

fn receive(kernel: &FakeKernel) -> (Option<ArrivedHost>, BTreeMap<u32, Arrival>) {
    let device = kernel.open().expect("new");
    let host = super::host(&device).unwrap_or(None);
    let all = Mutex::new(BTreeMap::new());
    arrive(&device, host.as_ref(), 3, &|arrival| {
        let before = all.lock().expect("lock").insert(arrival.slot, arrival);
        assert!(before.is_none(), "each once");
    });
    (host, all.into_inner().expect("lock"))
}

/// A kernel whose answer about one session nobody thought of.
struct Odd<'a>(&'a dyn Orchestrator);

impl Orchestrator for Odd<'_> {
    fn create_session(&self, name: &SessionName) -> Result<Box<dyn Outgoing>, LuoError> {
        self.0.create_session(name)
    }
    fn retrieve_session(&self, name: &SessionName) -> Result<Box<dyn Incoming>, LuoError> {
        assert_ne!(*name, vm_session(1), "told to");
        self.0.retrieve_session(name)
    }
}

#[test]
fn a_vm_whose_retrieval_panics_is_told_of_and_the_others_arrive() {
    let kernel = jumped(3, |_| ());
    let device = kernel.open().expect("new");
    let host = super::host(&device).expect("io").expect("a list");
    let all = Mutex::new(BTreeMap::new());
    arrive(&Odd(&device), Some(&host), 2, &|arrival| {
        all.lock().expect("lock").insert(arrival.slot, arrival);
    });
    let all = all.into_inner().expect("lock");
    assert_whole(0, &all[&0]);
    assert_whole(2, &all[&2]);
    assert_eq!(all[&1].name, Some(vm_name(1)));
    assert!(reason(&all[&1]).contains("ended early"), "{:?}", all[&1]);
}

fn assert_whole(slot: u32, arrival: &Arrival) {
    assert_eq!(arrival.name, Some(vm_name(slot)));
    let vm = arrival.outcome.as_ref().expect("arrived");
    assert!(matches!(vm.status, ExecStatus::Frozen { .. }));
    assert_eq!(read(&vm.files, 0x3000), slot as u8 + 10);
    assert_eq!(read(&vm.files, 2 * PART + 4096), slot as u8 + 20);
    assert_eq!(read(&vm.files, PART), 0);
    let segment = Segment::map_files(copies(&vm.files), vm.files.spec()).expect("map");
    assert_eq!(segment.exec().load().expect("state"), STATE);
}

fn reason(arrival: &Arrival) -> String {
    let lost = arrival.outcome.as_ref().expect_err("lost");
    lost.reason.to_string()
}

#[test]
fn vms_arrive_with_their_memory_and_state() {
    let kernel = jumped(3, |kernel| {
        assert_eq!(kernel.outgoing(), (4, 1 + 3 * 4));
        assert_eq!(kernel.tokens("hebe.vm.001"), [0, 1, 2, 4]);
    });
    let (host, vms) = receive(&kernel);
    let host = host.expect("host");
    assert_eq!(host.report.as_deref(), Some(&b"timeline"[..]));
    assert_eq!(host.kernel, "7.3.4-old");
    assert_eq!(host.expected().count(), 3);
    assert_eq!(vms.len(), 3);
    for (slot, arrival) in &vms {
        assert_whole(*slot, arrival);
    }
}

#[test]
fn what_arrived_can_be_sent_on() {
    let kernel = jumped(2, |_| {});
    for _ in 0..2 {
        let (_, vms) = receive(&kernel);
        let whole = |a: Arrival| a.outcome.expect("arrived").files;
        let all: Vec<SegmentFiles> = vms.into_values().map(whole).collect();
        let device = kernel.open().expect("device");
        let sent = send(&device, &all).expect("sent on");
        kernel.kexec();
        drop((sent, device, all));
    }
    let (_, vms) = receive(&kernel);
    for (slot, arrival) in &vms {
        assert_whole(*slot, arrival);
    }
}

#[test]
fn measured_before_it_is_filled() {
    let files = used(0);
    let uses = files.measure().expect("measure");
    let allocated: Vec<u64> = uses.iter().map(|u| u.allocated).collect();
    // A kernel with huge pages for shared memory gives more than was written.
    assert!(allocated[0] > 0 && allocated[1] == 0 && allocated[2] > 0);
    let trim = Plan::new(&uses, HolePolicy::Trim);
    assert_eq!(trim.parts, [true, false, true]);
    assert_eq!(trim.left_out, ByteSize(PART));
    assert_eq!(
        trim.fill.bytes() + allocated.iter().sum::<u64>(),
        PART + PART / 2
    );
    let kernel = FakeKernel::default();
    let device = kernel.open().expect("device");
    let carrier = Carrier::new(&device, "k").expect("carrier");
    let vm = carrier.vm(0, &files, &trim).expect("preserved");
    let after = files.measure().expect("measure");
    assert_eq!(after[0].holes(), 0, "the kernel fills what it preserves");
    assert_eq!(after[1].allocated, 0, "and nothing else");
    drop(vm);
    assert_eq!(plan(&files, HolePolicy::Fill).fill, ByteSize(PART));
}

#[test]
fn a_part_that_was_empty_and_is_no_more_is_preserved_late() {
    let kernel = FakeKernel::default();
    let device = kernel.open().expect("device");
    let files = used(0);
    let carrier = Carrier::new(&device, "k").expect("carrier");
    let mut host = carrier.host(1).expect("host");
    let mut vm = carrier
        .vm(0, &files, &plan(&files, HolePolicy::Trim))
        .expect("preserved");
    host.enter(&vm).expect("entered");
    assert_eq!(vm.left_out(), 1);
    write(&files, PART + 8192, 99);
    let late = vm.complete().expect("completed");
    assert_eq!(late.parts, 1);
    assert!(late.filled.bytes() < PART);
    assert_eq!(vm.complete().expect("again"), Late::default());
    kernel.kexec();
    drop((vm, host, files, device));
    let (_, vms) = receive(&kernel);
    let vm = vms[&0].outcome.as_ref().expect("arrived");
    assert_eq!(read(&vm.files, PART + 8192), 99);
}

#[test]
fn whatever_cannot_be_preserved_leaves_nothing_behind() {
    let all = [used(0), used(1)];
    let mut faults = vec![
        Fault::Create("hebe.host".into()),
        Fault::Create("hebe.vm.001".into()),
        Fault::Preserve("hebe.host".into(), 0),
    ];
    faults.extend([0, 1, 2, 4].map(|token| Fault::Preserve("hebe.vm.001".into(), token)));
    for fault in faults {
        let kernel = FakeKernel::default();
        let device = kernel.open().expect("device");
        kernel.arm(fault.clone(), libc::ENOMEM);
        let refused = send(&device, &all).map(drop).expect_err("refused");
        assert!(
            refused.to_string().contains("memory"),
            "{fault:?}: {refused}"
        );
        assert_eq!(kernel.outgoing(), (0, 0), "{fault:?}");
        kernel.disarm();
        send(&device, &all).expect("and then it works");
        assert_eq!(read(&all[1], 0x3000), 11, "and the VM's memory is its own");
    }
}

#[test]
fn a_late_part_that_cannot_be_preserved_is_an_error() {
    let kernel = FakeKernel::default();
    let device = kernel.open().expect("device");
    let files = used(0);
    let carrier = Carrier::new(&device, "k").expect("carrier");
    let plan = plan(&files, HolePolicy::Trim);
    let mut vm = carrier.vm(0, &files, &plan).expect("preserved");
    write(&files, PART, 1);
    kernel.arm(Fault::Preserve("hebe.vm.000".into(), 3), libc::ENOMEM);
    assert!(matches!(
        vm.complete(),
        Err(CarryError::Piece {
            piece: Piece::Part(1),
            ..
        })
    ));
    // It is not forgotten: the next try takes it, or fails again.
    assert_eq!(vm.left_out(), 1);
    assert!(vm.complete().is_err());
    kernel.disarm();
    assert_eq!(vm.complete().expect("at last").parts, 1);
    assert_eq!(vm.left_out(), 0);
}

#[test]
fn a_token_that_fails_costs_its_vm_alone() {
    for token in [0, 1, 2, 4] {
        let kernel = jumped(3, |_| {});
        kernel.arm(Fault::Retrieve("hebe.vm.001".into(), token), libc::EIO);
        let (_, vms) = receive(&kernel);
        assert_whole(0, &vms[&0]);
        assert_whole(2, &vms[&2]);
        assert_eq!(vms[&1].name, Some(vm_name(1)), "named by the list");
        assert!(reason(&vms[&1]).contains(&format!("token {token}")));
    }
}

#[test]
fn a_lost_vm_stays_until_it_is_given_up() {
    let kernel = jumped(1, |_| {});
    kernel.arm(Fault::Retrieve("hebe.vm.000".into(), 4), libc::EIO);
    let (_, vms) = receive(&kernel);
    let device = kernel.open().expect("device");
    let again = || device.retrieve_session(&vm_session(0)).map(drop);
    use hebe_sys::luo::Orchestrator;
    assert!(matches!(again(), Err(LuoError::SessionTaken(_))));
    drop(vms);
    assert!(matches!(again(), Err(LuoError::NoSession(_))));
}

#[test]
fn a_session_that_does_not_arrive_is_missed_by_name() {
    let kernel = jumped(2, |kernel| {
        kernel.arm(Fault::Vanish("hebe.vm.000".into()), 1);
    });
    let (_, vms) = receive(&kernel);
    assert_eq!(vms[&0].name, Some(vm_name(0)));
    assert!(reason(&vms[&0]).contains("no session 'hebe.vm.000'"));
    assert_whole(1, &vms[&1]);
}

#[test]
fn without_the_list_vms_are_found_by_slot() {
    let lost: [fn(&FakeKernel); 3] = [
        |kernel| kernel.arm(Fault::Vanish("hebe.host".into()), 1),
        |kernel| kernel.arm(Fault::Retrieve("hebe.host".into(), 0), libc::EIO),
        |_| {},
    ];
    for (way, before) in lost.into_iter().enumerate() {
        let kernel = jumped(2, before);
        if way == 2 {
            kernel.scribble("hebe.host", 0, 40, &[0xff; 8192]);
        }
        let (host, vms) = receive(&kernel);
        assert!(host.is_none());
        assert_eq!(vms.len(), 2, "way {way}");
        for (slot, arrival) in &vms {
            assert_whole(*slot, arrival);
        }
    }
}

#[test]
fn a_record_of_the_list_that_is_damaged_costs_nothing() {
    let kernel = jumped(2, |_| {});
    kernel.scribble("hebe.host", 0, GRANULE, &[0xff; 8192]);
    let (host, vms) = receive(&kernel);
    let names: Vec<_> = host.as_ref().expect("host").expected().collect();
    assert!(matches!(names[0], (0, Err(_))), "{names:?}");
    assert!(matches!(names[1], (1, Ok(spec)) if spec.name == vm_name(1)));
    for (slot, arrival) in &vms {
        assert_whole(*slot, arrival);
    }
}

#[test]
fn a_session_that_cannot_be_finished_is_kept_and_its_vm_runs() {
    let kernel = jumped(1, |_| {});
    kernel.arm(Fault::Finish("hebe.vm.000".into()), libc::EBUSY);
    let (_, vms) = receive(&kernel);
    assert_whole(0, &vms[&0]);
}

#[test]
fn files_of_a_wrong_length_are_refused() {
    for (token, len, word) in [
        (0, 4096, "length"),
        (1, GRANULE * 2, "length"),
        (2, PART * 2, "length"),
        (4, PART, "length"),
        (4, 4096, "granules"),
    ] {
        let kernel = jumped(2, |_| {});
        let other = file::make("other", len).expect("file");
        kernel.replace("hebe.vm.000", token, other);
        let (_, vms) = receive(&kernel);
        assert!(
            reason(&vms[&0]).contains(word),
            "{token}: {}",
            reason(&vms[&0])
        );
        assert_whole(1, &vms[&1]);
    }
}

#[test]
fn an_area_of_another_vm_is_damaged_and_not_resumed() {
    let kernel = jumped(1, |_| {});
    let stranger = used(5);
    let area = copies(&stranger).remove(0);
    kernel.replace("hebe.vm.000", 1, area);
    let (_, vms) = receive(&kernel);
    let vm = vms[&0].outcome.as_ref().expect("all files are there");
    assert!(matches!(vm.status, ExecStatus::Damaged { .. }));
}

#[test]
fn a_vm_that_was_running_at_the_jump_is_not_frozen() {
    let kernel = FakeKernel::default();
    let device = kernel.open().expect("device");
    let files = used(0);
    let segment = Segment::map_files(copies(&files), files.spec()).expect("map");
    segment.exec().mark_running([7; 16], 1).expect("running");
    let sent = send(&device, std::slice::from_ref(&files)).expect("sent");
    kernel.kexec();
    drop((sent, device, files, segment));
    let (_, vms) = receive(&kernel);
    let vm = vms[&0].outcome.as_ref().expect("all files are there");
    assert!(matches!(vm.status, ExecStatus::Running { .. }));
    assert_eq!(vm.info().exec, vm.status);
}

#[test]
fn limits_are_kept() {
    let kernel = FakeKernel::default();
    let device = kernel.open().expect("device");
    let carrier = Carrier::new(&device, "k").expect("carrier");
    assert!(matches!(
        carrier.host(VMS_MAX + 1),
        Err(CarryError::TooMany)
    ));
    let mut host = carrier.host(1).expect("host");
    let files = files(0);
    let plan = plan(&files, HolePolicy::Trim);
    assert!(matches!(
        carrier.vm(VMS_MAX, &files, &plan),
        Err(CarryError::TooMany)
    ));
    let vm = carrier.vm(1, &files, &plan).expect("preserved");
    assert!(host.enter(&vm).is_err(), "beyond the head's table");
    let long = vec![0; crate::REPORT_LEN_MAX + 1];
    assert!(host.write_report(&long).is_err());
}

#[test]
fn files_of_another_vm_are_refused() {
    let files = files(0);
    let spec = files.spec().clone();
    let refused = |spec: &SegmentSpec, fds: Vec<OwnedFd>| {
        SegmentFiles::from_fds(spec.clone(), fds).expect_err("refused");
    };
    SegmentFiles::from_fds(spec.clone(), copies(&files)).expect("the very files");
    refused(&spec, Vec::new());
    refused(&spec, copies(&files).drain(..1).collect());
    refused(&spec, copies(&files).drain(..3).collect());
    let mut swapped = copies(&files);
    swapped.swap(0, 1);
    refused(&spec, swapped);
    let mut more = copies(&files);
    more.push(file::make("more", GRANULE).expect("file"));
    refused(&spec, more);
    let mut other = spec.clone();
    other.ram[0].place.offset += GRANULE;
    refused(&other, copies(&files));
}

#[test]
fn one_holder_and_one_address_space() {
    let files = used(0);
    let segment = Segment::map_files(copies(&files), files.spec()).expect("map");
    assert!(matches!(
        Segment::map_files(copies(&files), files.spec()),
        Err(StoreError::Held(_))
    ));
    assert_eq!(segment.files().len(), 4);
    let ram = &segment.ram()[0];
    assert_eq!(ram.len, MEMORY.bytes());
    // SAFETY: inside the mapped range, which `segment` keeps.
    let byte = unsafe { ram.host.as_ptr().add((2 * PART + 4096) as usize).read() };
    assert_eq!(byte, 20);
    let fds = segment
        .files()
        .iter()
        .map(|fd| fd.as_fd().try_clone_to_owned());
    let fds = fds.collect::<Result<Vec<_>, _>>().expect("dup");
    drop(segment);
    let back = SegmentFiles::from_fds(files.spec().clone(), fds).expect("handed back");
    Segment::map_files(back.into_fds(), files.spec()).expect("the next holder");
}

#[test]
fn a_limit_is_said_with_the_way_out() {
    let empty = PartUse {
        len: 3 << 30,
        allocated: 0,
    };
    let all = Plan::new(&[empty], HolePolicy::Fill);
    all.within(ByteSize::gib(3), &vm_name(0))
        .expect("as much as allowed");
    let refused = all.within(ByteSize::gib(1), &vm_name(0)).expect_err("more");
    assert!(refused.to_string().contains("would fill 3GiB"));
    let none = Plan::new(&[empty], HolePolicy::Trim);
    none.within(ByteSize(0), &vm_name(0))
        .expect("nothing is filled");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    /// Whatever stands in a manifest: the VM arrives as it was sent, or not at
    /// all, and nobody else notices.
    #[test]
    fn a_scribbled_manifest_never_changes_a_vm(
        offset in 0u64..0x4000,
        bytes in proptest::collection::vec(any::<u8>(), 1..32),
        both in any::<bool>(),
    ) {
        let kernel = jumped(2, |_| {});
        let fits = bytes.len().min((0x4000 - offset) as usize);
        kernel.scribble("hebe.vm.000", 0, offset, &bytes[..fits]);
        if both {
            // The same change in the other copy.
            let other = offset ^ 0x1000;
            let fits = bytes.len().min((0x4000 - other) as usize);
            kernel.scribble("hebe.vm.000", 0, other, &bytes[..fits]);
        }
        let (_, vms) = receive(&kernel);
        assert_whole(1, &vms[&1]);
        if vms[&0].outcome.is_ok() {
            assert_whole(0, &vms[&0]);
        } else {
            prop_assert_eq!(&vms[&0].name, &Some(vm_name(0)));
        }
    }

    /// Any set of faults: a VM without one arrives whole, a VM with one is lost.
    #[test]
    fn faults_cost_what_they_hit(
        hit in proptest::collection::btree_set((0u32..4, prop::sample::select(vec![0u64, 1, 2, 4])), 0..5),
        vanish in proptest::collection::btree_set(0u32..4, 0..3),
    ) {
        let kernel = jumped(4, |kernel| {
            for slot in &vanish {
                kernel.arm(Fault::Vanish(format!("hebe.vm.{slot:03}")), 1);
            }
        });
        for (slot, token) in &hit {
            kernel.arm(Fault::Retrieve(format!("hebe.vm.{slot:03}"), *token), libc::EIO);
        }
        let (_, vms) = receive(&kernel);
        for slot in 0..4 {
            let ill = vanish.contains(&slot) || hit.iter().any(|(s, _)| *s == slot);
            if ill {
                prop_assert!(vms[&slot].outcome.is_err());
                prop_assert_eq!(&vms[&slot].name, &Some(vm_name(slot)));
            } else {
                assert_whole(slot, &vms[&slot]);
            }
        }
    }
}
