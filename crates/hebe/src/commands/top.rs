//! `top`: VMs and host in a terminal, refreshed each second.
//!
//! One thread looks, so that keys are heard while a VMM does not answer; this
//! one draws. [`frame`](frame::frame) makes the text, and knows of neither.

mod frame;
mod look;
mod screen;

use std::io::{self, IsTerminal};
use std::sync::mpsc::{self, TryRecvError};
use std::thread;
use std::time::Duration;

use hebe_host::Host;
use hebe_sys::proc;

use crate::cli::TopArgs;
use crate::output::{Exit, Failure, Outcome, Output};
use frame::{Snapshot, frame};
use look::Looker;
use screen::Screen;

/// How often it is looked.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Over how long the share of a processor is taken where it is looked once.
const ONCE_OVER: Duration = Duration::from_millis(500);
/// How soon a window that was resized is drawn anew.
const DRAW_EVERY: Duration = Duration::from_millis(200);

/// `hebe top`.
pub fn top(host: &Host, args: TopArgs, out: &Output) -> Outcome {
    if args.once || out.is_json() || !io::stdout().is_terminal() || cannot_be_steered() {
        let mut looker = Looker::new(host);
        looker.look();
        thread::sleep(ONCE_OVER);
        let snapshot = looker.look();
        out.answer(&snapshot, || frame(&snapshot, usize::MAX, usize::MAX));
        return Ok(Exit::Done);
    }
    let failed = |e: io::Error| Failure(format!("this terminal cannot be drawn on ({e})"));
    proc::hold_signals().map_err(failed)?;
    let screen = Screen::enter().map_err(failed)?;
    let watched = watch(host, &screen);
    drop(screen);
    watched.map_err(failed)?;
    Ok(Exit::Done)
}

/// A terminal of which is known that it can do nothing but scroll.
fn cannot_be_steered() -> bool {
    std::env::var_os("TERM").is_some_and(|term| term == "dumb")
}

fn watch(host: &Host, screen: &Screen) -> io::Result<()> {
    let (tell, looks) = mpsc::sync_channel(0);
    let host = host.clone();
    // Not waited for in the end: it may be asking a VMM that does not answer.
    thread::spawn(move || {
        let mut looker = Looker::new(&host);
        while tell.send(looker.look()).is_ok() {
            thread::sleep(LOOK_EVERY);
        }
    });
    let mut last: Option<Snapshot> = None;
    let mut drawn = None;
    while !proc::asked_to_stop() {
        let fresh = match looks.try_recv() {
            Ok(look) => {
                last = Some(look);
                true
            }
            Err(TryRecvError::Empty) => false,
            Err(TryRecvError::Disconnected) => {
                return Err(io::Error::other(
                    "nobody looks any more: please report this",
                ));
            }
        };
        let size = screen.size();
        if let Some(look) = last.as_ref().filter(|_| fresh || drawn != Some(size)) {
            screen.draw(&frame(look, size.0, size.1))?;
            drawn = Some(size);
        }
        // Ctrl-C is a key here.
        let leaves = |key: &u8| matches!(key, b'q' | b'Q' | 0x03);
        match screen.keys(DRAW_EVERY) {
            Some(keys) if !keys.iter().any(leaves) => {}
            _ => break,
        }
    }
    Ok(())
}
