//! Programs of this computer in a lab machine that has no libraries: each is
//! copied with the libraries that it is linked with and its dynamic loader.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::apt;

/// The dynamic loader, which x86-64's ABI names.
const LOADER: &str = "ld-linux-x86-64.so.2";

/// Copies `program` to `folder` under `name`, and what it is linked with below
/// `folder/lib`. `libraries` is where else to look for that (`LD_LIBRARY_PATH`).
/// Programs may share a folder.
pub fn place(program: &Path, libraries: Option<&OsStr>, folder: &Path, name: &str) -> Result<()> {
    let lib = folder.join("lib");
    fs::create_dir_all(&lib).with_context(|| format!("cannot create {}", lib.display()))?;
    copy(program, &folder.join(name))?;
    let mut ldd = Command::new("ldd");
    if let Some(libraries) = libraries {
        ldd.env("LD_LIBRARY_PATH", libraries);
    }
    let text = apt::run(ldd.arg(program))?;
    for (name, path) in named(&text, program)? {
        copy(&path, &lib.join(name))?;
    }
    if !lib.join(LOADER).exists() {
        bail!("{} names no dynamic loader", program.display());
    }
    Ok(())
}

/// The words that run the program `name` of a folder that was filled by
/// [`place`], and lies at `folder` where it runs.
pub fn argv(folder: &str, name: &str) -> Vec<String> {
    vec![
        format!("{folder}/lib/{LOADER}"),
        "--library-path".to_owned(),
        format!("{folder}/lib"),
        format!("{folder}/{name}"),
    ]
}

/// Copies a file, and says which if that fails.
pub fn copy(from: &Path, to: &Path) -> Result<()> {
    let done = fs::copy(from, to).map(drop);
    done.with_context(|| format!("cannot copy {} to {}", from.display(), to.display()))
}

/// What ldd says: the name that each library is asked for by, and its file.
fn named(ldd: &str, program: &Path) -> Result<Vec<(String, PathBuf)>> {
    let mut all = Vec::new();
    for line in ldd.lines().map(str::trim) {
        let words: Vec<&str> = line.split_whitespace().collect();
        let (name, path) = match words[..] {
            [name, "=>", "not", "found"] => {
                bail!("library {name} of {} is not found", program.display())
            }
            [name, "=>", path, ..] => (name, path),
            [path, ..] if path.starts_with('/') => (path, path),
            // The kernel's own (linux-vdso) has no file.
            _ => continue,
        };
        let name = name.rsplit('/').next().unwrap_or(name);
        all.push((name.to_owned(), PathBuf::from(path)));
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_are_read_from_what_ldd_says() {
        let text = "\tlinux-vdso.so.1 (0x00007ffc)\n\tlibz.so.1 => /lib/libz.so.1 (0x00007f)\n\t/lib64/ld-linux-x86-64.so.2 (0x00007f)\n";
        let program = Path::new("/bin/x");
        let all = named(text, program).expect("libraries");
        assert_eq!(all[0], ("libz.so.1".to_owned(), "/lib/libz.so.1".into()));
        assert_eq!(all[1].0, LOADER);
        assert_eq!(all.len(), 2);
        let missing = named("\tlibnuma.so.1 => not found\n", program).expect_err("missing");
        assert!(missing.to_string().contains("libnuma.so.1 of /bin/x"));
    }

    #[test]
    fn a_placed_program_runs_from_there() {
        let folder = tempfile::tempdir().expect("a folder");
        let program = apt::find_program("ls").expect("ls");
        place(&program, None, folder.path(), "list").expect("placed");
        let words = argv(&folder.path().to_string_lossy(), "list");
        let mut command = Command::new(&words[0]);
        let said = apt::run(command.args(&words[1..]).arg(folder.path())).expect("runs");
        assert_eq!(said, "lib\nlist\n");
    }
}
