//! Making a host ready: what the kernel must be told, written where GRUB finds
//! it, and units enabled. First what would change, then, if somebody agrees,
//! the change; done twice it changes nothing.

mod grub;
mod ranges;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use hebe_types::ByteSize;
use serde::Serialize;

use crate::cmdline;
use crate::files;

pub use grub::{UPDATE, arrived};
pub use ranges::{Range, choose, from_iomem, word};

/// Read at every boot, by systemd-tmpfiles.
const PAGES_FILE: &str = "etc/tmpfiles.d/hebe-pages.conf";
/// What switches live update on.
const LIVE_UPDATE: [&str; 2] = ["kho=on", "liveupdate=on"];
/// Those that a host with VMs needs.
const UNITS: [&str; 4] = [
    "hebe-freeze.service",
    "hebe-resume.service",
    "hebed.socket",
    "hebed.service",
];

/// What is to be made ready.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SetupOptions {
    /// How much to reserve; half of RAM where nobody says.
    pub size: Option<ByteSize>,
    /// For store `luo`: nothing is reserved, and Linux carries memory over. Where
    /// nobody says, what was written before decides.
    pub luo: Option<bool>,
    /// Take everything back.
    pub undo: bool,
}

/// A file before and after; `None` where there is none.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Change {
    /// Below the root directory.
    pub path: PathBuf,
    /// What it holds now.
    pub before: Option<String>,
    /// What it will hold.
    pub after: Option<String>,
}

impl Change {
    /// As lines, with `-` before what goes and `+` before what comes.
    pub fn diff(&self) -> String {
        let name = |there: &Option<String>| match there {
            Some(_) => format!("/{}", self.path.display()),
            None => "/dev/null".to_owned(),
        };
        let mut text = format!("--- {}\n+++ {}\n", name(&self.before), name(&self.after));
        for (mark, side) in [('-', &self.before), ('+', &self.after)] {
            for line in side.iter().flat_map(|text| text.lines()) {
                text.push_str(&format!("{mark}{line}\n"));
            }
        }
        text
    }
}

/// Everything that is to be done.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Setup {
    /// The words for the kernel's command line.
    pub words: Vec<String>,
    /// Files that change.
    pub changes: Vec<Change>,
    /// Commands that follow, in order.
    pub commands: Vec<Vec<String>>,
    /// Words that reserve memory now, and will not any more: whoever is frozen there
    /// is lost.
    pub given_up: Vec<String>,
    /// What else there is to say.
    pub notes: Vec<String>,
}

impl Setup {
    /// Nothing is to be done.
    pub fn is_done(&self) -> bool {
        self.changes.is_empty() && self.commands.is_empty()
    }
}

/// Why it cannot be made ready.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    /// There is no such memory.
    #[error("{0}")]
    Memory(String),
    /// Nothing here makes GRUB's configuration.
    #[error(
        "this host has no GRUB whose configuration is made from /etc/default/grub.d: add the words {words} to the kernel's command line yourself"
    )]
    NoGrub {
        /// Those words.
        words: String,
    },
    /// The range would move under a store.
    #[error(
        "{now} is reserved now, not by this command, and a store may lie there: take the words out of /etc/default/grub first, or leave it as it is"
    )]
    Reserved {
        /// What the running kernel reserves.
        now: String,
    },
    /// A file.
    #[error("cannot {what} {path}: run this as root")]
    File {
        /// What was tried.
        what: &'static str,
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A command.
    #[error("{0}")]
    Command(String),
}

/// What is to be done on the host whose files lie below `root`. Changes nothing.
///
/// # Errors
/// See [`SetupError`].
pub fn plan(root: &Path, options: &SetupOptions) -> Result<Setup, SetupError> {
    let mut setup = Setup::default();
    let ours = read(root, grub::FILE)?.unwrap_or_default();
    let luo = !options.undo && is_luo(options, &ours);
    if !options.undo {
        setup.words = words(root, options, luo, &ours, &mut setup.notes)?;
    }
    if !grub::is_here(root) && !setup.words.is_empty() {
        let words = setup.words.join(" ");
        return Err(SetupError::NoGrub { words });
    }
    let text = (!setup.words.is_empty()).then(|| grub::text(&setup.words));
    let changed = change(root, grub::FILE, text, &mut setup.changes)?;
    if changed {
        setup.commands.push(vec![grub::UPDATE.into()]);
        setup
            .notes
            .push("it counts from the next boot on: reboot once".into());
    }
    setup.given_up = grub::written(&ours, "memmap=");
    setup.given_up.retain(|word| !setup.words.contains(word));
    if !setup.given_up.is_empty() && !setup.words.iter().any(|w| w.starts_with("memmap=")) {
        setup.notes.push(format!(
            "{} is reserved no longer from then on, and the store there is gone: VMs whose memory lies in it are saved by `systemctl reboot` and come back in ordinary memory; those with store = \"devdax\" stay saved until memory is reserved again and `hebe store init` was run, or their definitions say otherwise",
            setup.given_up.join(" ")
        ));
    }
    if luo {
        setup.notes.extend(grub::cannot_carry(root));
    }
    let pages = luo.then(|| {
        "# Guest memory in pages of 2 MiB: less to hand over to the next kernel.\nw /sys/kernel/mm/transparent_hugepage/shmem_enabled - - - - advise\n".to_owned()
    });
    if change(root, PAGES_FILE, pages, &mut setup.changes)? && luo {
        let create = [
            "systemd-tmpfiles",
            "--create",
            "/etc/tmpfiles.d/hebe-pages.conf",
        ];
        setup.commands.push(create.map(str::to_owned).to_vec());
    }
    if !options.undo {
        enable(root, &mut setup);
    }
    Ok(setup)
}

/// Linux is to carry memory over: by order, or because that was ordered before.
fn is_luo(options: &SetupOptions, ours: &str) -> bool {
    let before = || options.size.is_none() && !grub::written(ours, LIVE_UPDATE[1]).is_empty();
    options.luo.unwrap_or_else(before)
}

/// The ranges that the boot loader reserves at the next start, by what this command
/// wrote.
pub fn pending(root: &Path) -> Vec<String> {
    let ours = read(root, grub::FILE).ok().flatten();
    grub::written(&ours.unwrap_or_default(), "memmap=")
}

/// What the kernel is to be told; `ours` is what it is told now.
fn words(
    root: &Path,
    options: &SetupOptions,
    luo: bool,
    ours: &str,
    notes: &mut Vec<String>,
) -> Result<Vec<String>, SetupError> {
    if luo {
        return Ok(LIVE_UPDATE.map(str::to_owned).to_vec());
    }
    let running = read(root, "proc/cmdline")?.unwrap_or_default();
    let now = cmdline::reservations(&running);
    let is_ours = now.iter().all(|r| ours.contains(&cmdline::written(r)));
    if !now.is_empty() && !is_ours {
        let words: Vec<String> = now.iter().map(cmdline::written).collect();
        if options.size.is_some() {
            return Err(SetupError::Reserved {
                now: words.join(" "),
            });
        }
        notes.push(format!(
            "{} is reserved already, and stays",
            words.join(" ")
        ));
        return Ok(Vec::new());
    }
    // What was written once is kept: the store lies there.
    let kept = grub::written(ours, "memmap=");
    if options.size.is_none() && !kept.is_empty() {
        return Ok(kept);
    }
    let range = choose(&memory(root)?, options.size).map_err(SetupError::Memory)?;
    notes.push(format!(
        "{} of memory from {} on are reserved for VMs, out of the host's hands",
        ByteSize(range.len),
        ByteSize(range.start)
    ));
    if !now.is_empty()
        && !now
            .iter()
            .any(|r| cmdline::covers(r, range.start, range.len))
    {
        notes.push(
            "the reserved range moves: VMs that are frozen in the store are not found there".into(),
        );
    }
    Ok(vec![word(range)])
}

/// RAM by the firmware's map, which no `memmap=` changes; else by the kernel's.
fn memory(root: &Path) -> Result<Vec<Range>, SetupError> {
    let map = root.join("sys/firmware/memmap");
    let mut ram = Vec::new();
    for entry in fs::read_dir(map).into_iter().flatten().flatten() {
        let text = |name: &str| fs::read_to_string(entry.path().join(name)).unwrap_or_default();
        let hex =
            |name: &str| u64::from_str_radix(text(name).trim().trim_start_matches("0x"), 16).ok();
        if text("type").trim() == "System RAM"
            && let (Some(start), Some(end)) = (hex("start"), hex("end"))
        {
            ram.extend(ranges::range(start, end));
        }
    }
    if ram.is_empty() {
        ram = from_iomem(&read(root, "proc/iomem")?.unwrap_or_default());
    }
    Ok(ram)
}

fn enable(root: &Path, setup: &mut Setup) {
    let dirs = [
        "etc/systemd/system",
        "usr/lib/systemd/system",
        "lib/systemd/system",
    ];
    let there = |unit: &&str| dirs.iter().any(|dir| root.join(dir).join(unit).exists());
    let wanted = |unit: &str| {
        let wants = [
            "sysinit.target.wants",
            "multi-user.target.wants",
            "sockets.target.wants",
        ];
        let link = |dir: &&str| root.join("etc/systemd/system").join(dir).join(unit);
        wants.iter().any(|dir| link(dir).symlink_metadata().is_ok())
    };
    let missing: Vec<String> = UNITS
        .iter()
        .filter(|unit| there(unit) && !wanted(unit))
        .map(|unit| (*unit).to_owned())
        .collect();
    if missing.is_empty() {
        return;
    }
    let order = |words: &[&str], units: &[String]| {
        let words = words.iter().map(|w| (*w).to_owned());
        words.chain(units.iter().cloned()).collect::<Vec<_>>()
    };
    setup
        .commands
        .push(order(&["systemctl", "enable"], &missing));
    if missing.iter().any(|unit| unit == UNITS[0]) {
        setup
            .commands
            .push(order(&["systemctl", "start"], &missing[..1]));
    }
}

fn read(root: &Path, path: &str) -> Result<Option<String>, SetupError> {
    let path = root.join(path);
    match fs::read_to_string(&path) {
        Ok(text) => Ok(Some(text)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(SetupError::File {
            what: "read",
            path,
            source,
        }),
    }
}

/// Notes a change, if it is one.
fn change(
    root: &Path,
    path: &str,
    after: Option<String>,
    changes: &mut Vec<Change>,
) -> Result<bool, SetupError> {
    let before = read(root, path)?;
    let changed = before != after;
    if changed {
        changes.push(Change {
            path: path.into(),
            before,
            after,
        });
    }
    Ok(changed)
}

/// Does it. `run` runs a command.
///
/// # Errors
/// What failed; the files are as they were, GRUB's configuration with them, so that
/// it can be done again.
pub fn apply(
    root: &Path,
    setup: &Setup,
    run: &dyn Fn(&[String]) -> Result<(), String>,
) -> Result<(), SetupError> {
    let all = || {
        for change in &setup.changes {
            write(root, &change.path, change.after.as_deref())?;
        }
        for command in &setup.commands {
            run(command).map_err(SetupError::Command)?;
        }
        Ok(())
    };
    all().inspect_err(|_| {
        for change in &setup.changes {
            let _ = write(root, &change.path, change.before.as_deref());
        }
        // What it made of the files that are no more must not be booted.
        let made = setup
            .commands
            .iter()
            .find(|words| words[..] == [grub::UPDATE]);
        let _ = made.map(|words| run(words));
    })
}

fn write(root: &Path, path: &Path, text: Option<&str>) -> Result<(), SetupError> {
    let path = root.join(path);
    let written = match text {
        Some(text) => path
            .parent()
            .map_or(Ok(()), fs::create_dir_all)
            .and_then(|()| files::write_durably(&path, text.as_bytes()))
            .and_then(|()| readable(&path)),
        None => files::remove_durably(&path),
    };
    written.map_err(|source| SetupError::File {
        what: "write",
        path,
        source,
    })
}

/// It holds no secret, and other programs read it.
fn readable(path: &Path) -> io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(path, fs::Permissions::from_mode(0o644))
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
