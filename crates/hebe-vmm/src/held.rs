//! What a VM has from outside, opened once and kept for the VMM's life: a
//! reset boots the same kernel again, with devices on the same disks and taps,
//! because the cage leaves no way to open them. Neither would names be of use:
//! a VMM that resumes its VM in an initramfs keeps that root directory, which
//! is empty once the host's own took over (`switch_root(8)`).

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;

use hebe_block::BlockBackend;
use hebe_boot::{BootError, BootFile};
use hebe_devices::{ConsoleLog, NetBackend};
use hebe_kvm::KvmDevice;
use hebe_sys::tap::{Tap, create_bridge};
use hebe_types::{DiskConfig, MacAddr, NetConfig, Network, VmConfig};

use crate::control;
use crate::generation::Generation;
use crate::image;
use crate::log;
use crate::parts;
use crate::vm::{Identity, VmError};

/// What a reset boots from; room for it where that is on the first disk.
#[derive(Debug)]
pub(crate) struct BootFiles {
    pub(crate) kernel: BootFile,
    pub(crate) initrd: Option<BootFile>,
}

impl BootFiles {
    fn open(config: &VmConfig) -> Result<Self, BootError> {
        let Some(kernel) = &config.kernel else {
            return image::places();
        };
        Ok(Self {
            kernel: BootFile::kernel(kernel)?,
            initrd: config.initrd.as_deref().map(BootFile::initrd).transpose()?,
        })
    }
}

/// KVM, the console's log, open disks and taps, in the order of the
/// definition, the socket for vsock, and boot files.
#[derive(Debug)]
pub(crate) struct Held {
    pub(crate) kvm: KvmDevice,
    pub(crate) console: ConsoleLog,
    /// Or why there are none, where the VM was resumed without them.
    pub(crate) boot: Result<BootFiles, String>,
    pub(crate) disks: Vec<BlockBackend>,
    pub(crate) nets: Vec<(NetBackend, MacAddr)>,
    /// If the VM has vsock.
    pub(crate) vsock: Option<UnixListener>,
    /// Used if the VM has one.
    pub(crate) generation: Generation,
}

/// Networks that whoever started this VMM made for NICs, by their numbers.
pub(crate) type GivenNets = BTreeMap<usize, OwnedFd>;

impl Held {
    /// For a VM that boots: kernel and initrd must be there.
    pub(crate) fn open(identity: &Identity, given: GivenNets) -> Result<Self, VmError> {
        let boot = BootFiles::open(&identity.config)?;
        Self::open_devices(identity, Ok(boot), given)
    }

    /// For a VM that goes on: it needs its kernel only when it resets itself,
    /// so one that is not there is told, and costs no VM.
    pub(crate) fn open_to_resume(identity: &Identity, given: GivenNets) -> Result<Self, VmError> {
        let boot = BootFiles::open(&identity.config).map_err(|error| {
            let why = control::chain(&error);
            log::log_error(&format!(
                "the guest cannot boot again when it resets: {why}"
            ));
            why
        });
        Self::open_devices(identity, boot, given)
    }

    /// Opens and locks the disks, opens the taps and joins their bridges.
    fn open_devices(
        identity: &Identity,
        boot: Result<BootFiles, String>,
        mut given: GivenNets,
    ) -> Result<Self, VmError> {
        let Identity {
            id,
            config,
            run_dir,
        } = identity;
        parts::host_boot_id()?;
        let kvm = KvmDevice::open()?;
        let console = ConsoleLog::open(&run_dir.join("console.log"));
        let console = console.map_err(|source| VmError::Io {
            what: "the console log cannot be opened: check the space and the rights of the run directory",
            source,
        })?;
        let mut disks = Vec::new();
        for disk in &config.disks {
            disks.push(open_disk(disk)?);
        }
        let mut nets = Vec::new();
        for (index, net) in config.nets.iter().enumerate() {
            let wire = open_net(net, given.remove(&index))?;
            nets.push((wire, net.mac_of(*id, index)));
        }
        let vsock = config.vsock.as_ref();
        let vsock = vsock.map(|_| control::listen(&run_dir.join("vsock.sock")));
        let vsock = vsock.transpose()?;
        Ok(Self {
            kvm,
            console,
            boot,
            disks,
            nets,
            vsock,
            generation: Generation::default(),
        })
    }
}

/// With a ring for its reads, where there can be one: none is made in the cage.
fn open_disk(disk: &DiskConfig) -> Result<BlockBackend, VmError> {
    let mut opened = BlockBackend::of(disk)?;
    let how = match opened.open_ring() {
        Ok(()) => "by io_uring".to_owned(),
        Err(why) => format!("one by one, because {why}"),
    };
    log::note(&format!("disk {}: reads {how}", disk.path.display()));
    Ok(opened)
}

fn open_net(net: &NetConfig, given: Option<OwnedFd>) -> Result<NetBackend, VmError> {
    match (net.network, given) {
        (Some(Network::User), Some(socket)) => return Ok(NetBackend::stream(socket)),
        // A VM goes on without its network rather than not at all; a boot is not
        // ordered without.
        (Some(Network::User), None) => {
            log::log_error("the NIC with network = \"user\" is connected to nothing");
            return Ok(NetBackend::Nothing);
        }
        (Some(Network::Nat) | None, _) => {}
    }
    let tap = Tap::open(&net.tap)?;
    if let Some(bridge) = &net.bridge {
        if net.network == Some(Network::Nat) {
            // Where the network could not be made, it can be later, and takes the
            // bridge as it finds it.
            create_bridge(bridge)?;
        }
        tap.join_bridge(bridge)?;
    }
    tap.set_up()?;
    Ok(NetBackend::tap(tap))
}
