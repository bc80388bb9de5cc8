//! The fuzz targets over their checked-in corpora.

use std::path::PathBuf;

use hebe_devices::fuzzing::{drive_queue, restore_devices};
use hebe_state::fuzzing::{read_state, seal};

fn corpus(target: &str, least: usize) -> Vec<(PathBuf, Vec<u8>)> {
    let folder = format!("{}/../../fuzz/corpus/{target}", env!("CARGO_MANIFEST_DIR"));
    let inputs: Vec<_> = std::fs::read_dir(&folder)
        .expect("corpus folder")
        .map(|entry| entry.expect("entry").path())
        .map(|path| (path.clone(), std::fs::read(path).expect("input")))
        .collect();
    assert!(inputs.len() >= least, "the corpus of {target} is gone");
    inputs
}

#[test]
fn no_guest_breaks_a_queue() {
    for (path, input) in corpus("queue", 40) {
        println!("{}", path.display());
        drive_queue(&input);
        // Every kind of device under this guest, not just the one it is for.
        for kind in [0, 1, 2, 3, 5] {
            let mut other = input.clone();
            other[0] = kind;
            drive_queue(&other);
        }
    }
}

#[test]
fn no_state_breaks_the_reader() {
    let mut constructed = 0;
    for (path, input) in corpus("state", 15) {
        println!("{}", path.display());
        for bytes in [input.clone(), seal(&input)] {
            if let Ok(functions) = read_state(&bytes) {
                constructed += restore_devices(&functions);
            }
        }
    }
    assert!(constructed >= 10, "the good states make devices");
}
