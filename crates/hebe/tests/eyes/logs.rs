//! `logs`.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::process::Stdio;

use crate::{Host, Running};

#[test]
fn logs_of_a_vm_that_is_gone_are_shown() {
    let host = Host::new();
    let dir = host.vm_dir("web");
    let line = r#"{"realtime_ns":1700000000000000000,"level":"info","text":"up"}"#;
    fs::write(dir.join("log"), format!("{line}\nkilled\n")).expect("write");
    fs::write(dir.join("console.log.1"), "a\r\n\u{1b}[31mb\u{1b}[0m\r\n").expect("write");
    fs::write(dir.join("console.log"), "c\r\nlogin: ").expect("write");
    let shown = |arguments: &[&str]| {
        let (status, text, error) = host.hebe(&[&["logs", "web"], arguments].concat());
        assert_eq!((status, error.as_str()), (0, ""), "{arguments:?}");
        text
    };
    assert_eq!(shown(&[]), "2023-11-14 22:13:20.000Z  info   up\nkilled\n");
    assert_eq!(shown(&["--lines", "1"]), "killed\n");
    let json = shown(&["--json"]);
    assert_eq!(json.lines().next(), Some(line));
    assert!(json.lines().all(|line| line.starts_with('{')), "{json}");
    assert_eq!(shown(&["--console"]), "a\nb\nc\nlogin: ");
    assert_eq!(shown(&["--console", "--lines", "2"]), "c\nlogin: ");
    let raw = shown(&["--console", "--raw"]);
    assert_eq!(raw, "a\r\n\u{1b}[31mb\u{1b}[0m\r\nc\r\nlogin: ");
}

#[test]
fn a_log_that_is_not_there_is_one_sentence() {
    let host = Host::new();
    for arguments in [["logs", "web"].as_slice(), &["logs", "web", "--console"]] {
        let (status, text, error) = host.hebe(arguments);
        assert_eq!((status, text.as_str()), (1, ""));
        assert_eq!(error.lines().count(), 1, "{error}");
        assert!(error.contains("hebe list"), "{error}");
    }
}

#[test]
fn what_is_added_is_shown_until_the_vm_is_dropped() {
    let host = Host::new();
    let dir = host.vm_dir("web");
    let path = dir.join("console.log");
    fs::write(&path, "1\n2\n").expect("write");
    let mut command = host.command(&["logs", "web", "--console", "--follow", "-n", "1"]);
    let mut follower = Running(command.stdout(Stdio::piped()).spawn().expect("hebe runs"));
    let mut lines = BufReader::new(follower.0.stdout.take().expect("stdout")).lines();
    let mut next = || lines.next().map(|line| line.expect("text"));
    assert_eq!(next().as_deref(), Some("2"));
    let mut log = File::options().append(true).open(&path).expect("open");
    log.write_all(b"3\n").expect("write");
    assert_eq!(next().as_deref(), Some("3"));
    // As a VMM does when its log is too long.
    fs::write(dir.join("console.log.1"), "1\n2\n3\n").expect("write");
    log.set_len(0).expect("truncate");
    log.write_all(b"4\n").expect("write");
    assert_eq!(next().as_deref(), Some("4"));
    fs::remove_dir_all(&dir).expect("remove");
    assert_eq!(next(), None);
    assert!(follower.ended().success());
}
