//! Manual pages, made from the definition of the command line.

use std::path::Path;
use std::{fs, io};

use clap::{Command, CommandFactory};
use clap_mangen::Man;

use crate::cli::Cli;
use crate::output::{Exit, Failure, Outcome, Output};

/// `hebe man`: one page, or with a directory one for each command
/// (`hebe.1`, `hebe-store.1`, `hebe-store-init.1`).
pub fn man(dir: Option<&Path>, out: &Output) -> Outcome {
    let whole = Cli::command();
    let Some(dir) = dir else {
        let (_, page) =
            page(whole).map_err(|e| Failure(format!("the manual page cannot be made ({e})")))?;
        out.raw(page.as_bytes());
        return Ok(Exit::Done);
    };
    let mut whole = whole.disable_help_subcommand(true);
    whole.build();
    let written = fs::create_dir_all(dir).and_then(|()| write_all(whole, dir));
    written.map_err(|e| {
        Failure(format!(
            "cannot write manual pages to {} ({e}): name a directory that may be written with --dir",
            dir.display()
        ))
    })?;
    out.progress(&format!("the manual pages are in {}", dir.display()));
    Ok(Exit::Done)
}

fn write_all(command: Command, dir: &Path) -> io::Result<()> {
    let shown = command.get_subcommands().filter(|sub| !sub.is_hide_set());
    for sub in shown.cloned().collect::<Vec<_>>() {
        write_all(sub, dir)?;
    }
    let (file, page) = page(command)?;
    fs::write(dir.join(file), page)
}

/// A page, and how its file is called.
fn page(command: Command) -> io::Result<(String, String)> {
    let man = Man::new(command);
    let mut page = Vec::new();
    man.render(&mut page)?;
    let page = String::from_utf8(page).map_err(io::Error::other)?;
    // What stands behind the flags has its own lines and columns: examples, a file.
    let page = page.replacen(".SH EXTRA\n", ".SH NOTES\n.nf\n", 1);
    Ok((man.get_filename(), page))
}
