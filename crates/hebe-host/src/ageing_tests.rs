use std::time::Duration;

use super::*;
use crate::host::{Host, Layout};

fn sample(up_s: f64) -> Sample {
    let mut readings = [None; Indicator::ALL.len()];
    readings[0] = Some(Reading {
        value: up_s * 2.0,
        limit: 0.0,
    });
    Sample {
        boot: [7; 16],
        up_s,
        at_s: 1e9 + up_s,
        readings,
    }
}

fn filled(slots: u32, samples: u32) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().expect("dir");
    let path = path_below(dir.path());
    let mut store = SampleStore::open(&path, slots).expect("store");
    for i in 1..=samples {
        store.append(&sample(f64::from(i))).expect("append");
    }
    (dir, path)
}

fn times(path: &Path) -> Vec<f64> {
    let samples = read(path).expect("read");
    samples.iter().map(|s| s.up_s).collect()
}

#[test]
fn the_newest_samples_are_kept_over_restarts_and_the_file_stays_small() {
    let (_dir, path) = filled(4, 3);
    assert_eq!(times(&path), [1.0, 2.0, 3.0]);
    let mut store = SampleStore::open(&path, 4).expect("again");
    for i in 4..=10 {
        store.append(&sample(f64::from(i))).expect("append");
    }
    assert_eq!(times(&path), [7.0, 8.0, 9.0, 10.0]);
    assert_eq!(read(&path).expect("read")[3], sample(10.0));
    let len = fs::metadata(&path).expect("meta").len();
    assert_eq!(len, (HEADER_LEN + 4 * SLOT_LEN) as u64);
}

#[test]
fn there_is_one_owner_and_any_number_of_readers() {
    let (_dir, path) = filled(4, 2);
    let held = SampleStore::open(&path, 4).expect("first");
    let error = SampleStore::open(&path, 4).expect_err("second");
    assert!(matches!(error, AgeingError::Owned(_)), "{error}");
    assert_eq!(times(&path), [1.0, 2.0]);
    drop(held);
    SampleStore::open(&path, 4).expect("after it");
}

/// Every cut of a write: the sample that is replaced is there or not, the new
/// one is there or not, and all others are.
#[test]
fn a_stop_in_the_midst_of_a_write_costs_no_other_sample() {
    let (_dir, path) = filled(4, 6);
    let before = fs::read(&path).expect("bytes");
    let slot = encode(7, &sample(7.0));
    let at = slot_at(7, 4) as usize;
    for cut in 0..=SLOT_LEN {
        let mut bytes = before.clone();
        bytes[at..at + cut].copy_from_slice(&slot[..cut]);
        fs::write(&path, &bytes).expect("write");
        let found = times(&path);
        let others = found.iter().filter(|t| [4.0, 5.0, 6.0].contains(t));
        assert_eq!(others.count(), 3, "cut at {cut}");
        assert!(found.iter().all(|t| [3.0, 4.0, 5.0, 6.0, 7.0].contains(t)));
        let mut store = SampleStore::open(&path, 4).expect("opens");
        store.append(&sample(8.0)).expect("goes on");
        assert_eq!(times(&path).last(), Some(&8.0), "cut at {cut}");
    }
}

#[test]
fn a_foreign_file_is_refused_and_stays_as_it_is() {
    let (_dir, path) = filled(4, 2);
    let good = fs::read(&path).expect("bytes");
    let mut newer = good.clone();
    newer[8] = 2;
    for bytes in [&b""[..], b"text", &newer, &good[..12]] {
        fs::write(&path, bytes).expect("write");
        let error = SampleStore::open(&path, 4)
            .expect_err("damaged")
            .to_string();
        assert!(error.contains("move it away"), "{error}");
        assert!(read(&path).is_err());
        assert_eq!(fs::read(&path).expect("bytes"), bytes);
    }
}

#[test]
fn a_proc_is_read_as_it_is_and_a_strange_one_tells_nothing() {
    let dir = tempfile::tempdir().expect("dir");
    let put = |file: &str, text: &str| {
        let path = dir.path().join(file);
        fs::create_dir_all(path.parent().expect("parent")).expect("dir");
        fs::write(path, text).expect("write");
    };
    let nothing = |vmms: &[_]| sensors::readings(dir.path(), &dir.path().join("none"), vmms);
    assert_eq!(nothing(&[]), [None; Indicator::ALL.len()]);
    put(
        "meminfo",
        "MemTotal:  1000 kB\nMemAvailable:  600 kB\nSUnreclaim:  50 kB\nSwapTotal:  80 kB\nSwapFree:  30 kB\n",
    );
    put(
        "buddyinfo",
        "Node 0, zone   Normal  512 0 0 0 0 0 0 0 0 1 1\n",
    );
    put("sys/fs/file-nr", "571\t0\t2465610\n");
    put("loadavg", "0.1 0.2 0.3 2/345 6789\n");
    put("sys/kernel/threads-max", "10000\n");
    for (pid, name, kib) in [
        ("10", "hebe-vmm", 30),
        ("11", "hebe-vmm", 50),
        ("12", "sh", 9),
        ("13", "hebed", 70),
    ] {
        put(&format!("{pid}/comm"), &format!("{name}\n"));
        put(&format!("{pid}/status"), &format!("RssAnon:\t {kib} kB\n"));
    }
    let vmm = |ms, disk_request_ns| sensors::Answered {
        took: Duration::from_millis(ms),
        disk_request_ns,
    };
    let vmms = [vmm(1, Some(4_000_000)), vmm(3, None)];
    let reading = |value: f64, limit: f64| Some(Reading { value, limit });
    let k = 1024.0;
    assert_eq!(
        nothing(&vmms),
        [
            reading(600.0 * k, 0.0),
            reading(50.0 * k, 1000.0 * k),
            reading(0.25, 1.0),
            reading(571.0, 2_465_610.0),
            reading(345.0, 10_000.0),
            reading(50.0 * k, 80.0 * k),
            reading(40.0 * k, 500.0 * k),
            reading(70.0 * k, 1000.0 * k),
            reading(0.002, 10.0),
            reading(0.004, 30.0),
            None,
        ]
    );
    put("meminfo", "MemTotal: lots\n");
    put("buddyinfo", "nonsense\n");
    put("loadavg", "1\n");
    assert_eq!(nothing(&[]).iter().flatten().count(), 1);
}

#[test]
fn what_suspends_leave_in_the_state_directory_is_counted_without_the_samples() {
    let dir = tempfile::tempdir().expect("dir");
    let state_files = || {
        let all = sensors::readings(Path::new("/nonexistent"), dir.path(), &[]);
        all.last().copied().flatten().expect("told")
    };
    assert_eq!(state_files().value, 0.0);
    let put = |file: &str, len: usize| {
        let path = dir.path().join(file);
        fs::create_dir_all(path.parent().expect("parent")).expect("dir");
        fs::write(path, vec![1; len]).expect("write");
    };
    put("saved/web.hebe", 300_000);
    put("notes/web", 10);
    put("ageing/samples", 2_000_000);
    std::os::unix::fs::symlink("/", dir.path().join("elsewhere")).expect("link");
    let found = state_files();
    assert!((300_000.0..400_000.0).contains(&found.value), "{found:?}");
    assert!(found.limit > found.value, "{found:?}");
}

/// A sampler of another release may know fewer indicators, or more.
#[test]
fn samples_of_another_release_are_read_as_far_as_they_go() {
    let mut slot = encode(1, &sample(1.0));
    slot[40..44].copy_from_slice(&7u32.to_le_bytes());
    let sum = crc32fast::hash(&slot[..SUM_AT]);
    slot[SUM_AT..].copy_from_slice(&sum.to_le_bytes());
    let (_, read) = decode(&slot).expect("read");
    assert_eq!(read, sample(1.0));
    slot[40..44].copy_from_slice(&12u32.to_le_bytes());
    let sum = crc32fast::hash(&slot[..SUM_AT]);
    slot[SUM_AT..].copy_from_slice(&sum.to_le_bytes());
    assert!(decode(&slot).is_some());
}

#[test]
fn this_host_can_be_sampled() {
    let dir = tempfile::tempdir().expect("dir");
    let mut host = Host::here();
    host.layout = Layout::below(dir.path());
    fs::create_dir_all(&host.layout.state).expect("dir");
    let one = sensors::sample(&host).expect("sample");
    assert!(one.up_s > 0.0 && one.at_s > 1e9);
    assert!(one.readings[0].is_some_and(|r| r.value > 0.0));
    assert!(one.readings[10].is_some_and(|r| r.limit > 0.0));
}
