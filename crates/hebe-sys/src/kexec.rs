//! Loading the next kernel and leaving this one.
//!
//! `kexec_file_load(2)` puts kernel, initramfs and command line into memory
//! while everything still runs; `reboot(2)` then jumps, resets or powers off.
//! Nothing here calls `sync(2)`: the caller does, once before it stops the
//! VMs (when that may take long) and once after (when little is left), see
//! `hebe-host`'s reboot.

use std::ffi::{CString, c_long, c_uint};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::path::Path;

/// `KEXEC_FILE_UNLOAD`, `linux/kexec.h`.
const KEXEC_FILE_UNLOAD: u64 = 0x1;
/// `KEXEC_FILE_NO_INITRAMFS`, `linux/kexec.h`.
const KEXEC_FILE_NO_INITRAMFS: u64 = 0x4;
/// Longest command line that x86 Linux takes, its final NUL counted
/// (`COMMAND_LINE_SIZE`).
pub const CMDLINE_LEN_MAX: usize = 2048;

// The argument order below is that of x86-64 Linux.
const _: () = assert!(libc::SYS_kexec_file_load == 320);

/// Why the next kernel could not be loaded, or the jump did not happen.
#[derive(Debug, thiserror::Error)]
pub enum KexecError {
    /// The caller may not load kernels.
    #[error(
        "this process may not load a kernel: run as root with CAP_SYS_BOOT, and check that /proc/sys/kernel/kexec_load_disabled is 0"
    )]
    NotPermitted(#[source] io::Error),
    /// Lockdown or secure boot wants a signed image.
    #[error(
        "the running kernel takes signed images only (secure boot or lockdown, see /sys/kernel/security/lockdown): use a kernel signed for this machine"
    )]
    NotSigned(#[source] io::Error),
    /// The image is not a kernel that can be loaded.
    #[error("the file is not a kernel that kexec can load: give an x86-64 bzImage")]
    NotAKernel(#[source] io::Error),
    /// Another load is going on, or a crash kernel is being changed.
    #[error(
        "another program is loading a kernel at this moment: wait until it has finished, then try again"
    )]
    Busy(#[source] io::Error),
    /// The running kernel has no kexec_file_load.
    #[error("the running kernel has no kexec_file_load: it needs CONFIG_KEXEC_FILE=y")]
    NotSupported(#[source] io::Error),
    /// No memory for the image.
    #[error("not enough free memory to load the kernel and its initramfs")]
    NoMemory(#[source] io::Error),
    /// The command line cannot be passed.
    #[error("the kernel command line has {0} bytes: at most {max}, and no NUL", max = CMDLINE_LEN_MAX - 1)]
    Cmdline(usize),
    /// A jump was asked for and no image is loaded.
    #[error("no kernel is loaded to jump into: load one first")]
    NothingLoaded,
    /// Anything else.
    #[error("the kernel refused to load or start the new kernel")]
    Other(#[source] io::Error),
}

impl KexecError {
    /// Maps the error of `kexec_file_load(2)` to its meaning.
    fn from_load(error: io::Error) -> Self {
        match error.raw_os_error() {
            // EACCES and EKEYREJECTED come from the signature check; lockdown
            // itself answers EPERM, told apart by its own file.
            Some(libc::EPERM) if locked_down() => Self::NotSigned(error),
            Some(libc::EPERM) => Self::NotPermitted(error),
            Some(
                libc::EACCES | libc::EKEYREJECTED | libc::ENODATA | libc::EBADMSG | libc::ENOKEY,
            ) => Self::NotSigned(error),
            Some(libc::ENOEXEC | libc::EINVAL) => Self::NotAKernel(error),
            Some(libc::EBUSY) => Self::Busy(error),
            Some(libc::ENOSYS) => Self::NotSupported(error),
            Some(libc::ENOMEM | libc::EADDRNOTAVAIL) => Self::NoMemory(error),
            _ => Self::Other(error),
        }
    }
}

fn locked_down() -> bool {
    std::fs::read_to_string("/sys/kernel/security/lockdown")
        .is_ok_and(|text| !text.contains("[none]"))
}

/// Loads `kernel` (a bzImage) with `initrd` and `cmdline` for a later
/// [`leave`] by [`Leave::Kexec`]. An image loaded before is replaced. The
/// running system goes on unchanged.
pub fn load(
    kernel: BorrowedFd<'_>,
    initrd: Option<BorrowedFd<'_>>,
    cmdline: &str,
) -> Result<(), KexecError> {
    if cmdline.len() >= CMDLINE_LEN_MAX {
        return Err(KexecError::Cmdline(cmdline.len()));
    }
    let text = CString::new(cmdline).map_err(|_| KexecError::Cmdline(cmdline.len()))?;
    let flags = if initrd.is_some() {
        0
    } else {
        KEXEC_FILE_NO_INITRAMFS
    };
    let initrd_fd = initrd.map_or(-1, |fd| fd.as_raw_fd());
    kexec_file_load(kernel.as_raw_fd(), initrd_fd, &text, flags).map_err(KexecError::from_load)
}

/// Unloads the image, if one is loaded.
pub fn unload() -> Result<(), KexecError> {
    let nothing = CString::default();
    kexec_file_load(-1, -1, &nothing, KEXEC_FILE_UNLOAD).map_err(KexecError::from_load)
}

fn kexec_file_load(
    kernel_fd: RawFd,
    initrd_fd: RawFd,
    cmdline: &CString,
    flags: u64,
) -> io::Result<()> {
    let text = cmdline.as_bytes_with_nul();
    // SAFETY: `text` is NUL-terminated and lives across the call, and its
    // length counts the NUL as the kernel expects. The kernel only reads it.
    // Wrong descriptors are answered with EBADF.
    let result = unsafe {
        libc::syscall(
            libc::SYS_kexec_file_load,
            c_long::from(kernel_fd),
            c_long::from(initrd_fd),
            text.len(),
            text.as_ptr(),
            flags,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Whether an image is loaded. `None` when the running kernel has no kexec.
pub fn is_loaded() -> Option<bool> {
    let text = std::fs::read_to_string(Path::new("/sys/kernel/kexec_loaded")).ok()?;
    Some(text.trim() == "1")
}

/// Whether loading kernels was switched off for good
/// (`kernel.kexec_load_disabled`). `None` when the running kernel has no kexec.
pub fn is_disabled() -> Option<bool> {
    let text = std::fs::read_to_string("/proc/sys/kernel/kexec_load_disabled").ok()?;
    Some(text.trim() != "0")
}

/// Ways to leave the running kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Leave {
    /// Jump into the loaded image; memory stays as it is.
    Kexec,
    /// Reset the machine through its firmware.
    Reset,
    /// Power off.
    PowerOff,
}

/// Leaves the running kernel at once, without stopping processes and without
/// `sync(2)`. Returns only when that failed: everything still runs then.
pub fn leave(how: Leave) -> KexecError {
    if how == Leave::Kexec && is_loaded() == Some(false) {
        return KexecError::NothingLoaded;
    }
    let command: c_uint = match how {
        Leave::Kexec => libc::LINUX_REBOOT_CMD_KEXEC as c_uint,
        Leave::Reset => libc::LINUX_REBOOT_CMD_RESTART as c_uint,
        Leave::PowerOff => libc::LINUX_REBOOT_CMD_POWER_OFF as c_uint,
    };
    // SAFETY: reboot(2) takes two magic numbers and a command, and no memory
    // for the commands used here.
    unsafe {
        libc::syscall(
            libc::SYS_reboot,
            libc::LINUX_REBOOT_MAGIC1 as c_uint,
            libc::LINUX_REBOOT_MAGIC2 as c_uint,
            command,
            std::ptr::null::<u8>(),
        );
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::EPERM) => KexecError::NotPermitted(error),
        Some(libc::EINVAL) if how == Leave::Kexec => KexecError::NothingLoaded,
        _ => KexecError::Other(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn a_long_command_line_is_refused_before_the_kernel_sees_it() {
        let null = std::fs::File::open("/dev/null").expect("open");
        let long = "x".repeat(CMDLINE_LEN_MAX);
        let error = load(null.as_fd(), None, &long).expect_err("too long");
        assert!(matches!(error, KexecError::Cmdline(2048)), "{error}");
        assert!(matches!(
            load(null.as_fd(), None, "a\0b"),
            Err(KexecError::Cmdline(3))
        ));
    }

    #[test]
    fn a_file_that_is_no_kernel_is_refused_with_a_sentence() {
        let null = std::fs::File::open("/dev/null").expect("open");
        let error = load(null.as_fd(), None, "quiet").expect_err("not a kernel");
        assert!(error.to_string().len() > 20, "{error}");
    }

    #[test]
    fn errors_name_the_way_out() {
        let text = |code| KexecError::from_load(io::Error::from_raw_os_error(code)).to_string();
        assert!(text(libc::ENOEXEC).contains("bzImage"));
        assert!(text(libc::EBUSY).contains("wait"));
        assert!(text(libc::ENOSYS).contains("CONFIG_KEXEC_FILE"));
        assert!(text(libc::EKEYREJECTED).contains("signed"));
    }
}
