//! The VM: memory slots, interrupt controllers, clock.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;

use hebe_state::v1::machine::{ClockV1, IrqchipV1};
use hebe_types::Gpa;
use kvm_bindings::{
    CpuId, KVM_CAP_EXCEPTION_PAYLOAD, KVM_CLOCK_REALTIME, KVM_IRQCHIP_IOAPIC,
    KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_MAX_CPUID_ENTRIES, KVM_VCPU_TSC_CTRL,
    KVM_VCPU_TSC_OFFSET, kvm_clock_data, kvm_device_attr, kvm_enable_cap, kvm_irqchip,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, Kvm, NoDatamatch, VcpuFd, VmFd};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iow_nr;

use crate::pod::{WrongLength, from_bytes, to_bytes};
use crate::rate;
use crate::routing::Router;
use crate::vcpu::Vcpu;

/// KVM keeps three pages for real-mode emulation here on Intel processors; a
/// hole of guest memory that nobody uses.
const TSS_ADDRESS: usize = 0xfffb_d000;
/// KVM's identity map for the same purpose.
const IDENTITY_MAP_ADDRESS: u64 = 0xfffb_c000;

ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, 0xae, 0xe1, kvm_device_attr);
ioctl_iow_nr!(KVM_GET_DEVICE_ATTR, 0xae, 0xe2, kvm_device_attr);
ioctl_iow_nr!(KVM_HAS_DEVICE_ATTR, 0xae, 0xe3, kvm_device_attr);

/// What went wrong with a VM.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// `/dev/kvm` is not there or not ours.
    #[error(
        "/dev/kvm cannot be opened: load kvm_intel or kvm_amd, switch virtualization on in the firmware, and be in group kvm"
    )]
    Open(#[source] kvm_ioctls::Error),
    /// The kernel's KVM lacks something.
    #[error("this kernel's KVM lacks {0}: use Linux 5.10 or newer")]
    Lacks(&'static str),
    /// KVM refused.
    #[error("KVM refuses to {action}")]
    Kvm {
        /// What was tried.
        action: &'static str,
        /// Why.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// KVM refuses the interrupt routing table.
    #[error("KVM refuses the interrupt routing table")]
    Routing(#[source] io::Error),
    /// A saved structure does not fit.
    #[error(transparent)]
    WrongLength(#[from] WrongLength),
    /// The state has another number of interrupt controllers.
    #[error("the saved interrupt controllers are not those of this machine")]
    Irqchips,
}

fn kvm(action: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> MachineError {
    move |source| MachineError::Kvm { action, source }
}

/// A VM in KVM.
#[derive(Debug)]
pub struct Machine {
    vm: Arc<VmFd>,
    router: Arc<Router>,
    supported: CpuId,
    tsc_deadline: bool,
    xsave_len: usize,
    msr_indices: Arc<Vec<u32>>,
}

/// Lets an exception that is queued but not delivered be saved with its
/// payload: the address of a page fault, the cause of a debug exception.
/// Without this (KVM API, 7.10 `KVM_CAP_EXCEPTION_PAYLOAD`) reading the events
/// writes the payload to CR2 or DR6, after these were read.
fn keep_payloads(vm: &VmFd) -> Result<(), MachineError> {
    if !vm
        .check_extension_raw(u64::from(KVM_CAP_EXCEPTION_PAYLOAD))
        .is_positive()
    {
        return Ok(());
    }
    let mut enable = kvm_enable_cap {
        cap: KVM_CAP_EXCEPTION_PAYLOAD,
        ..Default::default()
    };
    enable.args[0] = 1;
    vm.enable_cap(&enable)
        .map_err(kvm("keep the payloads of exceptions"))
}

/// `KVM_CREATE_VM`, which says `EINTR` where anything at all is to be done for
/// the thread just then (a signal, an end of an `io_uring` request): it watches
/// the process's memory, and does not wait for all of its locks in that case.
fn create_vm(kvm_fd: &Kvm) -> Result<VmFd, kvm_ioctls::Error> {
    loop {
        match kvm_fd.create_vm() {
            Err(e) if e.errno() == libc::EINTR => {}
            made => return made,
        }
    }
}

/// `/dev/kvm`, open: what VMs are made with where nothing can be opened any
/// more.
#[derive(Debug)]
pub struct KvmDevice(OwnedFd);

impl KvmDevice {
    /// Opens it.
    ///
    /// # Errors
    /// [`MachineError::Open`].
    pub fn open() -> Result<Self, MachineError> {
        let fd = Kvm::open_with_cloexec(true).map_err(MachineError::Open)?;
        // SAFETY: the descriptor was opened just now, and nobody else owns it.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    fn again(&self) -> Result<Kvm, MachineError> {
        let failed = |e: io::Error| kvm_ioctls::Error::new(e.raw_os_error().unwrap_or(libc::EIO));
        let copy = self.0.try_clone();
        let copy = copy.map_err(|e| MachineError::Open(failed(e)))?;
        // SAFETY: a descriptor of /dev/kvm, which nobody else owns.
        Ok(unsafe { Kvm::from_raw_fd(copy.into_raw_fd()) })
    }
}

impl Machine {
    /// A VM with interrupt controllers and without memory or vCPUs.
    pub fn new() -> Result<Self, MachineError> {
        Self::on(&KvmDevice::open()?)
    }

    /// [`Machine::new`], with what is open already.
    ///
    /// # Errors
    /// As [`Machine::new`].
    pub fn on(device: &KvmDevice) -> Result<Self, MachineError> {
        let kvm_fd = device.again()?;
        for (cap, name) in [
            (Cap::Irqchip, "in-kernel interrupt controllers"),
            (Cap::UserMemory, "user memory"),
            (Cap::Irqfd, "irqfd"),
            (Cap::Ioeventfd, "ioeventfd"),
            (Cap::ImmediateExit, "immediate_exit"),
            (Cap::AdjustClock, "an adjustable clock"),
        ] {
            if !kvm_fd.check_extension(cap) {
                return Err(MachineError::Lacks(name));
            }
        }
        let supported = kvm_fd
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(kvm("list CPUID"))?;
        let msr_list = kvm_fd.get_msr_index_list().map_err(kvm("list MSRs"))?;
        let vm = Arc::new(create_vm(&kvm_fd).map_err(kvm("create a VM"))?);
        vm.set_identity_map_address(IDENTITY_MAP_ADDRESS)
            .map_err(kvm("place the identity map"))?;
        vm.set_tss_address(TSS_ADDRESS)
            .map_err(kvm("place the TSS"))?;
        vm.create_irq_chip()
            .map_err(kvm("create interrupt controllers"))?;
        keep_payloads(&vm)?;
        let xsave_len = usize::try_from(vm.check_extension_int(Cap::Xsave2)).unwrap_or(0);
        Ok(Self {
            router: Arc::new(Router::new(vm.clone()).map_err(MachineError::Routing)?),
            vm,
            supported,
            tsc_deadline: kvm_fd.check_extension(Cap::TscDeadlineTimer),
            xsave_len: xsave_len.max(4096),
            msr_indices: Arc::new(msr_list.as_slice().to_vec()),
        })
    }

    /// What CPUID may tell guests on this host.
    pub fn supported_cpuid(&self) -> &CpuId {
        &self.supported
    }

    /// The CPUID of vCPU `index` of `count`.
    pub fn guest_cpuid(&self, index: u8, count: u8) -> CpuId {
        crate::guest_cpuid(&self.supported, index, count, self.tsc_deadline)
    }

    /// The owner of the interrupt routing table.
    pub fn router(&self) -> Arc<Router> {
        self.router.clone()
    }

    /// Maps `len` bytes of RAM at `host` into the guest at `gpa`.
    ///
    /// # Safety
    /// The memory at `host` stays mapped, and its owner expects a guest to
    /// change it, as long as this machine and its vCPUs live.
    pub unsafe fn map_ram(
        &self,
        slot: u32,
        gpa: Gpa,
        host: NonNull<u8>,
        len: u64,
    ) -> Result<(), MachineError> {
        let region = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: gpa.0,
            memory_size: len,
            userspace_addr: host.as_ptr() as u64,
        };
        // SAFETY: the caller promises that the memory outlives the VM.
        unsafe { self.vm.set_user_memory_region(region) }.map_err(kvm("map guest RAM"))
    }

    /// A new vCPU; `index` is its APIC id.
    pub fn create_vcpu(&self, index: u8) -> Result<Vcpu, MachineError> {
        rate::of_new_vcpus(&self.vm);
        let fd = self
            .vm
            .create_vcpu(u64::from(index))
            .map_err(kvm("create a vCPU"))?;
        rate::of_vcpu(&fd);
        Ok(Vcpu::new(
            fd,
            index,
            self.xsave_len,
            self.msr_indices.clone(),
        ))
    }

    #[cfg(test)]
    pub(crate) fn vm_fd(&self) -> &VmFd {
        &self.vm
    }

    /// Signals `event` when the guest writes anything at `address`.
    pub fn attach_doorbell(&self, address: u64, event: &EventFd) -> io::Result<()> {
        let address = kvm_ioctls::IoEventAddress::Mmio(address);
        Ok(self.vm.register_ioevent(event, &address, NoDatamatch)?)
    }

    /// Undoes [`Machine::attach_doorbell`].
    pub fn detach_doorbell(&self, address: u64, event: &EventFd) -> io::Result<()> {
        let address = kvm_ioctls::IoEventAddress::Mmio(address);
        Ok(self.vm.unregister_ioevent(event, &address, NoDatamatch)?)
    }

    /// Reads PICs and IOAPIC. The vCPUs must be stopped.
    pub fn save_irqchip(&self) -> Result<IrqchipV1, MachineError> {
        let mut chips = Vec::with_capacity(3);
        for chip_id in CHIPS {
            let mut chip = kvm_irqchip {
                chip_id,
                ..Default::default()
            };
            self.vm
                .get_irqchip(&mut chip)
                .map_err(kvm("read an interrupt controller"))?;
            chips.push(to_bytes(&chip));
        }
        Ok(IrqchipV1 { chips })
    }

    /// Writes PICs and IOAPIC.
    pub fn restore_irqchip(&self, saved: &IrqchipV1) -> Result<(), MachineError> {
        if saved.chips.len() != CHIPS.len() {
            return Err(MachineError::Irqchips);
        }
        for (bytes, chip_id) in saved.chips.iter().zip(CHIPS) {
            let chip: kvm_irqchip = from_bytes(bytes)?;
            if chip.chip_id != chip_id {
                return Err(MachineError::Irqchips);
            }
            self.vm
                .set_irqchip(&chip)
                .map_err(kvm("set an interrupt controller"))?;
        }
        Ok(())
    }

    /// Reads kvmclock with the host's clocks at the same instant. The TSC and
    /// its frequency are the caller's: `host_tsc`, `host_tsc_khz`.
    pub fn save_clock(
        &self,
        now_realtime_ns: u64,
        host_tsc: u64,
        host_tsc_khz: u32,
    ) -> Result<ClockV1, MachineError> {
        let data = self.vm.get_clock().map_err(kvm("read the clock"))?;
        let has_realtime = data.flags & KVM_CLOCK_REALTIME != 0;
        Ok(ClockV1 {
            kvmclock_ns: data.clock,
            realtime_ns: if has_realtime {
                data.realtime
            } else {
                now_realtime_ns
            },
            host_tsc,
            host_tsc_khz,
        })
    }

    /// Sets kvmclock. To be called before the vCPUs' MSRs are restored, so
    /// that the first clock page that a vCPU sees is already right.
    pub fn restore_clock(&self, kvmclock_ns: u64) -> Result<(), MachineError> {
        let data = kvm_clock_data {
            clock: kvmclock_ns,
            ..Default::default()
        };
        self.vm.set_clock(&data).map_err(kvm("set the clock"))
    }
}

const CHIPS: [u32; 3] = [
    KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE,
    KVM_IRQCHIP_IOAPIC,
];

fn tsc_attr(address: &mut u64) -> kvm_device_attr {
    kvm_device_attr {
        group: KVM_VCPU_TSC_CTRL,
        attr: u64::from(KVM_VCPU_TSC_OFFSET),
        addr: std::ptr::from_mut(address) as u64,
        flags: 0,
    }
}

pub(crate) fn has_tsc_offset(vcpu: &VcpuFd) -> bool {
    let attr = tsc_attr(&mut 0);
    // SAFETY: KVM_HAS_DEVICE_ATTR reads the struct and ignores `addr`.
    unsafe { ioctl_with_ref(&vcpu.as_raw_fd(), KVM_HAS_DEVICE_ATTR(), &attr) == 0 }
}

pub(crate) fn tsc_offset(vcpu: &VcpuFd) -> Option<u64> {
    let mut offset = 0u64;
    let attr = tsc_attr(&mut offset);
    // SAFETY: KVM writes one u64 to `addr`, which points at `offset`.
    let result = unsafe { ioctl_with_ref(&vcpu.as_raw_fd(), KVM_GET_DEVICE_ATTR(), &attr) };
    // The kernel wrote through a copy of the pointer that the optimiser
    // cannot see: read it volatile.
    // SAFETY: `offset` is a live local.
    (result == 0).then(|| unsafe { std::ptr::read_volatile(&offset) })
}

pub(crate) fn set_tsc_offset(vcpu: &VcpuFd, mut offset: u64) -> Result<(), kvm_ioctls::Error> {
    let attr = tsc_attr(&mut offset);
    // SAFETY: KVM reads one u64 from `addr`, which points at `offset`.
    match unsafe { ioctl_with_ref(&vcpu.as_raw_fd(), KVM_SET_DEVICE_ATTR(), &attr) } {
        0 => Ok(()),
        _ => Err(kvm_ioctls::Error::last()),
    }
}

/// Whether `/dev/kvm` can build the VM that Hebe needs, and why not.
pub fn host_can_run() -> Result<(), MachineError> {
    let machine = Machine::new()?;
    let vcpu = machine.create_vcpu(0)?;
    let cpuid = machine.guest_cpuid(0, 1);
    vcpu.prepare_boot(&cpuid, None)
        .map_err(|_| MachineError::Lacks("a usable vCPU"))
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::thread;
    use std::time::Duration;

    use super::*;

    /// A VM that is resumed in such a moment would stay frozen.
    #[test]
    fn vms_are_made_while_signals_come_in() {
        let kvm_fd = match Kvm::new() {
            Ok(kvm_fd) => kvm_fd,
            Err(e) => return eprintln!("skipped: /dev/kvm: {e}"),
        };
        crate::install_kick_handler().expect("a handler");
        let done = AtomicBool::new(false);
        // SAFETY: asks for this thread's number.
        let tid = unsafe { libc::gettid() };
        let mut made = Vec::new();
        thread::scope(|scope| {
            scope.spawn(|| {
                // A slow computer may get nowhere while they come in.
                for _ in 0..20_000 {
                    if done.load(Ordering::Acquire) {
                        break;
                    }
                    // SAFETY: sends a signal, for which a handler is installed,
                    // to a thread of this process that waits for this one.
                    unsafe {
                        libc::syscall(libc::SYS_tgkill, libc::getpid(), tid, libc::SIGRTMIN())
                    };
                    thread::sleep(Duration::from_micros(5));
                }
            });
            made.extend((0..300).map(|_| create_vm(&kvm_fd).map(drop)));
            done.store(true, Ordering::Release);
        });
        for vm in made {
            vm.expect("a VM");
        }
    }
}
