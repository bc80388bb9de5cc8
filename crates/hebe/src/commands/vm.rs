//! `run`, `start`, `stop`, `list`, `show`, `drop`.

use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use hebe_agent::Facts;
use hebe_host::definitions;
use hebe_host::limits::GroupView;
use hebe_host::listing::{self, VmRow, VmState};
use hebe_host::network::{self, NicView};
use hebe_host::ops::{self, StopOptions};
use hebe_host::{Host, HostError};
use hebe_types::{
    BalloonConfig, DiskConfig, DiskFormat, Forward, NetConfig, Network, StoreKind, VmConfig, VmId,
    VmName, VsockConfig,
};
use serde::Serialize;

use super::seed::seed;
use super::{agent, balloon};
use crate::bar::Bar;
use crate::cli::{RunArgs, StopArgs, StoreArg};
use crate::output::{Exit, Failure, Outcome, Output, table};

#[derive(Serialize)]
struct Done<'a> {
    name: &'a VmName,
    result: &'static str,
}

/// One VM, and where it is now.
pub fn done(out: &Output, name: &VmName, result: &'static str) {
    out.answer(&Done { name, result }, || format!("{name}: {result}"));
}

/// `hebe run`.
pub fn run(host: &Host, args: RunArgs, out: &Output) -> Outcome {
    let (config, seed) = match &args.file {
        Some(path) => (definitions::read_own(path).map_err(HostError::from)?, None),
        None => of_flags(host, args)?,
    };
    let bar = Bar::busy(out, &format!("starting '{}'", config.name));
    ops::run_with(host, &config, seed.as_deref())?;
    drop(bar);
    done(out, &config.name, "running");
    Ok(Exit::Done)
}

/// The VM, and the disk for its cloud-init.
fn of_flags(host: &Host, mut args: RunArgs) -> Result<(VmConfig, Option<Vec<u8>>), Failure> {
    let seed_args = std::mem::take(&mut args.seed);
    let mut config = from_flags(args)?;
    let seed = seed(&config.name, &seed_args)?;
    if seed.is_some() {
        let path = definitions::seed_path(&host.layout, &config.name);
        config.disks.push(DiskConfig::raw(path, true));
    }
    // It is resumed from another directory than this one.
    definitions::resolve(&mut config, Path::new("")).map_err(|e| {
        Failure(format!(
            "this shell's directory is gone: go to another one, or name files from / on ({e})"
        ))
    })?;
    Ok((config, seed))
}

fn from_flags(args: RunArgs) -> Result<VmConfig, Failure> {
    let missing = |flag: &str| Failure(format!("give --{flag}, or a definition file"));
    // By its name, which is the operator's; never by what is in it.
    let disk = |path: PathBuf, readonly: bool| DiskConfig {
        format: match path.extension().is_some_and(|e| e == "qcow2") {
            true => DiskFormat::Qcow2,
            false => DiskFormat::Raw,
        },
        snapshot: args.snapshot && !readonly,
        ..DiskConfig::raw(path, readonly)
    };
    let written = args.disk.into_iter().map(|path| disk(path, false));
    let read = args.readonly.into_iter().map(|path| disk(path, true));
    let disks = written.chain(read).collect();
    let nets = nets(args.net, args.forward)?;
    let name = args.name.ok_or_else(|| missing("name"))?;
    Ok(VmConfig {
        vcpus: args.vcpus,
        store: match args.store {
            StoreArg::Auto => StoreKind::Auto,
            StoreArg::Devdax => StoreKind::Devdax,
            StoreArg::Luo => StoreKind::Luo,
            StoreArg::Memfd => StoreKind::Memfd,
        },
        kernel: args.kernel,
        initrd: args.initrd,
        cmdline: args.cmdline,
        vsock: args.vsock.then(VsockConfig::default),
        balloon: args.balloon.then(BalloonConfig::default),
        disks,
        nets,
        ..VmConfig::minimal(name, args.memory)
    })
}

fn nets(named: Vec<String>, forward: Vec<Forward>) -> Result<Vec<NetConfig>, Failure> {
    let net = |text: String| match text.as_str() {
        "nat" => NetConfig::made(Network::Nat),
        "user" => NetConfig::made(Network::User),
        _ => match text.split_once('@') {
            Some((tap, bridge)) => NetConfig::tap(tap.to_owned(), Some(bridge.to_owned())),
            None => NetConfig::tap(text, None),
        },
    };
    let mut nets: Vec<NetConfig> = named.into_iter().map(net).collect();
    if !forward.is_empty() {
        let made = nets.iter_mut().find(|net| net.network.is_some());
        let none = || Failure("--forward goes with --net nat or --net user".to_owned());
        made.ok_or_else(none)?.forward = forward;
    }
    Ok(nets)
}

/// `hebe start`.
pub fn start(host: &Host, names: &[VmName], afresh: bool, out: &Output) -> Outcome {
    let order = if afresh {
        ops::start_afresh
    } else {
        ops::start
    };
    each("starting", names, out, |name| {
        order(host, name)?;
        Ok(move |out: &Output| done(out, name, "running"))
    })
}

/// `hebe stop`.
pub fn stop(host: &Host, args: &StopArgs, out: &Output) -> Outcome {
    let options = StopOptions {
        timeout: Duration::from_secs(args.timeout),
        force: args.force,
    };
    each("stopping", &args.names, out, |name| {
        ops::stop(host, name, options)?;
        Ok(move |out: &Output| stopped(host, name, out))
    })
}

/// Whoever gave a VM to `hebe run` may think that it can be started now.
fn stopped(host: &Host, name: &VmName, out: &Output) {
    let result = "stopped";
    let own = definitions::expected_path(&host.layout, name);
    out.answer(&Done { name, result }, || {
        match definitions::find(&host.layout, name) {
            Some(_) => format!("{name}: {result}"),
            None => format!(
                "{name}: {result}; nothing defines it any more: `hebe run` boots it again, or `hebe start` with {}",
                own.display()
            ),
        }
    });
}

/// Carries out an order for each VM, all at once, and says what came of each in
/// the order in which they were named; one that fails does not keep the others
/// from it.
pub fn each<'a, Say: FnOnce(&Output) + Send>(
    what: &str,
    names: &'a [VmName],
    out: &Output,
    order: impl Fn(&'a VmName) -> Result<Say, HostError> + Sync,
) -> Outcome {
    // The same VM named twice is one order.
    let mut distinct: Vec<&VmName> = Vec::with_capacity(names.len());
    for name in names {
        if !distinct.contains(&name) {
            distinct.push(name);
        }
    }
    let bar = match distinct.as_slice() {
        [one] => Bar::busy(out, &format!("{what} '{one}'")),
        several => Bar::busy(out, &format!("{what} {} VMs", several.len())),
    };
    let order = &order;
    thread::scope(|scope| {
        let workers: Vec<_> = distinct
            .into_iter()
            .map(|name| (name, scope.spawn(move || order(name))))
            .collect();
        let mut exit = Exit::Done;
        for (name, worker) in workers {
            match worker.join() {
                Ok(Ok(say)) => {
                    bar.aside(|| say(out));
                    continue;
                }
                Ok(Err(error)) => bar.aside(|| out.failure_of(name, &error.into())),
                Err(_) => bar.aside(|| {
                    let text = format!(
                        "the order for '{name}' broke off: see `hebe list`, and please report this"
                    );
                    out.failure_of(name, &Failure(text));
                }),
            }
            exit = Exit::Failed;
        }
        Ok(exit)
    })
}

#[derive(Serialize)]
struct List<'a> {
    vms: Vec<&'a VmRow>,
    store_trouble: Option<&'a str>,
}

/// `hebe list`.
pub fn list(host: &Host, out: &Output) -> Outcome {
    let survey = listing::survey(host);
    let answer = List {
        vms: survey.rows.values().collect(),
        store_trouble: survey.store_trouble.as_deref(),
    };
    out.answer(&answer, || {
        let rows: Vec<Vec<String>> = survey.rows.values().map(list_row).collect();
        if rows.is_empty() {
            return "there is no VM: `hebe run --help` shows how one is booted\n".to_owned();
        }
        table(&["NAME", "STATE", "MEMORY", "STORE", "PID", ""], &rows)
    });
    if let Some(trouble) = &survey.store_trouble {
        out.progress(trouble);
        return Ok(Exit::Attention);
    }
    Ok(Exit::Done)
}

/// `hebe list --names`, which completions ask.
pub fn names(host: &Host, out: &Output) -> Outcome {
    let names = listing::names(&host.layout);
    out.answer(&names, || {
        names.iter().map(|name| format!("{name}\n")).collect()
    });
    Ok(Exit::Done)
}

fn list_row(row: &VmRow) -> Vec<String> {
    vec![
        row.name.to_string(),
        row.state.as_str().to_owned(),
        row.memory.map_or("-".into(), |m| m.to_string()),
        row.store.unwrap_or("-").to_owned(),
        row.pid.map_or("-".into(), |p| p.to_string()),
        row.detail.clone().unwrap_or_default(),
    ]
}

#[derive(Serialize)]
struct Show<'a> {
    #[serde(flatten)]
    vm: &'a VmRow,
    definition: Option<&'a VmConfig>,
    definition_error: Option<String>,
    nics: Vec<NicView>,
    /// What its VMM may take of the host, by the kernel's word.
    #[serde(skip_serializing_if = "Option::is_none")]
    limits: Option<GroupView>,
    /// Why that is not known.
    #[serde(skip)]
    no_limits: Option<String>,
    /// Of a VM that runs and has sockets: what its agent says, if one answers.
    #[serde(skip_serializing_if = "Option::is_none")]
    agent: Option<Option<Facts>>,
    console_log: std::path::PathBuf,
    log: std::path::PathBuf,
}

/// `hebe show`.
pub fn show(host: &Host, name: &VmName, out: &Output) -> Outcome {
    let survey = listing::survey(host);
    let row = survey.row(host, name)?;
    let definition = survey.definitions.get(name);
    let dir = host.layout.vm_dir(name);
    let has_sockets = row.state == VmState::Running && dir.join("vsock.sock").exists();
    let limits = row.pid.map(|pid| host.system.limits_of(pid)).transpose();
    let answer = Show {
        no_limits: limits.as_ref().err().cloned(),
        limits: limits.unwrap_or_default(),
        agent: has_sockets.then(|| agent::look(host, name)),
        vm: row,
        definition: definition.and_then(|d| d.as_ref().ok()),
        nics: nics(host, row, definition.and_then(|d| d.as_ref().ok())),
        definition_error: definition.and_then(|d| d.as_ref().err().map(ToString::to_string)),
        console_log: dir.join("console.log"),
        log: dir.join("log"),
    };
    out.answer(&answer, || show_text(&answer));
    Ok(Exit::Done)
}

fn show_text(show: &Show) -> String {
    let row = show.vm;
    let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".into());
    let mut lines = vec![
        ("name", row.name.to_string()),
        ("state", row.state.as_str().to_owned()),
        ("detail", or_dash(row.detail.clone())),
        ("id", or_dash(row.id.clone())),
        ("memory", or_dash(row.memory.map(|m| m.to_string()))),
        ("store", or_dash(row.store.map(str::to_owned))),
        ("segment", or_dash(row.segment.map(|s| s.to_string()))),
        ("VMM process", or_dash(row.pid.map(|p| p.to_string()))),
    ];
    if let Some(status) = &row.status {
        let meter = &status.ram_meter;
        lines.push(("VMM release", status.version.clone()));
        lines.push(("resumes", status.resumes.to_string()));
        let cage = status.cage.as_ref().map(ToString::to_string);
        let none = || "OFF (this VMM's release has none)".to_owned();
        lines.push(("cage", cage.unwrap_or_else(none)));
        let why = show.no_limits.as_deref().unwrap_or("nobody knows why");
        let limits = show.limits.as_ref().map(ToString::to_string);
        lines.push(("limits", limits.unwrap_or_else(|| format!("NONE: {why}"))));
        if let Some(status) = &status.balloon {
            lines.push(("balloon", balloon::line(status)));
        }
        lines.push((
            "guest RAM touched",
            format!(
                "{} B in rings, {} B of data",
                meter.ring_bytes, meter.data_bytes
            ),
        ));
    }
    if let Some(config) = show.definition {
        lines.push(("vCPUs", config.vcpus.to_string()));
        let of_disk = || "as the first disk's boot loader says".to_owned();
        let kernel = config.kernel.as_ref().map(|k| k.display().to_string());
        lines.push(("kernel", kernel.unwrap_or_else(of_disk)));
        lines.push(("command line", config.cmdline.clone()));
        let status = row.status.as_ref();
        for (n, disk) in config.disks.iter().enumerate() {
            let way = match status.and_then(|status| status.disk_rings.get(n)) {
                Some(true) => ", read by io_uring",
                Some(false) => ", read one by one",
                None => "",
            };
            let kept = match disk.snapshot {
                true => ", which keeps nothing of what is written",
                false => "",
            };
            lines.push(("disk", format!("{}{way}{kept}", disk.path.display())));
        }
    }
    for nic in &show.nics {
        lines.push(("network", nic_text(nic)));
    }
    if let Some(facts) = &show.agent {
        lines.push(("agent", agent::look_text(facts.as_ref())));
    }
    lines.push(("definition", or_dash(show.definition_error.clone())));
    lines.push(("console log", show.console_log.display().to_string()));
    lines.push(("VMM log", show.log.display().to_string()));
    lines.retain(|(key, value)| !(matches!(*key, "definition" | "detail") && value == "-"));
    lines
        .into_iter()
        .map(|(key, value)| format!("{key:18} {value}\n"))
        .collect()
}

/// A VM's identity that is no UUID is none.
fn nics(host: &Host, row: &VmRow, defined: Option<&VmConfig>) -> Vec<NicView> {
    let vm = row.id.as_deref().and_then(hebe_sys::proc::parse_uuid);
    let defined = defined.map_or(&[][..], |config| &config.nets);
    network::nics(&host.layout, &row.name, vm.map(VmId), defined)
}

fn nic_text(nic: &NicView) -> String {
    let mut words = match nic.network {
        Some(Network::Nat) => vec!["nat".to_owned()],
        Some(Network::User) => vec!["user".to_owned()],
        None => vec![format!("tap {}", nic.tap)],
    };
    if let (None, Some(bridge)) = (nic.network, &nic.bridge) {
        words.push(format!("in {bridge}"));
    }
    words.extend(nic.address.clone());
    words.extend(nic.mac.as_ref().map(|mac| format!("({mac})")));
    words.extend(nic.forward.iter().map(|port| format!("[{port}]")));
    words.join(" ")
}

/// `hebe drop`.
pub fn drop_vm(host: &Host, name: &VmName, yes: bool, out: &Output) -> Outcome {
    let order = if yes {
        ops::drop_vm
    } else {
        ops::drop_worthless
    };
    let bar = Bar::busy(out, &format!("dropping '{name}' and scrubbing its memory"));
    order(host, name)?;
    drop(bar);
    let result = "dropped";
    out.answer(&Done { name, result }, || {
        match definitions::find(&host.layout, name) {
            Some(path) => format!("{name}: {result}; its definition stays, {}", path.display()),
            None => format!("{name}: {result}"),
        }
    });
    Ok(Exit::Done)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cli::{Cli, Command};

    #[test]
    fn disks_that_are_only_read_come_behind_the_others_and_keep_themselves() {
        let line = "hebe run --name a --readonly r.qcow2 --disk d --readonly s --snapshot";
        let cli = Cli::try_parse_from(line.split(' ')).expect("line");
        let Command::Run(args) = cli.command else {
            panic!("not run");
        };
        let config = from_flags(args).expect("a definition");
        config.validate().expect("sound");
        let seen = config.disks.iter();
        let seen: Vec<_> = seen
            .map(|d| {
                (
                    d.path.to_str().expect("text"),
                    d.format,
                    d.readonly,
                    d.snapshot,
                )
            })
            .collect();
        let wanted = [
            ("d", DiskFormat::Raw, false, true),
            ("r.qcow2", DiskFormat::Qcow2, true, false),
            ("s", DiskFormat::Raw, true, false),
        ];
        assert_eq!(seen, wanted);
    }

    /// A VM is resumed by a unit, whose directory is another one.
    #[test]
    fn files_that_flags_name_are_found_from_everywhere() {
        let line = "hebe run --name a --kernel k --initrd ./i --disk d --disk /e --hostname h";
        let cli = Cli::try_parse_from(line.split(' ')).expect("line");
        let Command::Run(args) = cli.command else {
            panic!("not run");
        };
        let (mut config, _) = of_flags(&Host::here(), args).expect("a definition");
        let here = std::env::current_dir().expect("here");
        let wanted = [here.join("k"), here.join("i"), here.join("d"), "/e".into()];
        let named: Vec<_> = config.paths_mut().map(|path| path.clone()).collect();
        assert_eq!(named[..4], wanted);
        assert!(named[4].is_absolute(), "{named:?}");
    }
}
