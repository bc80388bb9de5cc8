//! A VM around the test guest, and its segment, which outlives it.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use hebe_api::FreezeReport;
use hebe_store::{ExecStatus, Segment};
use hebe_types::{ByteSize, StoreKind, VmConfig, VmId};
use hebe_vmm::{Event, Identity, Vm, VmError};

use crate::environment;
use crate::guest::{self, Counters, View};

/// What to build.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// vCPUs, 1 to [`guest::VCPUS_MAX`].
    pub vcpus: u8,
    /// Guest RAM.
    pub memory: ByteSize,
    /// First letter of the guest's command line; see [`guest`].
    pub mode: char,
    /// Third letter: the timer's period is 2^(20+n) ticks.
    pub period: u8,
    /// Check the TSC between vCPUs, and against the timer.
    pub trust_tsc: bool,
    /// Use AVX where CPUID has it.
    pub avx: bool,
    /// Patterns are held for 2^(8+n) rounds of an empty loop.
    pub hold: u8,
}

impl Plan {
    /// A guest that loops.
    pub fn looping(vcpus: u8) -> Self {
        Self {
            vcpus,
            memory: ByteSize::mib(8),
            mode: 'L',
            period: 2,
            trust_tsc: environment::tsc_is_stable(),
            avx: true,
            hold: 6,
        }
    }

    /// The same for a KVM that interprets every instruction: no AVX, which
    /// KVM's emulator does not know, fewer timer interrupts, short holds.
    pub fn interpreted(vcpus: u8) -> Self {
        Self {
            avx: false,
            period: 4,
            hold: 2,
            ..Self::looping(vcpus)
        }
    }

    fn cmdline(&self) -> String {
        let (trust, avx) = (u8::from(self.trust_tsc), u8::from(self.avx));
        format!(
            "{}{}{}{trust}{avx}{}",
            self.mode, self.vcpus, self.period, self.hold
        )
    }
}

/// The VM under test. It is there or not; the segment always is.
pub struct Rig {
    vm: Option<Vm>,
    segment: Arc<Segment>,
    id: VmId,
    vcpus: u8,
    events: Sender<Event>,
    inbox: Receiver<Event>,
    dir: tempfile::TempDir,
    idle: Footprint,
    console_bytes: u64,
}

/// How long the parts of a resume took.
#[derive(Clone, Copy, Debug)]
pub struct ResumeTimes {
    /// Reading and checking the state.
    pub load: Duration,
    /// Building the VM.
    pub construct: Duration,
    /// Withdrawing the state and letting it run.
    pub start: Duration,
}

impl ResumeTimes {
    /// All parts.
    pub fn total(&self) -> Duration {
        self.load + self.construct + self.start
    }
}

/// What a process holds that a VM must give back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Footprint {
    threads: usize,
    descriptors: usize,
}

impl Footprint {
    fn now() -> Result<Self> {
        let count = |path: &str| -> Result<usize> { Ok(fs::read_dir(path)?.count()) };
        Ok(Self {
            threads: count("/proc/self/task")?,
            descriptors: count("/proc/self/fd")?,
        })
    }
}

impl Rig {
    /// Puts the guest into a fresh segment; nothing runs yet.
    pub fn new(plan: Plan) -> Result<Self> {
        hebe_kvm::install_kick_handler()?;
        let dir = tempfile::tempdir()?;
        let kernel = dir.path().join("guest.elf");
        fs::write(&kernel, guest::image())?;
        let name = "loop".parse()?;
        let id = VmId([0x11; 16]);
        let segment = Arc::new(Segment::new_memfd(id, &name, plan.memory, false)?);
        let (events, inbox) = mpsc::channel();
        // Counted once all descriptors that are not a VM's are there.
        let idle = Footprint::now()?;
        let config = VmConfig {
            vcpus: plan.vcpus,
            store: StoreKind::Memfd,
            kernel: Some(kernel),
            cmdline: plan.cmdline(),
            ..VmConfig::minimal(name, plan.memory)
        };
        config.validate()?;
        let identity = Identity {
            id,
            config,
            run_dir: dir.path().to_owned(),
        };
        let vm = Vm::boot(identity, segment.clone(), &events)?;
        Ok(Self {
            vm: Some(vm),
            segment,
            id,
            vcpus: plan.vcpus,
            events,
            inbox,
            dir,
            idle,
            console_bytes: 0,
        })
    }

    /// The VM.
    pub fn vm(&mut self) -> Result<&mut Vm> {
        self.vm.as_mut().context("there is no VM now")
    }

    /// The segment.
    pub fn segment(&self) -> &Arc<Segment> {
        &self.segment
    }

    /// The VM's id.
    pub fn id(&self) -> VmId {
        self.id
    }

    /// Where the VM's files are.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Where the VM's events go.
    pub fn events(&self) -> &Sender<Event> {
        &self.events
    }

    /// All vCPUs' counters.
    pub fn counters(&self) -> Vec<Counters> {
        let view = View::new(&self.segment);
        (0..self.vcpus).map(|cpu| view.counters(cpu)).collect()
    }

    /// Waits for what ends the VM.
    pub fn wait_for_end(&self, limit: Duration) -> Result<Event> {
        self.inbox
            .recv_timeout(limit)
            .with_context(|| format!("the guest did not end within {limit:?}"))
    }

    /// Freezes the VM.
    pub fn freeze(&mut self) -> Result<(FreezeReport, Duration)> {
        let began = Instant::now();
        let report = self.vm()?.freeze()?;
        let took = began.elapsed();
        ensure!(
            report.ram_touched == Default::default(),
            "the freeze touched guest RAM: {:?}",
            report.ram_touched
        );
        Ok((report, took))
    }

    /// Ends all threads of the VM and KVM's part of it; the segment stays.
    pub fn drop_vm(&mut self) -> Result<()> {
        self.vm = None;
        // A thread that was joined may still be listed for an instant.
        let until = Instant::now() + Duration::from_secs(60);
        loop {
            let left = Footprint::now()?;
            if left == self.idle {
                return Ok(());
            }
            if Instant::now() > until {
                bail!(
                    "the VM left something behind: {left:?}, before it {:?}",
                    self.idle
                );
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Builds the VM from the state in the segment and lets it run.
    pub fn resume(&mut self) -> Result<ResumeTimes> {
        let began = Instant::now();
        let state = self.segment.exec().load()?;
        let loaded = Instant::now();
        self.resume_from(&state)?;
        let constructed = Instant::now();
        let vm = self.vm()?;
        let touched = vm.status().ram_meter;
        ensure!(
            touched == Default::default(),
            "the resume touched guest RAM: {touched:?}"
        );
        vm.start()?;
        Ok(ResumeTimes {
            load: loaded - began,
            construct: constructed - loaded,
            start: constructed.elapsed(),
        })
    }

    /// Builds the VM from `state`; it does not run yet.
    pub fn resume_from(&mut self, state: &[u8]) -> Result<(), VmError> {
        let dir = self.dir.path().to_owned();
        let vm = Vm::resume(self.id, dir, self.segment.clone(), state, &self.events)?;
        self.vm = Some(vm);
        Ok(())
    }

    /// Errors of the guest, and of the VM, as text; none is good.
    pub fn check(&self) -> Result<()> {
        if let Ok(event) = self.inbox.try_recv() {
            let stages: Vec<_> = self.counters().iter().map(|c| c.stage).collect();
            bail!(
                "the VM ended: {event:?}, its vCPUs at stage {stages:?}{}",
                self.error_text()
            );
        }
        let errors = self.error_text();
        ensure!(errors.is_empty(), "the guest found errors:{errors}");
        Ok(())
    }

    fn error_text(&self) -> String {
        let view = View::new(&self.segment);
        let line = |cpu| {
            let error = view.first_error(cpu)?;
            let count = view.counters(cpu).errors;
            Some(format!(
                "\n  vCPU {cpu}: {count} errors, first {:?}: found {:#x}, wanted {:#x}, detail {:#x}",
                error.fault, error.found, error.wanted, error.detail
            ))
        };
        (0..self.vcpus).filter_map(line).collect()
    }

    /// Waits until every vCPU made progress of every kind since `base`; an
    /// interrupt lost shows here. Returns how long it took.
    pub fn wait_for_progress(&self, base: &[Counters], limit: Duration) -> Result<Duration> {
        let began = Instant::now();
        loop {
            self.check()?;
            let now = self.counters();
            let stuck = stuck(base, &now);
            if stuck.is_empty() {
                return Ok(began.elapsed());
            }
            if began.elapsed() > limit {
                bail!(
                    "no progress within {limit:?}: {}\n  before {base:?}\n  now {now:?}",
                    stuck.join(", ")
                );
            }
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    /// What must hold whenever the VM stands still: one token at most, an
    /// interrupt received for every one sent but the one in flight, and the
    /// working sets intact.
    pub fn check_stopped(&self) -> Result<()> {
        self.check()?;
        let counters = self.counters();
        let sum = |field: fn(&Counters) -> u64| counters.iter().map(field).sum::<u64>();
        let (sent, received) = (sum(|c| c.ipis_out), sum(|c| c.ipis_in));
        let tokens = sum(|c| c.token);
        // The guest counts a token it sends just after it gave it up.
        ensure!(
            sent >= received && sent - received + tokens <= 1,
            "{sent} interrupts sent, {received} received, {tokens} tokens held"
        );
        let view = View::new(&self.segment);
        for cpu in 0..self.vcpus {
            if let Err(page) = view.verify_work(cpu) {
                bail!("working set of vCPU {cpu}: page {page} is not what the guest wrote");
            }
        }
        Ok(())
    }

    /// Checks the console log of the VM that just ended: the guest wrote a
    /// sequence, and a port write lost or done twice breaks it.
    pub fn check_console(&mut self) -> Result<()> {
        for name in ["console.log.1", "console.log"] {
            let path = self.dir.path().join(name);
            let Ok(text) = fs::read(&path) else { continue };
            fs::remove_file(&path)?;
            for byte in text {
                let wanted = 0x30 + (self.console_bytes & 63) as u8;
                ensure!(
                    byte == wanted,
                    "byte {} of the serial output is {byte:#x}, not {wanted:#x}",
                    self.console_bytes
                );
                self.console_bytes += 1;
            }
        }
        // The guest counts a byte just before it writes it.
        let out = self.counters()[0].serial_out;
        ensure!(
            out - self.console_bytes <= 1,
            "the guest wrote {out} bytes and {} came out",
            self.console_bytes
        );
        Ok(())
    }

    /// The segment's status must be Frozen.
    pub fn expect_frozen(&self) -> Result<ExecStatus> {
        let status = self.segment.exec().status();
        ensure!(
            matches!(status, ExecStatus::Frozen { .. }),
            "the segment is {status:?}, not frozen"
        );
        Ok(status)
    }
}

/// Which counters have not moved.
fn stuck(base: &[Counters], now: &[Counters]) -> Vec<String> {
    let mut stuck = Vec::new();
    for (cpu, (old, new)) in base.iter().zip(now).enumerate() {
        let mut expect = |what: &str, old: u64, new: u64, more: u64| {
            if new < old + more {
                stuck.push(format!("vCPU {cpu} {what}"));
            }
        };
        // The second pass began after the resume.
        expect("passes", old.passes, new.passes, 2);
        expect("timer", old.ticks, new.ticks, 1);
        expect("interprocessor interrupts", old.ipis_in, new.ipis_in, 1);
        if cpu == 0 {
            expect("serial interrupts", old.serial_irqs, new.serial_irqs, 1);
        }
    }
    stuck
}
