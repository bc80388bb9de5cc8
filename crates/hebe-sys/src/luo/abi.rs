//! The ioctls of `/dev/liveupdate`, `include/uapi/linux/liveupdate.h` (Linux 7.3).
//!
//! Each takes a struct whose first field is its length; a kernel that knows
//! more fields takes the missing ones for zero.

use std::io;
use std::mem::offset_of;
use std::os::fd::{AsRawFd, BorrowedFd};

use libc::{c_int, c_ulong};

/// Longest name of a session, its final NUL counted.
pub(super) const NAME_LEN: usize = 64;

const TYPE: c_ulong = 0xba;

const fn io(number: c_ulong) -> c_ulong {
    TYPE << 8 | number
}

pub(super) const CREATE_SESSION: c_ulong = io(0x00);
pub(super) const RETRIEVE_SESSION: c_ulong = io(0x01);
pub(super) const PRESERVE_FD: c_ulong = io(0x40);
pub(super) const RETRIEVE_FD: c_ulong = io(0x41);
pub(super) const FINISH: c_ulong = io(0x42);

/// `liveupdate_ioctl_create_session` and `liveupdate_ioctl_retrieve_session`.
#[repr(C)]
pub(super) struct Session {
    pub size: u32,
    pub fd: i32,
    pub name: [u8; NAME_LEN],
}

/// `liveupdate_session_preserve_fd` and `liveupdate_session_retrieve_fd`.
#[repr(C, align(8))]
pub(super) struct File {
    pub size: u32,
    pub fd: i32,
    pub token: u64,
}

/// `liveupdate_session_finish`.
#[repr(C)]
pub(super) struct Finish {
    pub size: u32,
    pub reserved: u32,
}

const _: () = {
    assert!(size_of::<Session>() == 72 && offset_of!(Session, name) == 8);
    assert!(size_of::<File>() == 16 && offset_of!(File, token) == 8);
    assert!(size_of::<Finish>() == 8);
    assert!(CREATE_SESSION == 0xba00 && FINISH == 0xba42);
};

/// A struct that one of these ioctls takes.
///
/// # Safety
/// The type is `repr(C)`, has no pointers, and begins with its own length.
pub(super) unsafe trait Argument {}

// SAFETY: as the type says.
unsafe impl Argument for Session {}
// SAFETY: as the type says.
unsafe impl Argument for File {}
// SAFETY: as the type says.
unsafe impl Argument for Finish {}

/// Makes the call; on success the kernel has filled its fields in.
pub(super) fn call<T: Argument>(
    fd: BorrowedFd<'_>,
    request: c_ulong,
    argument: &mut T,
) -> io::Result<()> {
    // SAFETY: by `Argument` the struct says how long it is, and the kernel
    // reads and writes no more than that. It is exclusive for the call. A
    // descriptor of another kind of file answers ENOTTY.
    let result: c_int = unsafe { libc::ioctl(fd.as_raw_fd(), request, &raw mut *argument) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}
