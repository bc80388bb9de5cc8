//! `host setup`.

use std::io::{self, BufRead, IsTerminal, Write};
use std::path::Path;
use std::process::{Command, Stdio};

use hebe_host::Host;
use hebe_host::listing::with_cause;
use hebe_host::setup::{Setup, SetupError, SetupOptions, UPDATE, apply, arrived, plan};
use hebe_host::stores::ExecView;
use serde::Serialize;

use crate::cli::{SetupArgs, SetupStore};
use crate::output::{Exit, Failure, Outcome, Output};

impl From<SetupError> for Failure {
    fn from(error: SetupError) -> Self {
        Self(with_cause(&error))
    }
}

#[derive(Serialize)]
struct Answer<'a> {
    changed: bool,
    #[serde(flatten)]
    setup: &'a Setup,
}

/// `hebe host setup`.
pub fn setup(host: &Host, args: &SetupArgs, out: &Output) -> Outcome {
    let options = SetupOptions {
        size: args.size,
        luo: args.store.map(|store| store == SetupStore::Luo),
        undo: args.undo,
    };
    let setup = plan(&args.root, &options)?;
    if !setup.given_up.is_empty() && !args.dry_run {
        nothing_frozen(host)?;
    }
    let told = |changed: bool| {
        let answer = Answer {
            changed,
            setup: &setup,
        };
        out.answer(&answer, String::new);
    };
    out.progress(&text(&setup));
    if setup.is_done() || args.dry_run {
        told(false);
        return Ok(Exit::Done);
    }
    if !args.yes && !agreed()? {
        told(false);
        out.progress("nothing was changed");
        return Ok(Exit::CheckFailed);
    }
    apply(&args.root, &setup, &|command| {
        run(&args.root, command, &setup.words)
    })?;
    told(true);
    out.progress("done");
    Ok(Exit::Done)
}

/// What lies frozen in the range would be overwritten by the next boot.
fn nothing_frozen(host: &Host) -> Result<(), Failure> {
    let view = host.store.view().ok().flatten();
    let segments = view.iter().flat_map(|view| &view.segments);
    let frozen = segments.filter(|s| matches!(s.exec, ExecView::Frozen { .. }));
    let names: Vec<String> = frozen
        .filter_map(|s| s.name.as_ref().map(ToString::to_string))
        .collect();
    if names.is_empty() {
        return Ok(());
    }
    Err(Failure(format!(
        "VMs are frozen in the reserved memory ({}): resume them with `hebe resume --all` first, or give them up",
        names.join(", ")
    )))
}

fn text(setup: &Setup) -> String {
    if setup.is_done() {
        let mut text = setup.notes.join("\n");
        text.push_str("\nnothing is to be done");
        return text.trim_start().to_owned();
    }
    let mut text: String = setup.changes.iter().map(|c| c.diff()).collect();
    for command in &setup.commands {
        text.push_str(&format!("then: {}\n", command.join(" ")));
    }
    for note in &setup.notes {
        text.push_str(&format!("note: {note}\n"));
    }
    text
}

fn agreed() -> Result<bool, Failure> {
    if !io::stdin().is_terminal() {
        return Err(Failure(
            "nobody is there to be asked: agree with --yes".to_owned(),
        ));
    }
    eprint!("Do it? [y/N] ");
    let _ = io::stderr().flush();
    let mut line = String::new();
    let read = io::stdin().lock().read_line(&mut line);
    read.map_err(|e| Failure(format!("no answer could be read: {e}")))?;
    Ok(matches!(line.trim(), "y" | "Y" | "yes"))
}

/// In another root file system nothing is run: its own boot does it.
fn run(root: &Path, command: &[String], told: &[String]) -> Result<(), String> {
    if root != Path::new("/") {
        return Ok(());
    }
    let words = command.join(" ");
    let (program, arguments) = command.split_first().ok_or("an empty command")?;
    // `su` alone leaves root the PATH of a user, without update-grub.
    let path = std::env::var("PATH").unwrap_or_default() + ":/usr/local/sbin:/usr/sbin:/sbin";
    let status = Command::new(program)
        .args(arguments)
        .env("PATH", path)
        .stdin(Stdio::null())
        .stdout(io::stderr())
        .status()
        .map_err(|e| format!("`{words}` cannot be started: {e}"))?;
    match status.success() {
        true if program == UPDATE => arrived(root, told),
        true => Ok(()),
        false => Err(format!(
            "`{words}` failed ({status}); the files are as they were"
        )),
    }
}
