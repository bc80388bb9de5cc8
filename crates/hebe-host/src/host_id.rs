//! Who this host is: `host-id` in the state directory, 16 random bytes in hex.
//!
//! From it the Ethernet addresses of VMs without `mac` follow, so that two hosts in
//! one network never give the same ones. It is neither the host's name, which may
//! change, nor `/etc/machine-id`, which some hosts draw anew at each boot.

use std::fs;
use std::io;
use std::path::PathBuf;

use hebe_types::{HostId, VmName};

use crate::files;
use crate::host::{HostError, Layout};
use crate::ops::fresh_id;

fn path(layout: &Layout) -> PathBuf {
    layout.state.join("host-id")
}

/// The id, if there is one.
///
/// # Errors
/// There is one, and it cannot be read.
pub(crate) fn read(layout: &Layout) -> io::Result<Option<HostId>> {
    let text = match fs::read_to_string(path(layout)) {
        Ok(text) => text,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(e),
    };
    let invalid = || io::Error::new(io::ErrorKind::InvalidData, "it is not 32 hex digits");
    let text = text.trim();
    let hex = text.len() == 32 && text.bytes().all(|b| b.is_ascii_hexdigit());
    let number = u128::from_str_radix(text, 16).ok().filter(|_| hex);
    Ok(Some(HostId(number.ok_or_else(invalid)?.to_be_bytes())))
}

/// The id, drawn now where there is none; `None` where none can be kept: no VM is
/// kept from booting by that.
///
/// # Errors
/// There is one, and it cannot be read: `vm` would get other addresses than it had.
pub(crate) fn have(layout: &Layout, vm: &VmName) -> Result<Option<HostId>, HostError> {
    let refused = |error: io::Error| HostError::Refused {
        name: vm.clone(),
        why: format!(
            "{} cannot be read ({error}), from which VMs without mac = have their Ethernet addresses: put it back, or remove it, and they get new ones when they boot",
            path(layout).display()
        ),
    };
    if let Some(id) = read(layout).map_err(refused)? {
        return Ok(Some(id));
    }
    // Two first boots at once must not draw two.
    let locked = fs::create_dir_all(&layout.state).and_then(|()| files::lock_dir(&layout.state));
    let Ok(_locked) = locked else {
        return Ok(None);
    };
    if let Some(id) = read(layout).map_err(refused)? {
        return Ok(Some(id));
    }
    let id = fresh_id()?.0;
    let text = format!("{:032x}\n", u128::from_be_bytes(id));
    let written = files::write_durably(&path(layout), text.as_bytes());
    Ok(written.is_ok().then_some(HostId(id)))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn it_is_drawn_once_and_a_bad_one_is_said() {
        let root = tempfile::tempdir().expect("dir");
        let layout = Layout::below(root.path());
        let web: VmName = "web".parse().expect("name");
        assert_eq!(read(&layout).expect("none"), None);
        let drawn = std::thread::scope(|scope| {
            let draw = || have(&layout, &web).expect("io").expect("drawn").0;
            let all: Vec<_> = (0..8).map(|_| scope.spawn(draw)).collect();
            let all = all.into_iter().map(|thread| thread.join().expect("joined"));
            all.collect::<BTreeSet<_>>()
        });
        assert_eq!(drawn.len(), 1, "one for all");
        let id = read(&layout).expect("io").expect("there");
        assert!(drawn.contains(&id.0));
        fs::write(path(&layout), "0123456789abcdef0123456789ABCDEF").expect("write");
        let known = HostId(0x0123_4567_89ab_cdef_0123_4567_89ab_cdef_u128.to_be_bytes());
        assert_eq!(have(&layout, &web).expect("io"), Some(known));
        for bad in ["", "+123456789abcdef0123456789abcdef0", "0123"] {
            fs::write(path(&layout), bad).expect("write");
            let refused = have(&layout, &web).expect_err(bad).to_string();
            assert!(refused.contains("host-id"), "{refused}");
        }
        // Nowhere to keep it.
        let nowhere = Layout::below(std::path::Path::new("/proc/no-such-folder"));
        assert_eq!(have(&nowhere, &web).expect("no reason to refuse"), None);
    }
}
