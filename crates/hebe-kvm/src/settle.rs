//! Timer interrupts that KVM has taken note of and not yet given to the LAPIC.
//!
//! When a LAPIC timer runs out, KVM counts that aside, and sets the bit in the
//! IRR the next time the vCPU goes through `KVM_RUN`. No ioctl shows the
//! count. So a one-shot timer that runs out after the vCPU's last `KVM_RUN`
//! and before its registers are read would be lost: the saved count is 0,
//! which arms nothing, and the IRR is empty. A guest that waits for that tick
//! waits for ever. (TSC-deadline timers are safe: the MSR keeps its value
//! until the interrupt is in the IRR.)

use std::os::fd::AsRawFd;
use std::ptr;

use kvm_ioctls::VcpuFd;
use vmm_sys_util::ioctl::ioctl_with_ptr;
use vmm_sys_util::ioctl_iow_nr;

use crate::vcpu::{VcpuError, kvm};

/// `struct kvm_signal_mask` with a kernel `sigset_t` behind it (KVM API, 4.17
/// `KVM_SET_SIGNAL_MASK`).
#[repr(C, packed)]
struct SignalMask {
    len: u32,
    set: u64,
}

/// The header alone is what the ioctl's number counts.
type SignalMaskHeader = u32;

ioctl_iow_nr!(KVM_SET_SIGNAL_MASK, 0xae, 0x8b, SignalMaskHeader);

/// LAPIC registers by offset (KVM API, 4.57 `KVM_GET_LAPIC`).
const LVT_TIMER: usize = 0x320;
const INITIAL_COUNT: usize = 0x380;
const CURRENT_COUNT: usize = 0x390;
const LVT_MASKED: u32 = 1 << 16;
const LVT_MODE: u32 = 3 << 17;
const ONE_SHOT: u32 = 0;
const PERIODIC: u32 = 1 << 17;

/// Whether KVM may hold a timer interrupt that this LAPIC does not show.
pub(crate) fn timer_may_be_pending(lapic: &[u8]) -> bool {
    let register = |at: usize| {
        lapic
            .get(at..at + 4)
            .map_or(0, |b| u32::from_ne_bytes([b[0], b[1], b[2], b[3]]))
    };
    let lvt = register(LVT_TIMER);
    if lvt & LVT_MASKED != 0 || register(INITIAL_COUNT) == 0 {
        return false;
    }
    match lvt & LVT_MODE {
        ONE_SHOT => register(CURRENT_COUNT) == 0,
        PERIODIC => true,
        _ => false,
    }
}

/// Makes KVM move what it holds into the LAPIC, without a step of the guest.
///
/// `KVM_RUN` with `immediate_exit` returns too early for that. With a signal
/// that is pending, and blocked everywhere but inside `KVM_RUN`, KVM goes once
/// round its loop, leaves before it enters the guest, and looks at its timers
/// on the way out. To be called in the vCPU's thread.
pub(crate) fn settle_timer(fd: &mut VcpuFd, signal: libc::c_int) -> Result<(), VcpuError> {
    let failed = kvm("settle the timer");
    fd.set_kvm_immediate_exit(0);
    let outside = match Blocked::new(signal) {
        Ok(outside) => outside,
        Err(e) => return Err(failed(e)),
    };
    let inside = SignalMask {
        len: 8,
        set: outside.others(),
    };
    // SAFETY: the mask is a packed header and `len` bytes of set, which KVM
    // reads during the call.
    let set = unsafe { ioctl_with_ptr(fd, KVM_SET_SIGNAL_MASK(), ptr::from_ref(&inside)) };
    if set < 0 {
        return Err(failed(kvm_ioctls::Error::last()));
    }
    // SAFETY: signals the calling thread, in which the signal is blocked.
    unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), libc::gettid(), signal) };
    let ran = match fd.run() {
        Err(e) if e.errno() == libc::EINTR => Ok(()),
        Ok(kvm_ioctls::VcpuExit::Intr) => Ok(()),
        Err(e) => Err(failed(e)),
        // A step of the guest's that was not finished before: not our case,
        // and not to be passed over.
        Ok(exit) => Err(VcpuError::Stepped(format!("{exit:?}"))),
    };
    // SAFETY: no mask: KVM leaves the thread's own in force from now on.
    unsafe { libc::ioctl(fd.as_raw_fd(), KVM_SET_SIGNAL_MASK(), 0) };
    drop(outside);
    ran
}

/// A signal that is blocked in this thread. At its end what is pending of it
/// is taken off, and the thread has its old mask.
struct Blocked {
    signal: libc::c_int,
    before: libc::sigset_t,
}

impl Blocked {
    fn new(signal: libc::c_int) -> Result<Self, kvm_ioctls::Error> {
        // SAFETY: both sets are initialised by the calls that are given them.
        unsafe {
            let mut one: libc::sigset_t = std::mem::zeroed();
            let mut before: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&raw mut one);
            libc::sigaddset(&raw mut one, signal);
            let error = libc::pthread_sigmask(libc::SIG_BLOCK, &raw const one, &raw mut before);
            if error != 0 {
                return Err(kvm_ioctls::Error::new(error));
            }
            Ok(Self { signal, before })
        }
    }

    /// The mask before, without the signal, as the kernel's 64 bits.
    fn others(&self) -> u64 {
        let member = |signal: libc::c_int| {
            // SAFETY: the set is initialised.
            unsafe { libc::sigismember(&raw const self.before, signal) == 1 }
        };
        (1..=64)
            .filter(|&signal| signal != self.signal && member(signal))
            .fold(0, |set, signal| set | 1 << (signal - 1))
    }
}

impl Drop for Blocked {
    fn drop(&mut self) {
        let now = libc::timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        // SAFETY: the sets are initialised, and the calls change this thread's
        // pending signals and mask alone.
        unsafe {
            let mut one: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&raw mut one);
            libc::sigaddset(&raw mut one, self.signal);
            while libc::sigtimedwait(&raw const one, ptr::null_mut(), &raw const now) > 0 {}
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.before, ptr::null_mut());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::ptr::NonNull;
    use std::thread;
    use std::time::Duration;

    use hebe_types::Gpa;

    use super::*;
    use crate::{BootRegisters, IoHandler, Kick, Machine, host_can_run, install_kick_handler};

    const VECTOR: u8 = 0x40;
    const CODE_AT: usize = 0x1000;

    #[test]
    fn only_timers_that_ran_out_unseen_count() {
        let lapic = |lvt: u32, initial: u32, current: u32| {
            let mut bytes = vec![0; 1024];
            for (at, value) in [
                (LVT_TIMER, lvt),
                (INITIAL_COUNT, initial),
                (CURRENT_COUNT, current),
            ] {
                bytes[at..at + 4].copy_from_slice(&value.to_ne_bytes());
            }
            timer_may_be_pending(&bytes)
        };
        assert!(lapic(0x40, 100, 0));
        assert!(!lapic(0x40, 100, 1), "still counting");
        assert!(!lapic(0x40, 0, 0), "never armed");
        assert!(!lapic(0x10040, 100, 0), "masked");
        assert!(lapic(0x20040, 100, 50), "periodic");
        assert!(!lapic(0x40040, 100, 0), "the deadline's MSR tells");
        assert!(!timer_may_be_pending(&[]));
    }

    /// 32-bit code: x2APIC on, a one-shot timer of 20 ms, then `OUT`.
    fn code() -> Vec<u8> {
        let mut code = Vec::new();
        let mut set = |msr: u32, value: u32| {
            code.push(0xb9); // mov ecx
            code.extend(msr.to_le_bytes());
            code.push(0xb8); // mov eax
            code.extend(value.to_le_bytes());
            code.extend([0x31, 0xd2, 0x0f, 0x30]); // xor edx, edx; wrmsr
        };
        set(0x1b, 0xfee0_0d00); // APIC base: enabled, x2APIC, boot processor
        set(0x80f, 0x1ff); // spurious vector, software enable
        set(0x83e, 0xb); // divide by 1
        set(0x832, u32::from(VECTOR)); // one-shot
        set(0x838, 20_000_000); // nanoseconds
        code.extend([0xe6, 0x80, 0xf4]); // out 0x80, al; hlt
        code
    }

    /// Stops the vCPU when the timer is armed.
    struct StopAtOut(Kick);

    impl IoHandler for StopAtOut {
        fn pio_read(&self, _: u16, _: &mut [u8]) {}
        fn pio_write(&self, _: u16, _: &[u8]) {
            self.0.kick();
        }
        fn mmio_read(&self, _: u64, _: &mut [u8]) {}
        fn mmio_write(&self, _: u64, _: &[u8]) {}
    }

    #[test]
    fn a_timer_that_runs_out_while_the_vcpu_stands_still_is_saved() {
        if let Err(error) = host_can_run() {
            println!("skipped: {error}");
            return;
        }
        install_kick_handler().expect("a handler");
        let mut ram = Box::new(Pages([0; 0x10000]));
        let code = code();
        ram.0[CODE_AT..CODE_AT + code.len()].copy_from_slice(&code);
        let machine = Machine::new().expect("a machine");
        let host = NonNull::from(&mut ram.0).cast();
        // SAFETY: `ram` is page-aligned, and dropped after the machine.
        unsafe { machine.map_ram(0, Gpa(0), host, 0x10000) }.expect("RAM");
        let mut vcpu = machine.create_vcpu(0).expect("a vCPU");
        let boot = BootRegisters::Pvh {
            eip: CODE_AT as u64,
            ebx: 0,
        };
        vcpu.prepare_boot(&machine.guest_cpuid(0, 1), Some(boot))
            .expect("registers");
        vcpu.bind_to_thread();
        let io = StopAtOut(vcpu.kick_handle());
        assert_eq!(vcpu.run(&io), crate::Stop::Interrupted);
        vcpu.clear_kick();
        vcpu.finish_pending_io(&io).expect("the OUT is done");

        thread::sleep(Duration::from_millis(60));
        let rip_before = vcpu.save().expect("a state").regs;
        let saved = vcpu.save().expect("a state");

        let irr = 0x200 + 0x10 * usize::from(VECTOR / 32);
        let word = u32::from_ne_bytes(saved.lapic[irr..irr + 4].try_into().expect("4 bytes"));
        assert_ne!(word & 1 << (VECTOR % 32), 0, "the interrupt is lost");
        assert_eq!(saved.regs, rip_before, "the guest ran on");
        drop(vcpu);
        drop(machine);
        drop(ram);
    }

    #[repr(C, align(4096))]
    struct Pages([u8; 0x10000]);
}
