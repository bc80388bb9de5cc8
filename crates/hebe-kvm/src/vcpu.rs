//! One vCPU: running it, stopping it, saving and restoring it.

use std::io;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use hebe_state::v1::machine::{CpuidEntryV1, VcpuV1};
use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, Msrs, Xsave, kvm_fpu, kvm_mp_state, kvm_msr_entry, kvm_regs,
    kvm_segment, kvm_sregs, kvm_xsave, kvm_xsave2,
};
use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_sys_util::fam::FamStruct;

use crate::pod::{WrongLength, from_bytes, to_bytes};
use crate::settle::{settle_timer, timer_may_be_pending};
use crate::tsc::ClockPlan;
use crate::{cpuid, machine};

/// Long mode is active, in EFER.
const EFER_LMA: u64 = 1 << 10;
/// `IA32_TSC`.
const MSR_TSC: u32 = 0x10;
/// `IA32_TSC_DEADLINE`.
const MSR_TSC_DEADLINE: u32 = 0x6e0;
/// MSRs that tell a guest what its processor can do, which KVM fills in for
/// every vCPU and whose value differs between host kernels, each with the
/// CPUID bit (leaf, register, bit) without which a guest cannot read it.
/// Where the bit is off, the value is the host's own business.
const GATED_MSRS: [(u32, (u32, usize, u32)); 2] = [
    (0x10a, (7, 3, 29)), // IA32_ARCH_CAPABILITIES
    (0x345, (1, 2, 15)), // IA32_PERF_CAPABILITIES
];
/// Where the boot loader part puts the GDT that the first segments describe.
const GDT_BASE: u64 = 0x500;
const GDT_LIMIT: u16 = 4 * 8 - 1;
/// Saved MSRs beyond this are refused: KVM lists about 300.
const MSRS_MAX: usize = 4096;
/// KVM reads and writes at most this many MSRs in one call (`MAX_IO_MSRS`).
const MSR_CHUNK: usize = 256;

/// What went wrong with a vCPU.
#[derive(Debug, thiserror::Error)]
pub enum VcpuError {
    /// KVM refused.
    #[error("KVM refuses to {action} of a vCPU")]
    Kvm {
        /// What was tried.
        action: &'static str,
        /// Why.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// KVM ran the guest where it was only to look at its timers.
    #[error("KVM made a step of the guest when it was to look at a vCPU's timers: exit {0}")]
    Stepped(String),
    /// A saved register class does not fit.
    #[error(transparent)]
    WrongLength(#[from] WrongLength),
    /// A saved MSR cannot be set on this host.
    #[error(
        "this host kernel does not take MSR {index:#x} = {value:#x}, which the guest uses: go back to the kernel it was suspended under"
    )]
    Msr {
        /// Its index.
        index: u32,
        /// Its value.
        value: u64,
    },
    /// The saved extended state is larger than this host's.
    #[error(
        "the guest's extended register state has {saved} bytes and this host takes {host}: it needs a host with the same processor features"
    )]
    XsaveTooLong {
        /// Bytes saved.
        saved: usize,
        /// Bytes that this host takes.
        host: usize,
    },
    /// The guest needs a processor feature that is gone.
    #[error(transparent)]
    Cpuid(#[from] crate::CpuidRefusal),
    /// A list is longer than KVM's limits.
    #[error("the saved {0} list is too long")]
    TooLong(&'static str),
}

pub(crate) fn kvm(action: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> VcpuError {
    move |source| VcpuError::Kvm { action, source }
}

/// Why [`Vcpu::run`] came back for good.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stop {
    /// A [`Kick`], or a signal.
    Interrupted,
    /// Triple fault, or another shutdown of the processor.
    Shutdown,
    /// KVM cannot go on; the text says what it reported.
    Failed(String),
}

/// Receives a vCPU's port and memory-mapped I/O.
pub trait IoHandler {
    /// `IN`: fill `data`.
    fn pio_read(&self, port: u16, data: &mut [u8]);
    /// `OUT`.
    fn pio_write(&self, port: u16, data: &[u8]);
    /// A load from outside RAM: fill `data`.
    fn mmio_read(&self, address: u64, data: &mut [u8]);
    /// A store outside RAM.
    fn mmio_write(&self, address: u64, data: &[u8]);
}

/// Gets a vCPU out of the guest from another thread.
///
/// A signal alone would be lost if it came just before `KVM_RUN`; so the kick
/// sets `immediate_exit` in the vCPU's shared page first (KVM API, 5.
/// `kvm_run`), then signals the thread.
#[derive(Clone, Debug, Default)]
pub struct Kick(Arc<Mutex<KickTarget>>);

#[derive(Debug, Default)]
struct KickTarget {
    /// Address of `kvm_run.immediate_exit`; 0 once the vCPU is gone.
    immediate_exit: usize,
    tid: Option<libc::pid_t>,
}

impl Kick {
    /// Makes the vCPU leave the guest, or not enter it.
    pub fn kick(&self) {
        let target = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if target.immediate_exit == 0 {
            return;
        }
        // SAFETY: the address is that of a byte in the vCPU's shared page,
        // which stays mapped while this lock is held: `Vcpu::drop` clears the
        // address under the same lock before the page goes. KVM only reads it.
        let flag = unsafe { AtomicU8::from_ptr(target.immediate_exit as *mut u8) };
        flag.store(1, Ordering::SeqCst);
        if let Some(tid) = target.tid {
            // SAFETY: sends a signal, for which a handler is installed, to a
            // thread of this process; a thread that is gone yields ESRCH.
            unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), tid, kick_signal()) };
        }
    }
}

fn kick_signal() -> libc::c_int {
    libc::SIGRTMIN()
}

/// Installs the handler of the kick signal, which does nothing: its arrival
/// ends `KVM_RUN`. To be called once per process, before any vCPU runs.
pub fn install_kick_handler() -> io::Result<()> {
    extern "C" fn nothing(_: libc::c_int) {}
    // SAFETY: `action` is fully initialised (zeroed, then set), and the
    // handler is async-signal-safe because it does nothing. SA_RESTART is
    // left out on purpose: the signal is meant to interrupt.
    let result = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = nothing as extern "C" fn(libc::c_int) as usize;
        libc::sigaction(kick_signal(), &action, std::ptr::null_mut())
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Registers with which a vCPU begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BootRegisters {
    /// 64-bit Linux boot protocol: paging on, `rsi` = boot parameters.
    Linux64 {
        /// Entry point.
        rip: u64,
        /// Boot parameters.
        rsi: u64,
        /// Top-level page table.
        cr3: u64,
    },
    /// PVH: 32-bit protected mode, `ebx` = start info.
    Pvh {
        /// Entry point.
        eip: u64,
        /// Start info.
        ebx: u64,
    },
}

/// One vCPU.
#[derive(Debug)]
pub struct Vcpu {
    fd: VcpuFd,
    index: u8,
    kick: Kick,
    xsave_len: usize,
    msr_indices: Arc<Vec<u32>>,
    /// What it was given at its beginning. KVM's own answer may differ: it
    /// has bits that follow registers, and a KVM without hardware behind it
    /// shows the host's.
    cpuid: OnceLock<CpuId>,
}

impl Vcpu {
    pub(crate) fn new(
        mut fd: VcpuFd,
        index: u8,
        xsave_len: usize,
        msr_indices: Arc<Vec<u32>>,
    ) -> Self {
        let kick = Kick::default();
        let flag: *mut u8 = &mut fd.get_kvm_run().immediate_exit;
        kick.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .immediate_exit = flag as usize;
        Self {
            fd,
            index,
            kick,
            xsave_len,
            msr_indices,
            cpuid: OnceLock::new(),
        }
    }

    /// Number of the vCPU, which is its APIC id.
    pub fn index(&self) -> u8 {
        self.index
    }

    #[cfg(test)]
    pub(crate) fn tsc_khz(&self) -> Option<u32> {
        self.fd.get_tsc_khz().ok()
    }

    /// A handle that stops this vCPU from other threads.
    pub fn kick_handle(&self) -> Kick {
        self.kick.clone()
    }

    /// Says that the calling thread is the one that runs this vCPU.
    pub fn bind_to_thread(&self) {
        // SAFETY: gettid has no arguments and cannot fail.
        let tid = unsafe { libc::gettid() };
        self.kick
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .tid = Some(tid);
    }

    /// Gives a fresh vCPU its CPUID and, if it is the first, where to begin.
    /// The others wait for INIT and SIPI.
    pub fn prepare_boot(
        &self,
        cpuid: &CpuId,
        boot: Option<BootRegisters>,
    ) -> Result<(), VcpuError> {
        self.set_cpuid(cpuid)?;
        let fpu = kvm_fpu {
            fcw: 0x37f,
            mxcsr: 0x1f80,
            ..Default::default()
        };
        self.fd.set_fpu(&fpu).map_err(kvm("set the FPU"))?;
        let Some(boot) = boot else { return Ok(()) };
        let mut sregs = self.fd.get_sregs().map_err(kvm("read the segments"))?;
        let mut regs = kvm_regs {
            rflags: 2,
            ..Default::default()
        };
        match boot {
            BootRegisters::Linux64 { rip, rsi, cr3 } => {
                sregs.cs = segment(0x10, 0xb, true);
                sregs.cr3 = cr3;
                sregs.cr4 |= 1 << 5; // PAE
                sregs.cr0 |= 1 | 1 << 31; // PE, PG
                sregs.efer |= 1 << 8 | 1 << 10; // LME, LMA
                (regs.rip, regs.rsi) = (rip, rsi);
            }
            BootRegisters::Pvh { eip, ebx } => {
                sregs.cs = segment(0x10, 0xb, false);
                sregs.cr0 = 1 | 1 << 4; // PE, ET
                sregs.cr4 = 0;
                (regs.rip, regs.rbx) = (eip, ebx);
            }
        }
        let data = segment(0x18, 0x3, false);
        (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
        sregs.tr = kvm_segment {
            limit: 0x67,
            type_: 0xb,
            present: 1,
            ..Default::default()
        };
        (sregs.gdt.base, sregs.gdt.limit) = (GDT_BASE, GDT_LIMIT);
        (sregs.idt.base, sregs.idt.limit) = (0, 0);
        self.fd.set_sregs(&sregs).map_err(kvm("set the segments"))?;
        self.fd.set_regs(&regs).map_err(kvm("set the registers"))
    }

    /// Set once, before the vCPU runs.
    fn set_cpuid(&self, cpuid: &CpuId) -> Result<(), VcpuError> {
        self.fd.set_cpuid2(cpuid).map_err(kvm("set CPUID"))?;
        let _ = self.cpuid.set(cpuid.clone());
        Ok(())
    }

    /// Runs until something stops it, giving I/O to `io`.
    pub fn run(&mut self, io: &impl IoHandler) -> Stop {
        loop {
            if let Some(stop) = self.run_once(io) {
                return stop;
            }
        }
    }

    fn run_once(&mut self, io: &impl IoHandler) -> Option<Stop> {
        let pio = match self.fd.run() {
            Ok(VcpuExit::MmioRead(address, data)) => {
                io.mmio_read(address, data);
                return None;
            }
            Ok(VcpuExit::MmioWrite(address, data)) => {
                io.mmio_write(address, data);
                return None;
            }
            Ok(VcpuExit::IoIn(port, data)) => (port, true, data.as_mut_ptr(), data.len()),
            Ok(VcpuExit::IoOut(port, data)) => (port, false, data.as_ptr().cast_mut(), data.len()),
            Ok(VcpuExit::Intr | VcpuExit::IrqWindowOpen) => return Some(Stop::Interrupted),
            Ok(VcpuExit::Shutdown) => return Some(Stop::Shutdown),
            Ok(VcpuExit::Hlt) => {
                return Some(Stop::Failed("HLT without an interrupt controller".into()));
            }
            Ok(VcpuExit::SystemEvent(kind, _)) => {
                return Some(Stop::Failed(format!("system event {kind}")));
            }
            Ok(VcpuExit::InternalError) => return Some(self.internal_error()),
            Ok(other) => return Some(Stop::Failed(format!("exit {other:?}"))),
            Err(e) if e.errno() == libc::EINTR => return Some(Stop::Interrupted),
            Err(e) if e.errno() == libc::EAGAIN => return None,
            Err(e) => return Some(Stop::Failed(format!("KVM_RUN: {e}"))),
        };
        self.port_io(io, pio);
        None
    }

    /// What KVM says of an exit that it cannot explain otherwise.
    fn internal_error(&mut self) -> Stop {
        // SAFETY: the last exit was KVM_EXIT_INTERNAL_ERROR, so `internal` is
        // the live member of the union.
        let internal = unsafe { self.fd.get_kvm_run().__bindgen_anon_1.internal };
        let count = (internal.ndata as usize).min(internal.data.len());
        let rip = self.fd.get_regs().map_or(0, |regs| regs.rip);
        Stop::Failed(format!(
            "KVM internal error {} at {rip:#x}, data {:x?}",
            internal.suberror,
            &internal.data[..count]
        ))
    }

    /// Gives a port access to `io` operand by operand: a string instruction
    /// brings several at once.
    fn port_io(
        &mut self,
        io: &impl IoHandler,
        (port, is_in, data, len): (u16, bool, *mut u8, usize),
    ) {
        // SAFETY: the last exit was KVM_EXIT_IO, so `io` is the live member of
        // the union.
        let size = unsafe { self.fd.get_kvm_run().__bindgen_anon_1.io.size };
        // SAFETY: kvm-ioctls took pointer and length from the vCPU's shared
        // page, which stays mapped as long as `self.fd`; nothing else refers
        // to it here, and the kernel touches it only inside KVM_RUN.
        let data = unsafe { std::slice::from_raw_parts_mut(data, len) };
        for operand in data.chunks_mut(usize::from(size).max(1)) {
            if is_in {
                io.pio_read(port, operand);
            } else {
                io.pio_write(port, operand);
            }
        }
    }

    /// After [`Stop::Interrupted`]: takes note of the kick, so that the next
    /// run enters the guest.
    pub fn clear_kick(&mut self) {
        self.fd.set_kvm_immediate_exit(0);
    }

    /// Completes the instruction whose I/O was handled last.
    ///
    /// KVM finishes an `IN`, `OUT` or MMIO access at the *next* `KVM_RUN`
    /// (KVM API, 5., note on `KVM_EXIT_IO`): registers read before that would
    /// make the guest do the access twice. So re-enter with `immediate_exit`
    /// until KVM says EINTR; an access in several parts exits several times.
    pub fn finish_pending_io(&mut self, io: &impl IoHandler) -> Result<(), Stop> {
        loop {
            self.fd.set_kvm_immediate_exit(1);
            match self.run_once(io) {
                None => {}
                Some(Stop::Interrupted) => break,
                Some(stop) => return Err(stop),
            }
        }
        self.fd.set_kvm_immediate_exit(0);
        Ok(())
    }

    /// Reads every register class.
    ///
    /// Ordering requirements:
    /// - MP state first: reading it makes KVM accept pending INIT and SIPI,
    ///   which changes registers and LAPIC.
    /// - LAPIC before the MSRs: reading the LAPIC brings its timer count up
    ///   to date, and `IA32_TSC_DEADLINE` belongs to that timer.
    /// - Events last: reading them must come after everything that may queue
    ///   an exception or an interrupt.
    ///
    /// A timer that ran out since the vCPU stopped is first moved to where it
    /// can be read (see `settle`), and all is read again: once is enough, as
    /// such a timer does not start again by itself. To be called in the
    /// vCPU's thread, after [`Vcpu::finish_pending_io`].
    pub fn save(&mut self) -> Result<VcpuV1, VcpuError> {
        let saved = self.read_all()?;
        if !timer_may_be_pending(&saved.lapic) {
            return Ok(saved);
        }
        settle_timer(&mut self.fd, kick_signal())?;
        self.read_all()
    }

    fn read_all(&self) -> Result<VcpuV1, VcpuError> {
        let mp_state = self
            .fd
            .get_mp_state()
            .map_err(kvm("read the MP state"))?
            .mp_state;
        let regs = self.fd.get_regs().map_err(kvm("read the registers"))?;
        let sregs = self.fd.get_sregs().map_err(kvm("read the segments"))?;
        let xsave = self.read_xsave()?;
        // A host without XSAVE answers with no register, and refuses to set none.
        let xcrs = match self.fd.get_xcrs() {
            Ok(xcrs) if xcrs.nr_xcrs > 0 => to_bytes(&xcrs),
            _ => Vec::new(),
        };
        let debug_regs = self
            .fd
            .get_debug_regs()
            .map_err(kvm("read the debug registers"))?;
        let lapic = self.fd.get_lapic().map_err(kvm("read the LAPIC"))?;
        let tsc_offset = machine::tsc_offset(&self.fd);
        let msrs = self.read_msrs()?;
        let cpuid = match self.cpuid.get() {
            Some(cpuid) => cpuid.clone(),
            None => self
                .fd
                .get_cpuid2(KVM_MAX_CPUID_ENTRIES)
                .map_err(kvm("read CPUID"))?,
        };
        let events = self.fd.get_vcpu_events().map_err(kvm("read the events"))?;
        Ok(VcpuV1 {
            cpuid: cpuid::to_v1(&cpuid),
            mp_state,
            regs: to_bytes(&regs),
            sregs: to_bytes(&sregs),
            xsave,
            xcrs,
            debug_regs: to_bytes(&debug_regs),
            lapic: to_bytes(&lapic),
            msrs,
            events: to_bytes(&events),
            tsc_khz: self.fd.get_tsc_khz().unwrap_or(0),
            tsc_offset,
        })
    }

    /// Writes every register class into a fresh vCPU.
    ///
    /// Ordering requirements:
    /// - CPUID first: KVM checks everything else against it.
    /// - MP state before the registers; segments before the LAPIC, because
    ///   the LAPIC's base and mode are in them.
    /// - XSAVE before XCRS as KVM validates XCR0 on its own; both before run.
    /// - LAPIC before the MSRs: `IA32_TSC_DEADLINE` arms a timer only if the
    ///   LAPIC is in deadline mode, so it comes last of the MSRs, after the
    ///   TSC itself is right.
    /// - Events last, because setting MP state and registers clears them.
    pub fn restore(
        &self,
        saved: &VcpuV1,
        supported: &CpuId,
        plan: &ClockPlan,
    ) -> Result<(), VcpuError> {
        cpuid::missing_features(&saved.cpuid, supported)?;
        let cpuid = cpuid::from_v1(&saved.cpuid).ok_or(VcpuError::TooLong("CPUID"))?;
        self.set_cpuid(&cpuid)?;
        let mp_state = kvm_mp_state {
            mp_state: saved.mp_state,
        };
        self.fd
            .set_mp_state(mp_state)
            .map_err(kvm("set the MP state"))?;
        self.fd
            .set_regs(&from_bytes(&saved.regs)?)
            .map_err(kvm("set the registers"))?;
        self.fd
            .set_sregs(&settable_sregs(from_bytes(&saved.sregs)?))
            .map_err(kvm("set the segments"))?;
        self.write_xsave(&saved.xsave)?;
        if !saved.xcrs.is_empty() {
            self.fd
                .set_xcrs(&from_bytes(&saved.xcrs)?)
                .map_err(kvm("set XCR0"))?;
        }
        let debug_regs = from_bytes(&saved.debug_regs)?;
        self.fd
            .set_debug_regs(&debug_regs)
            .map_err(kvm("set the debug registers"))?;
        self.fd
            .set_lapic(&from_bytes(&saved.lapic)?)
            .map_err(kvm("set the LAPIC"))?;
        self.restore_tsc_and_msrs(saved, plan)?;
        self.fd
            .set_vcpu_events(&from_bytes(&saved.events)?)
            .map_err(kvm("set the events"))?;
        // The guest slept through the pause: spare it a soft-lockup report
        // (KVM_KVMCLOCK_CTRL). EINVAL says that it does not use kvmclock.
        let _ = self.fd.kvmclock_ctrl();
        Ok(())
    }

    fn restore_tsc_and_msrs(&self, saved: &VcpuV1, plan: &ClockPlan) -> Result<(), VcpuError> {
        let (late, early): (Vec<_>, Vec<_>) = saved
            .msrs
            .iter()
            .copied()
            .partition(|(index, _)| *index == MSR_TSC_DEADLINE);
        let with_offset = saved.tsc_offset.is_some() && machine::has_tsc_offset(&self.fd);
        // Without the offset attribute the TSC's value itself is written, moved
        // on by the pause; with it, the offset below is exact.
        let early: Vec<(u32, u64)> = early
            .into_iter()
            .filter(|(index, _)| *index != MSR_TSC || !with_offset)
            .filter(|(index, _)| guest_can_read(*index, &saved.cpuid))
            .map(|(index, value)| match index {
                MSR_TSC => {
                    let ticks = u128::from(plan.pause_ns) * u128::from(saved.tsc_khz) / 1_000_000;
                    (index, value.wrapping_add(ticks as u64))
                }
                _ => (index, value),
            })
            .collect();
        self.write_msrs(&early)?;
        if let (true, Some(offset)) = (with_offset, saved.tsc_offset) {
            machine::set_tsc_offset(&self.fd, offset.wrapping_add(plan.tsc_offset_delta))
                .map_err(kvm("set the TSC offset"))?;
        }
        self.write_msrs(&late)
    }

    fn read_xsave(&self) -> Result<Vec<u8>, VcpuError> {
        let mut xsave = xsave_of(self.xsave_len)?;
        if self.xsave_len > size_of::<kvm_xsave>() {
            // SAFETY: `xsave` has room for what KVM_CAP_XSAVE2 announced, and
            // this process enables no dynamic feature after that.
            unsafe { self.fd.get_xsave2(&mut xsave) }.map_err(kvm("read the extended state"))?;
            Ok(xsave_bytes(&xsave, self.xsave_len))
        } else {
            let plain = self
                .fd
                .get_xsave()
                .map_err(kvm("read the extended state"))?;
            Ok(plain
                .region
                .iter()
                .flat_map(|word| word.to_ne_bytes())
                .collect())
        }
    }

    fn write_xsave(&self, bytes: &[u8]) -> Result<(), VcpuError> {
        if bytes.len() > self.xsave_len || !bytes.len().is_multiple_of(4) {
            return Err(VcpuError::XsaveTooLong {
                saved: bytes.len(),
                host: self.xsave_len,
            });
        }
        let mut xsave = xsave_of(self.xsave_len)?;
        let mut words = bytes
            .chunks_exact(4)
            .map(|c| u32::from_ne_bytes([c[0], c[1], c[2], c[3]]));
        // SAFETY: only words are written, the length is not touched.
        let fam = unsafe { xsave.as_mut_fam_struct() };
        for (slot, word) in fam.xsave.region.iter_mut().zip(&mut words) {
            *slot = word;
        }
        for (slot, word) in fam.as_mut_slice().iter_mut().zip(&mut words) {
            *slot = word;
        }
        // SAFETY: `xsave` has the length that KVM takes on this host.
        unsafe { self.fd.set_xsave2(&xsave) }.map_err(kvm("set the extended state"))
    }

    /// Reads every MSR that KVM lists; those that this vCPU has not got are
    /// left out.
    fn read_msrs(&self) -> Result<Vec<(u32, u64)>, VcpuError> {
        let mut values = Vec::with_capacity(self.msr_indices.len());
        let mut wanted: &[u32] = &self.msr_indices;
        while !wanted.is_empty() {
            let chunk = &wanted[..wanted.len().min(MSR_CHUNK)];
            let entry = |&index: &u32| kvm_msr_entry {
                index,
                ..Default::default()
            };
            let entries: Vec<_> = chunk.iter().map(entry).collect();
            let mut msrs = Msrs::from_entries(&entries).map_err(|_| VcpuError::TooLong("MSR"))?;
            let read = self.fd.get_msrs(&mut msrs).map_err(kvm("read the MSRs"))?;
            values.extend(msrs.as_slice()[..read].iter().map(|m| (m.index, m.data)));
            // KVM stops at the first that it cannot read: go on behind it.
            wanted = &wanted[if read < chunk.len() { read + 1 } else { read }..];
        }
        Ok(values)
    }

    /// Writes MSRs. One that this kernel does not know is passed over if the
    /// guest never set it (it is zero), and refused by number otherwise.
    fn write_msrs(&self, values: &[(u32, u64)]) -> Result<(), VcpuError> {
        if values.len() > MSRS_MAX {
            return Err(VcpuError::TooLong("MSR"));
        }
        let mut rest = values;
        while !rest.is_empty() {
            let chunk = &rest[..rest.len().min(MSR_CHUNK)];
            let entry = |&(index, data): &(u32, u64)| kvm_msr_entry {
                index,
                data,
                ..Default::default()
            };
            let entries: Vec<_> = chunk.iter().map(entry).collect();
            let msrs = Msrs::from_entries(&entries).map_err(|_| VcpuError::TooLong("MSR"))?;
            let set = self.fd.set_msrs(&msrs).map_err(kvm("set the MSRs"))?;
            rest = &rest[set..];
            if set < chunk.len() {
                let (index, value) = chunk[set];
                if value != 0 {
                    return Err(VcpuError::Msr { index, value });
                }
                rest = &rest[1..];
            }
        }
        Ok(())
    }
}

impl Drop for Vcpu {
    fn drop(&mut self) {
        let mut target = self.kick.0.lock().unwrap_or_else(PoisonError::into_inner);
        target.immediate_exit = 0;
        target.tid = None;
    }
}

/// Outside of long mode the L bit of a code segment means nothing, and a guest
/// may have loaded one that has it; but KVM refuses to set it
/// (`kvm_is_valid_sregs`).
fn settable_sregs(mut sregs: kvm_sregs) -> kvm_sregs {
    if sregs.efer & EFER_LMA == 0 {
        sregs.cs.l = 0;
    }
    sregs
}

fn guest_can_read(msr: u32, cpuid: &[CpuidEntryV1]) -> bool {
    let gate = GATED_MSRS.iter().find(|(index, _)| *index == msr);
    gate.is_none_or(|(_, (leaf, register, bit))| {
        cpuid
            .iter()
            .any(|e| e.function == *leaf && e.index == 0 && e.registers[*register] >> bit & 1 == 1)
    })
}

fn xsave_of(len: usize) -> Result<Xsave, VcpuError> {
    let extra = len.saturating_sub(size_of::<kvm_xsave>());
    let entries = extra.div_ceil(size_of::<<kvm_xsave2 as FamStruct>::Entry>());
    Xsave::new(entries).map_err(|_| VcpuError::TooLong("extended state"))
}

fn xsave_bytes(xsave: &Xsave, len: usize) -> Vec<u8> {
    let fam = xsave.as_fam_struct_ref();
    let words = fam.xsave.region.iter().chain(fam.as_slice());
    let mut bytes: Vec<u8> = words.flat_map(|word| word.to_ne_bytes()).collect();
    bytes.truncate(len);
    bytes
}

fn segment(selector: u16, type_: u8, long: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_,
        present: 1,
        dpl: 0,
        db: u8::from(!long),
        s: 1,
        l: u8::from(long),
        g: 1,
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn feature_msrs_count_only_if_the_guest_can_read_them() {
        let mut leaf = CpuidEntryV1 {
            function: 7,
            index: 0,
            flags: 0,
            registers: [0; 4],
        };
        assert!(!guest_can_read(0x10a, &[leaf]));
        assert!(guest_can_read(MSR_TSC, &[leaf]));
        leaf.registers[3] = 1 << 29;
        assert!(guest_can_read(0x10a, &[leaf]));
    }
}
