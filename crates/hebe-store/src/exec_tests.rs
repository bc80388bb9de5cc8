//! The execution-state area, stopped between any two writes and damaged in
//! any bit.

use proptest::prelude::*;

use super::*;
use crate::testing::{Image, TestMedia, every_cut, whole_cuts};

const VM: VmId = VmId([0xaa; 16]);
const WHOSE: Whose = whose(VM);
const BOOT: [u8; 16] = [0xbb; 16];

const fn whose(vm: VmId) -> Whose {
    let exec = Extent {
        offset: 4 * GRANULE,
        len: GRANULE,
    };
    Whose::new(vm, [0x77; 16], exec)
}

/// An area as its VMM first sees it.
fn prepared() -> TestMedia {
    let media = TestMedia::default();
    prepare(&media, &WHOSE).expect("guard");
    media.log.borrow_mut().clear();
    media
}

/// A change of the area, as its VMM makes it.
#[derive(Clone, Debug)]
enum Step {
    Run(u32),
    Freeze(Vec<u8>),
    End,
}

fn step(media: &TestMedia, step: &Step) -> Result<(), StoreError> {
    match step {
        Step::Run(pid) => mark_running(media, &WHOSE, BOOT, *pid, u64::from(*pid)),
        Step::Freeze(state) => commit_frozen(media, &WHOSE, state, 1_000),
        Step::End => mark_empty(media, &WHOSE, 2_000),
    }
}

/// What a reader learns, without the generation.
#[derive(Clone, Debug, PartialEq)]
enum Seen {
    Empty,
    Ended,
    Running(u32),
    Frozen(Vec<u8>),
    Damaged,
}

fn look(image: &Image) -> Seen {
    let media = TestMedia::over(image);
    let loaded = load(&media, &WHOSE);
    let seen = match status(&media, &WHOSE).expect("status") {
        ExecStatus::Empty => Seen::Empty,
        ExecStatus::Ended => Seen::Ended,
        ExecStatus::Running { pid, boot_id, .. } => {
            assert_eq!(boot_id, BOOT);
            Seen::Running(pid)
        }
        ExecStatus::Frozen { len, .. } => {
            let state = loaded.as_ref().expect("status says frozen").clone();
            assert_eq!(state.len() as u64, len);
            Seen::Frozen(state)
        }
        ExecStatus::Damaged { .. } => Seen::Damaged,
    };
    assert_eq!(loaded.is_ok(), matches!(seen, Seen::Frozen(_)));
    assert!(media.log.borrow().is_empty(), "looking writes nothing");
    seen
}

fn after(steps: &[Step]) -> TestMedia {
    let media = prepared();
    for s in steps {
        step(&media, s).expect("step");
    }
    media
}

fn state(tag: u8, len: usize) -> Vec<u8> {
    (0..len).map(|i| tag ^ i as u8).collect()
}

fn life() -> Vec<Step> {
    vec![
        Step::Run(1),
        Step::Freeze(state(1, 203)),
        Step::Run(2),
        Step::Freeze(state(2, 64)),
        Step::Freeze(state(3, 1)),
        Step::Run(3),
        Step::Run(4),
        Step::Freeze(vec![]),
        Step::Run(5),
        Step::End,
        Step::Run(6),
    ]
}

#[test]
fn an_area_whose_vm_ended_is_not_one_that_never_ran() {
    assert_eq!(look(&prepared().snapshot()), Seen::Empty);
    for steps in [
        vec![Step::End],
        vec![Step::Run(1), Step::End],
        vec![Step::Run(1), Step::Freeze(state(1, 9)), Step::End],
    ] {
        assert_eq!(look(&after(&steps).snapshot()), Seen::Ended, "{steps:?}");
    }
}

#[test]
fn a_stop_at_any_write_leaves_old_or_new() {
    let media = prepared();
    for s in life() {
        let start = media.snapshot();
        let old = look(&start);
        media.log.borrow_mut().clear();
        step(&media, &s).expect("step");
        let new = look(&media.snapshot());
        assert_ne!(old, new);
        every_cut(&start, &media.log.borrow(), |image, at| {
            let seen = look(image);
            assert!(seen == old || seen == new, "{s:?} cut {at}: {seen:?}");
        });
    }
}

#[test]
fn a_stop_during_the_change_after_a_stop_leaves_one_of_them() {
    let life = life();
    for pair in life.windows(2) {
        let before = after(&[Step::Run(99), Step::Freeze(state(9, 40))]);
        let start = before.snapshot();
        let first = TestMedia::over(&start);
        step(&first, &pair[0]).expect("step");
        let log = first.log.borrow().clone();
        for cut in whole_cuts(&start, &log) {
            let old = look(&cut);
            let second = TestMedia::over(&cut);
            step(&second, &pair[1]).expect("step after a stop");
            let new = look(&second.snapshot());
            every_cut(&cut, &second.log.borrow(), |image, at| {
                let seen = look(image);
                assert!(seen == old || seen == new, "{pair:?} cut {at}: {seen:?}");
            });
        }
    }
}

/// Bytes of each header copy that mean something.
const HEADER_LEN: u64 = (mirror::COPY_HEADER_LEN + size_of::<HeaderV2>()) as u64;

#[test]
fn any_one_flipped_bit_of_the_header_loses_nothing() {
    let lives = [
        vec![Step::Run(1)],
        vec![Step::Run(1), Step::Freeze(state(1, 203))],
        vec![Step::Run(1), Step::Freeze(state(1, 203)), Step::Run(2)],
    ];
    for steps in lives {
        let image = after(&steps).snapshot();
        let truth = look(&image);
        for offset in (0..HEADER_LEN).chain(HEADER.b..HEADER.b + HEADER_LEN) {
            for bit in 0..8 {
                let mut damaged = image.clone();
                damaged.flip(offset, bit);
                assert_eq!(look(&damaged), truth, "bit {bit} of byte {offset:#x}");
            }
        }
    }
}

#[test]
fn any_flipped_bit_of_the_state_is_damage() {
    let image = after(&[Step::Freeze(state(7, 50)), Step::Freeze(state(1, 203))]).snapshot();
    for at in 0..203 {
        for bit in 0..8 {
            let mut damaged = image.clone();
            damaged.flip(slot_offset(1) + at, bit);
            assert_eq!(look(&damaged), Seen::Damaged);
        }
    }
    let mut other_slot = image.clone();
    other_slot.flip(slot_offset(0), 1);
    assert_eq!(look(&other_slot), Seen::Frozen(state(1, 203)));
}

#[test]
fn an_older_frozen_header_never_wins_over_running() {
    let frozen = after(&[Step::Run(1), Step::Freeze(state(1, 203))]).snapshot();
    let media = TestMedia::over(&frozen);
    step(&media, &Step::Run(2)).expect("run");
    let running = media.snapshot();
    for (at, other) in [(HEADER.a, HEADER.b), (HEADER.b, HEADER.a)] {
        // An old copy comes back (a stray write, a wrong restore).
        let mut stale = running.clone();
        stale.write(at, &frozen.bytes(at, 4096));
        assert!(!matches!(look(&stale), Seen::Frozen(_)), "{at:#x}");
        // A copy is wiped, and the other is damaged in any word.
        for word in 0..HEADER_LEN / 8 {
            let mut both = running.clone();
            both.write(at, &[0; 4096]);
            both.flip(other + word * 8, 3);
            let seen = look(&both);
            assert!(matches!(seen, Seen::Damaged | Seen::Empty), "{seen:?}");
        }
    }
}

#[test]
fn one_wiped_copy_is_repaired_by_the_next_change() {
    let image = after(&[Step::Run(1), Step::Freeze(state(1, 203))]).snapshot();
    for at in [HEADER.a, HEADER.b] {
        let mut damaged = image.clone();
        damaged.write(at, &[0xff; 4096]);
        let media = TestMedia::over(&damaged);
        step(&media, &Step::Run(2)).expect("run");
        let reading = mirror::read(&media, &HEADER).expect("read");
        assert!(matches!(reading, Reading::Valid { healthy: true, .. }));
    }
}

#[test]
fn what_does_not_belong_here_is_refused_and_left_alone() {
    let image = after(&[Step::Freeze(state(1, 10))]).snapshot();
    let media = TestMedia::over(&image);
    let other = whose(VmId([1; 16]));
    let said = load(&media, &other).expect_err("foreign").to_string();
    assert!(said.contains("belongs to VM aaaaaaaa-aaaa"), "{said}");
    mark_running(&media, &other, BOOT, 1, 1).expect_err("foreign");
    commit_frozen(&media, &other, b"x", 1).expect_err("foreign");
    assert_eq!(media.snapshot(), image);
    let long = commit_frozen(&media, &WHOSE, &vec![0; EXEC_STATE_LEN_MAX + 1], 1);
    assert!(matches!(long, Err(StoreError::StateTooLong { .. })));
    assert_eq!(media.snapshot(), image);
    commit_frozen(&media, &WHOSE, &vec![5; EXEC_STATE_LEN_MAX], 1).expect("the longest");
    assert_eq!(
        load(&media, &WHOSE).expect("load").len(),
        EXEC_STATE_LEN_MAX
    );
}

#[test]
fn an_overwritten_guard_is_damage_whatever_the_header_says() {
    for steps in [&life()[..1], &life()[..2], &[]] {
        let image = after(steps).snapshot();
        for (at, len) in [(0, 1), (GUARD_LEN - 1, 1), (4096, 8), (0, GUARD_LEN)] {
            let mut hurt = image.clone();
            let byte = hurt.bytes(GUARD_OFFSET + at, 1)[0] ^ 1;
            hurt.write(GUARD_OFFSET + at, &vec![byte; len as usize]);
            assert_eq!(look(&hurt), Seen::Damaged);
            let media = TestMedia::over(&hurt);
            let said = load(&media, &WHOSE).expect_err("refused").to_string();
            let place = format!("{:#x}", 5 * GRANULE - GUARD_LEN + at - at % 8);
            assert!(said.contains(&place), "{said}");
            for s in [Step::Run(9), Step::Freeze(state(9, 9))] {
                let refused = step(&media, &s);
                assert!(matches!(refused, Err(StoreError::ExecDamaged(_))));
            }
            mark_empty(&media, &WHOSE, 1).expect_err("refused");
            assert_eq!(media.snapshot(), hurt, "nothing is written");
        }
    }
}

#[test]
fn an_area_seen_at_another_place_or_of_another_store_is_damage() {
    let image = after(&life()[..2]).snapshot();
    let exec = |granule: u64| Extent {
        offset: granule * GRANULE,
        len: GRANULE,
    };
    for wrong in [
        Whose::new(VM, [0x77; 16], exec(5)),
        Whose::new(VM, [0x78; 16], exec(4)),
    ] {
        load(&TestMedia::over(&image), &wrong).expect_err("refused");
    }
}

#[test]
fn a_newer_header_is_refused_by_its_version() {
    let newer = Place {
        version: 3,
        ..HEADER
    };
    let media = prepared();
    let payload = [0; size_of::<HeaderV2>()];
    mirror::write_first(&media, &newer, &payload).expect("write");
    let said = load(&media, &WHOSE).expect_err("newer").to_string();
    assert!(said.contains("version 3"), "{said}");
    assert!(mark_running(&media, &WHOSE, BOOT, 1, 1).is_err());
}

#[test]
fn the_header_has_its_golden_bytes() {
    let media = prepared();
    commit_frozen(&media, &WHOSE, b"state", 0x0102_0304_0506_0708).expect("freeze");
    let image = media.snapshot();
    let mut golden = Vec::new();
    golden.extend_from_slice(b"HEBEEXEC");
    golden.extend_from_slice(&[2, 0, 0, 0, 64, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    golden.extend_from_slice(&[0; 4]);
    golden.extend_from_slice(&[0xe1, 0x77, 0xc1, 0x04]);
    golden.extend_from_slice(&[2, 0, 0, 0, 0, 0, 0, 0]);
    golden.extend_from_slice(&[0xaa; 16]);
    golden.extend_from_slice(&[8, 7, 6, 5, 4, 3, 2, 1]);
    golden.extend_from_slice(&[0; 20]);
    golden.extend_from_slice(&[0xfb, 0xd2, 0x93, 0xa3]);
    golden.extend_from_slice(&[5, 0, 0, 0, 0, 0, 0, 0]);
    for at in [HEADER.a, HEADER.b] {
        assert_eq!(image.bytes(at, golden.len()), golden);
    }
    assert_eq!(image.bytes(0x2000, 8), b"state\0\0\0");
    assert_eq!((slot_offset(1), GUARD_OFFSET), (0x10_0000, 0x1f_e000));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Any damage to both header copies at once, over any short life: what is
    /// read is the truth, damage, or never-written; never another state.
    #[test]
    fn damage_to_both_copies_never_brings_an_old_state_back(
        steps in proptest::collection::vec(
            prop_oneof![
                (1..100u32).prop_map(Step::Run),
                proptest::collection::vec(any::<u8>(), 0..40).prop_map(Step::Freeze),
            ],
            1..6,
        ),
        hits in proptest::collection::vec((0..HEADER_LEN, 1..=255u8, any::<bool>()), 1..6),
    ) {
        let mut image = after(&steps).snapshot();
        let truth = look(&image);
        for (offset, mask, in_b) in hits {
            let at = offset + if in_b { HEADER.b } else { HEADER.a };
            let byte = image.bytes(at, 1)[0] ^ mask;
            image.write(at, &[byte]);
        }
        let seen = look(&image);
        prop_assert!(seen == truth || matches!(seen, Seen::Damaged), "{:?} for {:?}", seen, truth);
    }

    /// Power cut on media that keep no order but at fences: any part of the
    /// words between two fences may have arrived.
    #[test]
    fn unordered_words_between_fences_leave_old_or_new(
        index in 0..9usize,
        keep in proptest::collection::vec(any::<bool>(), 256),
    ) {
        use crate::testing::Op;
        let life = life();
        let media = after(&life[..index]);
        let start = media.snapshot();
        media.log.borrow_mut().clear();
        step(&media, &life[index]).expect("step");
        let (old, new) = (look(&start), look(&media.snapshot()));
        let log = media.log.borrow();
        let mut before = start.clone();
        for group in log.split(|op| *op == Op::Fence) {
            let mut torn = before.clone();
            let mut keep = keep.iter().cycle();
            for op in group {
                if let Op::Store { offset, bytes } = op {
                    for (i, word) in bytes.chunks(8).enumerate() {
                        before.write(offset + i as u64 * 8, word);
                        if *keep.next().unwrap_or(&true) {
                            torn.write(offset + i as u64 * 8, word);
                        }
                    }
                }
            }
            let seen = look(&torn);
            prop_assert!(seen == old || seen == new, "{:?}", seen);
        }
    }
}
