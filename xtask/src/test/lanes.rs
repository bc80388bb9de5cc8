//! Several checks at a time.
//!
//! A lab check keeps one processor busy, that of its emulated machine. So two
//! of them go on side by side, and beside them, one after the other, the checks
//! that run on this computer itself, which wait for much of their time. Each is a
//! child of this program, whose lines are printed as they come with the check's
//! name in front.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::fmt;
use std::io::{BufRead, BufReader, pipe};
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use anyhow::{Context, Result, bail};

use crate::ui;

/// What the last words of a check that failed begin with.
const ERROR: &str = "error: ";

/// How one check ended, and after how many seconds.
#[derive(Clone, Debug, PartialEq)]
pub struct Verdict {
    name: String,
    seconds: f64,
    /// Why, if it failed.
    pub failed: Option<String>,
}

impl Verdict {
    /// Of a check that began at `start` and ended just now; says so, too.
    pub fn of(name: &str, start: Instant, result: Result<()>) -> Self {
        let verdict = Self {
            name: name.to_owned(),
            seconds: start.elapsed().as_secs_f64(),
            failed: result.err().map(|error| ui::chain(&error)),
        };
        println!("{verdict}");
        verdict
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let (name, seconds) = (&self.name, self.seconds);
        match &self.failed {
            None => write!(f, "ok  {name} ({seconds:.0} s)"),
            Some(why) => write!(f, "FAILED  {name} ({seconds:.0} s): {why}"),
        }
    }
}

/// Checks that are run one after the other, on so many lanes at once.
pub struct Queue<'a> {
    /// By name, the first ones first.
    pub names: Vec<&'a str>,
    /// How many go on at once.
    pub lanes: usize,
}

/// Runs all queues side by side.
pub fn run(queues: &[Queue], full: bool, again: &[OsString]) -> Result<Vec<Verdict>> {
    let program = std::env::current_exe().context("this program's own path is not known")?;
    let verdicts = Mutex::new(Vec::new());
    let one = |name: &str| {
        let mut command = Command::new(&program);
        command.args(again).args(["test", "--check", name]);
        if full {
            command.arg("--full");
        }
        println!("--- {name}");
        let start = Instant::now();
        let verdict = Verdict::of(name, start, follow(command, name));
        locked(&verdicts).push(verdict);
    };
    let lefts: Vec<Mutex<VecDeque<&str>>> = queues
        .iter()
        .map(|queue| Mutex::new(queue.names.iter().copied().collect()))
        .collect();
    std::thread::scope(|scope| {
        for (queue, left) in queues.iter().zip(&lefts) {
            for _ in 0..queue.lanes.min(queue.names.len()) {
                scope.spawn(|| {
                    while let Some(name) = pop(left) {
                        one(name);
                    }
                });
            }
        }
    });
    Ok(verdicts
        .into_inner()
        .unwrap_or_else(PoisonError::into_inner))
}

fn pop<'a>(left: &Mutex<VecDeque<&'a str>>) -> Option<&'a str> {
    locked(left).pop_front()
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Prints what the child prints, as it comes, until it ends.
///
/// # Errors
/// Its last words where it failed.
fn follow(mut command: Command, name: &str) -> Result<()> {
    let (reader, writer) = pipe().context("no pipe")?;
    let copy = writer.try_clone().context("no pipe")?;
    let child = command.stdout(writer).stderr(copy).spawn();
    let mut child = child.context("this program cannot be run again")?;
    // The command holds the pipe's writing end, which would keep it open.
    drop(command);
    let (mut last, mut begun) = (String::new(), false);
    for line in BufReader::new(reader).split(b'\n') {
        let line = line.context("a check's output cannot be read")?;
        let line = String::from_utf8_lossy(&line);
        println!("{name}: {line}");
        // An error may be of several lines.
        let begins = line.starts_with(ERROR);
        begun |= begins;
        match begins || !begun {
            true => last = line.into_owned(),
            false => last.extend(["\n", &line]),
        }
    }
    let status = child.wait().context("a check cannot be waited for")?;
    match status.code() {
        Some(0) => Ok(()),
        Some(_) => bail!("{}", last.strip_prefix(ERROR).unwrap_or(&last)),
        None => bail!("it was killed ({status})"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Result<(), String> {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        follow(command, "test").map_err(|error| error.to_string())
    }

    #[test]
    fn a_childs_failure_is_told_with_its_last_words() {
        assert_eq!(shell("echo fine"), Ok(()));
        assert_eq!(
            shell("echo a step >&2; printf 'error: the first\nand the second line' >&2; exit 1"),
            Err("the first\nand the second line".to_owned())
        );
        assert_eq!(
            shell("echo a step; echo the last one; exit 2"),
            Err("the last one".to_owned())
        );
        let killed = shell("kill -9 $$").expect_err("it is no success");
        assert!(killed.contains("killed"), "{killed}");
    }
}
