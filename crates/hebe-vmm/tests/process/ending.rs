//! How a VMM ends.

use std::fs::File;
use std::io::Read;

use crate::vmm::{Vmm, fifo};

#[test]
fn the_lock_is_held_until_the_end_is_on_record() {
    let dir = tempfile::tempdir().expect("dir");
    let record = dir.path().join("exit.json.part");
    fifo(&record);
    // A definition that is refused with more words than a FIFO takes at once:
    // its writer waits in the midst of the record.
    let mut vmm = Vmm::start(dir, &"?".repeat(1 << 20), |_| Vec::new());
    let mut reader = File::open(record).expect("the record is being written");
    let mut text = vec![0];
    reader.read_exact(&mut text).expect("its first byte");
    assert!(vmm.is_locked(), "the lock fell before the record was whole");
    reader.read_to_end(&mut text).expect("the rest");
    let record: serde_json::Value = serde_json::from_slice(&text).expect("whole");
    assert_eq!(record["reason"], "error");
    assert_eq!(record["ran"], false);
    assert!(!vmm.child.wait().expect("wait").success());
    assert!(!vmm.is_locked());
    assert!(vmm.dir.path().join("exit.json").exists());
}
