//! SIGKILL at random instants: a child process runs, freezes, creates and
//! drops; whatever instant it dies at, what it leaves is whole.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use hebe_store::{Access, ExecStatus, FormatOptions, Segment, SegmentEntry, Store};
use hebe_types::{ByteSize, GRANULE, VmId, VmName};

const CHILD: &str = "HEBE_STORE_KILLED_CHILD";
const ROUNDS: u32 = 40;
const SIZE: ByteSize = ByteSize(2 * GRANULE);

fn name(text: &str) -> VmName {
    text.parse().expect("name")
}

fn state(n: u64) -> Vec<u8> {
    let mut out = n.to_le_bytes().to_vec();
    out.resize(4096 + (n % 4096) as usize, n as u8);
    out
}

/// The child's life: RAM holds the number of the last change, and so does
/// every state committed after it. Runs only as the other test's child.
#[test]
fn child() {
    let Ok(path) = std::env::var(CHILD) else {
        return;
    };
    let path = Path::new(&path);
    let mut store = Store::open(path, Access::Manage).expect("open");
    let mut kept = None;
    for entry in store.segments().expect("segments") {
        match entry {
            SegmentEntry::Valid(info) if info.spec.name == name("kept") => kept = Some(info.spec),
            SegmentEntry::Valid(info) => store
                .drop_segment(info.spec.id, Some(info.spec.vm))
                .expect("left over"),
            damaged => panic!("{damaged:?}"),
        }
    }
    let spec = kept.expect("the VM that is never dropped");
    let fd = store.device_fd().try_clone_to_owned().expect("dup");
    let segment = Segment::map(fd, &spec).expect("map");
    let ram = segment.ram()[0].host.cast::<u64>();
    loop {
        segment.exec().mark_running([1; 16], 7).expect("running");
        // SAFETY: the first word of the mapping; this process is its owner.
        let n = unsafe {
            let n = ram.read_volatile() + 1;
            ram.write_volatile(n);
            n
        };
        segment.exec().commit_frozen(&state(n)).expect("frozen");
        if n % 16 == 0 {
            let passing = store.create(VmId([2; 16]), &name("passing"), SIZE);
            let passing = passing.expect("create");
            store
                .drop_segment(passing.id, Some(passing.vm))
                .expect("drop");
        }
    }
}

#[test]
fn whatever_a_killed_process_leaves_is_whole() {
    let dir = tempfile::tempdir().expect("dir");
    let path = dir.path().join("store");
    let file = File::create_new(&path).expect("file");
    file.set_len(13 * GRANULE).expect("length");
    Store::format(&path, FormatOptions::default()).expect("format");
    let mut store = Store::open(&path, Access::Manage).expect("open");
    let spec = store
        .create(VmId([1; 16]), &name("kept"), SIZE)
        .expect("create");
    drop(store);
    let ram_word = || {
        let mut word = [0; 8];
        file.read_exact_at(&mut word, spec.ram[0].place.offset)
            .expect("read");
        u64::from_le_bytes(word)
    };
    let (mut frozen, mut last) = (0, 0);
    for round in 0..ROUNDS {
        let mut child = Command::new(std::env::current_exe().expect("this test"))
            .args(["--exact", "child", "--nocapture"])
            .env(CHILD, &path)
            .stdout(Stdio::null())
            .spawn()
            .expect("spawn");
        // Once it is at work, a moment more.
        let deadline = Instant::now() + Duration::from_secs(180);
        while ram_word() == last && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
        std::thread::sleep(Duration::from_micros(u64::from(round) * 7_919 % 20_000));
        child.kill().expect("kill");
        let ended = child.wait().expect("wait");
        assert_eq!(ended.code(), None, "it ended by itself: {ended}");

        let store = Store::open(&path, Access::Manage).expect("open");
        let entries = store.segments().expect("segments");
        for entry in &entries {
            let SegmentEntry::Valid(info) = entry else {
                panic!("round {round}: {entry:?}");
            };
            let status = &info.exec;
            assert!(!matches!(status, ExecStatus::Damaged { .. }), "{status:?}");
        }
        let fd = store.device_fd().try_clone_to_owned().expect("dup");
        let segment = Segment::map(fd, &spec).expect("map");
        last = ram_word();
        if let ExecStatus::Frozen { .. } = segment.exec().status() {
            frozen += 1;
            let loaded = segment.exec().load().expect("load");
            assert!(loaded == state(last), "round {round}: state and RAM differ");
        }
    }
    println!("{ROUNDS} kills, {frozen} found frozen, {last} changes");
    assert!(last >= u64::from(ROUNDS), "the child hardly ran: {last}");
}
