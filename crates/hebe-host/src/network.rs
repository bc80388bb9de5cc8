//! VMs in networks that Hebe makes: addresses before a boot, the network before
//! a VMM starts, or beside that where many are resumed.
//!
//! What a VM's NICs are is read from its definition as it was booted (the file of
//! its life, [`crate::saved::LifeFile`]), which the host wrote and no VMM can
//! change. A VM that goes on is never kept from it by its network: what could
//! not be had is said.

use std::collections::BTreeSet;
use std::fmt::Display;
use std::fs;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::thread;

use hebe_net::passt::{self, Coming, Passt, PasstError};
use hebe_net::{Care, NetworkError, Place, Port, serve};
use hebe_sys::proc;
use hebe_types::{NetConfig, Network, Stamp, VmConfig, VmId, VmName, fill_macs};
use serde::Serialize;

use crate::definitions;
use crate::host::{Host, HostError, Layout};
use crate::host_id;
use crate::launch::{Launch, LaunchError, Origin};
use crate::lock::VmLock;
use crate::saved::LifeFile;

/// Longest definition that is read, in bytes.
const DEFINITION_LEN_MAX: usize = 1 << 20;

fn place(layout: &Layout) -> Result<Place, NetworkError> {
    Place::open(&layout.run, &layout.state)
}

/// The definition with all that follows from the VM and this host, as the VM
/// keeps it over every suspend. Its addresses are written down when this
/// returns.
pub(crate) fn resolved(host: &Host, config: &VmConfig, vm: VmId) -> Result<VmConfig, HostError> {
    let mut config = config.clone();
    let name = config.name.clone();
    if config.nets.iter().any(|net| net.mac.is_none())
        && let Some(id) = host_id::have(&host.layout, &name)?
    {
        fill_macs(&mut config.nets, id, &name);
    }
    if config.nets.iter().all(|net| net.network.is_none()) {
        return Ok(config);
    }
    let known = |vm: &str| vm.parse().is_ok_and(|vm| has_a_claim(&host.layout, &vm));
    let leased = place(&host.layout).and_then(|place| place.lease(&name, &mut config.nets, &known));
    leased.map_err(LaunchError::from)?;
    for (index, net) in config.nets.iter_mut().enumerate() {
        *net = net.resolved(&name, vm, index);
    }
    Ok(config)
}

/// Whether a VM may come back and want its address.
fn has_a_claim(layout: &Layout, name: &VmName) -> bool {
    definitions::find(layout, name).is_some()
        || !LifeFile::all(layout, name).is_empty()
        || VmLock::is_held(&layout.vm_dir(name))
}

/// The NICs of a VM that is about to start.
fn nets_of(host: &Host, order: &Launch) -> Vec<NetConfig> {
    match &order.origin {
        Origin::Boot(config) => config.nets.clone(),
        Origin::Frozen | Origin::File(_) => life_nets(&host.layout, &order.name, order.vm),
    }
}

fn life_nets(layout: &Layout, name: &VmName, vm: VmId) -> Vec<NetConfig> {
    let config = life(layout, name, vm);
    config.map(|config| config.nets).unwrap_or_default()
}

/// The definition that a VM was booted with, as far as its VMM knows it.
pub(crate) fn life(layout: &Layout, name: &VmName, vm: VmId) -> Option<VmConfig> {
    let file = LifeFile::new(layout, name, vm).existing()?;
    let text = fs::read_to_string(file).ok()?;
    let text = (text.len() <= DEFINITION_LEN_MAX).then_some(text)?;
    toml::from_str(&text).ok()
}

fn ports(name: &VmName, vm: VmId, nets: &[NetConfig]) -> Vec<Port> {
    let port = |(index, net): (usize, &NetConfig)| {
        (net.network == Some(Network::Nat)).then_some(())?;
        Some(Port {
            vm: name.clone(),
            tap: net.tap.clone(),
            mac: net.mac_of(vm, index),
            address: net.address?,
            forward: net.forward.clone(),
            expected_until_ns: None,
        })
    };
    nets.iter().enumerate().filter_map(port).collect()
}

/// The network of VMs that are about to be resumed all at once, made beside that:
/// none of them waits for it, and it passes nothing on before its rules are in
/// ([`hebe_net::Expected`]).
pub(crate) struct Beside<'a> {
    host: &'a Host,
    place: Option<Place>,
    ports: Vec<Port>,
}

impl<'a> Beside<'a> {
    /// For these VMs.
    pub(crate) fn of(host: &'a Host, vms: impl Iterator<Item = (&'a VmName, VmId)>) -> Self {
        let ports: Vec<Port> = vms
            .flat_map(|(name, vm)| ports(name, vm, &life_nets(&host.layout, name, vm)))
            .collect();
        let wanted = (!ports.is_empty()).then(|| place(&host.layout).ok());
        Self {
            host,
            place: wanted.flatten(),
            ports,
        }
    }

    /// Notes the VMs, has their bridge there, and does `work`, given those that
    /// need do nothing for their network, while that is made. The instant from
    /// which on it passes frames on, where there is one.
    pub(crate) fn make_while<T>(
        &self,
        work: impl FnOnce(&BTreeSet<VmName>) -> T,
    ) -> (T, Option<Stamp>) {
        // What fails here is said when each VM comes.
        let expected = self.place.as_ref().map(|place| place.expect(&self.ports));
        let (Some(place), Some(Ok(Some(expected)))) = (&self.place, expected) else {
            return (work(&BTreeSet::new()), None);
        };
        let vms = expected.vms().clone();
        let passes = OnceLock::new();
        let make = || {
            let note = || {
                let _ = passes.set(self.host.system.stamp());
            };
            let start = || self.host.system.start_net_helper(self.host);
            let said = expected.finish(note, &start);
            said.iter().for_each(|words| place.remark(words));
        };
        let make = Mutex::new(Some(make));
        let make_once = || {
            let make = make.lock().unwrap_or_else(PoisonError::into_inner).take();
            make.into_iter().for_each(|make| make());
        };
        let done = thread::scope(|scope| {
            let thread = thread::Builder::new().spawn_scoped(scope, make_once);
            if thread.is_err() {
                // None can be had: one after the other then.
                make_once();
            }
            let done = work(&vms);
            // One that panicked costs the network, and no VM.
            let _ = thread.map(thread::ScopedJoinHandle::join);
            done
        });
        // Who did not come is expected no more; forgotten in a while all the same.
        let _ = place.over();
        (done, passes.into_inner())
    }
}

/// What carries a VM's networks of its own.
#[derive(Default)]
pub(crate) struct Passts {
    /// What is handed to the VMM, with the numbers of its NICs.
    pub(crate) ends: Vec<(usize, OwnedFd)>,
    /// Processes that are needed as long as the VMM, whoever started that.
    pids: Vec<u32>,
    /// Those that come up beside the VMM.
    coming: Vec<Coming>,
}

impl Passts {
    /// Moves them to where the VMM is moved. Where they cannot be, nor can the VMM,
    /// and that is said.
    pub(crate) fn adopt(&self, host: &Host, vm: &VmName) {
        for pid in &self.pids {
            let _ = host.system.adopt_passt(vm, *pid);
        }
    }

    /// Starts one. Whoever boots waits for it; who goes on does not.
    fn start(
        &mut self,
        nic: usize,
        net: &NetConfig,
        log: &Path,
        boots: bool,
    ) -> Result<(), PasstError> {
        let (end, pid) = if boots {
            let Passt { end, pid } = passt::start(net, log)?;
            (end, pid)
        } else {
            let (end, coming) = passt::begin(net, log)?;
            let pid = coming.pid();
            self.coming.push(coming);
            (end, pid)
        };
        self.pids.push(pid);
        self.ends.push((nic, end));
        Ok(())
    }

    /// Does `work`, which has the VMM come up, and looks after those that come up
    /// beside it. What keeps one from serving is said, unless the VM is not up either.
    pub(crate) fn look_after_while<T, E>(
        self,
        host: &Host,
        vm: &VmName,
        work: impl FnOnce() -> Result<T, E>,
    ) -> Result<T, E> {
        let failed = AtomicBool::new(false);
        let look_after = |coming: Coming| {
            let goes_on = || !failed.load(Ordering::Acquire);
            let adopt = |pid| {
                let _ = host.system.adopt_passt(vm, pid);
            };
            if let Err(error) = coming.finish(&goes_on, &adopt)
                && goes_on()
            {
                remark_part(host, vm, &error);
            }
        };
        thread::scope(|scope| {
            let look_after = &look_after;
            for coming in self.coming {
                // Where no thread can be had, nobody starts one anew or tells of it.
                let thread = thread::Builder::new();
                let _ = thread.spawn_scoped(scope, move || look_after(coming));
            }
            let done = work();
            failed.store(done.is_err(), Ordering::Release);
            done
        })
    }
}

/// Has the networks of a VM ready, whose lock the caller holds.
pub(crate) fn connect(host: &Host, order: &Launch) -> Result<Passts, LaunchError> {
    let nets = nets_of(host, order);
    let boots = matches!(order.origin, Origin::Boot(_));
    let ports = ports(&order.name, order.vm, &nets);
    if !ports.is_empty() && !order.is_expected {
        let care = if boots {
            Care::Whole
        } else {
            Care::WhatThereIs
        };
        let plugged = place(&host.layout).and_then(|place| {
            let said = place.plug(&ports, care, &|| host.system.start_net_helper(host))?;
            said.iter().for_each(|words| place.remark(words));
            Ok(())
        });
        bear(host, boots, plugged.map_err(LaunchError::from), &order.name)?;
    }
    let mut passts = Passts::default();
    for (index, net) in nets.iter().enumerate() {
        if net.network == Some(Network::User) {
            let log = host
                .layout
                .vm_dir(&order.name)
                .join(format!("passt{index}.log"));
            let started = passts.start(index, net, &log, boots);
            bear(host, boots, started.map_err(LaunchError::from), &order.name)?;
        }
    }
    Ok(passts)
}

/// What keeps a VM from booting is said of one that goes on.
fn bear<T>(
    host: &Host,
    boots: bool,
    result: Result<T, LaunchError>,
    name: &VmName,
) -> Result<Option<T>, LaunchError> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if boots => Err(error),
        Err(error) => {
            remark_part(host, name, &error);
            Ok(None)
        }
    }
}

fn remark_part(host: &Host, name: &VmName, error: &dyn Display) {
    if let Ok(place) = place(&host.layout) {
        place.remark(&format!(
            "VM '{name}' goes on without a part of its network, until it is suspended and resumed again: {error}"
        ));
    }
}

/// Looks after the process that serves the network: started again where VMs use
/// that and it is gone. Whether it was.
///
/// # Errors
/// It cannot be started, or the network cannot be put right.
pub fn tend(host: &Host) -> Result<bool, NetworkError> {
    // Makes nothing where there is nothing.
    if !host.layout.run.join("net").exists() {
        return Ok(false);
    }
    place(&host.layout)?.tend(&|| host.system.start_net_helper(host))
}

/// What operators should know of networks since this was last asked.
pub fn remarks(layout: &Layout) -> Vec<String> {
    // Makes nothing where there is nothing.
    if !layout.run.join("net").exists() {
        return Vec::new();
    }
    place(layout).map_or_else(|_| Vec::new(), |place| place.take_remarks())
}

/// A NIC of a VM, as `hebe show` tells it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct NicView {
    /// `nat` or `user`; `None` on a tap of the operator's.
    pub network: Option<Network>,
    /// Its tap, where it has one.
    pub tap: String,
    /// Its bridge, where it has one.
    pub bridge: Option<String>,
    /// Its Ethernet address, where known.
    pub mac: Option<String>,
    /// Its address, where Hebe gives it.
    pub address: Option<String>,
    /// Ports of the host that lead to it.
    pub forward: Vec<String>,
}

/// The NICs of a VM: as it was booted where it is up, frozen or saved, and as
/// defined otherwise.
pub fn nics(
    layout: &Layout,
    name: &VmName,
    vm: Option<VmId>,
    defined: &[NetConfig],
) -> Vec<NicView> {
    let life = vm.map(|vm| life_nets(layout, name, vm)).unwrap_or_default();
    let (vm, nets) = match life.as_slice() {
        // What it has is not known, if it goes on; what it will have is.
        [] => (None, with_macs(layout, name, vm, defined)),
        life => (vm, life.to_vec()),
    };
    let view = |(index, net): (usize, &NetConfig)| NicView {
        network: net.network,
        tap: net.tap.clone(),
        bridge: net.bridge.clone(),
        mac: match vm {
            Some(vm) => Some(net.mac_of(vm, index).to_string()),
            None => net.mac.map(|mac| mac.to_string()),
        },
        address: net.address.map(|address| address.to_string()),
        forward: net.forward.iter().map(ToString::to_string).collect(),
    };
    nets.iter().enumerate().map(view).collect()
}

/// NICs as the next boot gives them their Ethernet addresses.
fn with_macs(
    layout: &Layout,
    name: &VmName,
    vm: Option<VmId>,
    defined: &[NetConfig],
) -> Vec<NetConfig> {
    let mut nets = defined.to_vec();
    if vm.is_none()
        && let Ok(Some(id)) = host_id::read(layout)
    {
        fill_macs(&mut nets, id, name);
    }
    nets
}

/// Runs the helper in this process.
///
/// # Errors
/// It could not begin, or goes on no more.
pub fn run_helper(host: &Host) -> Result<(), NetworkError> {
    serve::run(&place(&host.layout)?, std::io::stdout())
}

/// Starts the helper's process, and waits until it serves.
pub(crate) fn start_helper(layout: &Layout) -> Result<(), String> {
    use std::io::{BufRead, BufReader};
    let failed = |e: std::io::Error| e.to_string();
    let log = fs::File::create(layout.run.join("net").join("helper.log")).map_err(failed)?;
    let program = program();
    let mut command = Command::new(&program);
    command.arg(serve::WORD);
    // Where this process was told that everything is.
    command.env("HEBE_RUN_DIR", &layout.run);
    command.env("HEBE_STATE_DIR", &layout.state);
    command.current_dir("/");
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    command.stderr(Stdio::from(log));
    let started = proc::spawn_detached(command, Vec::new());
    let mut child = started.map_err(|e| format!("{}: {e}", program.display()))?;
    // VMs need it until they are suspended, whoever started it.
    let _ = crate::systemd::adopt_helper("net", child.id());
    let mut word = String::new();
    if let Some(stdout) = child.stdout.take() {
        BufReader::new(stdout)
            .read_line(&mut word)
            .map_err(failed)?;
    }
    match word.trim() {
        serve::READY => Ok(()),
        "" => Err("it ended without a word".to_owned()),
        why => Err(why.to_owned()),
    }
}

/// `hebe`: this program, or the one beside it.
fn program() -> PathBuf {
    let this = std::env::current_exe().ok();
    let named = |path: &PathBuf| path.file_name().is_some_and(|name| name == "hebe");
    match this {
        Some(this) if named(&this) => this,
        Some(this) => {
            let beside = this.with_file_name("hebe");
            if beside.exists() {
                beside
            } else {
                "hebe".into()
            }
        }
        None => "hebe".into(),
    }
}

impl From<NetworkError> for LaunchError {
    fn from(error: NetworkError) -> Self {
        Self::Network(error.to_string())
    }
}

impl From<PasstError> for LaunchError {
    fn from(error: PasstError) -> Self {
        Self::Network(error.to_string())
    }
}
