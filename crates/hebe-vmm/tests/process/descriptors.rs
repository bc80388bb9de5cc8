//! What a VMM takes over from whoever starts it.

use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};

use crate::vmm::{Vmm, fifo};

#[test]
fn a_descriptor_that_no_argument_names_is_closed_and_the_named_ones_are_not() {
    let dir = tempfile::tempdir().expect("dir");
    let record = dir.path().join("exit.json");
    // Nobody reads it yet: the VMM waits here before it does anything else.
    fifo(&record);
    let (config, mut definition) = std::io::pipe().expect("pipe");
    definition.write_all(b"name = 7").expect("write");
    drop(definition);
    let (mut reader, extra) = std::io::pipe().expect("pipe");
    let vmm = Vmm::start(dir, "", |command| {
        let config = OwnedFd::from(config);
        command.args(["--config-fd", &config.as_raw_fd().to_string()]);
        vec![config, OwnedFd::from(extra)]
    });
    let mut hangs_up = [PollFd::new(&reader, PollFlags::IN)];
    let limit = Duration::from_secs(120).try_into().expect("a time");
    let gone = poll(&mut hangs_up, Some(&limit)).expect("poll");
    assert_eq!(gone, 1, "the VMM kept a descriptor that it was not given");
    assert_eq!(reader.read(&mut [0]).expect("read"), 0);
    assert!(vmm.is_locked(), "the lock was its own to keep");
    let text = std::fs::read_to_string(record).expect("record");
    assert!(text.contains("name = 7"), "another definition: {text}");
}
