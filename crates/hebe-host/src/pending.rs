//! VMs that a cold reboot shut down, and the next boot brings back:
//! `pending.json`.
//!
//! A VM is on the list from before it is told to power off until it is up
//! again, or its owner decides otherwise: who starts, stops or drops it takes
//! it from the list, which would boot it against that order with a definition
//! of long ago.
//!
//! Each entry is read for itself, and what cannot be read stays as it is: a VM
//! of another release is neither booted nor forgotten, and costs no other.

use std::fs::{self, File};
use std::io;
use std::path::PathBuf;

use hebe_types::{VmConfig, VmName};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::files;
use crate::host::{Host, HostError, Layout};

/// VMs that a cold reboot shuts down (`pending.json`).
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Pending {
    /// What boots each.
    pub vms: Vec<VmConfig>,
    /// Entries of which this release does not know what to make.
    unread: Vec<(Value, String)>,
}

/// The file, entry by entry.
#[derive(Default, Serialize, Deserialize)]
struct Entries {
    vms: Vec<Value>,
}

fn path(layout: &Layout) -> PathBuf {
    layout.state.join("pending.json")
}

fn name_of(entry: &Value) -> Option<&str> {
    entry.get("name")?.as_str()
}

impl Pending {
    /// The list; empty when there is none.
    ///
    /// # Errors
    /// The file as a whole cannot be read.
    pub fn read(layout: &Layout) -> Result<Self, HostError> {
        let path = path(layout);
        let read: io::Result<Option<Entries>> = files::read_json(&path);
        let entries = read.map_err(HostError::file("read", &path))?;
        let mut pending = Self::default();
        for entry in entries.unwrap_or_default().vms {
            match VmConfig::deserialize(&entry) {
                Ok(config) => pending.vms.push(config),
                Err(error) => pending.unread.push((entry, error.to_string())),
            }
        }
        Ok(pending)
    }

    /// Writes the list durably; an empty one is no file.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write(&self, host: &Host) -> Result<(), HostError> {
        let path = path(&host.layout);
        let mut entries = Entries::default();
        for config in &self.vms {
            let entry = serde_json::to_value(config).map_err(io::Error::from);
            let entry = entry.map_err(HostError::file("write", &path))?;
            entries.vms.push(entry);
        }
        let unread = self.unread.iter().map(|(entry, _)| entry.clone());
        entries.vms.extend(unread);
        let written = if entries.vms.is_empty() {
            files::remove_durably(&path)
        } else {
            files::write_json(&path, &entries)
        };
        written.map_err(HostError::file("write", &path))
    }

    /// Whether a VM is on the list; also where an entry does not say which one it is.
    pub fn has(&self, name: &VmName) -> bool {
        let own = |entry: &Value| name_of(entry).is_none_or(|of| of == name.as_str());
        self.vms.iter().any(|config| config.name == *name)
            || self.unread.iter().any(|(entry, _)| own(entry))
    }

    /// Puts a VM on the list, in place of what stood there of it.
    pub fn put(&mut self, config: VmConfig) {
        self.remove(&config.name);
        self.vms.push(config);
    }

    /// Takes a VM from the list; whether it was on it.
    pub fn remove(&mut self, name: &VmName) -> bool {
        let before = self.vms.len() + self.unread.len();
        self.vms.retain(|config| config.name != *name);
        let own = |entry: &Value| name_of(entry) == Some(name.as_str());
        self.unread.retain(|(entry, _)| !own(entry));
        self.vms.len() + self.unread.len() != before
    }

    /// Why VMs on the list cannot be booted, with the way out.
    pub fn trouble(&self, layout: &Layout) -> Option<String> {
        let (first, why) = self.unread.first()?;
        let names = self.unread.iter().map(|(entry, _)| name_of(entry));
        let names: Vec<&str> = names.map(|name| name.unwrap_or("?")).collect();
        let name = name_of(first).unwrap_or("NAME");
        Some(format!(
            "{} says in a way that this release does not know ({why}) how to boot {}: `hebe start {name}` boots what is defined now, `hebe drop {name}` gives it up, or go back to the release that wrote it",
            path(layout).display(),
            names.join(", ")
        ))
    }
}

/// What a file that cannot be read as a whole means for the VMs on it.
pub(crate) fn unreadable(layout: &Layout, error: &HostError) -> String {
    format!(
        "{}, so nobody knows which VMs the last cold reboot shut down: start them with `hebe start NAME`, and remove {}",
        crate::listing::with_cause(error),
        path(layout).display()
    )
}

/// Orders for several VMs run at once, and each rewrites the whole list.
fn lock_list(layout: &Layout) -> Result<File, HostError> {
    let dir = &layout.state;
    files::lock_dir(dir).map_err(HostError::file("lock", dir))
}

/// Puts a VM on the list while others may be taken from it.
///
/// # Errors
/// The file cannot be read or written.
pub(crate) fn add(host: &Host, config: VmConfig) -> Result<(), HostError> {
    let dir = &host.layout.state;
    fs::create_dir_all(dir).map_err(HostError::file("create", dir))?;
    let _locked = lock_list(&host.layout)?;
    let mut pending = Pending::read(&host.layout)?;
    pending.put(config);
    pending.write(host)
}

/// Takes a VM from the list because its owner decided about it. Nothing is
/// written where it is not on it.
///
/// # Errors
/// The file cannot be written.
pub(crate) fn settle(host: &Host, name: &VmName) -> Result<(), HostError> {
    let path = path(&host.layout);
    if !path.exists() {
        return Ok(());
    }
    let _locked = lock_list(&host.layout)?;
    // A list that cannot be read boots nobody.
    let Ok(mut pending) = Pending::read(&host.layout) else {
        return Ok(());
    };
    if pending.remove(name) {
        pending.write(host)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(root: &std::path::Path) -> Host {
        Host {
            layout: Layout::below(root),
            ..Host::here()
        }
    }

    fn config(name: &str) -> VmConfig {
        toml::from_str(&format!(
            "name = \"{name}\"\nmemory = \"4MiB\"\nkernel = \"/k\""
        ))
        .expect("a definition")
    }

    /// An entry of another release costs no other VM, and outlasts this one.
    #[test]
    fn an_entry_that_cannot_be_read_costs_no_other_and_is_kept() {
        let root = tempfile::tempdir().expect("dir");
        let host = host(root.path());
        let mut pending = Pending::default();
        pending.put(config("db"));
        pending.put(config("mail"));
        pending.write(&host).expect("write");
        let path = path(&host.layout);
        let text = fs::read_to_string(&path).expect("read");
        let newer = text.replace("\"mail\",", "\"mail\", \"of-tomorrow\": 1,");
        assert_ne!(text, newer);
        fs::write(&path, newer).expect("write");
        let mut pending = Pending::read(&host.layout).expect("read");
        assert_eq!(pending.vms, [config("db")]);
        let trouble = pending.trouble(&host.layout).expect("mail");
        for word in ["mail", "of-tomorrow", "hebe start mail"] {
            assert!(trouble.contains(word), "{trouble}");
        }
        pending.put(config("web"));
        pending.write(&host).expect("write");
        settle(&host, &config("db").name).expect("settled");
        settle(&host, &config("web").name).expect("settled");
        let left = Pending::read(&host.layout).expect("read");
        assert!(left.vms.is_empty() && left.trouble(&host.layout).is_some());
        settle(&host, &config("mail").name).expect("its owner decided");
        assert!(!path.exists(), "an empty list is no file");
    }

    /// Orders for several VMs at once: none brings back what another took, or
    /// takes what another put there.
    #[test]
    fn several_vms_are_taken_at_once() {
        let root = tempfile::tempdir().expect("dir");
        let host = host(root.path());
        let names: Vec<String> = (0..16).map(|n| format!("vm{n}")).collect();
        let mut pending = Pending::default();
        names.iter().for_each(|name| pending.put(config(name)));
        pending.put(config("left"));
        pending.write(&host).expect("write");
        std::thread::scope(|scope| {
            for name in &names {
                let host = &host;
                scope.spawn(move || settle(host, &config(name).name).expect("settled"));
                let new = config(&format!("new-{name}"));
                scope.spawn(move || add(host, new).expect("added"));
            }
        });
        let left = Pending::read(&host.layout).expect("read");
        let left: std::collections::BTreeSet<String> =
            left.vms.iter().map(|c| c.name.to_string()).collect();
        let new = names.iter().map(|name| format!("new-{name}"));
        assert_eq!(left, new.chain(["left".to_owned()]).collect());
    }
}
