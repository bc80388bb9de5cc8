//! Making a store: from a reserved range to a formatted device.

use std::path::{Path, PathBuf};

use hebe_store::{Access, FormatOptions, Store, StoreError};
use hebe_sys::dax::{self, CreateOptions, Created, Roots};
use hebe_types::VmName;
use serde::Serialize;

use crate::host::{Host, HostError};
use crate::listing;
use crate::notes;
use crate::stores::{DeviceStore, ExecView, StoreAccess, StoreTrouble};
use crate::stores_known;

/// What is to be made.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct InitOptions {
    /// The device or file; by default the one devdax device, or else the one
    /// reserved range is made into a device first.
    pub device: Option<PathBuf>,
    /// The reserved range to make a device of, such as `namespace0.0`.
    pub namespace: Option<String>,
    /// Give up a store that is there, if no VM is frozen in it as far as it can be
    /// read.
    pub force: bool,
}

/// What was made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Initialised {
    /// The store's device or file.
    pub path: PathBuf,
    /// A store was there, and was left as it is.
    pub existing: bool,
    /// The devdax device was made of a reserved range first.
    pub device_made: bool,
    /// Size in bytes.
    pub capacity: u64,
}

/// Makes a store, unless there is one. Doing it again changes nothing.
pub fn init(host: &Host, options: &InitOptions) -> Result<Initialised, HostError> {
    let (path, device_made) = device(host, options)?;
    if !options.force {
        match Store::open(&path, Access::Read) {
            Ok(store) => {
                store.check().map_err(StoreTrouble::from)?;
                let info = store.info().map_err(StoreTrouble::from)?;
                return Ok(Initialised {
                    path,
                    existing: true,
                    device_made,
                    capacity: info.capacity,
                });
            }
            Err(StoreError::NoStore(_)) => {}
            Err(error) => return Err(StoreTrouble::from(error).into()),
        }
    }
    // A VM that is just starting maps memory that this would hand out anew.
    let _only_one = host.lock_all()?;
    refuse_while_in_use(host)?;
    refuse_with_frozen(host, &path)?;
    let force = options.force;
    let old = Store::open(&path, Access::Read).and_then(|store| store.info());
    let info = Store::format(&path, FormatOptions { force }).map_err(StoreTrouble::from)?;
    if let Ok(old) = old {
        notes::forget_store(&host.layout, old.uuid);
        stores_known::forget(&host.layout, old.uuid);
    }
    Ok(Initialised {
        path,
        existing: false,
        device_made,
        capacity: info.capacity,
    })
}

fn device(host: &Host, options: &InitOptions) -> Result<(PathBuf, bool), HostError> {
    if let Some(path) = options.device.as_ref().or(host.layout.store.as_ref()) {
        return Ok((path.clone(), false));
    }
    let roots = Roots::default();
    let trouble = |e: dax::DaxError| StoreTrouble::from(StoreError::from(e));
    if options.namespace.is_none() {
        if let Some(path) = Store::find().map_err(StoreTrouble::from)? {
            return Ok((path, false));
        }
        let devices = dax::list(Path::new("/sys"), Path::new("/dev"));
        if let [only] = &devices.map_err(trouble)?[..] {
            return Ok((only.path.clone(), false));
        }
    }
    let create = CreateOptions {
        namespace: options.namespace.clone(),
        force: options.force,
    };
    Ok(
        match dax::create_from_pmem(&roots, &create).map_err(trouble)? {
            Created::Existing(device) => (device.path, false),
            Created::New(device) => (device.path, true),
        },
    )
}

/// Not even force takes memory from a VM that runs in it.
fn refuse_while_in_use(host: &Host) -> Result<(), HostError> {
    let survey = listing::survey(host);
    let running = survey
        .rows
        .values()
        .find(|row| row.life.has_vmm() && row.segment.is_some());
    match running {
        Some(row) => Err(HostError::Refused {
            name: row.name.clone(),
            why: "it runs in this store: stop it before the store is formatted".into(),
        }),
        None => Ok(()),
    }
}

/// A VM that is frozen is given up by its name. What cannot be read holds nothing
/// that could be resumed, and is what force is for.
fn refuse_with_frozen(host: &Host, path: &Path) -> Result<(), HostError> {
    let view = DeviceStore::new(Some(path.to_owned())).view();
    let view = view.ok().flatten();
    let segments = view.iter().flat_map(|view| &view.segments);
    let frozen = segments.filter(|segment| {
        let given_up = || notes::is_given_up(&host.layout, segment).unwrap_or(false);
        matches!(segment.exec, ExecView::Frozen { .. }) && !given_up()
    });
    let names: Vec<VmName> = frozen.filter_map(|segment| segment.name.clone()).collect();
    if names.is_empty() {
        return Ok(());
    }
    let path = path.to_owned();
    Err(HostError::FrozenInStore { path, names })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::Layout;
    use crate::system::Machine;
    use std::sync::Arc;

    #[test]
    fn a_store_is_made_once_and_kept_after_that() {
        let root = tempfile::tempdir().expect("dir");
        let path = root.path().join("store");
        let file = std::fs::File::create(&path).expect("create");
        file.set_len(64 << 20).expect("size");
        let mut layout = Layout::below(root.path());
        layout.store = Some(path.clone());
        let host = Host {
            store: Arc::new(DeviceStore::new(Some(path))),
            system: Arc::new(Machine::default()),
            layout,
        };
        let first = init(&host, &InitOptions::default()).expect("made");
        assert!(!first.existing);
        let uuid = host.store.view().expect("view").expect("store").uuid;
        let second = init(&host, &InitOptions::default()).expect("kept");
        assert!(second.existing);
        let same = host.store.view().expect("view").expect("store").uuid;
        assert_eq!(uuid, same);
        let options = InitOptions {
            force: true,
            ..InitOptions::default()
        };
        assert!(!init(&host, &options).expect("again").existing);
        let other = host.store.view().expect("view").expect("store").uuid;
        assert_ne!(uuid, other);
    }
}
