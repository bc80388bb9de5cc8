//! Ways out, and what must go on working.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use hebe_block::BlockBackend;
use hebe_devices::VsockHost;
use hebe_store::Segment;
use hebe_types::{ByteSize, Gpa, VmId};
use hebe_vmm::cage::{narrow_device, narrow_vcpu};
use libc::{c_long, c_ulong};

/// How an attempt must end inside the cage.
#[derive(Clone, Copy, Debug)]
pub enum End {
    /// As outside.
    Works,
    /// The file is denied, and the process lives.
    Denied,
    /// There is no such system call, and the process lives.
    Absent,
    /// This system call ends the process.
    Killed(c_long),
}

/// What a VMM has from before its cage.
pub struct Open {
    disk: BlockBackend,
    record: File,
    vsock: UnixListener,
    /// A program of the host that has said what it wants.
    program: UnixStream,
    /// Its RAM, in a file of its own, all of it in use.
    memory: Segment,
    /// Where the first page of a store of two is mapped; its file is closed.
    segment: c_ulong,
}

const CREATE_VM: u32 = hebe_kvm::requests::CREATE_VM;

impl Open {
    /// With a descriptor that is not KVM's, which the kernel looks at after its
    /// filters.
    fn ask_kvm(&self, request: u32) -> io::Result<()> {
        let file = self.record.as_raw_fd() as c_ulong;
        match call(libc::SYS_ioctl, [file, request.into(), 0, 0, 0]) {
            Err(error) if error.raw_os_error() == Some(libc::ENOTTY) => Ok(()),
            other => other.map(drop),
        }
    }

    pub fn before_the_cage(dir: &Path) -> io::Result<Self> {
        let path = dir.join("own/disk.img");
        File::create(&path)?.set_len(1 << 20)?;
        let socket = dir.join("own/vsock.sock");
        let vsock = UnixListener::bind(&socket)?;
        let mut program = UnixStream::connect(&socket)?;
        program.write_all(b"CONNECT 7\n")?;
        Ok(Self {
            vsock,
            program,
            disk: disk_with_ring(&path)?,
            record: File::create(dir.join("own/exit.json"))?,
            memory: used_memory()?,
            segment: map_segment(&dir.join("own/store"))?,
        })
    }
}

/// With a ring, where this kernel gives one.
fn disk_with_ring(path: &Path) -> io::Result<BlockBackend> {
    let mut disk = BlockBackend::open(path, false).map_err(io::Error::other)?;
    if let Err(why) = disk.open_ring() {
        println!("skipped: a disk without a ring: {why}");
    }
    Ok(disk)
}

/// Reads by the disk's ring, where it has one.
fn read_by_ring(disk: &BlockBackend) -> io::Result<()> {
    if !disk.has_ring() {
        return Ok(());
    }
    disk.begin_read(512, 0)
        .ok_or(io::ErrorKind::QuotaExceeded)?;
    disk.send_reads()?;
    loop {
        if let Some((_, read)) = disk.ended_read() {
            return read.map(drop);
        }
        std::thread::yield_now();
    }
}

fn used_memory() -> io::Result<Segment> {
    let name = "web".parse().map_err(io::Error::other)?;
    let segment = Segment::new_memfd(VmId([1; 16]), &name, ByteSize::mib(8), false);
    let segment = segment.map_err(io::Error::other)?;
    for ram in segment.ram() {
        // SAFETY: the mapping of a segment that nobody else uses.
        unsafe { ram.host.as_ptr().write_bytes(1, ram.len as usize) };
    }
    Ok(segment)
}

/// One thing that code in a VMM might do.
pub struct Attempt {
    pub name: &'static str,
    pub end: End,
    /// Whether it works for whoever runs these tests, without a cage.
    pub works_outside: bool,
    pub make: fn(&Path, &Open) -> io::Result<()>,
}

const fn attempt(
    name: &'static str,
    end: End,
    make: fn(&Path, &Open) -> io::Result<()>,
) -> Attempt {
    Attempt {
        name,
        end,
        works_outside: true,
        make,
    }
}

/// Needs rights that whoever runs these tests may lack.
const fn privileged(
    name: &'static str,
    call: c_long,
    make: fn(&Path, &Open) -> io::Result<()>,
) -> Attempt {
    Attempt {
        name,
        end: End::Killed(call),
        works_outside: false,
        make,
    }
}

pub const ATTEMPTS: &[Attempt] = &[
    attempt("write to a file that is open", End::Works, |_, open| {
        (&open.record).write_all(b"{}")?;
        open.record.sync_all()
    }),
    attempt("use a disk", End::Works, |_, open| {
        let disk = open.disk.again().map_err(io::Error::other)?;
        disk.write_at(&[7; 512], 512)?;
        disk.read_at(&mut [0; 512], 512)?;
        disk.discard(0, 4096)?;
        disk.flush()?;
        disk.settle()?;
        disk.check_found_again().map_err(io::Error::other)?;
        disk.identity().map(drop)
    }),
    attempt("give memory of the guest back", End::Works, |_, open| {
        let segment = &open.memory;
        let full = segment.resident();
        segment.give_back(Gpa(0), 4 << 20)?;
        match (full, segment.resident()) {
            (Some(full), Some(left)) if left < full => Ok(()),
            sizes => Err(io::Error::other(format!("{sizes:?}"))),
        }
    }),
    attempt("serve sockets of the guest", End::Works, |_, open| {
        let (mut accepted, _) = open.vsock.accept()?;
        accepted.set_nonblocking(true)?;
        accepted.read_exact(&mut [0; 10])?;
        accepted.write_all(b"OK 7\n")?;
        accepted.shutdown(std::net::Shutdown::Write)?;
        drop(accepted);
        (&open.program).read_exact(&mut [0; 5])?;
        // As for a VM that resets itself.
        VsockHost::new(open.vsock.try_clone()?).map(drop)
    }),
    attempt(
        "reach a socket by its name",
        End::Killed(libc::SYS_socket),
        |dir, _| UnixStream::connect(dir.join("own/vsock.sock")).map(drop),
    ),
    attempt("change its run directory's files", End::Denied, |dir, _| {
        fs::write(dir.join("own/instance.json"), "{}")
    }),
    attempt("open a file of its own again", End::Denied, |dir, _| {
        File::open(dir.join("own/exit.json")).map(drop)
    }),
    attempt(
        "rename a file of its own",
        End::Killed(libc::SYS_rename),
        |dir, _| fs::rename(dir.join("own/exit.json"), dir.join("own/instance.json")),
    ),
    attempt(
        "remove a file of its own",
        End::Killed(libc::SYS_unlink),
        |dir, _| fs::remove_file(dir.join("own/exit.json")),
    ),
    attempt("let a lock go", End::Killed(libc::SYS_flock), |_, open| {
        Ok(rustix::fs::flock(
            &open.record,
            rustix::fs::FlockOperation::Unlock,
        )?)
    }),
    attempt("say that something panicked", End::Works, |_, _| {
        tell_where();
        Ok(())
    }),
    attempt("panic on a vCPU's thread", End::Works, |_, _| {
        narrow_if_caged();
        tell_where();
        Ok(())
    }),
    attempt(
        "tell a tap what its driver takes, on a vCPU's thread",
        End::Works,
        |_, open| {
            narrow_if_caged();
            let file = open.record.as_raw_fd() as c_ulong;
            match call(libc::SYS_ioctl, [file, libc::TUNSETOFFLOAD, 0, 0, 0]) {
                // It is no tap.
                Err(error) if error.raw_os_error() == Some(libc::ENOTTY) => Ok(()),
                other => other.map(drop),
            }
        },
    ),
    attempt("open a file on a vCPU's thread", End::Denied, |dir, _| {
        narrow_if_caged();
        File::open(dir.join("own/exit.json")).map(drop)
    }),
    attempt(
        "make another VM on a vCPU's thread",
        End::Killed(libc::SYS_ioctl),
        |_, open| {
            narrow_if_caged();
            open.ask_kvm(CREATE_VM)
        },
    ),
    attempt(
        "give a VM memory on a vCPU's thread",
        End::Killed(libc::SYS_ioctl),
        |_, open| {
            narrow_if_caged();
            open.ask_kvm(0x4020_ae46)
        },
    ),
    attempt("run on a vCPU's thread", End::Works, |_, open| {
        narrow_if_caged();
        open.ask_kvm(0xae80)
    }),
    attempt("make another VM after a reset", End::Works, |_, open| {
        open.ask_kvm(CREATE_VM)
    }),
    attempt(
        "ask KVM for what no VMM asks",
        End::Killed(libc::SYS_ioctl),
        // KVM_SET_GUEST_DEBUG
        |_, open| open.ask_kvm(0x4048_ae9b),
    ),
    attempt(
        "run a vCPU on a device's thread",
        End::Killed(libc::SYS_ioctl),
        |_, open| {
            narrow_device_if_caged();
            open.ask_kvm(0xae80)
        },
    ),
    attempt(
        "use a disk and a socket on a device's thread",
        End::Works,
        |_, open| {
            narrow_device_if_caged();
            let disk = open.disk.again().map_err(io::Error::other)?;
            disk.write_at(&[7; 512], 512)?;
            disk.read_at(&mut [0; 512], 512)?;
            disk.discard(0, 4096)?;
            disk.flush()?;
            disk.write_at(&[8; 512], 512)?;
            disk.settle()?;
            let (mut accepted, _) = open.vsock.accept()?;
            accepted.set_nonblocking(true)?;
            accepted.read_exact(&mut [0; 10])?;
            accepted.write_all(b"OK 7\n")
        },
    ),
    attempt(
        "read by a ring on a device's thread",
        End::Works,
        |_, open| {
            narrow_device_if_caged();
            read_by_ring(&open.disk)?;
            open.disk.await_reads();
            Ok(())
        },
    ),
    attempt(
        "have a ring work on a vCPU's thread",
        End::Killed(libc::SYS_io_uring_enter),
        |_, _| {
            narrow_if_caged();
            enter_no_ring(0)
        },
    ),
    attempt(
        "have a ring look at an argument in memory",
        End::Killed(libc::SYS_io_uring_enter),
        |_, _| {
            narrow_device_if_caged();
            // IORING_ENTER_EXT_ARG
            enter_no_ring(1 << 3)
        },
    ),
    // This kernel may have none, or have it switched off.
    privileged("make a ring", libc::SYS_io_uring_setup, |_, _| {
        narrow_device_if_caged();
        let mut parameters = [0_u8; 120];
        let at = parameters.as_mut_ptr() as c_ulong;
        call(libc::SYS_io_uring_setup, [8, at, 0, 0, 0]).map(drop)
    }),
    privileged(
        "have a ring do more than it did",
        libc::SYS_io_uring_register,
        |_, open| {
            let ring = open.disk.reads_ended().unwrap_or(-1);
            // IORING_REGISTER_PERSONALITY
            call(libc::SYS_io_uring_register, [ring as c_ulong, 9, 0, 0, 0]).map(drop)
        },
    ),
    attempt(
        "let an image grow on a device's thread",
        End::Works,
        |_, open| {
            narrow_device_if_caged();
            open.record.set_len(1 << 16)
        },
    ),
    attempt(
        "hand a descriptor on from a device's thread",
        End::Killed(libc::SYS_sendmsg),
        |_, open| {
            narrow_device_if_caged();
            let (stream, _) = open.vsock.accept()?;
            hebe_sys::fdpass::send(&stream, &[open.record.as_fd()])
        },
    ),
    attempt(
        "take a descriptor on a device's thread",
        End::Killed(libc::SYS_recvmsg),
        |_, open| {
            narrow_device_if_caged();
            let (stream, _) = open.vsock.accept()?;
            let mut message = [0_u64; 7];
            let at = message.as_mut_ptr() as c_ulong;
            let socket = stream.as_raw_fd() as c_ulong;
            let now = libc::MSG_DONTWAIT as c_ulong;
            call(libc::SYS_recvmsg, [socket, at, now, 0, 0]).map(drop)
        },
    ),
    attempt(
        "listen on a vCPU's thread",
        End::Killed(libc::SYS_accept4),
        |_, _| {
            narrow_if_caged();
            match call(libc::SYS_accept4, [c_ulong::MAX, 0, 0, 0, 0]) {
                Err(error) if error.raw_os_error() == Some(libc::EBADF) => Ok(()),
                other => other.map(drop),
            }
        },
    ),
    attempt("start a thread", End::Works, |_, _| {
        std::thread::spawn(|| ())
            .join()
            .map_err(|_| io::Error::other("it panicked"))
    }),
    attempt("read /etc/passwd", End::Denied, |_, _| {
        File::open("/etc/passwd").map(drop)
    }),
    attempt("read another VM's disk", End::Denied, |dir, _| {
        fs::read(dir.join("other/disk.img")).map(drop)
    }),
    attempt("write to another VM's disk", End::Denied, |dir, _| {
        let disk = dir.join("other/disk.img");
        OpenOptions::new().write(true).open(disk).map(drop)
    }),
    attempt("leave its room by ..", End::Denied, |dir, _| {
        File::open(dir.join("own/../other/disk.img")).map(drop)
    }),
    attempt("put a file beside its room", End::Denied, |dir, _| {
        fs::write(dir.join("new"), "")
    }),
    attempt("read its parent's environment", End::Denied, |_, _| {
        File::open(format!("/proc/{}/environ", parent_id())).map(drop)
    }),
    attempt("open the kernel's random device", End::Denied, |_, _| {
        File::open("/dev/urandom").map(drop)
    }),
    attempt("execve", End::Killed(libc::SYS_execve), |_, _| {
        let argv = [c"/bin/true".as_ptr(), std::ptr::null()];
        // SAFETY: the path and the arguments end in a null.
        unsafe { libc::execve(argv[0], argv.as_ptr(), argv.as_ptr().add(1)) };
        Err(io::Error::last_os_error())
    }),
    attempt("fork", End::Killed(libc::SYS_fork), |_, _| {
        call(libc::SYS_fork, [0; 5]).map(exit_if_child)
    }),
    attempt("clone a process", End::Killed(libc::SYS_clone), |_, _| {
        call(libc::SYS_clone, [libc::SIGCHLD as c_ulong, 0, 0, 0, 0]).map(exit_if_child)
    }),
    attempt("socket(AF_INET)", End::Killed(libc::SYS_socket), |_, _| {
        let (family, kind) = (libc::AF_INET as c_ulong, libc::SOCK_DGRAM as c_ulong);
        call(libc::SYS_socket, [family, kind, 0, 0, 0]).map(drop)
    }),
    attempt("socket(AF_UNIX)", End::Killed(libc::SYS_socket), |_, _| {
        let (family, kind) = (libc::AF_UNIX as c_ulong, libc::SOCK_STREAM as c_ulong);
        call(libc::SYS_socket, [family, kind, 0, 0, 0]).map(drop)
    }),
    attempt(
        "grow its segment into the next one",
        End::Absent,
        |_, open| {
            let grown = [
                open.segment,
                PAGE,
                2 * PAGE,
                libc::MREMAP_MAYMOVE as c_ulong,
                0,
            ];
            call(libc::SYS_mremap, grown).map(drop)
        },
    ),
    attempt("grow a large vector", End::Works, |_, _| {
        let mut large = vec![1_u8; 8 << 20];
        large.resize(64 << 20, 2);
        match (large.first(), large.last()) {
            (Some(1), Some(2)) => Ok(()),
            other => Err(io::Error::other(format!("{other:?}"))),
        }
    }),
    attempt("lock a part of a file", End::Works, |_, open| {
        let (file, whole) = (open.record.as_raw_fd() as c_ulong, lock());
        let at = &raw const whole as c_ulong;
        let order = libc::F_OFD_SETLK as c_ulong;
        call(libc::SYS_fcntl, [file, order, at, 0, 0]).map(drop)
    }),
    attempt(
        "have its parent signalled by a descriptor",
        End::Killed(libc::SYS_fcntl),
        |_, open| {
            let (file, order) = (
                open.record.as_raw_fd() as c_ulong,
                libc::F_SETOWN as c_ulong,
            );
            call(libc::SYS_fcntl, [file, order, parent_id().into(), 0, 0]).map(drop)
        },
    ),
    attempt("kill its parent", End::Killed(libc::SYS_kill), |_, _| {
        call(libc::SYS_kill, [parent_id().into(), 0, 0, 0, 0]).map(drop)
    }),
    attempt(
        "kill a thread of its parent",
        End::Killed(libc::SYS_tgkill),
        |_, _| {
            let parent = parent_id().into();
            call(libc::SYS_tgkill, [parent, parent, 0, 0, 0]).map(drop)
        },
    ),
    attempt(
        "make memory executable",
        End::Killed(libc::SYS_mprotect),
        |_, _| {
            let prot = (libc::PROT_READ | libc::PROT_WRITE) as c_ulong;
            let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as c_ulong;
            let page = mmap(prot, flags)?;
            let exec = prot | libc::PROT_EXEC as c_ulong;
            call(libc::SYS_mprotect, [page, 4096, exec, 0, 0]).map(drop)
        },
    ),
    attempt(
        "map executable memory",
        End::Killed(libc::SYS_mmap),
        |_, _| {
            let prot = (libc::PROT_READ | libc::PROT_EXEC) as c_ulong;
            let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as c_ulong;
            mmap(prot, flags).map(drop)
        },
    ),
    attempt(
        "take the handler away",
        End::Killed(libc::SYS_rt_sigaction),
        |_, _| {
            let signal = libc::SIGSYS as c_ulong;
            call(libc::SYS_rt_sigaction, [signal, 0, 0, 8, 0]).map(drop)
        },
    ),
    attempt(
        "an ioctl that is not KVM's",
        End::Killed(libc::SYS_ioctl),
        |_, open| {
            let mut waiting = 0;
            let fd = std::os::fd::AsRawFd::as_raw_fd(&open.record) as c_ulong;
            let at = (&raw mut waiting) as c_ulong;
            call(libc::SYS_ioctl, [fd, libc::FIONREAD, at, 0, 0]).map(drop)
        },
    ),
    attempt(
        "make memory with a name",
        End::Killed(libc::SYS_memfd_create),
        |_, _| {
            let name = c"x".as_ptr() as c_ulong;
            call(libc::SYS_memfd_create, [name, 0, 0, 0, 0]).map(drop)
        },
    ),
    // The kernel refuses it, too: without shared memory it would be no thread.
    privileged(
        "start a thread on a device's thread",
        libc::SYS_clone,
        |_, _| {
            narrow_device_if_caged();
            call(libc::SYS_clone, [libc::CLONE_THREAD as c_ulong, 0, 0, 0, 0]).map(exit_if_child)
        },
    ),
    privileged("ptrace its parent", libc::SYS_ptrace, |_, _| {
        let attach = libc::PTRACE_ATTACH as c_ulong;
        call(libc::SYS_ptrace, [attach, parent_id().into(), 0, 0, 0]).map(drop)
    }),
    privileged(
        "read its parent's memory",
        libc::SYS_process_vm_readv,
        |_, _| call(libc::SYS_process_vm_readv, [parent_id().into(), 0, 0, 0, 0]).map(drop),
    ),
    privileged("mount", libc::SYS_mount, |_, _| {
        let (kind, at) = (
            c"tmpfs".as_ptr() as c_ulong,
            c"/nowhere".as_ptr() as c_ulong,
        );
        call(libc::SYS_mount, [kind, at, kind, 0, 0]).map(drop)
    }),
    privileged("enter another namespace", libc::SYS_unshare, |_, _| {
        call(
            libc::SYS_unshare,
            [libc::CLONE_NEWUSER as c_ulong, 0, 0, 0, 0],
        )
        .map(drop)
    }),
    attempt("pass for root", End::Killed(libc::SYS_setresuid), |_, _| {
        call(libc::SYS_setresuid, [0; 5]).map(drop)
    }),
    privileged("become another user", libc::SYS_setuid, |_, _| {
        call(libc::SYS_setuid, [0; 5]).map(drop)
    }),
    privileged("open by handle", libc::SYS_open_by_handle_at, |_, _| {
        call(libc::SYS_open_by_handle_at, [0; 5]).map(drop)
    }),
    privileged("load a kernel", libc::SYS_kexec_file_load, |_, _| {
        call(libc::SYS_kexec_file_load, [c_ulong::MAX; 5]).map(drop)
    }),
    privileged("load a BPF program", libc::SYS_bpf, |_, _| {
        call(libc::SYS_bpf, [0; 5]).map(drop)
    }),
];

/// As a panic does with RUST_BACKTRACE=1.
fn tell_where() {
    let _ = std::backtrace::Backtrace::force_capture().to_string();
}

/// Asks what is no ring to work, with such flags.
fn enter_no_ring(flags: c_ulong) -> io::Result<()> {
    match call(libc::SYS_io_uring_enter, [c_ulong::MAX, 0, 0, flags, 0]) {
        Err(error) if is_no_ring(&error) => Ok(()),
        other => other.map(drop),
    }
}

/// The last where this kernel has none.
fn is_no_ring(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EBADF | libc::EINVAL | libc::EFAULT | libc::EPERM | libc::ENOSYS)
    )
}

fn narrow_if_caged() {
    if crate::is_caged() {
        narrow_vcpu();
    }
}

fn narrow_device_if_caged() {
    if crate::is_caged() {
        narrow_device();
    }
}

/// The process that started this one; asking the kernel is not a VMM's.
fn parent_id() -> u32 {
    std::env::var(crate::PARENT)
        .ok()
        .and_then(|id| id.parse().ok())
        .expect("its id")
}

const PAGE: c_ulong = 4096;

fn map_segment(path: &Path) -> io::Result<c_ulong> {
    let file = File::create_new(path)?;
    file.set_len(2 * PAGE)?;
    let file = OpenOptions::new().read(true).write(true).open(path)?;
    let prot = (libc::PROT_READ | libc::PROT_WRITE) as c_ulong;
    let fd = file.as_raw_fd() as c_ulong;
    call(
        libc::SYS_mmap,
        [0, PAGE, prot, libc::MAP_SHARED as c_ulong, fd],
    )
}

/// The whole of a file, for writing.
fn lock() -> libc::flock {
    libc::flock {
        l_type: libc::F_WRLCK as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    }
}

fn mmap(prot: c_ulong, flags: c_ulong) -> io::Result<c_ulong> {
    call(libc::SYS_mmap, [0, 4096, prot, flags, c_ulong::MAX])
}

fn exit_if_child(pid: c_ulong) {
    if pid == 0 {
        // SAFETY: it ends this process, and does nothing else.
        unsafe { libc::_exit(0) }
    }
}

fn call(number: c_long, a: [c_ulong; 5]) -> io::Result<c_ulong> {
    // SAFETY: every caller passes what the call it names takes: numbers, null
    // pointers, or pointers to what outlives the call.
    let result = unsafe { libc::syscall(number, a[0], a[1], a[2], a[3], a[4], 0) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(result as c_ulong)
}
