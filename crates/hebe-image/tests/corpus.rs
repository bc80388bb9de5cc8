//! The fuzz target's corpus as an ordinary test: no panic, no long run.

use std::fs;
use std::time::{Duration, Instant};

#[test]
fn the_corpus_is_looked_at_in_no_time() {
    let folder = format!("{}/../../fuzz/corpus/image", env!("CARGO_MANIFEST_DIR"));
    let mut inputs = 0;
    let mut booted = 0;
    for entry in fs::read_dir(folder).expect("corpus folder") {
        let path = entry.expect("entry").path();
        let input = fs::read(&path).expect("read");
        let began = Instant::now();
        booted += u32::from(hebe_image::fuzzing::look_at(&input));
        assert!(
            began.elapsed() < Duration::from_secs(300),
            "{}",
            path.display()
        );
        inputs += 1;
    }
    assert!(inputs >= 12, "the corpus is gone");
    assert!(booted >= 1, "no disk of the corpus boots any more");
}
