//! VMs that failed, and were ended by a reboot of the host: `failed/NAME.json`.
//!
//! With a VM that KVM gave up nothing can be continued, so that a reboot ends its
//! VMM instead of waiting for a person ([`hebe_flow::reboot::Fate::End`]). Why it
//! failed is known to that VMM alone, which ends here: so it is noted before
//! that, on what outlives the kernel. Afterwards the VM is listed as crashed, with
//! this reason, until it is booted, stopped or dropped.
//!
//! A note is a word for people, and for the rules by which crashed VMs are
//! started again; no state hangs on it. One that cannot be written costs its VM
//! the reason.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::PathBuf;

use hebe_types::{VmId, VmName};
use serde::{Deserialize, Serialize};

use crate::files;
use crate::host::{Host, HostError, Layout};

const VERSION: u32 = 1;
/// Longest reason, in characters: a guest may have a hand in it.
const WHY_MAX: usize = 1000;

/// One note.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct FailedV1 {
    /// Layout of this file.
    version: u32,
    /// Which life of the VM.
    vm: VmId,
    /// Why it could not go on.
    why: String,
    /// When this was noted: nanoseconds since 1970.
    noted_ns: u64,
}

/// What is known of a VM that failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Failed {
    /// Which life of it; `None` where the note cannot be read.
    vm: Option<VmId>,
    /// What is said of it.
    pub(crate) sentence: String,
}

impl Failed {
    /// Whether it is about this life, as far as that is known.
    pub(crate) fn is_of(&self, vm: Option<VmId>) -> bool {
        self.vm.is_none() || vm.is_none() || self.vm == vm
    }
}

fn dir(layout: &Layout) -> PathBuf {
    layout.state.join("failed")
}

fn path(layout: &Layout, name: &VmName) -> PathBuf {
    dir(layout).join(format!("{name}.json"))
}

/// Notes why a VM failed; durable when this returns without error.
///
/// # Errors
/// The file cannot be written.
pub(crate) fn note(host: &Host, name: &VmName, vm: VmId, why: &str) -> Result<(), HostError> {
    let note = FailedV1 {
        version: VERSION,
        vm,
        why: why.chars().take(WHY_MAX).collect(),
        noted_ns: host.system.stamp().realtime_ns,
    };
    let path = path(&host.layout, name);
    files::write_json(&path, &note).map_err(HostError::file("write", &path))
}

/// Every VM of which such a note is there.
pub(crate) fn all(layout: &Layout) -> BTreeMap<VmName, Failed> {
    let entries = fs::read_dir(dir(layout)).into_iter().flatten().flatten();
    let names = entries.filter_map(|entry| {
        let file = entry.file_name();
        let name = file.to_str()?.strip_suffix(".json")?;
        name.parse::<VmName>().ok()
    });
    names
        .filter_map(|name| {
            let failed = read(layout, &name)?;
            Some((name, failed))
        })
        .collect()
}

fn read(layout: &Layout, name: &VmName) -> Option<Failed> {
    let path = path(layout, name);
    let read: io::Result<Option<FailedV1>> = files::read_json(&path);
    let known = |note: FailedV1| match note.version {
        VERSION => Ok(note),
        _ => Err(io::Error::other("it is of another release")),
    };
    let checked = read.and_then(|note| note.map(known).transpose());
    Some(match checked {
        Ok(note) => {
            let note = note?;
            let why = hebe_api::plain(&note.why);
            Failed {
                vm: Some(note.vm),
                sentence: format!("it failed, and a reboot of the host ended it: {why}"),
            }
        }
        Err(error) => Failed {
            vm: None,
            sentence: format!(
                "it failed, and a reboot of the host ended it; why is not known: {} cannot be read ({error})",
                path.display()
            ),
        },
    })
}

/// Forgets it: the VM was booted, stopped or dropped. What stays is a reason that
/// is shown where there is no other.
pub(crate) fn forget(layout: &Layout, name: &VmName) {
    let _ = files::remove_durably(&path(layout, name));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_note_is_of_one_life_and_one_that_cannot_be_read_is_said() {
        let root = tempfile::tempdir().expect("dir");
        let host = Host {
            layout: Layout::below(root.path()),
            ..Host::here()
        };
        let web: VmName = "web".parse().expect("name");
        let (own, other) = (VmId([1; 16]), VmId([2; 16]));
        let why = format!("\u{1b}[31mKVM gave it up {}", "x".repeat(5000));
        note(&host, &web, own, &why).expect("noted");
        let found = &all(&host.layout)[&web];
        assert!(found.sentence.contains("KVM gave it up"));
        assert!(found.sentence.len() < 1200, "bounded");
        assert!(!found.sentence.contains(char::is_control), "and plain");
        assert!(found.is_of(Some(own)) && found.is_of(None));
        assert!(!found.is_of(Some(other)));
        let golden = "{\"version\":1,\"vm\":[1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1],\"why\":\"KVM\",\"noted_ns\":7}";
        fs::write(path(&host.layout, &web), golden).expect("write");
        let found = &all(&host.layout)[&web];
        assert!(found.sentence.ends_with(": KVM"), "{found:?}");
        let newer = golden.replace("n\":1,", "n\":2,");
        for text in ["{", &newer, &golden.replace("why", "what")] {
            fs::write(path(&host.layout, &web), text).expect("write");
            let found = &all(&host.layout)[&web];
            assert!(found.sentence.contains("cannot be read"), "{found:?}");
        }
        forget(&host.layout, &web);
        forget(&host.layout, &web);
        assert!(all(&host.layout).is_empty());
    }
}
