//! Which stores VMs of this host may be frozen in: `stores/UUID.json` in the state
//! directory.
//!
//! A VM that is about to be frozen is noted ([`crate::notes`]); but where that
//! cannot be written while the host goes down, because the directory is full, it is
//! frozen all the same. Under a kernel without its store nothing would tell of it
//! then, if its definition is deleted, too, and what it needs to go on (what was
//! written over its disks, what it was booted with) would look like left by nobody.
//! So each store is written down long before, when a VM is booted into it, and
//! as long as one of them is not here, nothing of a VM that nobody knows goes.
//!
//! A store is forgotten when another one is made in its place. One that is gone for
//! good otherwise costs disk space alone: what such VMs left stays, until its file
//! here is removed.

use std::fs;
use std::path::PathBuf;

use hebe_sys::proc::parse_uuid;
use hebe_types::VmId;
use serde::Serialize;

use crate::files;
use crate::host::{Host, HostError, Layout};
use crate::stores::StoreView;

/// What is written down, for people: that it is there is what counts.
#[derive(Serialize)]
struct StoreV1<'a> {
    /// Layout of this file.
    version: u32,
    /// The store's device then.
    path: &'a PathBuf,
}

fn dir(layout: &Layout) -> PathBuf {
    layout.state.join("stores")
}

fn path(layout: &Layout, uuid: [u8; 16]) -> PathBuf {
    dir(layout).join(format!("{}.json", VmId(uuid)))
}

/// The store that is here, where it is a device's: what is carried from kernel to
/// kernel alone is nowhere else than where it arrived.
fn here(store: Option<&StoreView>) -> Option<&StoreView> {
    store.filter(|store| !store.kept_only)
}

/// Writes the store that is here down, if there is one; durable when this returns
/// without error.
///
/// # Errors
/// The file cannot be written.
pub(crate) fn know(host: &Host, store: Option<&StoreView>) -> Result<(), HostError> {
    let Some(store) = here(store) else {
        return Ok(());
    };
    let file = path(&host.layout, store.uuid);
    if file.exists() {
        return Ok(());
    }
    let text = StoreV1 {
        version: 1,
        path: &store.path,
    };
    files::write_json(&file, &text).map_err(HostError::file("write", &file))
}

/// Whether a store that VMs may be frozen in is not here; also where that cannot be
/// told. `store` is the one that is.
pub(crate) fn is_any_away(layout: &Layout, store: Option<&StoreView>) -> bool {
    let here = here(store).map(|store| store.uuid);
    let entries = match fs::read_dir(dir(layout)) {
        Ok(entries) => entries,
        Err(e) => return e.kind() != std::io::ErrorKind::NotFound,
    };
    entries.into_iter().any(|entry| {
        let Ok(entry) = entry else {
            return true;
        };
        let file = entry.file_name();
        let uuid = file.to_str().and_then(|file| file.strip_suffix(".json"));
        uuid.and_then(parse_uuid)
            .is_some_and(|uuid| Some(uuid) != here)
    })
}

/// The store is no more: another one was made in its place.
pub(crate) fn forget(layout: &Layout, uuid: [u8; 16]) {
    let _ = files::remove_durably(&path(layout, uuid));
}
