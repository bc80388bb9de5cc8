//! System calls that init needs and no crate wraps.

use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::AsRawFd;
use std::path::Path;

use anyhow::{Context, Result};
use rustix::mount::{MountFlags, mount};

/// linux/sockios.h
const SIOCBRADDBR: libc::c_ulong = 0x89a0;
/// linux/sockios.h
const SIOCBRADDIF: libc::c_ulong = 0x89a2;
/// linux/if_tun.h
const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
/// linux/if_tun.h
const TUNSETPERSIST: libc::c_ulong = 0x4004_54cb;

/// Time-stamp counter: goes on across kexec.
pub fn tsc() -> u64 {
    // SAFETY: RDTSC reads a counter and touches no memory.
    unsafe { std::arch::x86_64::_rdtsc() }
}

/// Wall clock, in nanoseconds since 1970.
pub fn realtime_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Realtime);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

/// Makes the console standard input and output, where there is one.
pub fn take_console() -> Result<()> {
    let options = File::options().read(true).write(true).to_owned();
    if let Ok(console) = options.open("/dev/console") {
        rustix::stdio::dup2_stdin(&console)?;
        rustix::stdio::dup2_stdout(&console)?;
        rustix::stdio::dup2_stderr(&console)?;
    }
    Ok(())
}

/// Mounts a pseudo file system; its mount point is created.
pub fn mount_pseudo(kind: &str, target: &str, data: &str) -> Result<()> {
    fs::create_dir_all(target).with_context(|| format!("cannot create {target}"))?;
    let data = CString::new(data)?;
    mount(kind, target, kind, MountFlags::empty(), data.as_c_str())
        .with_context(|| format!("cannot mount {kind} on {target}"))
}

/// What a mounted disk is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Reading alone.
    Read,
    /// Reading and writing.
    Write,
}

/// Mounts a block device.
pub fn mount_disk(device: &str, target: &str, kind: &str, access: Access) -> Result<()> {
    fs::create_dir_all(target).with_context(|| format!("cannot create {target}"))?;
    let flags = match access {
        Access::Read => MountFlags::NOATIME | MountFlags::RDONLY,
        Access::Write => MountFlags::NOATIME,
    };
    mount(device, target, kind, flags, c"")
        .with_context(|| format!("cannot mount {device} on {target}"))
}

/// Makes `target` another name of the folder `source`.
pub fn bind(source: &str, target: &str) -> Result<()> {
    fs::create_dir_all(source).with_context(|| format!("cannot create {source}"))?;
    fs::create_dir_all(target).with_context(|| format!("cannot create {target}"))?;
    rustix::mount::mount_bind(source, target)
        .with_context(|| format!("cannot bind {source} to {target}"))
}

/// Loads a module that lies uncompressed in a file.
pub fn load_module(path: &Path, parameters: &str) -> io::Result<()> {
    let file = File::open(path)?;
    let parameters = CString::new(parameters)?;
    // SAFETY: the descriptor and the NUL-terminated parameter string live
    // through the call; the kernel copies what it needs.
    let rc = unsafe {
        libc::syscall(
            libc::SYS_finit_module,
            file.as_raw_fd(),
            parameters.as_ptr(),
            0,
        )
    };
    match rc {
        0 => Ok(()),
        _ => match io::Error::last_os_error() {
            e if e.raw_os_error() == Some(libc::EEXIST) => Ok(()),
            e => Err(e),
        },
    }
}

/// Loads a kernel for the jump by [`reboot`] (kexec_file_load(2)).
pub fn kexec_load(kernel: &str, initrd: &str, cmdline: &str) -> Result<()> {
    let kernel_file = File::open(kernel).with_context(|| format!("cannot open {kernel}"))?;
    let initrd_file = File::open(initrd).with_context(|| format!("cannot open {initrd}"))?;
    let cmdline = CString::new(cmdline)?;
    // SAFETY: both descriptors and the command line (with its NUL counted, as
    // the call wants) live through the call.
    let rc = unsafe {
        libc::syscall(
            libc::SYS_kexec_file_load,
            kernel_file.as_raw_fd(),
            initrd_file.as_raw_fd(),
            cmdline.as_bytes_with_nul().len(),
            cmdline.as_ptr(),
            0,
        )
    };
    if rc != 0 {
        return Err(io::Error::last_os_error()).context("kexec_file_load failed");
    }
    Ok(())
}

/// Takes the loaded kernel away, so that the jump fails (kexec_file_load(2),
/// `KEXEC_FILE_UNLOAD`).
pub fn kexec_unload() -> Result<()> {
    const KEXEC_FILE_UNLOAD: libc::c_ulong = 1;
    // SAFETY: with this flag the call takes no descriptor and no text.
    let rc = unsafe {
        libc::syscall(
            libc::SYS_kexec_file_load,
            -1,
            -1,
            0,
            std::ptr::null::<libc::c_char>(),
            KEXEC_FILE_UNLOAD,
        )
    };
    if rc != 0 {
        return Err(io::Error::last_os_error()).context("kexec_file_load failed");
    }
    Ok(())
}

/// What reboot(2) can do.
pub enum Reboot {
    /// Into the loaded kernel.
    Kexec,
    /// Power off.
    PowerOff,
}

/// Ends this kernel's life.
pub fn reboot(how: Reboot) -> io::Error {
    let command = match how {
        Reboot::Kexec => libc::LINUX_REBOOT_CMD_KEXEC,
        Reboot::PowerOff => libc::LINUX_REBOOT_CMD_POWER_OFF,
    };
    // SAFETY: reboot(2) takes no pointer with these commands.
    unsafe { libc::reboot(command) };
    io::Error::last_os_error()
}

/// A socket for interface ioctls.
pub struct NetControl(rustix::fd::OwnedFd);

impl NetControl {
    /// Opens it.
    pub fn open() -> Result<Self> {
        use rustix::net::{AddressFamily, SocketType, socket};
        Ok(Self(
            socket(AddressFamily::INET, SocketType::DGRAM, None).context("cannot open a socket")?,
        ))
    }

    fn ioctl<T>(&self, request: libc::c_ulong, argument: &mut T) -> io::Result<()> {
        // SAFETY: every caller passes the structure that netdevice(7) and
        // linux/sockios.h give for its request; it lives through the call.
        match unsafe { libc::ioctl(self.0.as_raw_fd(), request as _, argument as *mut T) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Sets an interface up.
    pub fn up(&self, name: &str) -> Result<()> {
        let mut request = ifreq(name);
        self.ioctl(libc::SIOCGIFFLAGS, &mut request)
            .with_context(|| format!("no interface {name}"))?;
        // SAFETY: SIOCGIFFLAGS filled in the flags member.
        let flags = unsafe { request.ifr_ifru.ifru_flags };
        request.ifr_ifru.ifru_flags = flags | (libc::IFF_UP | libc::IFF_RUNNING) as i16;
        self.ioctl(libc::SIOCSIFFLAGS, &mut request)
            .with_context(|| format!("cannot set {name} up"))
    }

    /// Gives an interface an IPv4 address.
    pub fn address(&self, name: &str, address: Ipv4Addr, prefix: u8) -> Result<()> {
        let mut request = ifreq(name);
        request.ifr_ifru.ifru_addr = sockaddr(address);
        self.ioctl(libc::SIOCSIFADDR, &mut request)
            .with_context(|| format!("cannot give {name} the address {address}"))?;
        let mask = u32::MAX.checked_shl(32 - u32::from(prefix)).unwrap_or(0);
        let mut request = ifreq(name);
        request.ifr_ifru.ifru_netmask = sockaddr(Ipv4Addr::from(mask));
        self.ioctl(libc::SIOCSIFNETMASK, &mut request)
            .with_context(|| format!("cannot give {name} its netmask"))
    }

    /// Sets the default route.
    pub fn gateway(&self, gateway: Ipv4Addr) -> Result<()> {
        // SAFETY: rtentry is plain data; all zeroes is a valid value.
        let mut route: libc::rtentry = unsafe { std::mem::zeroed() };
        route.rt_dst = sockaddr(Ipv4Addr::UNSPECIFIED);
        route.rt_genmask = sockaddr(Ipv4Addr::UNSPECIFIED);
        route.rt_gateway = sockaddr(gateway);
        route.rt_flags = libc::RTF_UP | libc::RTF_GATEWAY;
        self.ioctl(libc::SIOCADDRT, &mut route)
            .context("cannot set the default route")
    }

    /// Creates a bridge that forwards at once, with `port` in it.
    pub fn bridge(&self, name: &str, port: &str) -> Result<()> {
        let mut raw = [0u8; libc::IFNAMSIZ];
        raw[..name.len()].copy_from_slice(name.as_bytes());
        self.ioctl(SIOCBRADDBR, &mut raw)
            .with_context(|| format!("cannot create the bridge {name}"))?;
        for (knob, value) in [("forward_delay", "0"), ("stp_state", "0")] {
            let path = format!("/sys/class/net/{name}/bridge/{knob}");
            fs::write(&path, value).with_context(|| format!("cannot write {path}"))?;
        }
        self.join(port, name)?;
        // A bridge takes the lowest address of its ports unless it was given
        // one; it must not change when taps join.
        let mut request = ifreq(port);
        self.ioctl(libc::SIOCGIFHWADDR, &mut request)
            .with_context(|| format!("{port} has no hardware address"))?;
        let mut fixed = ifreq(name);
        // SAFETY: SIOCGIFHWADDR filled in the hwaddr member.
        fixed.ifr_ifru.ifru_hwaddr = unsafe { request.ifr_ifru.ifru_hwaddr };
        self.ioctl(libc::SIOCSIFHWADDR, &mut fixed)
            .with_context(|| format!("cannot fix the hardware address of {name}"))
    }

    /// Puts an interface into a bridge.
    fn join(&self, port: &str, bridge: &str) -> Result<()> {
        let mut request = ifreq(port);
        self.ioctl(libc::SIOCGIFINDEX, &mut request)
            .with_context(|| format!("no interface {port}"))?;
        // SAFETY: SIOCGIFINDEX filled in the index member.
        let index = unsafe { request.ifr_ifru.ifru_ifindex };
        let mut request = ifreq(bridge);
        request.ifr_ifru.ifru_ifindex = index;
        self.ioctl(SIOCBRADDIF, &mut request)
            .with_context(|| format!("cannot put {port} into {bridge}"))
    }

    /// Makes a tap that stays when its user goes, and puts it into a bridge;
    /// one that is there is left as it is.
    pub fn tap(&self, name: &str, bridge: &str) -> Result<()> {
        if Path::new("/sys/class/net").join(name).exists() {
            return Ok(());
        }
        let device = File::options()
            .read(true)
            .write(true)
            .open("/dev/net/tun")
            .context("cannot open /dev/net/tun")?;
        let mut request = ifreq(name);
        request.ifr_ifru.ifru_flags =
            (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
        // SAFETY: TUNSETIFF takes an ifreq, which lives through the call;
        // TUNSETPERSIST takes a number.
        let made = unsafe {
            libc::ioctl(device.as_raw_fd(), TUNSETIFF as _, &mut request) == 0
                && libc::ioctl(device.as_raw_fd(), TUNSETPERSIST as _, 1) == 0
        };
        if !made {
            return Err(io::Error::last_os_error())
                .with_context(|| format!("cannot make the tap {name}"));
        }
        self.join(name, bridge)?;
        self.up(name)
    }
}

fn ifreq(name: &str) -> libc::ifreq {
    // SAFETY: ifreq is plain data; all zeroes is a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request
        .ifr_name
        .iter_mut()
        .take(libc::IFNAMSIZ - 1)
        .zip(name.bytes())
    {
        *to = from as libc::c_char;
    }
    request
}

fn sockaddr(address: Ipv4Addr) -> libc::sockaddr {
    let mut data = [0 as libc::c_char; 14];
    for (to, from) in data[2..6].iter_mut().zip(address.octets()) {
        *to = from as libc::c_char;
    }
    libc::sockaddr {
        sa_family: libc::AF_INET as libc::sa_family_t,
        sa_data: data,
    }
}

/// Ties the calling thread to one CPU.
pub fn pin_to_cpu(cpu: usize) -> io::Result<()> {
    let mut set = rustix::thread::CpuSet::new();
    set.set(cpu);
    rustix::thread::sched_setaffinity(None, &set).map_err(io::Error::from)
}

/// One field of `/proc/cmdline`: `name=value`.
pub fn cmdline_value(name: &str) -> Option<String> {
    let text = fs::read_to_string("/proc/cmdline").ok()?;
    let value = text
        .split_whitespace()
        .rev()
        .find_map(|word| word.strip_prefix(name)?.strip_prefix('='))?
        .to_owned();
    Some(value)
}

/// Whether `/proc/cmdline` has the bare word.
pub fn cmdline_has(name: &str) -> bool {
    fs::read_to_string("/proc/cmdline")
        .is_ok_and(|text| text.split_whitespace().any(|word| word == name))
}

/// First line of a small file, without its newline.
pub fn read_line(path: &str) -> String {
    fs::read_to_string(path)
        .map(|t| t.trim_end().to_owned())
        .unwrap_or_default()
}
