//! A booted lab host with what it needs, and guests in it.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use hebe_types::{
    BalloonConfig, ByteSize, DiskConfig, MacAddr, NetConfig, StoreKind, VmConfig, VsockConfig,
};
use lab_guest::proto::HostStatus;
use lab_guest::status::GuestStatus;

use crate::agent::Agent;
use crate::assets::{Assets, Kernel, KernelName};
use crate::binaries::{Binaries, HEBE, HEBE_VMM, Program, workspace_root};
use crate::machine::{
    EmulatorFailure, GuestPorts, Machine, MachineConfig, Start, SystemDisk, host_cmdline,
};
use crate::progress::Progress;
use crate::smaps::Share;
use crate::system::{self, System};
use crate::{disk, initramfs, peer, probe, serial, tools};

/// Longest time a host may take from reset or kexec to the end of its start-up.
pub const BOOT_LIMIT: Duration = Duration::from_secs(600);
/// The same for a host with systemd.
const SYSTEM_BOOT_LIMIT: Duration = Duration::from_secs(1200);
/// Longest time until the first word of a host that was just started, which is
/// started again after that.
const FIRST_WORD_LIMIT: Duration = Duration::from_secs(480);
/// Longest time a guest may take to answer.
pub const GUEST_LIMIT: Duration = Duration::from_secs(600);
/// Longest wait for guests that were just started, and the part of each.
const FIRST_BOOT_LIMIT: Duration = Duration::from_secs(240);
const FIRST_BOOT_LIMIT_EACH: Duration = Duration::from_secs(60);
/// How long a list of the VMs may take.
const LIST_LIMIT: Duration = Duration::from_secs(120);
/// How much of a guest's console an error shows.
const CONSOLE_LINES: usize = 80;
/// The last address byte of the first guest.
pub const FIRST_GUEST_BYTE: u8 = 101;
/// That of the host.
const HOST_BYTE: u8 = 15;

/// How to build a lab host.
#[derive(Clone, Debug)]
pub struct LabOptions {
    /// The kernel that a reset starts.
    pub host: KernelName,
    /// A Debian root disk with systemd as PID 1, instead of `lab-init` in the
    /// initramfs. One with a boot loader has its own kernel, and its own words on
    /// the command line: `host`, `others`, `reserve_mib` and `append` are not used.
    pub system: Option<System>,
    /// Kernels that the host can be rebooted into, besides `host`.
    pub others: Vec<KernelName>,
    /// Kernels for guests.
    pub guest_kernels: Vec<KernelName>,
    /// Names of guests that get a disk, and its size in MiB.
    pub guest_disks: Vec<(String, u64)>,
    /// Names of guests that get a disk which is a copy of an image.
    pub guest_images: Vec<(String, PathBuf)>,
    /// Files that are put below `/data/files`.
    pub files: Vec<PathBuf>,
    /// How many guests the forwarded ports are for.
    pub guests: u8,
    /// The first guest's ports lead to the host itself, which leads them on:
    /// for guests behind an address translation of the host's.
    pub ports_of_host: bool,
    /// The machine's RAM, in MiB; half of it lies below 4 GiB.
    pub memory_mib: u64,
    /// The reserved range at 4 GiB, in MiB; 0 for none.
    pub reserve_mib: u64,
    /// Processors.
    pub cpus: u8,
    /// The host's disk, in MiB; sparse.
    pub disk_mib: u64,
    /// Programs in the host's `/bin`.
    pub product: Vec<Program>,
    /// Programs in the guests' `/bin`.
    pub guest_programs: Vec<Program>,
    /// Put a busybox into the host.
    pub tools: bool,
    /// Put QEMU into the host, for [`crate::peer`].
    pub peer: bool,
    /// Put fio and iperf3 into the host, and on a disk for guests
    /// ([`crate::tools`]).
    pub bench_tools: bool,
    /// Format the store on the first boot (`hebe store init`).
    pub store_init: bool,
    /// An emulated processor with AVX.
    pub avx: bool,
    /// Emulated processors run at the same time, each in a thread of its own:
    /// faster on a quiet computer, but QEMU then loses a host or a guest now
    /// and then, the more often the busier the computer is (docs/lab.md).
    pub parallel: bool,
    /// More words for the host's command line.
    pub append: String,
    /// Leave the serial log and the disk behind.
    pub keep_files: bool,
}

impl Default for LabOptions {
    fn default() -> Self {
        Self {
            host: KernelName::V6_1Cloud,
            system: None,
            others: Vec::new(),
            guest_kernels: vec![KernelName::V6_1Cloud],
            guest_disks: Vec::new(),
            guest_images: Vec::new(),
            files: Vec::new(),
            guests: 4,
            ports_of_host: false,
            memory_mib: 4096,
            reserve_mib: 1536,
            cpus: 2,
            disk_mib: 4096,
            product: vec![HEBE, HEBE_VMM],
            guest_programs: Vec::new(),
            tools: false,
            peer: false,
            bench_tools: false,
            store_init: true,
            avx: false,
            parallel: false,
            append: String::new(),
            keep_files: false,
        }
    }
}

impl LabOptions {
    /// Words for the command line of every kernel of this host.
    fn append(&self) -> String {
        let system = self.system.as_ref().map(|_| system::CMDLINE);
        let words = system.into_iter().chain([self.append.as_str()]);
        words.collect::<Vec<_>>().join(" ").trim().to_owned()
    }

    /// By firmware and boot loader; no kernel of the lab's is for it.
    fn starts_by_itself(&self) -> bool {
        self.system.as_ref().is_some_and(|system| system.has_loader)
    }

    fn boot_limit(&self) -> Duration {
        match self.system {
            Some(_) => SYSTEM_BOOT_LIMIT,
            None => BOOT_LIMIT,
        }
    }
}

/// A guest to define.
#[derive(Clone, Debug)]
pub struct GuestSpec {
    /// Its name.
    pub name: String,
    /// Which forwarded ports are its own: 0 is the first guest.
    pub index: u8,
    /// RAM, in MiB.
    pub memory_mib: u64,
    /// vCPUs.
    pub vcpus: u8,
    /// Kernel, one of [`LabOptions::guest_kernels`].
    pub kernel: KernelName,
    /// It has the disk that [`LabOptions::guest_disks`] made under its name.
    pub disk: bool,
    /// Its disk keeps nothing of what is written.
    pub snapshot: bool,
    /// Its first disk is the one with fio and iperf3 ([`crate::tools`]), and it
    /// runs programs by order ([`Lab::guest_agent`]). A disk of its own is then
    /// its second, and nothing in the guest uses it.
    pub tools: bool,
    /// It has sockets, an agent that serves them, pvpanic, a generation ID and a
    /// real-time clock;
    /// the agent must be among [`LabOptions::guest_programs`].
    pub agent: bool,
    /// It has a generation ID, also without an agent.
    pub generation_id: bool,
    /// It has a balloon.
    pub balloon: bool,
    /// Where its RAM lives.
    pub store: StoreKind,
    /// Working set of the memory checker, in MiB.
    pub memcheck_mib: u64,
    /// Pause of the memory checker between two slices, in milliseconds; the
    /// guest's own where none is given.
    pub memcheck_ms: Option<u64>,
    /// How often a trial probes it from outside.
    pub probe_every: Duration,
    /// Started by the host after a cold reboot.
    pub autostart: bool,
    /// More words for its command line, such as `lab.slow_work=500` or `lab.disk_ms=200`.
    pub append: String,
}

impl GuestSpec {
    /// Guest number `index` (from 0), called `vm1`, `vm2` …
    pub fn numbered(index: u8, kernel: KernelName) -> Self {
        Self {
            name: format!("vm{}", index + 1),
            index,
            memory_mib: 256,
            vcpus: 1,
            kernel,
            disk: false,
            snapshot: false,
            tools: false,
            agent: false,
            generation_id: false,
            balloon: false,
            store: StoreKind::Auto,
            memcheck_mib: 32,
            memcheck_ms: None,
            probe_every: probe::UDP_INTERVAL,
            autostart: true,
            append: String::new(),
        }
    }

    /// Its command line asks for the disk writer, which writes to a disk of its own.
    pub fn has_disk_writer(&self) -> bool {
        self.disk && !self.tools && self.append.contains("lab.disk_ms=")
    }

    /// Its command line asks for the slow-starting service.
    pub fn has_slow_service(&self) -> bool {
        self.append.contains("lab.slow_work=")
    }

    fn cmdline(&self) -> String {
        let byte = FIRST_GUEST_BYTE + self.index;
        let mut line = format!(
            "console=ttyS0 quiet lab.role=guest lab.ip=10.0.2.{byte}/24 lab.gw=10.0.2.2 lab.memcheck_mib={}",
            self.memcheck_mib
        );
        if let Some(ms) = self.memcheck_ms {
            line.push_str(&format!(" lab.memcheck_ms={ms}"));
        }
        if self.agent {
            line.push_str(" lab.agent=1");
        }
        if self.tools {
            line.push_str(" lab.tools=1");
        }
        if !self.append.is_empty() {
            line.push(' ');
            line.push_str(&self.append);
        }
        line
    }

    fn disks(&self) -> Vec<DiskConfig> {
        let raw = |name: &str, readonly| DiskConfig::raw(guest_disk_path(name).into(), readonly);
        let tools = self.tools.then(|| raw(tools::DISK, true));
        let own = self.disk.then(|| DiskConfig {
            snapshot: self.snapshot,
            ..raw(&self.name, false)
        });
        tools.into_iter().chain(own).collect()
    }

    /// The definition that an operator would write.
    pub fn config(&self) -> Result<VmConfig> {
        let folder = format!("/data/guest/{}", self.kernel);
        let byte = FIRST_GUEST_BYTE + self.index;
        let mac = [0x52, 0x54, 0x00, 0x6c, 0x61, byte];
        let config = VmConfig {
            vcpus: self.vcpus,
            store: self.store,
            kernel: Some(format!("{folder}/vmlinuz").into()),
            initrd: Some(format!("{folder}/initrd.img").into()),
            cmdline: self.cmdline(),
            autostart: self.autostart,
            rtc: self.agent,
            pvpanic: self.agent,
            generation_id: self.agent || self.generation_id,
            vsock: self.agent.then(VsockConfig::default),
            balloon: self.balloon.then(BalloonConfig::default),
            disks: self.disks(),
            nets: vec![NetConfig {
                mac: Some(MacAddr(mac)),
                ..NetConfig::tap(format!("tap{byte}"), Some("br0".to_owned()))
            }],
            ..VmConfig::minimal(self.name.parse()?, ByteSize::mib(self.memory_mib))
        };
        config.validate()?;
        Ok(config)
    }
}

/// Where a guest's disk lies in the host.
pub fn guest_disk_path(name: &str) -> String {
    format!("/data/guest/disks/{name}.img")
}

/// A lab host that has booted.
pub struct Lab {
    /// The machine.
    pub machine: Machine,
    /// What it was built from.
    pub options: LabOptions,
    /// The boot that the lab last waited for.
    pub boot: HostStatus,
    /// How long the first boot took.
    pub boot_time: Duration,
    folder: Folder,
}

impl Lab {
    /// Builds everything and boots the host.
    pub fn boot(assets: &Assets, options: LabOptions, progress: &dyn Progress) -> Result<Self> {
        let system = options.system.as_ref();
        let image = system.map(|s| s.image(assets, progress)).transpose()?;
        let disk = image.map(|image| SystemDisk { image, kept: false });
        Self::boot_on(assets, options, disk, progress)
    }

    /// The same, with this first disk.
    pub(crate) fn boot_on(
        assets: &Assets,
        options: LabOptions,
        system: Option<SystemDisk>,
        progress: &dyn Progress,
    ) -> Result<Self> {
        let qemu = assets.machine_qemu(progress)?;
        let binaries = Binaries::build(&options.product, &options.guest_programs, progress)?;
        let folder = Folder::create(options.keep_files)?;
        let tools = match options.tools {
            true => assets.busybox(progress)?,
            false => None,
        };
        progress.step("making the lab host's initramfs and disk");
        let initrd = folder.path.join("initrd.img");
        let start = first_start(
            assets,
            &options,
            &binaries,
            tools.as_deref(),
            initrd,
            progress,
        )?;
        let image = folder.path.join("disk.img");
        let tree = folder.path.join("tree");
        fill_tree(
            &tree,
            assets,
            &options,
            &binaries,
            tools.as_deref(),
            progress,
        )?;
        if options.peer {
            peer::place(&assets.qemu(progress)?, &tree)?;
        }
        if options.bench_tools {
            let folder = tree.join("tools");
            tools::place(assets, &folder, progress)?;
            let image = tree.join(format!("guest/disks/{}.img", tools::DISK));
            tools::make_disk(&image, &folder, progress)?;
        }
        disk::make_ext4(&image, options.disk_mib, Some(&tree), progress)?;
        fs::remove_dir_all(&tree).context("cannot remove the disk's source folder")?;
        let config = MachineConfig {
            memory_mib: options.memory_mib,
            cpus: options.cpus,
            start,
            system,
            disk: Some(image),
            guests: options.guests,
            guest_byte: match options.ports_of_host {
                true => HOST_BYTE,
                false => FIRST_GUEST_BYTE,
            },
            avx: options.avx,
            parallel: options.parallel,
            dir: folder.path.clone(),
        };
        progress.step(&match options.starts_by_itself() {
            true => "starting the lab host by its firmware".to_owned(),
            false => format!("booting the lab host on {}", options.host),
        });
        let start = Instant::now();
        let mut machine = Machine::start(&qemu, &config)?;
        let boot = first_boot(&mut machine, &options)?;
        Ok(Self {
            machine,
            options,
            boot,
            boot_time: start.elapsed(),
            folder,
        })
    }

    /// Takes what this computer keeps in memory of the host's disk away, so
    /// that the host's next reads come from the disk below. What the host
    /// wrote is on the disk after it, too.
    pub fn drop_disk_cache(&self) -> Result<()> {
        let path = self.folder.path.join("disk.img");
        let file =
            fs::File::open(&path).with_context(|| format!("cannot open {}", path.display()))?;
        // Pages that are not written yet cannot be dropped.
        file.sync_data()?;
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)?;
        Ok(())
    }

    /// Folder of the serial log.
    pub fn folder(&self) -> &Path {
        &self.folder.path
    }

    /// Leaves the serial log and the disk behind.
    pub fn keep_files(&mut self) {
        self.folder.keep = true;
    }

    /// What `hebe reboot` is told for another kernel: `--kernel`, `--initrd`
    /// and `--cmdline` with their values.
    pub fn reboot_arguments(&self, kernel: KernelName) -> Vec<String> {
        let (image, initrd) = host_files(kernel);
        vec![
            "--kernel".to_owned(),
            image,
            "--initrd".to_owned(),
            initrd,
            "--cmdline".to_owned(),
            self.host_cmdline(),
        ]
    }

    /// The command line that another kernel of this host gets.
    pub fn host_cmdline(&self) -> String {
        host_cmdline(self.options.reserve_mib, &self.options.append())
    }

    /// Jumps into another kernel by the agent alone, without the product: a
    /// test aid. Frozen VMs are not asked.
    pub fn plain_kexec(&mut self, kernel: KernelName) -> Result<HostStatus> {
        self.leave_by_kexec(kernel)?;
        self.wait_for_next_boot()
    }

    /// The first half of [`Lab::plain_kexec`]: the serial line shows `LAB: jump`
    /// when the old kernel is left.
    pub fn leave_by_kexec(&self, kernel: KernelName) -> Result<()> {
        let (image, initrd) = host_files(kernel);
        self.machine
            .agent
            .kexec(&image, &initrd, &self.host_cmdline(), true)
    }

    /// Hard reset, and the boot after it.
    pub fn reset(&mut self) -> Result<HostStatus> {
        self.machine.reset()?;
        self.wait_for_next_boot()
    }

    /// Waits until another boot of the host answers.
    pub fn wait_for_next_boot(&mut self) -> Result<HostStatus> {
        let before = self.boot.boot_id.clone();
        let limit = self.options.boot_limit();
        self.boot = self.machine.wait_for_boot(Some(&before), limit)?;
        Ok(self.boot.clone())
    }

    /// Writes a guest's definition to `/etc/hebe/vms`.
    pub fn define(&self, guest: &GuestSpec) -> Result<()> {
        if !self.options.guest_kernels.contains(&guest.kernel) {
            bail!(
                "{} is not among the guest kernels of this lab",
                guest.kernel
            );
        }
        let text = toml::to_string(&guest.config()?)?;
        let path = format!("/etc/hebe/vms/{}.toml", guest.name);
        self.machine.agent.put(&path, 0o644, text.as_bytes())
    }

    /// Defines and starts guests.
    ///
    /// # Errors
    /// An [`EmulatorFailure`] where a guest of the emulated machine does not
    /// come to its user space: nothing was done to it yet but to start it.
    pub fn start(&mut self, guests: &[GuestSpec]) -> Result<()> {
        for guest in guests {
            self.define(guest)?;
            self.machine.exec_ok(&["hebe", "start", &guest.name])?;
        }
        let limit = FIRST_BOOT_LIMIT + FIRST_BOOT_LIMIT_EACH * guests.len() as u32;
        let up = self.wait_within(guests, limit);
        up.map(drop).map_err(|error| {
            self.machine
                .shut_down("a guest")
                .context(format!("{error:#}"))
        })
    }

    /// The ports of a guest.
    pub fn ports(&self, guest: &GuestSpec) -> Result<GuestPorts> {
        let ports = self.machine.guests.get(usize::from(guest.index)).copied();
        ports.with_context(|| format!("the lab has no ports for {}; raise `guests`", guest.name))
    }

    /// What runs programs in a guest that has them ([`GuestSpec::tools`]).
    pub fn guest_agent(&self, guest: &GuestSpec) -> Result<Agent> {
        self.ports(guest).map(|ports| Agent::new(ports.agent))
    }

    /// Waits until every guest's HTTP server answers.
    pub fn wait_for_guests(&mut self, guests: &[GuestSpec]) -> Result<Vec<GuestStatus>> {
        self.wait_within(guests, GUEST_LIMIT)
    }

    fn wait_within(&mut self, guests: &[GuestSpec], limit: Duration) -> Result<Vec<GuestStatus>> {
        let mut all = Vec::new();
        for guest in guests {
            let ports = self.ports(guest)?;
            let status = probe::wait_for_guest(&ports, limit, || {
                self.machine.check()?;
                self.check_exit(guest)?;
                match self.guest_alarms(guest).first() {
                    Some(alarm) => bail!("the kernel of {} is in trouble: {alarm}", guest.name),
                    None => Ok(()),
                }
            });
            match status {
                Ok(status) => all.push(status),
                Err(error) => {
                    let error = error.context(self.console_tail(guest));
                    return Err(self.blame(std::slice::from_ref(guest), error));
                }
            }
        }
        Ok(all)
    }

    /// The emulator's failure behind an error, where there is evidence of one.
    pub fn blame(&mut self, guests: &[GuestSpec], error: anyhow::Error) -> anyhow::Error {
        if error.is::<EmulatorFailure>() {
            return error;
        }
        let checks = [self.machine.check()].into_iter();
        let exits = guests.iter().map(|guest| self.check_exit(guest));
        let lists = std::iter::once_with(|| self.all_running(guests));
        let mut failures = checks.chain(exits).chain(lists).filter_map(Result::err);
        match failures.find(|failure| failure.is::<EmulatorFailure>()) {
            Some(failure) => failure.context(format!("{error:#}")),
            None => error,
        }
    }

    /// Fails when a guest's VMM says that its processor shut down.
    pub fn check_exits(&self, guests: &[GuestSpec]) -> Result<()> {
        guests.iter().try_for_each(|guest| self.check_exit(guest))
    }

    fn check_exit(&self, guest: &GuestSpec) -> Result<()> {
        let path = format!("/run/hebe/vms/{}/exit.json", guest.name);
        let Ok(exit) = self.machine.agent.get(&path) else {
            return Ok(());
        };
        let exit: serde_json::Value = serde_json::from_slice(&exit).unwrap_or_default();
        if exit["reason"] != "triple-fault" {
            return Ok(());
        }
        let error = self.machine.shut_down("a guest");
        Err(error.context(format!("{}'s VMM", guest.name)))
    }

    /// What a guest's kernel printed in trouble, on its serial port.
    pub fn guest_alarms(&self, guest: &GuestSpec) -> Vec<String> {
        let path = format!("/run/hebe/vms/{}/console.log", guest.name);
        let bytes = self.machine.agent.get(&path).unwrap_or_default();
        serial::alarms_in(&String::from_utf8_lossy(&bytes))
    }

    /// Fails with a VM's last words if one of the guests is not running.
    pub fn all_running(&self, guests: &[GuestSpec]) -> Result<()> {
        let list = ["hebe", "list", "--json"];
        let text = self.machine.agent.exec(&list, b"", LIST_LIMIT)?.text();
        let list: serde_json::Value =
            serde_json::from_str(&text).context("hebe list printed no JSON")?;
        let rows = list.as_array().or_else(|| list["vms"].as_array());
        for guest in guests {
            let row = rows
                .into_iter()
                .flatten()
                .find(|row| row["name"] == guest.name.as_str());
            if row.is_none_or(|row| row["state"] != "running") {
                let words = format!("{}: {}", guest.name, self.console_tail(guest));
                return Err(self.machine.not_running(&text).context(words));
            }
        }
        Ok(())
    }

    /// The process id of each guest's VMM.
    pub fn vmm_pids(&self, guests: &[GuestSpec]) -> Result<Vec<u32>> {
        let text = self.machine.exec_ok(&["hebe", "list", "--json"])?;
        let list: serde_json::Value =
            serde_json::from_str(&text).context("hebe list printed no JSON")?;
        let rows = list.as_array().or_else(|| list["vms"].as_array());
        let pid = |guest: &GuestSpec| {
            let mut rows = rows.into_iter().flatten();
            let row = rows.find(|row| row["name"] == guest.name.as_str());
            let pid = row.and_then(|row| u32::try_from(row["pid"].as_u64()?).ok());
            pid.with_context(|| format!("{} has no VMM: {text}", guest.name))
        };
        guests.iter().map(pid).collect()
    }

    /// What a process of the host costs in memory.
    pub fn share(&self, pid: u32) -> Result<Share> {
        let smaps = self.machine.agent.get(&format!("/proc/{pid}/smaps"))?;
        Ok(Share::read(&String::from_utf8_lossy(&smaps)))
    }

    fn console_tail(&self, guest: &GuestSpec) -> String {
        let read = |file: &str| {
            let path = format!("/run/hebe/vms/{}/{file}", guest.name);
            let bytes = self.machine.agent.get(&path).unwrap_or_default();
            let text = String::from_utf8_lossy(&bytes).into_owned();
            let lines: Vec<&str> = text.lines().collect();
            lines[lines.len().saturating_sub(CONSOLE_LINES)..].join("\n")
        };
        format!(
            "{} does not answer; its console:\n{}\nits VMM:\n{}",
            guest.name,
            read("console.log"),
            read("log")
        )
    }
}

/// Kernel and initramfs of a host kernel on the host's disk.
pub fn host_files(kernel: KernelName) -> (String, String) {
    let folder = format!("/data/boot/{kernel}");
    (format!("{folder}/vmlinuz"), format!("{folder}/initrd.img"))
}

/// Waits for the first boot. Nothing of the product runs before the lab's agent
/// does, so that where this never answers the emulator failed; nor is there any in a
/// host that starts by itself.
fn first_boot(machine: &mut Machine, options: &LabOptions) -> Result<HostStatus> {
    let word = machine.wait_for_answer(None, false, FIRST_WORD_LIMIT);
    let emulators = word.is_err() || options.starts_by_itself();
    let boot = word.and_then(|_| machine.wait_for_boot(None, options.boot_limit()));
    boot.map_err(|error| match emulators {
        true => machine
            .shut_down("the lab host")
            .context(format!("{error:#}")),
        false => error,
    })
}

/// What a reset starts; its initramfs is written to `initrd`.
fn first_start(
    assets: &Assets,
    options: &LabOptions,
    binaries: &Binaries,
    tools: Option<&Path>,
    initrd: PathBuf,
    progress: &dyn Progress,
) -> Result<Start> {
    if options.starts_by_itself() {
        return Ok(Start::Firmware);
    }
    let host = assets.kernel(options.host, progress)?;
    fs::write(&initrd, initramfs::host(&host, binaries, tools, progress)?)
        .context("cannot write the host's initramfs")?;
    let mut append = options.append();
    if options.store_init && options.product.contains(&HEBE) {
        append.push_str(" lab.store=init");
    }
    Ok(Start::Kernel {
        image: host.image,
        initrd,
        cmdline: host_cmdline(options.reserve_mib, append.trim()),
    })
}

fn fill_tree(
    tree: &Path,
    assets: &Assets,
    options: &LabOptions,
    binaries: &Binaries,
    tools: Option<&Path>,
    progress: &dyn Progress,
) -> Result<()> {
    let put = |folder: String, kernel: &Kernel, initrd: Vec<u8>| -> Result<()> {
        let dir = tree.join(folder);
        disk::place(&kernel.image, &dir.join("vmlinuz"))?;
        fs::write(dir.join("initrd.img"), initrd).context("cannot write an initramfs")
    };
    let hosts = std::iter::once(&options.host).chain(&options.others);
    for name in hosts.filter(|_| !options.starts_by_itself()) {
        let kernel = assets.kernel(*name, progress)?;
        put(
            format!("boot/{name}"),
            &kernel,
            initramfs::host(&kernel, binaries, tools, progress)?,
        )?;
        if options.system.is_some() {
            system::place_modules(&kernel, tree)?;
        }
    }
    if options.system.is_some() {
        system::place_programs(binaries, tree)?;
    }
    for name in &options.guest_kernels {
        let kernel = assets.kernel(*name, progress)?;
        put(
            format!("guest/{name}"),
            &kernel,
            initramfs::guest(&kernel, binaries)?,
        )?;
    }
    for folder in ["hebe", "etc/vms", "guest/disks"] {
        fs::create_dir_all(tree.join(folder))?;
    }
    for (name, mib) in &options.guest_disks {
        let image = tree.join(format!("guest/disks/{name}.img"));
        disk::make_ext4(&image, *mib, None, progress)?;
    }
    for file in &options.files {
        let name = file.file_name().context("a file without a name")?;
        disk::place(file, &tree.join("files").join(name))?;
    }
    for (name, image) in &options.guest_images {
        disk::place(image, &tree.join(format!("guest/disks/{name}.img")))?;
    }
    Ok(())
}

/// The folder of one run, removed at its end unless something went wrong.
struct Folder {
    path: PathBuf,
    keep: bool,
}

impl Folder {
    fn create(keep: bool) -> Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let runs = workspace_root().join("target/lab/runs");
        remove_left_disks(&runs);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = runs.join(format!("{}-{number}", std::process::id()));
        if path.exists() {
            fs::remove_dir_all(&path)
                .with_context(|| format!("cannot remove {}", path.display()))?;
        }
        fs::create_dir_all(&path).with_context(|| format!("cannot create {}", path.display()))?;
        Ok(Self { path, keep })
    }
}

/// Disks of runs that were killed; their logs stay.
fn remove_left_disks(runs: &Path) {
    for entry in fs::read_dir(runs).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let pid = name.split('-').next().unwrap_or_default();
        if !Path::new("/proc").join(pid).exists() {
            // Whoever removes them first is right.
            let _ = fs::remove_file(entry.path().join("disk.img"));
            let _ = fs::remove_dir_all(entry.path().join("tree"));
        }
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        if self.keep {
            return;
        }
        let _ = fs::remove_file(self.path.join("disk.img"));
        if !std::thread::panicking() {
            let _ = fs::remove_dir_all(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guests_definition_is_one_that_the_product_accepts() {
        let mut guest = GuestSpec::numbered(2, KernelName::V7_3Cloud);
        guest.disk = true;
        guest.append = "lab.disk_ms=200".to_owned();
        let text = toml::to_string(&guest.config().expect("valid")).expect("toml");
        let back: VmConfig = toml::from_str(&text).expect("parses");
        assert_eq!(back.name.as_str(), "vm3");
        assert_eq!(back.nets[0].tap, "tap103");
        assert!(back.cmdline.contains("lab.ip=10.0.2.103/24"));
        assert!(back.cmdline.ends_with("lab.disk_ms=200"));
    }
}
