//! `agent exec`: a program's outputs become this one's, and its end this one's
//! end. What failed before or besides that ends with a status of its own, as
//! `ssh` has it.

use std::io::{self, IsTerminal};

use hebe_agent::{Done, Order};
use hebe_host::agent::Answer;
use hebe_host::{Host, listing};
use hebe_types::VmName;

use crate::bar::Bar;
use crate::output::{Exit, Failure, Output};
use crate::plain::Plain;

/// The program did not run, or did not end by itself.
const NOT_ENDED: u8 = 255;

/// `hebe agent NAME exec`: the order, and within how many seconds it ends.
pub fn exec(host: &Host, name: &VmName, (order, limit_s): (Order, u32), out: &Output) -> Exit {
    let bar = Bar::busy(out, &format!("a program runs in '{name}'"));
    let done = ask(host, name, order);
    drop(bar);
    let told = done.and_then(|done| tell(name, done, limit_s, out));
    Exit::Passed(told.unwrap_or_else(|failure| {
        out.failure(&failure);
        NOT_ENDED
    }))
}

fn ask(host: &Host, name: &VmName, order: Order) -> Result<Done, Failure> {
    let survey = listing::survey(host);
    let row = survey.row(host, name)?;
    Ok(hebe_host::agent::order(host, row, || order)?)
}

/// Shows what a program said, and gives the status it ended with.
fn tell(name: &VmName, done: Done, limit_s: u32, out: &Output) -> Result<u8, Failure> {
    let Done::Ended {
        status,
        stdout,
        stderr,
        cut,
    } = &done
    else {
        let text = format!("'{name}': its agent answers, and not about a program");
        return Err(Failure(text));
    };
    if !out.is_json() {
        out.raw(&shown(stdout, io::stdout().is_terminal()));
        out.raw_aside(&shown(stderr, io::stderr().is_terminal()));
    }
    if *cut {
        out.progress(&format!(
            "'{name}': not all that the program wrote is here: at most 16 KiB of each output; have it write to a file in the guest"
        ));
    }
    if status.is_none() {
        out.progress(&format!(
            "'{name}': the program did not end by itself: a signal ended it, or its time was over after {limit_s} s (--timeout)"
        ));
    }
    // A status that is none of Linux's is no success.
    let passed = status.and_then(|status| u8::try_from(status).ok());
    out.answer(&Answer { name, done }, String::new);
    Ok(passed.unwrap_or(NOT_ENDED))
}

/// As it came, or without what would steer a terminal.
fn shown(text: &str, terminal: bool) -> Vec<u8> {
    match terminal {
        true => Plain::default().feed(text.as_bytes()).into_bytes(),
        false => text.as_bytes().to_vec(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ended(status: Option<i32>) -> u8 {
        let done = Done::Ended {
            status,
            stdout: String::new(),
            stderr: String::new(),
            cut: false,
        };
        let name = "web".parse().expect("name");
        tell(&name, done, 1, &Output::new(false)).expect("an end")
    }

    #[test]
    fn a_program_that_did_not_end_well_is_never_told_to_have() {
        for (status, wanted) in [
            (Some(0), 0),
            (Some(7), 7),
            (Some(255), 255),
            (None, 255),
            (Some(256), 255),
            (Some(-1), 255),
        ] {
            assert_eq!(ended(status), wanted, "{status:?}");
        }
    }

    #[test]
    fn an_answer_about_something_else_is_a_failure() {
        let name = "web".parse().expect("name");
        let told = tell(&name, Done::Ok, 1, &Output::new(false));
        assert!(told.is_err_and(|e| e.0.contains("not about a program")));
    }

    #[test]
    fn a_terminal_is_not_steered_and_a_file_gets_what_was_said() {
        let said = "a\u{1b}[2Jb\n";
        assert_eq!(shown(said, true), b"ab\n");
        assert_eq!(shown(said, false), said.as_bytes());
    }
}
