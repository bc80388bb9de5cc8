//! Manual pages, made from the definition of the command line.

use std::fs;
use std::path::Path;

use clap::CommandFactory;
use clap_mangen::{Man, generate_to};

use crate::cli::Cli;
use crate::output::{Exit, Failure, Outcome, Output};

/// `hebe man`: one page, or with a directory one for each command
/// (`hebe.1`, `hebe-store.1`, `hebe-store-init.1`).
pub fn man(dir: Option<&Path>, out: &Output) -> Outcome {
    let whole = Cli::command();
    let Some(dir) = dir else {
        let mut page = Vec::new();
        let rendered = Man::new(whole).render(&mut page);
        rendered.map_err(|e| Failure(format!("the manual page cannot be made ({e})")))?;
        out.raw(&page);
        return Ok(Exit::Done);
    };
    let written = fs::create_dir_all(dir).and_then(|()| generate_to(whole, dir));
    written.map_err(|e| {
        Failure(format!(
            "cannot write manual pages to {} ({e}): name a directory that may be written with --dir",
            dir.display()
        ))
    })?;
    out.progress(&format!("the manual pages are in {}", dir.display()));
    Ok(Exit::Done)
}
