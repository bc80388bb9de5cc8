//! One VM, put together.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::Sender;

use hebe_api::{RamMeter, ResumeReport, ResumeSteps, VmStatus, VmmState};
use hebe_block::BlockBackend;
use hebe_boot::{AcpiError, AcpiPlan, BootError, BootPlan, Entry};
use hebe_devices::{ConsoleHub, DeviceError, VirtioPci};
use hebe_kvm::{BootRegisters, ClockPlan, Machine, MachineError, Stop, Vcpu, VcpuError};
use hebe_state::v1::machine::{AcpiV1, ClockV1, IrqchipV1, VcpuV1, VmV1};
use hebe_state::{SectionKind, StateError, StateReader};
use hebe_store::{Segment, StoreError};
use hebe_sys::clock::stamp_now;
use hebe_types::{ByteSize, RamRange, VmConfig, VmId, ram_ranges};

use crate::board::Board;
use crate::cage::Confined;
use crate::held::{GivenNets, Held};
use crate::image;
use crate::log;
use crate::parts::{self, Disks, Parts, Site};
use crate::vcpus::{Vcpus, VcpusError};

/// What ends a VM, or its VMM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The guest powered itself off.
    PowerOff,
    /// The guest asked for a reset.
    Reset,
    /// A vCPU stopped by itself: triple fault, or a failure of KVM.
    VcpuStopped(Stop),
    /// The operator ends the VMM.
    Quit,
    /// A signal ends the VMM.
    Terminated,
}

/// Why a VM cannot be built, suspended or resumed.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// KVM and the machine.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// A vCPU.
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
    /// vCPU threads.
    #[error(transparent)]
    Vcpus(#[from] VcpusError),
    /// Kernel and initrd.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// It was resumed without its kernel or initrd, and reset itself.
    #[error("{0}, when the VM was resumed: put the file back and start the VM")]
    NoKernel(String),
    /// ACPI tables.
    #[error(transparent)]
    Acpi(#[from] AcpiError),
    /// A device.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The serial port's state.
    #[error(transparent)]
    Serial(#[from] hebe_devices::SerialStateError),
    /// A disk.
    #[error(transparent)]
    Disk(#[from] hebe_block::BlockError),
    /// The disk that it boots from.
    #[error("the VM cannot boot from its first disk")]
    Image(#[from] hebe_image::ImageError),
    /// Both command lines together.
    #[error("the kernel command line has {0} bytes, with what the first disk says: at most 2047")]
    Cmdline(usize),
    /// A tap.
    #[error(transparent)]
    Tap(#[from] hebe_sys::tap::TapError),
    /// The execution state.
    #[error(transparent)]
    State(#[from] StateError),
    /// The segment.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The saved file.
    #[error(transparent)]
    Saved(#[from] hebe_snapshot::SnapshotError),
    /// The state is another VM's.
    #[error(
        "the execution state is that of VM {found}, and the segment is VM {expected}'s: it is not resumed"
    )]
    OtherVm {
        /// Whose segment it is.
        expected: VmId,
        /// Whose state it is.
        found: VmId,
    },
    /// The definition inside the state is not one.
    #[error("the VM's definition in its execution state cannot be read")]
    Config(#[source] toml::de::Error),
    /// State and definition do not agree.
    #[error("the execution state does not fit the VM's definition: {0}")]
    Mismatch(String),
    /// Not possible from the state that the VM is in.
    #[error("the VM is {state:?}: it cannot be {wanted}")]
    NotNow {
        /// Where it stands.
        state: VmmState,
        /// What was wanted.
        wanted: &'static str,
    },
    /// It was to be ended in another state.
    #[error("the VM is {state:?} and was to be ended as {expected:?}: it is left alone")]
    Unexpected {
        /// Where it stands.
        state: VmmState,
        /// What the order expected.
        expected: VmmState,
    },
    /// Nobody waits for the answer any more.
    #[error("the order came too late: whoever gave it waits no more, and the VM is as it was")]
    Expired,
    /// Its RAM has no files that could be handed out.
    #[error("the VM's RAM is in no files of its own: only that of store \"luo\" is handed over")]
    NoFiles,
    /// The memory of a frozen VM would end with its VMM.
    #[error(
        "the VM is frozen in memory that ends with its VMM: `hebe resume` lets it run again, and `hebe stop` ends it then"
    )]
    LastHolder,
    /// It was not defined with one.
    #[error("the VM has no balloon: add [balloon] to its definition and start it anew")]
    NoBalloon,
    /// The guest cannot be left with more than there is.
    #[error(
        "the VM has {memory} of RAM, so {target} cannot be left to its guest: say at most {memory}"
    )]
    BalloonTarget {
        /// What was asked for.
        target: ByteSize,
        /// What there is.
        memory: ByteSize,
    },
    /// The VMM was told to end.
    #[error("the VMM is ending: wait for it")]
    Quitting,
    /// KVM could not go on.
    #[error("the VM failed and cannot run again ({0}): `hebe stop` ends it")]
    Broken(String),
    /// The guest is on its way out.
    #[error("the guest is powering off or resetting: wait for it")]
    Ending,
    /// A file or descriptor.
    #[error("{what}")]
    Io {
        /// What was tried, and the way out.
        what: &'static str,
        /// Why it failed.
        #[source]
        source: std::io::Error,
    },
}

/// A VM with its threads.
pub struct Vm {
    // Declaration order is drop order: the vCPUs end first, then the devices,
    // then KVM lets go of the RAM, and the segment is unmapped last.
    pub(crate) vcpus: Vcpus,
    pub(crate) devices: Vec<Arc<VirtioPci>>,
    pub(crate) board: Arc<Board>,
    pub(crate) console: Arc<ConsoleHub>,
    pub(crate) machine: Arc<Machine>,
    pub(crate) segment: Arc<Segment>,
    pub(crate) identity: Identity,
    pub(crate) state: VmmState,
    pub(crate) resumes: u32,
    pub(crate) resume_report: Option<ResumeReport>,
    /// Instants of its construction, if it was resumed.
    resume_steps: Option<ResumeSteps>,
    /// An order to end was accepted: nothing starts to run any more.
    pub(crate) quitting: bool,
    /// Somebody waits to suspend it while its guest resets: what boots again then
    /// stands still at its first instruction, until whoever waits has looked.
    pub(crate) stands_by: bool,
    /// Why it stands still for good.
    pub(crate) failed: Option<String>,
    /// What it has from outside, for as long as the VMM lives.
    pub(crate) held: Arc<Held>,
    /// How the VMM is confined, where it is.
    pub(crate) cage: Option<Confined>,
}

/// Who the VM is. Does not change as long as it lives.
#[derive(Clone, Debug)]
pub struct Identity {
    /// Its id.
    pub id: VmId,
    /// Its definition.
    pub config: VmConfig,
    /// Where its socket and logs are.
    pub run_dir: PathBuf,
}

/// Where a VM comes from that goes on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Origin {
    /// The disks that it may have.
    pub(crate) disks: Disks,
    /// Its state was in a file, of which there may be copies.
    pub(crate) copied: bool,
}

/// An execution state whose owner and definition are known and in order.
pub(crate) struct Found<'a> {
    reader: StateReader<'a>,
    pub(crate) identity: Identity,
    resumes: u32,
}

impl<'a> Found<'a> {
    /// Reads who is in `state`, which must be VM `id` and fit its segment.
    pub(crate) fn read(
        id: VmId,
        run_dir: PathBuf,
        segment: &Segment,
        state: &'a [u8],
    ) -> Result<Self, VmError> {
        let mut reader = StateReader::parse(state)?;
        let vm: VmV1 = reader.take(0)?;
        if vm.id != id.0 {
            return Err(VmError::OtherVm {
                expected: id,
                found: VmId(vm.id),
            });
        }
        let config: VmConfig = toml::from_str(&vm.config_toml).map_err(VmError::Config)?;
        config
            .validate()
            .map_err(|e| VmError::Mismatch(e.to_string()))?;
        check_ram(&config, segment)?;
        let identity = Identity {
            id,
            config,
            run_dir,
        };
        Ok(Self {
            reader,
            identity,
            resumes: vm.resumes,
        })
    }
}

impl Vm {
    /// Builds the VM and puts its kernel into RAM. It does not run yet.
    pub fn boot(
        identity: Identity,
        segment: Arc<Segment>,
        events: &Sender<Event>,
    ) -> Result<Self, VmError> {
        let held = Arc::new(Held::open(&identity, GivenNets::new())?);
        Self::boot_with(held, identity, segment, events)
    }

    /// [`Vm::boot`], with what is open already.
    pub(crate) fn boot_with(
        held: Arc<Held>,
        identity: Identity,
        segment: Arc<Segment>,
        events: &Sender<Event>,
    ) -> Result<Self, VmError> {
        let config = &identity.config;
        let machine = Arc::new(Machine::on(&held.kvm)?);
        let ram = parts::map_ram(&machine, &segment)?;
        let generation = config.generation_id.then(|| held.generation.id());
        let tables = AcpiPlan {
            vcpus: config.vcpus,
            serial: config.console.serial,
            rtc: config.rtc,
            pvpanic: config.pvpanic,
            generation_id: generation.transpose()?,
        };
        let rsdp = hebe_boot::write_acpi(&ram, &tables)?;
        let ranges: Vec<RamRange> = ram_ranges(config.memory);
        let files = held.boot.as_ref();
        let files = files.map_err(|why| VmError::NoKernel(why.clone()))?;
        let found = image::look(files, &held.disks, config)?;
        let plan = BootPlan {
            kernel: &files.kernel,
            initrd: files.initrd.as_ref().filter(|_| found.has_initrd),
            cmdline: &found.cmdline,
            rsdp,
            ranges: &ranges,
        };
        let entry = hebe_boot::load(&plan, &ram)?;
        drop(found);
        let site = Site {
            identity: &identity,
            held: &held,
            machine: &machine,
            segment: &segment,
            events,
        };
        let parts = parts::build(&site, ram)?;
        let mut vcpus = Vec::new();
        for index in 0..config.vcpus {
            let vcpu = machine.create_vcpu(index)?;
            let boot = (index == 0).then_some(boot_registers(entry));
            vcpu.prepare_boot(&machine.guest_cpuid(index, config.vcpus), boot)?;
            vcpus.push(vcpu);
        }
        Self::assemble(held, identity, segment, machine, parts, vcpus, events)
    }

    /// Builds the VM around RAM that it finds, from its execution state, with
    /// the disks that it had. It does not run yet; RAM is not touched.
    pub fn resume(
        id: VmId,
        run_dir: PathBuf,
        segment: Arc<Segment>,
        state: &[u8],
        events: &Sender<Event>,
    ) -> Result<Self, VmError> {
        Self::resume_with(Disks::Same, id, run_dir, segment, state, events)
    }

    /// [`Vm::resume`], with `disks`.
    pub fn resume_with(
        disks: Disks,
        id: VmId,
        run_dir: PathBuf,
        segment: Arc<Segment>,
        state: &[u8],
        events: &Sender<Event>,
    ) -> Result<Self, VmError> {
        let found = Found::read(id, run_dir, &segment, state)?;
        let held = Arc::new(Held::open_to_resume(&found.identity, GivenNets::new())?);
        let origin = Origin {
            disks,
            copied: false,
        };
        Self::resume_found(origin, found, held, segment, events)
    }

    /// [`Vm::resume_with`], from a state that was read, with what is open
    /// already.
    pub(crate) fn resume_found(
        origin: Origin,
        found: Found<'_>,
        held: Arc<Held>,
        segment: Arc<Segment>,
        events: &Sender<Event>,
    ) -> Result<Self, VmError> {
        let Found {
            mut reader,
            identity,
            resumes,
        } = found;
        let caged = stamp_now();
        let machine = Arc::new(Machine::on(&held.kvm)?);
        let machine_made = stamp_now();
        let ram = parts::map_ram(&machine, &segment)?;
        let ram_known = stamp_now();
        let vcpus = restore_vcpus(&mut reader, &machine, &identity.config)?;
        let vcpus_restored = stamp_now();
        let site = Site {
            identity: &identity,
            held: &held,
            machine: &machine,
            segment: &segment,
            events,
        };
        let parts = parts::restore(&site, ram.clone(), &mut reader, origin.disks)?;
        reader.finish()?;
        // The last thing that can fail before the VM is whole, and the first
        // that touches its RAM.
        if origin.copied && identity.config.generation_id {
            held.generation.renew(&ram)?;
            parts.board.acpi.tell_generation();
        }
        let mut vm = Self::assemble(held, identity, segment, machine, parts, vcpus, events)?;
        vm.resumes = resumes.saturating_add(1);
        vm.resume_steps = Some(ResumeSteps {
            caged,
            machine_made,
            ram_known,
            vcpus_restored,
        });
        Ok(vm)
    }

    fn assemble(
        held: Arc<Held>,
        identity: Identity,
        segment: Arc<Segment>,
        machine: Arc<Machine>,
        parts: Parts,
        vcpus: Vec<Vcpu>,
        events: &Sender<Event>,
    ) -> Result<Self, VmError> {
        let board = Arc::new(parts.board);
        Ok(Self {
            vcpus: Vcpus::start(vcpus, &board, events)?,
            devices: parts.devices,
            board,
            console: parts.console,
            machine,
            segment,
            identity,
            state: VmmState::Paused,
            resumes: 0,
            resume_report: None,
            resume_steps: None,
            quitting: false,
            stands_by: false,
            failed: None,
            held,
            cage: None,
        })
    }

    /// Where the VM stands.
    pub fn state(&self) -> VmmState {
        self.state
    }

    /// The VM is about to be ended by order: if it is in the `expected` state,
    /// it leaves that no more.
    pub(crate) fn prepare_quit(&mut self, expected: Option<VmmState>) -> Result<(), VmError> {
        if let Some(expected) = expected.filter(|expected| *expected != self.state) {
            return Err(VmError::Unexpected {
                state: self.state,
                expected,
            });
        }
        // By an order that would have it stay frozen without a VMM, which only
        // a segment in a store does.
        if expected.is_some() && self.is_last_holder() {
            return Err(VmError::LastHolder);
        }
        self.quitting = true;
        Ok(())
    }

    /// Frozen in memory that ends with this process: a segment in files, not
    /// in a store.
    pub(crate) fn is_last_holder(&self) -> bool {
        self.state == VmmState::Frozen && !self.segment.files().is_empty()
    }

    /// KVM cannot go on with a vCPU. Everything stops and stays as it is, to
    /// be looked at: only an order ends it. A state that is committed stays so.
    pub(crate) fn fail(&mut self, why: String) {
        if self.failed.is_some() || matches!(self.state, VmmState::Frozen | VmmState::Saved) {
            return;
        }
        // Fails for the vCPU that is the reason; the others stop.
        let _ = self.vcpus.pause();
        pause_all(&self.devices);
        if let Some(serial) = &self.board.serial {
            serial.pause();
        }
        self.state = VmmState::Paused;
        self.failed = Some(why);
    }

    /// Ends the VM for good: its segment says that there is nothing to
    /// resume.
    pub(crate) fn withdraw(self) {
        let (_, segment) = self.dismantle();
        mark_ended(&segment);
    }

    /// Ends threads, devices and KVM's VM; what is left can be built anew.
    pub(crate) fn dismantle(self) -> (Identity, Arc<Segment>) {
        let Self {
            vcpus,
            devices,
            board,
            machine,
            segment,
            identity,
            ..
        } = self;
        drop(vcpus);
        pause_all(&devices);
        drop((devices, board, machine));
        (identity, segment)
    }

    /// The VM as it is.
    pub fn status(&self) -> VmStatus {
        let stopped = |d: &Arc<VirtioPci>| {
            d.stopped_reason()
                .map(|why| format!("{} in slot {}: {why}", d.device_name(), d.slot()))
        };
        VmStatus {
            name: self.identity.config.name.clone(),
            id: self.identity.id,
            state: self.state,
            pid: std::process::id(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            resumes: self.resumes,
            failed: self.failed.clone(),
            guest_panicked: self.board.has_panicked(),
            stopped_devices: self.devices.iter().filter_map(stopped).collect(),
            ram_meter: self.meter(),
            disk_request_ns: self.devices.iter().filter_map(|d| d.request_ns()).max(),
            disk_rings: self.held.disks.iter().map(BlockBackend::has_ring).collect(),
            first_tx: self
                .devices
                .iter()
                .filter_map(|d| d.first_tx())
                .min_by_key(|s| s.tsc),
            resume: self.resume_report.clone(),
            cage: self.cage.as_ref().map(Confined::report),
            balloon: self.balloon_status().map(Box::new),
        }
    }

    /// Guest RAM that device code touched so far.
    pub(crate) fn meter(&self) -> RamMeter {
        let add = |sum: RamMeter, device: &Arc<VirtioPci>| {
            let (ring, data) = device.meter();
            RamMeter {
                ring_bytes: sum.ring_bytes + ring,
                data_bytes: sum.data_bytes + data,
            }
        };
        self.devices.iter().fold(RamMeter::default(), add)
    }

    /// Presses the ACPI power button.
    pub fn press_power_button(&self) -> Result<(), VmError> {
        self.board
            .acpi
            .press_power_button()
            .map_err(|source| VmError::Io {
                what: "the power button's interrupt cannot be raised",
                source,
            })
    }

    /// Begins: marks the segment as running, which withdraws any frozen
    /// state in it, and only then lets anything run.
    pub fn start(&mut self) -> Result<(), VmError> {
        let boot_id = parts::host_boot_id()?;
        self.segment
            .exec()
            .mark_running(boot_id, std::process::id())?;
        self.release();
        Ok(())
    }

    /// Lets devices and vCPUs of a stopped VM go on.
    pub(crate) fn release(&mut self) {
        for device in &self.devices {
            device.resume();
        }
        if let Some(serial) = &self.board.serial {
            serial.resume();
        }
        self.board.acpi.kick();
        self.vcpus.run();
        self.stands_by = false;
        self.state = VmmState::Running;
    }

    /// Tells the network where the VM's addresses are now.
    pub fn announce(&self) {
        for device in &self.devices {
            // A frame that cannot be sent now: the guest's own traffic will tell.
            let _ = device.announce();
        }
    }

    /// Notes when the resume's steps were; the VM's status shows it.
    pub fn set_resume_report(
        &mut self,
        process_started: hebe_types::Stamp,
        state_read: hebe_types::Stamp,
        constructed: hebe_types::Stamp,
    ) {
        self.resume_report = Some(ResumeReport {
            process_started,
            state_read,
            constructed,
            running: stamp_now(),
            ram_touched: self.meter(),
            steps: self.resume_steps.map(Box::new),
        });
    }
}

/// Stops the devices of a VM that does not go on.
fn pause_all(devices: &[Arc<VirtioPci>]) {
    devices.iter().for_each(|device| device.ask_to_pause());
    for device in devices {
        if let Err(error) = device.pause() {
            log::note_of_guest(&format!(
                "{} does not stop cleanly: {error}",
                device.device_name()
            ));
        }
    }
}

/// The VM of this segment ended by order: there is nothing to resume.
pub(crate) fn mark_ended(segment: &Segment) {
    if let Err(error) = segment.exec().mark_empty() {
        log::log_error(&format!("the segment cannot be marked as empty: {error}"));
    }
}

fn boot_registers(entry: Entry) -> BootRegisters {
    match entry {
        Entry::Linux64 {
            rip,
            boot_params,
            cr3,
        } => BootRegisters::Linux64 {
            rip,
            rsi: boot_params,
            cr3,
        },
        Entry::Pvh { eip, start_info } => BootRegisters::Pvh {
            eip,
            ebx: start_info,
        },
    }
}

/// The P2M table must cover exactly the RAM that the definition names.
fn check_ram(config: &VmConfig, segment: &Segment) -> Result<(), VmError> {
    let mut left = ram_ranges(config.memory);
    let mut mapped: Vec<RamRange> = segment
        .ram()
        .iter()
        .map(|m| RamRange {
            gpa: m.gpa,
            len: m.len,
        })
        .collect();
    mapped.sort_by_key(|r| r.gpa);
    // Merge neighbours: a range may lie in several extents.
    mapped.dedup_by(|next, range| {
        let joins = range.gpa.0 + range.len == next.gpa.0;
        if joins {
            range.len += next.len;
        }
        joins
    });
    left.sort_by_key(|r| r.gpa);
    if mapped != left {
        return Err(VmError::Mismatch(format!(
            "the segment does not hold exactly {} of guest RAM",
            config.memory
        )));
    }
    Ok(())
}

/// Clocks first, vCPUs after them: the first clock page that a vCPU sees is
/// then already right.
fn restore_vcpus(
    reader: &mut StateReader,
    machine: &Machine,
    config: &VmConfig,
) -> Result<Vec<Vcpu>, VmError> {
    let instances = reader.instances(SectionKind::Vcpu);
    if !instances.iter().copied().eq(0..u32::from(config.vcpus)) {
        return Err(VmError::Mismatch(format!(
            "{} vCPUs in the state, {} in the definition",
            instances.len(),
            config.vcpus
        )));
    }
    let mut vcpus = Vec::with_capacity(instances.len());
    for index in 0..config.vcpus {
        vcpus.push((
            machine.create_vcpu(index)?,
            reader.take::<VcpuV1>(u32::from(index))?,
        ));
    }
    machine.restore_irqchip(&reader.take::<IrqchipV1>(0)?)?;
    let clock: ClockV1 = reader.take(0)?;
    let now = stamp_now();
    let plan = ClockPlan::new(&clock, now.tsc, now.realtime_ns);
    machine.restore_clock(plan.kvmclock_ns)?;
    for (vcpu, saved) in &vcpus {
        vcpu.restore(saved, machine.supported_cpuid(), &plan)?;
    }
    Ok(vcpus.into_iter().map(|(vcpu, _)| vcpu).collect())
}

/// The ACPI section, for [`parts::restore`].
pub(crate) fn take_acpi(reader: &mut StateReader) -> Result<AcpiV1, VmError> {
    Ok(reader.take(0)?)
}
