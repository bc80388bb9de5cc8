//! Three emulated hosts, one after another renewed under their VMs, behind a
//! load balancer whose clients never pause.
//!
//! Three machines share this computer's processors, so that no host may depend
//! on how fast it is: each answer takes a fixed time, and each host is given a
//! fixed number of requests at once. So a host that is there does a fixed rate,
//! and one that is away does nothing. What a cold guest loses by its empty
//! cache is not in it.

use std::collections::VecDeque;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use hebe_policy::cluster::Way;
use hebe_policy::cluster::chart::Curve;
use hebe_policy::fleet::{Effect, Event, Grant, Places, Roll};
use hebe_policy::span::Span;
use lab::assets::Assets;
use lab::balancer::{Answer, Balancer, Clients, Server};
use lab::machine::EmulatorFailure;
use lab::progress::Progress;
use lab::scenario::{GuestSpec, Lab, LabOptions};
use lab::trial::{self, Method};
use serde::Serialize;

use super::ClusterArgs;
use crate::demo;
use crate::ui::Spinner;

/// Hosts.
const HOSTS: usize = 3;
/// How long an answer takes, in milliseconds, and how many a host works at.
const PACE_MS: u32 = 500;
const AT_ONCE: u32 = 2;
/// Clients: enough to keep all hosts busy, and some that wait.
const CLIENTS: u32 = 3 * HOSTS as u32;
/// RAM of a host beside the store, in MiB.
const HOST_MIB: u64 = 1024;
/// What the store needs beside its VM, in MiB.
const STORE_MIB: u64 = 96;
/// With three machines on few processors an emulated timer comes late: a kernel
/// that tests it in that moment panics ("IO-APIC + timer doesn't work!").
const NO_TIMER_CHECK: &str = "no_timer_check";
/// Undisturbed time before and after the renewals, in seconds.
const CALM_S: f64 = 20.0;
/// How long throughput takes to come back after the last renewal, at most.
const SETTLE: Duration = Duration::from_secs(180);
/// Width of a bin of the curve, in seconds.
const BIN_S: f64 = 4.0;

/// When one host was renewed.
#[derive(Clone, Debug, Serialize)]
pub struct Renewal {
    /// Which, from 0.
    host: usize,
    /// From the order, in seconds of the clients' clock …
    from_s: f64,
    /// … to the last check that its VM answers.
    to_s: f64,
    /// Downtime of its VM by a UDP probe, in seconds.
    downtime_s: f64,
}

/// One cycle.
#[derive(Clone, Debug, Serialize)]
pub struct Run {
    /// How VMs got over it.
    pub way: Way,
    /// Hosts.
    pub hosts: u32,
    /// From when to when throughput was integrated, in seconds of the clients'
    /// clock.
    window_s: (f64, f64),
    /// Good answers a second while nothing was done, before and after.
    rates: [f64; 2],
    renewals: Vec<Renewal>,
    answers: Vec<Answer>,
}

impl Run {
    /// How long it took, calm times with it.
    pub fn cycle_s(&self) -> f64 {
        self.window_s.1 - self.window_s.0
    }

    /// What one host does, in answers a second.
    fn host_rate(&self) -> f64 {
        (self.rates[0] + self.rates[1]) / 2.0 / f64::from(self.hosts)
    }

    fn good(&self, from_s: f64, to_s: f64) -> f64 {
        let within = |a: &&Answer| a.ok && (from_s..to_s).contains(&a.at_s);
        self.answers.iter().filter(within).count() as f64
    }

    /// What was missing, in host-seconds.
    pub fn lost(&self) -> f64 {
        let (from, to) = self.window_s;
        let whole = f64::from(self.hosts) * self.cycle_s();
        whole - self.good(from, to) / self.host_rate()
    }

    /// Throughput in bins, in hosts.
    fn bins(&self) -> Vec<(f64, f64)> {
        let (from, to) = self.window_s;
        let count = ((to - from) / BIN_S) as usize;
        let bin = |i: usize| {
            let at = from + i as f64 * BIN_S;
            let hosts = self.good(at, at + BIN_S) / BIN_S / self.host_rate();
            ((i as f64 + 0.5) * BIN_S, hosts)
        };
        (0..count).map(bin).collect()
    }

    /// The least of any bin, in hosts.
    pub fn least(&self) -> f64 {
        let bins = self.bins().into_iter();
        bins.map(|(_, hosts)| hosts).fold(f64::INFINITY, f64::min)
    }

    /// From the first order to the last host that was back.
    pub fn roll_s(&self) -> f64 {
        let ends = self.renewals.first().zip(self.renewals.last());
        ends.map_or(0.0, |(first, last)| last.to_s - first.from_s)
    }

    /// For the chart.
    pub fn curve(&self) -> Curve {
        let whole = f64::from(self.hosts);
        Curve {
            label: format!("{}, measured", self.way.name()),
            way: self.way,
            points: self.bins().iter().map(|(s, h)| (*s, h / whole)).collect(),
        }
    }
}

/// One host with its VM.
struct Host {
    lab: Lab,
    guests: Vec<GuestSpec>,
}

/// Boots the hosts, and renews them warm and then cold.
pub fn run(
    assets: &Assets,
    args: &ClusterArgs,
    runs: &mut Vec<Run>,
    progress: &Spinner,
) -> Result<()> {
    let haproxy = assets.haproxy(progress)?;
    let mut hosts = Vec::new();
    for number in 1..=HOSTS {
        progress.note(&format!("host {number} of {HOSTS}"));
        hosts.push(boot(assets, args, progress)?);
    }
    let servers = hosts
        .iter()
        .enumerate()
        .map(|(i, host)| {
            Ok(Server {
                name: format!("host{}", i + 1),
                port: host.lab.ports(&host.guests[0])?.http,
                at_once: AT_ONCE,
            })
        })
        .collect::<Result<Vec<_>>>()?;
    let folder = hosts[0].lab.folder().to_owned();
    let balancer = Balancer::start(&haproxy, &folder, &servers)?;
    for (way, method) in [(Way::Warm, Method::Warm), (Way::Cold, Method::Cold)] {
        let run = cycle(&mut hosts, args, (way, method), balancer.port, progress)?;
        progress.note(&format!(
            "{}: {:.1} host-seconds lost, {:.1} answers/s before and {:.1} after",
            way.name(),
            run.lost(),
            run.rates[0],
            run.rates[1]
        ));
        runs.push(run);
    }
    hosts
        .into_iter()
        .try_for_each(|host| host.lab.machine.power_off())
}

fn boot(assets: &Assets, args: &ClusterArgs, progress: &Spinner) -> Result<Host> {
    let reserve_mib = args.memory + STORE_MIB;
    let options = LabOptions {
        host: args.host,
        guest_kernels: vec![args.host],
        guests: 1,
        memory_mib: HOST_MIB + reserve_mib,
        reserve_mib,
        disk_mib: 2048,
        append: NO_TIMER_CHECK.to_owned(),
        ..LabOptions::default()
    };
    let mut lab = Lab::boot(assets, options, progress)?;
    let guests = vec![GuestSpec {
        memory_mib: args.memory,
        memcheck_mib: 8,
        memcheck_ms: Some(500),
        probe_every: Duration::from_millis(100),
        ..GuestSpec::numbered(0, args.host)
    }];
    lab.start(&guests)?;
    Ok(Host { lab, guests })
}

fn cycle(
    hosts: &mut [Host],
    args: &ClusterArgs,
    (way, method): (Way, Method),
    port: u16,
    progress: &Spinner,
) -> Result<Run> {
    let clients = Clients::start(CLIENTS, port, &format!("/paced/{PACE_MS}"));
    settle(&clients, hosts.len(), None)?;
    let from_s = clients.now_s();
    sleep_s(CALM_S);
    let calm_until = clients.now_s();
    let before = rate(&clients, from_s, calm_until);
    let renewals = roll(hosts, args, method, &clients, progress)?;
    settle(&clients, hosts.len(), Some(before))?;
    let calm_from = clients.now_s();
    sleep_s(CALM_S);
    let to_s = clients.now_s();
    let after = rate(&clients, calm_from, to_s);
    Ok(Run {
        way,
        hosts: hosts.len() as u32,
        window_s: (from_s, to_s),
        rates: [before, after],
        renewals,
        answers: clients.finish(),
    })
}

fn sleep_s(seconds: f64) {
    thread::sleep(Duration::from_secs_f64(seconds));
}

fn rate(clients: &Clients, from_s: f64, to_s: f64) -> f64 {
    clients.answered(from_s, to_s) as f64 / (to_s - from_s)
}

/// Waits until all hosts serve: as many answers as before, or, before anything
/// was measured, three quarters of what the hosts' pace allows.
fn settle(clients: &Clients, hosts: usize, before: Option<f64>) -> Result<()> {
    let paced = hosts as f64 * f64::from(AT_ONCE) * 1000.0 / f64::from(PACE_MS);
    let wanted = before.map_or(paced * 0.75, |before| before * 0.9);
    let end = clients.now_s() + SETTLE.as_secs_f64();
    loop {
        sleep_s(5.0);
        let now = clients.now_s();
        let found = rate(clients, now - 5.0, now);
        if found >= wanted {
            return Ok(());
        }
        ensure!(
            now < end,
            "the hosts answer {found:.1} times a second, and {wanted:.1} were expected: this computer is too busy for three machines"
        );
    }
}

/// Takes all hosts through it by the state machine of a real roll.
fn roll(
    hosts: &mut [Host],
    args: &ClusterArgs,
    method: Method,
    clients: &Clients,
    progress: &Spinner,
) -> Result<Vec<Renewal>> {
    let mut roll = Roll::new(hosts.len(), 1, Span::minutes(30));
    let mut places = Places::new(1);
    let mut queue = VecDeque::from([Event::Tick]);
    let mut renewals = Vec::new();
    while let Some(event) = queue.pop_front() {
        let (next, effects) = roll.step(event, clients.now_s() as u64);
        roll = next;
        for effect in effects {
            match effect {
                Effect::AskLock(i) => queue.push_back(match places.acquire(&i.to_string()) {
                    Grant::Held => Event::Granted(i),
                    Grant::Full => Event::Denied(i),
                }),
                Effect::Release(i) => places.release(&i.to_string()),
                Effect::Reboot(i) => {
                    progress.step(&format!("{} renewal of host {}", method.as_str(), i + 1));
                    renewals.push(renew(hosts, i, args, method, clients, progress)?);
                    queue.extend([Event::OtherBoot(i), Event::AllAnswer(i)]);
                }
            }
        }
    }
    match (roll.is_over(), roll.stopped()) {
        (true, None) => Ok(renewals),
        (_, stopped) => bail!("the roll did not come to its end: {stopped:?}"),
    }
}

fn renew(
    hosts: &mut [Host],
    index: usize,
    args: &ClusterArgs,
    method: Method,
    clients: &Clients,
    progress: &Spinner,
) -> Result<Renewal> {
    let from_s = clients.now_s();
    let Host { lab, guests } = &mut hosts[index];
    let trial = trial::reboot(lab, guests, method, args.host, &[], progress);
    let trial = trial.map_err(|error| match error.is::<EmulatorFailure>() {
        true => error,
        false => error.context(format!("host {}", index + 1)),
    })?;
    demo::check(&trial)?;
    let vm = trial.vms.first().context("no VM went through it")?;
    Ok(Renewal {
        host: index,
        from_s,
        to_s: clients.now_s(),
        downtime_s: vm.downtime_ms / 1000.0,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Three hosts of 4 answers a second for 100 s, of which one is away for
    /// 10 s.
    #[test]
    fn what_is_missing_is_counted_in_host_seconds() {
        let answers = (0..1200).filter_map(|i| {
            let at_s = f64::from(i) / 12.0;
            let away = i % 3 == 0 && (40.0..50.0).contains(&at_s);
            (!away).then_some(Answer {
                at_s,
                took_s: 0.5,
                ok: true,
            })
        });
        let run = Run {
            way: Way::Warm,
            hosts: 3,
            window_s: (0.0, 100.0),
            rates: [12.0, 12.0],
            renewals: Vec::new(),
            answers: answers.collect(),
        };
        assert!((run.lost() - 10.0).abs() < 0.3, "{}", run.lost());
        assert!((run.least() - 2.0).abs() < 0.1, "{}", run.least());
        let curve = run.curve();
        assert_eq!(curve.points.len(), 25);
        assert!(
            (curve.points[0].1 - 1.0).abs() < 0.03,
            "{:?}",
            curve.points[0]
        );
    }
}
