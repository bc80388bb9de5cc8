//! One emulated computer.

use std::net::{TcpListener, UdpSocket};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use lab_guest::proto::{AGENT_PORT, HostStatus};
use lab_guest::qmp::Qmp;
use lab_guest::status::{HTTP_PORT, SLOW_PORT, TCP_ECHO_PORT, UDP_ECHO_PORT};
use serde_json::json;

use crate::agent::{Agent, ExecOutput};
use crate::assets::Qemu;
use crate::serial::Serial;

/// The processor that QEMU's emulation runs nested guests on soundly.
const TCG_CPU: &str = "Opteron_G3,+svm,+npt,+rdrand,+vgif,+svme-addr-chk,+x2apic,-misalignsse";

/// The emulated processor with AVX. Small guests alone run on it for long.
const TCG_CPU_AVX: &str = "max,-misalignsse";

/// Who runs the machine's instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accelerator {
    /// QEMU's emulator: everywhere, slow. Ratios count, absolute times do not.
    Tcg,
    /// This computer's processor, with nesting.
    Kvm,
}

impl Accelerator {
    /// KVM only where hardware is behind it and nesting is on.
    pub fn detect() -> Self {
        let nested = ["kvm_intel", "kvm_amd"].iter().any(|module| {
            std::fs::read_to_string(format!("/sys/module/{module}/parameters/nested"))
                .is_ok_and(|v| matches!(v.trim(), "1" | "Y"))
        });
        let flags = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let hardware = flags.split_whitespace().any(|f| f == "vmx" || f == "svm");
        let usable = std::fs::File::options()
            .read(true)
            .write(true)
            .open("/dev/kvm")
            .is_ok();
        if nested && hardware && usable {
            Self::Kvm
        } else {
            Self::Tcg
        }
    }

    fn arguments(self, avx: bool, parallel: bool) -> [&'static str; 4] {
        let emulated = if avx { TCG_CPU_AVX } else { TCG_CPU };
        let tcg = match parallel {
            true => "tcg,thread=multi",
            false => "tcg,thread=single",
        };
        match self {
            Self::Tcg => ["-accel", tcg, "-cpu", emulated],
            Self::Kvm => ["-accel", "kvm", "-cpu", "host"],
        }
    }
}

/// A guest of the lab host, by number: its address and the forwarded ports
/// of this machine through which it is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestPorts {
    /// Last byte of its address 10.0.2.x.
    pub host_byte: u8,
    /// UDP echo.
    pub udp_echo: u16,
    /// TCP echo.
    pub tcp_echo: u16,
    /// HTTP.
    pub http: u16,
    /// The slow-starting service.
    pub slow: u16,
    /// The agent of a guest that has one ([`crate::tools`]).
    pub agent: u16,
}

/// What a reset starts.
#[derive(Clone, Debug)]
pub enum Start {
    /// A kernel that the emulator itself puts into memory.
    Kernel {
        /// Its image.
        image: PathBuf,
        /// Its initramfs.
        initrd: PathBuf,
        /// Its command line.
        cmdline: String,
    },
    /// What the firmware finds on the first disk.
    Firmware,
}

impl Start {
    fn arguments(&self, command: &mut Command) {
        match self {
            Self::Kernel {
                image,
                initrd,
                cmdline,
            } => {
                command.arg("-kernel").arg(image);
                command.arg("-initrd").arg(initrd);
                command.args(["-append", cmdline]);
            }
            Self::Firmware => {
                command.args(["-boot", "order=c"]);
            }
        }
    }
}

/// A machine's first disk.
#[derive(Clone, Debug)]
pub struct SystemDisk {
    /// Raw image.
    pub image: PathBuf,
    /// The image keeps what the machine writes. Otherwise it is never written to:
    /// what the machine writes is kept as long as QEMU runs, over resets and kexec.
    pub kept: bool,
}

/// How to build the machine.
#[derive(Clone, Debug)]
pub struct MachineConfig {
    /// RAM, in MiB; a multiple of 2, at least 1024.
    pub memory_mib: u64,
    /// Processors.
    pub cpus: u8,
    /// What a reset starts.
    pub start: Start,
    /// The first disk.
    pub system: Option<SystemDisk>,
    /// Raw image of the next disk.
    pub disk: Option<PathBuf>,
    /// How many guests the forwarded ports are for.
    pub guests: u8,
    /// First guest's address byte: 101, or 15 when the machine itself is the guest.
    /// From it on addresses are given to those that ask by DHCP.
    pub guest_byte: u8,
    /// An emulated processor with AVX.
    pub avx: bool,
    /// Emulated processors run at the same time instead of in turn.
    pub parallel: bool,
    /// Folder for the serial log.
    pub dir: PathBuf,
}

/// The emulator failed, not what runs in it: a processor shut down (triple
/// fault) without an order, or a guest never came to its user space. QEMU does
/// that now and then on a busy computer, whatever runs in it (docs/lab.md,
/// limits).
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the emulated processor of {0} failed")]
pub struct EmulatorFailure(
    /// "the lab host" or "a guest".
    pub &'static str,
);

/// What a VMM says when the processor tells KVM that an event was being delivered
/// as the guest touched a device (`KVM_INTERNAL_ERROR_DELIVERY_EV`). No guest of the
/// lab has its tables or its stacks there.
pub const UNDELIVERED: &str = "KVM internal error 3 ";

/// What QEMU writes to its log at a triple fault of the machine's own.
const TRIPLE_FAULT: &str = "Triple fault";

/// What QEMU says where a port that was free has been taken before it got there.
const PORT_TAKEN: &str = "Could not set up host forwarding rule";
/// How often other ports are tried then.
const PORT_TRIES: u32 = 10;
/// How long QEMU may take to open its control socket.
const START_LIMIT: Duration = Duration::from_secs(120);
/// How long a program in the host may take for which nothing else is said.
const EXEC_LIMIT: Duration = Duration::from_secs(1200);
/// How long a host may take to power off, and one with systemd.
const POWER_OFF_LIMIT: Duration = Duration::from_secs(300);
const SHUT_DOWN_LIMIT: Duration = Duration::from_secs(900);

#[derive(Debug, thiserror::Error)]
#[error("QEMU did not start: {0}")]
struct NotStarted(String);

/// A running machine. Dropping it ends QEMU.
pub struct Machine {
    /// The agent in the host.
    pub agent: Agent,
    /// The serial line.
    pub serial: Serial,
    /// The forwarded ports of the guests, in order.
    pub guests: Vec<GuestPorts>,
    /// Who runs its instructions.
    pub accelerator: Accelerator,
    /// QEMU's process id.
    pub pid: u32,
    resets: PathBuf,
    qmp: Qmp,
    _sockets: tempfile::TempDir,
    ended: Option<thread::JoinHandle<()>>,
    alarms_seen: usize,
}

impl Machine {
    /// Starts QEMU; the kernel in it then boots.
    pub fn start(qemu: &Qemu, config: &MachineConfig) -> Result<Self> {
        let mut tries = 1;
        loop {
            match Self::start_once(qemu, config) {
                Err(error)
                    if tries < PORT_TRIES
                        && error
                            .downcast_ref::<NotStarted>()
                            .is_some_and(|NotStarted(said)| said.contains(PORT_TAKEN)) =>
                {
                    tries += 1;
                }
                other => return other,
            }
        }
    }

    fn start_once(qemu: &Qemu, config: &MachineConfig) -> Result<Self> {
        let accelerator = Accelerator::detect();
        let ports = Ports::choose(config.guests, config.guest_byte)?;
        let serial = Serial::new(&config.dir.join("serial.log"));
        // A folder of its own: the path of a unix socket is short.
        let sockets = tempfile::tempdir().context("cannot create a folder for QEMU's socket")?;
        let socket = sockets.path().join("qmp");
        let mut command = qemu.command();
        command
            .args([
                "-nodefaults",
                "-no-user-config",
                "-display",
                "none",
                "-machine",
                "q35",
            ])
            .args(accelerator.arguments(config.avx, config.parallel))
            .args([
                "-smp",
                &config.cpus.to_string(),
                "-m",
                &format!("{}M", config.memory_mib),
            ])
            .args(["-serial", &format!("file:{}", serial.path().display())])
            .args([
                "-qmp",
                &format!("unix:{},server=on,wait=off", socket.display()),
            ])
            .args([
                "-nic",
                &format!(
                    "user,model=virtio-net-pci,dhcpstart=10.0.2.{}{}",
                    config.guest_byte,
                    ports.forwards()
                ),
            ])
            .args(["-device", "virtio-rng-pci"]);
        config.start.arguments(&mut command);
        let resets = config.dir.join("resets.log");
        if accelerator == Accelerator::Tcg {
            command.args(["-d", "cpu_reset", "-D"]).arg(&resets);
        }
        if let Some(system) = &config.system {
            let snapshot = if system.kept { "off" } else { "on" };
            let drive = format!(
                "if=virtio,format=raw,snapshot={snapshot},file={}",
                system.image.display()
            );
            // The overlay grows with what is written: not in memory.
            command.args(["-drive", &drive]).env("TMPDIR", &config.dir);
        }
        if let Some(disk) = &config.disk {
            command.args([
                "-drive",
                &format!("if=virtio,format=raw,file={}", disk.display()),
            ]);
        }
        let log = std::fs::File::create(config.dir.join("qemu.log"))?;
        command
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        let (pid, ended) = spawn_guarded(command)?;
        let qmp = match control(&socket, &ended) {
            Ok(qmp) => qmp,
            Err(error) => {
                kill(pid, ended);
                let said = std::fs::read_to_string(config.dir.join("qemu.log")).unwrap_or_default();
                return Err(error.context(NotStarted(said.trim().to_owned())));
            }
        };
        Ok(Self {
            agent: Agent::new(ports.agent),
            serial,
            guests: ports.guests,
            accelerator,
            pid,
            resets,
            qmp,
            _sockets: sockets,
            ended: Some(ended),
            alarms_seen: 0,
        })
    }

    /// Waits for a kernel other than `before`; fails at once when the serial
    /// line shows a kernel failure.
    pub fn wait_for_boot(&mut self, before: Option<&str>, limit: Duration) -> Result<HostStatus> {
        self.wait_for_answer(before, true, limit)
    }

    /// The same; where it needs not be `settled`, the first answer is enough.
    pub fn wait_for_answer(
        &mut self,
        before: Option<&str>,
        settled: bool,
        limit: Duration,
    ) -> Result<HostStatus> {
        let agent = self.agent;
        agent
            .wait_for_boot(before, settled, limit, || self.check())
            .with_context(|| format!("last lines of the serial line:\n{}", self.serial.tail(15)))
    }

    /// Fails when the serial line shows a kernel failure that was not
    /// reported before, when QEMU is gone, or with an [`EmulatorFailure`].
    pub fn check(&mut self) -> Result<()> {
        let resets = std::fs::read(&self.resets).unwrap_or_default();
        if String::from_utf8_lossy(&resets).contains(TRIPLE_FAULT) {
            return Err(self.shut_down("the lab host"));
        }
        let alarms = self.serial.alarms().unwrap_or_default();
        let seen = std::mem::replace(&mut self.alarms_seen, alarms.len());
        if let Some(alarm) = alarms.get(seen) {
            bail!("the lab host's kernel is in trouble: {alarm}");
        }
        if self
            .ended
            .as_ref()
            .is_none_or(thread::JoinHandle::is_finished)
        {
            bail!("QEMU ended");
        }
        Ok(())
    }

    /// What it means that a processor shut down, or never got anywhere.
    pub fn shut_down(&self, whose: &'static str) -> anyhow::Error {
        let failure = EmulatorFailure(whose);
        match self.accelerator {
            Accelerator::Tcg => failure.into(),
            // Said without the type that has a check repeated.
            Accelerator::Kvm => anyhow::anyhow!("{whose} shut down by triple fault"),
        }
    }

    /// That a VM does not run, as `hebe list` told it in `row`.
    pub fn not_running(&self, row: &str) -> anyhow::Error {
        let error = match row.contains(UNDELIVERED) {
            true => self.shut_down("a guest"),
            false => anyhow::anyhow!("it is not running"),
        };
        error.context(format!("it does not run: {row}"))
    }

    /// Runs a program in the host; twenty minutes at most.
    pub fn exec(&self, argv: &[&str]) -> Result<ExecOutput> {
        self.agent.exec(argv, b"", EXEC_LIMIT)
    }

    /// Runs a program that must end with status 0; returns its output.
    pub fn exec_ok(&self, argv: &[&str]) -> Result<String> {
        let output = self.exec(argv)?;
        if !output.ok() {
            bail!(
                "`{}` ended with {:?}: {}",
                argv.join(" "),
                output.code,
                output.all_text().trim()
            );
        }
        Ok(output.text())
    }

    /// Hard reset, as by the button: RAM is kept by QEMU, caches and devices are not.
    pub fn reset(&mut self) -> Result<()> {
        self.qmp.execute("system_reset", json!({})).map(drop)
    }

    /// Presses the ACPI power button.
    pub fn power_button(&mut self) -> Result<()> {
        self.qmp.execute("system_powerdown", json!({})).map(drop)
    }

    /// Stops all processors between two instructions.
    pub fn stop(&mut self) -> Result<()> {
        self.qmp.execute("stop", json!({})).map(drop)
    }

    /// Lets stopped processors go on.
    pub fn cont(&mut self) -> Result<()> {
        self.qmp.execute("cont", json!({})).map(drop)
    }

    /// Powers the host off and waits for QEMU's end.
    pub fn power_off(self) -> Result<()> {
        self.agent.power_off()?;
        self.wait_for_end(POWER_OFF_LIMIT)
    }

    /// Has systemd take the host down, with all its file systems in order, and
    /// waits for QEMU's end.
    pub fn shut_down_by_systemd(self) -> Result<()> {
        self.agent
            .spawn(&["systemctl", "poweroff"], "/data/poweroff.log")?;
        self.wait_for_end(SHUT_DOWN_LIMIT)
    }

    fn wait_for_end(mut self, limit: Duration) -> Result<()> {
        let end = Instant::now() + limit;
        while self.ended.as_ref().is_some_and(|e| !e.is_finished()) {
            if Instant::now() > end {
                bail!("the lab host did not power off");
            }
            thread::sleep(Duration::from_millis(50));
        }
        self.ended = None;
        Ok(())
    }

    /// Ends QEMU at once.
    pub fn kill(self) {}
}

impl Drop for Machine {
    fn drop(&mut self) {
        if let Some(ended) = self.ended.take() {
            kill(self.pid, ended);
        }
    }
}

/// Ends QEMU, if it has not ended.
fn kill(pid: u32, ended: thread::JoinHandle<()>) {
    if !ended.is_finished() {
        // SAFETY: kill(2) takes no pointer; the process is our child and
        // not yet waited for, because its waiting thread still runs.
        unsafe { libc::kill(pid as i32, libc::SIGKILL) };
    }
    let _ = ended.join();
}

/// QEMU's control socket, unless it ends before it opens it.
fn control(socket: &Path, ended: &thread::JoinHandle<()>) -> Result<Qmp> {
    let end = Instant::now() + START_LIMIT;
    loop {
        match Qmp::connect(socket, Duration::from_millis(200)) {
            Ok(qmp) => return Ok(qmp),
            Err(error) if ended.is_finished() || Instant::now() > end => return Err(error),
            Err(_) => {}
        }
    }
}

/// Starts QEMU from a thread that lives as long as QEMU does, so that the
/// parent-death signal means the end of this whole process.
fn spawn_guarded(mut command: Command) -> Result<(u32, thread::JoinHandle<()>)> {
    let (started_in, started) = mpsc::channel();
    let handle = thread::spawn(move || {
        // SAFETY: prctl(2) is async-signal-safe and takes no pointer here.
        unsafe {
            command.pre_exec(
                || match libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) {
                    0 => Ok(()),
                    _ => Err(std::io::Error::last_os_error()),
                },
            );
        }
        match command.spawn() {
            Ok(mut child) => {
                let _ = started_in.send(Ok(child.id()));
                let _ = child.wait();
            }
            Err(e) => {
                let _ = started_in.send(Err(e));
            }
        }
    });
    let pid = started
        .recv()
        .context("no answer")?
        .context("cannot start QEMU")?;
    Ok((pid, handle))
}

struct Ports {
    agent: u16,
    guests: Vec<GuestPorts>,
}

impl Ports {
    /// Finds free ports; all are held until the last one is chosen, so that
    /// none is given twice.
    fn choose(guests: u8, first_byte: u8) -> Result<Self> {
        let mut held = Vec::new();
        let mut tcp = || -> Result<u16> {
            let listener = TcpListener::bind("127.0.0.1:0").context("no free port")?;
            let port = listener.local_addr()?.port();
            held.push(listener);
            Ok(port)
        };
        let agent = tcp()?;
        let mut all = Vec::new();
        let mut held_udp = Vec::new();
        for i in 0..guests {
            let udp = UdpSocket::bind("127.0.0.1:0").context("no free port")?;
            all.push(GuestPorts {
                host_byte: first_byte + i,
                udp_echo: udp.local_addr()?.port(),
                tcp_echo: tcp()?,
                http: tcp()?,
                slow: tcp()?,
                agent: tcp()?,
            });
            held_udp.push(udp);
        }
        Ok(Self { agent, guests: all })
    }

    fn forwards(&self) -> String {
        let one = |kind: &str, port: u16, byte: u8, to: u16| {
            format!(",hostfwd={kind}:127.0.0.1:{port}-10.0.2.{byte}:{to}")
        };
        let mut text = one("tcp", self.agent, 15, AGENT_PORT);
        for guest in &self.guests {
            text.push_str(&one("udp", guest.udp_echo, guest.host_byte, UDP_ECHO_PORT));
            text.push_str(&one("tcp", guest.tcp_echo, guest.host_byte, TCP_ECHO_PORT));
            text.push_str(&one("tcp", guest.http, guest.host_byte, HTTP_PORT));
            text.push_str(&one("tcp", guest.slow, guest.host_byte, SLOW_PORT));
            text.push_str(&one("tcp", guest.agent, guest.host_byte, AGENT_PORT));
        }
        text
    }
}

/// A host's command line: console, reservation, and what else is asked for.
/// The kernel's tests of its own ciphers are left out: they are a seventh of the
/// instructions from kexec to the first program.
pub fn host_cmdline(reserve_mib: u64, extra: &str) -> String {
    let mut line = String::from("console=ttyS0 loglevel=4 panic=0 tsc=reliable cryptomgr.notests");
    if reserve_mib > 0 {
        line.push_str(&format!(" memmap={reserve_mib}M!4G"));
    }
    if !extra.is_empty() {
        line.push(' ');
        line.push_str(extra);
    }
    line
}
