//! Which system calls can be made: seccomp filters.
//!
//! Filters lie on top of each other, of which the strictest answer counts.
//! One lets two calls seem absent. `clone3`'s flags lie in memory where no
//! filter sees them: the C library then takes `clone`. `mremap` makes a mapping
//! longer without looking at its descriptor, which is closed: the next VM's
//! segment follows this one's; the C library then copies. The second lets no file
//! be opened. The third holds for the whole process, and one more for each vCPU's
//! and each device's thread, which the guest keeps busiest: what it lets through is
//! in the tables [`COMMON`], [`VCPU`] and [`DEVICE`]. KVM is asked for what
//! `hebe_kvm` asks, by number: a vCPU's thread makes no VM and maps no memory, a
//! device's asks nothing at all.
//!
//! Of io_uring one call is let through, and not to vCPUs: to have a ring of a disk
//! carry out what is in it. That is reads alone, by the kernel's word
//! (`hebe_sys::ring`), of what is open, which `pread` does as well. No ring can be
//! made, and what one does cannot be changed.

use std::collections::BTreeMap;
use std::process;
use std::sync::atomic::{AtomicBool, Ordering};

use hebe_kvm::requests;
use libc::c_long;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen as Len, SeccompCmpOp as Op, SeccompCondition,
    SeccompFilter, SeccompRule, TargetArch, apply_filter,
};

use super::verdict;
use crate::log;

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

/// What every thread needs: memory, locks, signals, clocks, its end, and
/// descriptors that are open.
const COMMON: &[c_long] = &[
    libc::SYS_brk,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_close,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_futex,
    libc::SYS_getpid,
    libc::SYS_getrandom,
    libc::SYS_gettid,
    libc::SYS_madvise,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_nanosleep,
    libc::SYS_read,
    libc::SYS_restart_syscall,
    libc::SYS_rseq,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_rt_sigtimedwait,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_yield,
    libc::SYS_set_robust_list,
    libc::SYS_sigaltstack,
    libc::SYS_write,
    libc::SYS_writev,
];

/// What a device's thread does besides: disks, images that grow, taps, sockets of
/// guests, memory given back. No descriptor is sent, taken or made there but by
/// `accept`: a guest that has the thread hands none on.
const DEVICE: &[c_long] = &[
    libc::SYS_accept4,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_wait,
    libc::SYS_fallocate,
    libc::SYS_fdatasync,
    libc::SYS_fstat,
    libc::SYS_fsync,
    libc::SYS_ftruncate,
    libc::SYS_lseek,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_preadv2,
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
    libc::SYS_readv,
    libc::SYS_recvfrom,
    libc::SYS_sendto,
    libc::SYS_shutdown,
    libc::SYS_statx,
];

/// What a VMM does besides, on its other threads: those for its control socket, to
/// which descriptors come and go, the console's, and another VM after a reset.
const VMM: &[c_long] = &[
    libc::SYS_clone3,
    libc::SYS_dup,
    libc::SYS_epoll_create1,
    libc::SYS_eventfd2,
    libc::SYS_fadvise64,
    libc::SYS_fstatfs,
    libc::SYS_getpeername,
    libc::SYS_getsockname,
    libc::SYS_getsockopt,
    libc::SYS_msync,
    libc::SYS_newfstatat,
    libc::SYS_pwritev2,
    libc::SYS_recvmsg,
    libc::SYS_rt_sigpending,
    libc::SYS_sendmsg,
    libc::SYS_setsockopt,
    libc::SYS_sync_file_range,
    libc::SYS_uname,
];

/// What a VMM asks of a descriptor. The others name a process that gets a
/// signal of one's choice (`F_SETOWN`, `F_SETSIG`), for which the kernel asks
/// for the same user only.
const FCNTL: &[libc::c_int] = &[
    libc::F_DUPFD_CLOEXEC,
    libc::F_GETFD,
    libc::F_SETFD,
    libc::F_GETFL,
    libc::F_SETFL,
    libc::F_ADD_SEALS,
    libc::F_GET_SEALS,
    libc::F_OFD_GETLK,
    libc::F_OFD_SETLK,
];

/// <linux/io_uring.h>; `libc` lacks it.
const IORING_ENTER_GETEVENTS: u32 = 1;

/// <linux/prctl.h>; `libc` lacks it.
const PR_GET_AUXV: libc::c_int = 0x4155_5856;

static CONFINED: AtomicBool = AtomicBool::new(false);

/// How a panic looks for this program and its directory, to tell where it
/// was, and the C library for the number of processors: denied, and no reason
/// to end the VM.
const LOOKS: &[c_long] = &[
    libc::SYS_access,
    libc::SYS_getcwd,
    libc::SYS_open,
    libc::SYS_openat,
    libc::SYS_readlink,
];

/// Confines this thread, and those that it starts.
pub(super) fn confine() -> Result<String, String> {
    // All programs are compiled before the first is put on: whatever can fail
    // leaves nothing half done.
    let told_absent = Rules::from([
        (libc::SYS_clone3, Vec::new()),
        (libc::SYS_mremap, Vec::new()),
    ]);
    let absent = compile(
        told_absent,
        SeccompAction::Allow,
        SeccompAction::Errno(libc::ENOSYS as u32),
    )?;
    let no_access = SeccompAction::Errno(libc::EACCES as u32);
    let no_files = compile(looks(), SeccompAction::Allow, no_access)?;
    let whole = compile(process_rules()?, SeccompAction::Trap, SeccompAction::Allow)?;
    verdict::install().map_err(|e| format!("SIGSYS cannot be handled ({e})"))?;
    let put_on = |program: &BpfProgram| {
        apply_filter(program)
            .map_err(|e| format!("{e}: this kernel has no CONFIG_SECCOMP_FILTER, or forbids it"))
    };
    put_on(&absent)?;
    put_on(&no_files)?;
    put_on(&whole)?;
    CONFINED.store(true, Ordering::Relaxed);
    // Devices' threads begin after this.
    hebe_devices::on_worker_start(narrow_device);
    Ok("process, vcpus, devices".to_owned())
}

/// Whether [`confine`] has confined this process.
pub(crate) fn has_filters() -> bool {
    CONFINED.load(Ordering::Relaxed)
}

/// Confines a vCPU's thread further.
pub fn narrow_vcpu() {
    narrow("vCPU", vcpu_rules());
}

/// Confines a device's thread further.
pub fn narrow_device() {
    narrow("device", device_rules());
}

fn narrow(whose: &str, rules: Result<Rules, String>) {
    let narrowed = rules.and_then(|rules| {
        let program = compile(rules, SeccompAction::Trap, SeccompAction::Allow)?;
        apply_filter(&program).map_err(|e| e.to_string())
    });
    // The process's own filters hold as before.
    if let Err(why) = narrowed {
        log::log_error(&format!(
            "a {whose}'s thread is not confined further: {why}"
        ));
    }
}

/// Let through by the filters that list what a VMM does, for the one that
/// denies them to answer.
fn looks() -> Rules {
    LOOKS.iter().map(|&call| (call, Vec::new())).collect()
}

fn process_rules() -> Result<Rules, String> {
    let mut rules = thread_rules()?;
    rules.extend(DEVICE.iter().chain(VMM).map(|&call| (call, Vec::new())));
    let own = u64::from(process::id());
    let no_program = [when(2, Op::MaskedEq(libc::PROT_EXEC as u64), 0)?];
    // A thread of this process, and no new process.
    let thread = libc::CLONE_THREAD as u64;
    let special = [
        (
            libc::SYS_clone,
            vec![rule(&[when(0, Op::MaskedEq(thread), thread)?])?],
        ),
        (libc::SYS_mmap, vec![rule(&no_program)?]),
        (libc::SYS_mprotect, vec![rule(&no_program)?]),
        (libc::SYS_tgkill, vec![rule(&[when(0, Op::Eq, own)?])?]),
        // The handler of the last word stays.
        (
            libc::SYS_rt_sigaction,
            vec![rule(&[when(0, Op::Ne, libc::SIGSYS as u64)?])?],
        ),
        (
            libc::SYS_ioctl,
            [
                requests(requests::VCPU)?,
                requests(requests::MACHINE)?,
                requests(&[libc::TUNSETOFFLOAD as u32, libc::FIONBIO as u32])?,
            ]
            .concat(),
        ),
        (libc::SYS_prctl, prctl()?),
        (libc::SYS_io_uring_enter, ring_works()?),
        (
            libc::SYS_seccomp,
            vec![rule(&[when(
                0,
                Op::Eq,
                u64::from(libc::SECCOMP_SET_MODE_FILTER),
            )?])?],
        ),
    ];
    rules.extend(special);
    Ok(rules)
}

/// What guests make a VMM do, on each of its threads.
fn thread_rules() -> Result<Rules, String> {
    let mut rules: Rules = COMMON.iter().map(|&call| (call, Vec::new())).collect();
    rules.extend(looks());
    let no_program = [when(2, Op::MaskedEq(libc::PROT_EXEC as u64), 0)?];
    let own = u64::from(process::id());
    rules.insert(libc::SYS_fcntl, one_of(1, FCNTL)?);
    rules.insert(libc::SYS_mmap, vec![rule(&no_program)?]);
    rules.insert(libc::SYS_mprotect, vec![rule(&no_program)?]);
    // abort() signals its own thread.
    rules.insert(libc::SYS_tgkill, vec![rule(&[when(0, Op::Eq, own)?])?]);
    Ok(rules)
}

fn vcpu_rules() -> Result<Rules, String> {
    let mut rules = thread_rules()?;
    // What a driver takes from its NIC's tap is told by the vCPU on which it says
    // so.
    let tap = requests(&[libc::TUNSETOFFLOAD as u32])?;
    let all = [requests(requests::VCPU)?, tap].concat();
    rules.insert(libc::SYS_ioctl, all);
    Ok(rules)
}

fn device_rules() -> Result<Rules, String> {
    let mut rules = thread_rules()?;
    rules.extend(DEVICE.iter().map(|&call| (call, Vec::new())));
    // `set_nonblocking` of a socket.
    rules.insert(libc::SYS_ioctl, requests(&[libc::FIONBIO as u32])?);
    rules.insert(libc::SYS_io_uring_enter, ring_works()?);
    Ok(rules)
}

fn requests(numbers: &[u32]) -> Result<Vec<SeccompRule>, String> {
    numbers
        .iter()
        .map(|&number| rule(&[when(1, Op::Eq, u64::from(number))?]))
        .collect()
}

/// A ring works, and its reads are waited for; no argument lies in memory, no
/// ring is named by another number than its descriptor's.
fn ring_works() -> Result<Vec<SeccompRule>, String> {
    let others = u64::from(!IORING_ENTER_GETEVENTS);
    Ok(vec![rule(&[when(3, Op::MaskedEq(others), 0)?])?])
}

/// A thread's name, a name for memory, a narrower filter; and where the
/// kernel's clock is mapped, which `rustix` asks once.
fn prctl() -> Result<Vec<SeccompRule>, String> {
    one_of(
        0,
        &[
            libc::PR_SET_NAME,
            PR_GET_AUXV,
            libc::PR_SET_VMA,
            libc::PR_SET_NO_NEW_PRIVS,
        ],
    )
}

fn one_of(argument: u8, values: &[libc::c_int]) -> Result<Vec<SeccompRule>, String> {
    values
        .iter()
        .map(|&value| rule(&[when(argument, Op::Eq, value as u64)?]))
        .collect()
}

/// The kernel looks at 32 bits of each of these arguments.
fn when(argument: u8, op: Op, value: u64) -> Result<SeccompCondition, String> {
    SeccompCondition::new(argument, Len::Dword, op, value).map_err(|e| e.to_string())
}

fn rule(conditions: &[SeccompCondition]) -> Result<SeccompRule, String> {
    SeccompRule::new(conditions.to_vec()).map_err(|e| e.to_string())
}

fn compile(
    rules: Rules,
    otherwise: SeccompAction,
    matched: SeccompAction,
) -> Result<BpfProgram, String> {
    SeccompFilter::new(rules, otherwise, matched, TargetArch::x86_64)
        .and_then(TryInto::try_into)
        .map_err(|e| e.to_string())
}
