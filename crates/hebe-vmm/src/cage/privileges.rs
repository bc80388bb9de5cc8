//! Limits, namespaces and capabilities.

use rustix::io::Errno;
use rustix::process::{
    DumpableBehavior, Gid, Resource, Rlimit, Uid, getrlimit, set_dumpable_behavior, setrlimit,
};
use rustix::thread::{
    CapabilitiesSecureBits, CapabilitySet, CapabilitySets, UnshareFlags,
    clear_ambient_capability_set, remove_capability_from_bounding_set, set_capabilities,
    set_capabilities_secure_bits, set_no_new_privs, set_thread_groups, set_thread_res_gid,
    set_thread_res_uid, unshare_unsafe,
};

/// Most open descriptors: a few dozen for the largest VM, and three for each
/// of the connections that the control socket takes.
const DESCRIPTORS_MAX: u64 = 4096;

/// No core file, which would hold guest RAM, few descriptors, and no new
/// rights by starting programs.
pub(super) fn limit() -> Result<String, String> {
    let refuse = |what: &str, errno: Errno| format!("{what} ({errno})");
    set_no_new_privs(true).map_err(|e| refuse("no_new_privs cannot be set", e))?;
    set_dumpable_behavior(DumpableBehavior::NotDumpable)
        .map_err(|e| refuse("memory dumps cannot be forbidden", e))?;
    let none = Rlimit {
        current: Some(0),
        maximum: Some(0),
    };
    setrlimit(Resource::Core, none).map_err(|e| refuse("core files cannot be forbidden", e))?;
    let max = getrlimit(Resource::Nofile)
        .maximum
        .map_or(DESCRIPTORS_MAX, |max| max.min(DESCRIPTORS_MAX));
    let few = Rlimit {
        current: Some(max),
        maximum: Some(max),
    };
    setrlimit(Resource::Nofile, few).map_err(|e| refuse("descriptors cannot be limited", e))?;
    Ok(String::new())
}

/// A network without interfaces, and nobody's shared memory or host name.
/// Taps that are open stay attached where they are.
pub(super) fn leave_namespaces() -> Result<String, String> {
    let flags = UnshareFlags::NEWNET | UnshareFlags::NEWIPC | UnshareFlags::NEWUTS;
    // SAFETY: none of the flags concerns this process's descriptors, memory
    // or directories, and no other thread exists whose view could differ.
    unsafe { unshare_unsafe(flags) }
        .map(|()| "network, ipc, uts".to_owned())
        .map_err(|errno| match errno {
            Errno::PERM => "new namespaces need root: not run as root".to_owned(),
            Errno::INVAL => "off in this kernel".to_owned(),
            other => other.to_string(),
        })
}

/// The first of 2²⁴ users of whom each VMM is one; systemd gives none of them
/// away, and neither does a distribution.
const FIRST_USER: u32 = 1_900_000_000;

/// A user and a group of its own, drawn by the process's number, and no other
/// groups: neither the user that started it nor another VM's. Files are looked at
/// as before (setfsuid(2)), because a VMM must see whether its disks are where a
/// resume would find them; nothing can be opened all the same.
///
/// What the kernel lets root do by capabilities is kept until they are dropped.
pub(super) fn become_nobody_else() -> Result<String, String> {
    if !rustix::process::geteuid().is_root() {
        return Err("not started by root: it stays the user that it is".to_owned());
    }
    let told = |what: &str, errno: Errno| format!("{what} ({errno})");
    let number = FIRST_USER + (std::process::id() & 0x00ff_ffff);
    let (user, group) = (Uid::from_raw(number), Gid::from_raw(number));
    set_capabilities_secure_bits(CapabilitiesSecureBits::NO_SETUID_FIXUP)
        .map_err(|e| told("capabilities cannot be kept so far", e))?;
    set_thread_groups(&[]).map_err(|e| told("other groups cannot be left", e))?;
    set_thread_res_gid(group, group, group).map_err(|e| told("no group of its own", e))?;
    set_thread_res_uid(user, user, user).map_err(|e| told("no user of its own", e))?;
    // SAFETY: setfsuid(2) takes a number and touches no memory; no other thread
    // exists that could differ from this one.
    unsafe { libc::setfsuid(0) };
    Ok(format!("{number}"))
}

/// No capability in any set, for good.
pub(super) fn drop_capabilities() -> Result<String, String> {
    for capability in CapabilitySet::all().iter() {
        match remove_capability_from_bounding_set(capability) {
            // A kernel that does not know it grants it to nobody; and without
            // CAP_SETPCAP there is no_new_privs.
            Ok(()) | Err(Errno::INVAL | Errno::PERM) => {}
            Err(errno) => return Err(format!("the bounding set cannot be emptied ({errno})")),
        }
    }
    match clear_ambient_capability_set() {
        Ok(()) | Err(Errno::INVAL) => {}
        Err(errno) => return Err(format!("ambient ones cannot be dropped ({errno})")),
    }
    let none = CapabilitySets {
        effective: CapabilitySet::empty(),
        permitted: CapabilitySet::empty(),
        inheritable: CapabilitySet::empty(),
    };
    set_capabilities(None, none).map_err(|e| format!("they cannot be dropped ({e})"))?;
    Ok("none".to_owned())
}
