//! Instants on a clock that kexec does not reset.

use hebe_types::Stamp;

/// This instant: the TSC, which goes on across kexec (mechanisms of R-15),
/// and the wall clock beside it.
pub fn stamp_now() -> Stamp {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Realtime);
    Stamp {
        tsc: read_tsc(),
        realtime_ns: now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64,
    }
}

fn read_tsc() -> u64 {
    // SAFETY: RDTSC reads a counter and touches no memory; every x86-64
    // processor has it, and Linux does not disable it for user space unless
    // a process asks for that with prctl(PR_SET_TSC).
    unsafe { std::arch::x86_64::_rdtsc() }
}
