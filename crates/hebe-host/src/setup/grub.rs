//! What GRUB tells the kernel: the file that is written for it, and the
//! configuration that `update-grub` makes of it.

use std::fs;
use std::path::Path;

/// What GRUB's configuration is made from, besides `/etc/default/grub`.
pub(super) const DIR: &str = "etc/default/grub.d";
pub(super) const FILE: &str = "etc/default/grub.d/hebe.cfg";
/// What `update-grub` makes.
const MADE: &str = "boot/grub/grub.cfg";
/// The command that makes it.
pub const UPDATE: &str = "update-grub";
/// Where in it the entries of this system's own kernels are.
const BEGIN: &str = "### BEGIN /etc/grub.d/10_linux ###";
const END: &str = "### END /etc/grub.d/10_linux ###";

/// Something makes GRUB's configuration here.
pub(super) fn is_here(root: &Path) -> bool {
    root.join("etc/default/grub").exists() || root.join(DIR).is_dir()
}

/// A file that a shell reads, without interpreting the exclamation mark.
pub(super) fn text(words: &[String]) -> String {
    format!(
        "# Written by `hebe host setup`, which changes it again; `hebe host setup --undo` removes it.\nGRUB_CMDLINE_LINUX=\"$GRUB_CMDLINE_LINUX {}\"\n",
        words.join(" ")
    )
}

/// The words in such a file that begin so.
pub(super) fn written(file: &str, prefix: &str) -> Vec<String> {
    let words = file.split(['"', ' ', '\n']);
    let ours = words.filter(|word| word.starts_with(prefix));
    ours.map(str::to_owned).collect()
}

/// Whether `update-grub` took the words over: into every entry of this system's
/// kernels, and nothing of that kind where there are none.
///
/// # Errors
/// One sentence with the way out.
pub fn arrived(root: &Path, words: &[String]) -> Result<(), String> {
    let path = root.join(MADE);
    let made = fs::read_to_string(&path)
        .map_err(|e| format!("{} cannot be read ({e}): GRUB is not installed on this host, or its configuration is elsewhere; the files are as they were", path.display()))?;
    let own = made
        .split_once(BEGIN)
        .and_then(|(_, rest)| rest.split_once(END));
    let entries = own.map_or(made.as_str(), |(own, _)| own);
    let mut lines = entries
        .lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>())
        .filter(|line| line.first() == Some(&"linux"))
        .peekable();
    if lines.peek().is_none() && !words.is_empty() {
        return Err(format!(
            "{} has no entry that starts a kernel of this system; the files are as they were",
            path.display()
        ));
    }
    let lacks = |line: Vec<&str>| words.iter().find(|word| !line.contains(&word.as_str()));
    match lines.find_map(lacks) {
        None => Ok(()),
        Some(word) => Err(format!(
            "{UPDATE} did not take {word} over into {}: some file that is read behind /{FILE} sets GRUB_CMDLINE_LINUX anew (`grep -r GRUB_CMDLINE_LINUX= /etc/default/grub.d`); have it add to what is there, GRUB_CMDLINE_LINUX=\"$GRUB_CMDLINE_LINUX …\"; the files are as they were",
            path.display()
        )),
    }
}

/// Why no kernel of this host can carry memory over, by what packages say in
/// `/boot`; none where one can, or where nothing says.
pub(super) fn cannot_carry(root: &Path) -> Option<String> {
    let entries = fs::read_dir(root.join("boot"))
        .into_iter()
        .flatten()
        .flatten();
    let configs = entries.filter(|e| e.file_name().to_string_lossy().starts_with("config-"));
    let mut lacking: Vec<String> = Vec::new();
    for config in configs {
        let text = fs::read_to_string(config.path()).unwrap_or_default();
        let option = crate::luo::check::switched_off(&text)?;
        let release = config.file_name().to_string_lossy().into_owned();
        let release = release.trim_start_matches("config-");
        lacking.push(format!("Linux {release} is built without {option}"));
    }
    lacking.sort();
    let all = lacking.join(", ");
    (!lacking.is_empty()).then(|| format!(
        "no kernel in /boot can carry memory over, and VMs end with each of them until one is there: {all}"
    ))
}
