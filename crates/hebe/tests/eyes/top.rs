//! `top`, on a terminal and without one.

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex};
use std::thread;

use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, Winsize, tcgetattr, tcsetwinsize};
use serde_json::Value;

use crate::{Host, Running, until};

#[test]
fn one_frame_is_printed_where_there_is_no_terminal() {
    let host = Host::new();
    host.vm_dir("web");
    for arguments in [["top"].as_slice(), &["top", "--once"]] {
        let (status, text, error) = host.hebe(arguments);
        assert_eq!((status, error.as_str()), (0, ""));
        assert!(text.contains("web") && text.contains("NAME"), "{text}");
        assert!(!text.contains('\u{1b}'), "{text:?}");
    }
    let (status, text, _) = host.hebe(&["top", "--json"]);
    assert_eq!(status, 0);
    let value: Value = serde_json::from_str(&text).expect("JSON");
    assert_eq!(value["vms"][0]["name"], "web");
    assert_eq!(value["host"]["age"]["verdict"], "no-samples");
    assert!(value["host"]["memory"]["whole"].as_u64() > Some(0));
}

/// A terminal, and what was drawn on it.
struct Terminal {
    own: File,
    other: OwnedFd,
    drawn: Arc<Mutex<Vec<u8>>>,
}

impl Terminal {
    fn new(columns: u16, lines: u16) -> Self {
        let own = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).expect("a terminal");
        grantpt(&own).expect("grant");
        unlockpt(&own).expect("unlock");
        let path = ptsname(&own, Vec::new()).expect("its name");
        let path = path.to_str().expect("text").to_owned();
        let other = File::options()
            .read(true)
            .write(true)
            .open(path)
            .expect("open");
        let terminal = Self {
            own: own.into(),
            other: other.into(),
            drawn: Arc::default(),
        };
        terminal.resize(columns, lines);
        let (mut reader, drawn) = (
            terminal.own.try_clone().expect("clone"),
            Arc::clone(&terminal.drawn),
        );
        thread::spawn(move || {
            let mut chunk = [0; 4096];
            while let Ok(count @ 1..) = reader.read(&mut chunk) {
                drawn
                    .lock()
                    .expect("drawn")
                    .extend_from_slice(&chunk[..count]);
            }
        });
        terminal
    }

    fn resize(&self, columns: u16, lines: u16) {
        let size = Winsize {
            ws_col: columns,
            ws_row: lines,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        tcsetwinsize(&self.own, size).expect("resize");
    }

    fn start(&self, host: &Host) -> Running {
        self.start_as(host, "xterm")
    }

    fn start_as(&self, host: &Host, term: &str) -> Running {
        let end = || self.other.try_clone().expect("clone");
        let mut command = host.command(&["top"]);
        command.env("TERM", term);
        command.stdin(end()).stdout(end());
        Running(command.spawn().expect("hebe runs"))
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.drawn.lock().expect("drawn")).into_owned()
    }

    /// Lines are edited and shown as they are typed.
    fn is_ordinary(&self) -> bool {
        let modes = tcgetattr(self.other.as_fd())
            .expect("attributes")
            .local_modes;
        modes.contains(LocalModes::ICANON | LocalModes::ECHO)
    }
}

fn press(terminal: &Terminal, key: &[u8]) {
    use std::io::Write;
    (&terminal.own).write_all(key).expect("press");
}

#[test]
fn a_terminal_is_drawn_on_resized_and_given_back() {
    let host = Host::new();
    host.vm_dir("web");
    let terminal = Terminal::new(100, 24);
    let mut top = terminal.start(&host);
    until("it is drawn", || terminal.text().contains("web"));
    assert!(!terminal.is_ordinary());
    assert!(terminal.text().contains("\u{1b}[?1049h"));
    let before = terminal.text().len();
    terminal.resize(20, 3);
    until("it is drawn anew", || {
        let text = terminal.text();
        let after = text.get(before..).unwrap_or_default();
        after.contains("\u{1b}[J") && !after.contains("web")
    });
    press(&terminal, b"x");
    press(&terminal, b"q");
    assert!(top.ended().success());
    until("the screen is given back", || {
        terminal.text().ends_with("\u{1b}[?1049l")
    });
    assert!(terminal.is_ordinary());
}

#[test]
fn a_terminal_that_cannot_be_steered_gets_one_frame() {
    let host = Host::new();
    host.vm_dir("web");
    let terminal = Terminal::new(100, 24);
    assert!(terminal.start_as(&host, "dumb").ended().success());
    until("it is printed", || terminal.text().contains("web"));
    assert!(!terminal.text().contains('\u{1b}'), "{}", terminal.text());
}

#[test]
fn a_terminal_is_given_back_at_a_signal() {
    use rustix::process::{Pid, Signal, kill_process};
    let host = Host::new();
    for signal in [Signal::TERM, Signal::INT] {
        let terminal = Terminal::new(80, 24);
        let mut top = terminal.start(&host);
        until("it is drawn", || terminal.text().contains("there is no VM"));
        let pid = i32::try_from(top.0.id()).expect("pid");
        kill_process(Pid::from_raw(pid).expect("pid"), signal).expect("kill");
        assert!(top.ended().success());
        until("the screen is given back", || {
            terminal.text().ends_with("\u{1b}[?1049l")
        });
        assert!(terminal.is_ordinary(), "{signal:?}");
    }
}
