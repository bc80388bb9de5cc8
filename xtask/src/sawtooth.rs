//! A host whose daemon leaks, and that rejuvenates itself (R-01, R-02): the
//! monitor flags the leak, the policy reboots the host warm, the leak is gone
//! and the VM is not. Nobody outside gives an order; what is seen from outside
//! is read through the lab's agent and from the VM itself.
//!
//! ```text
//! available │╲        ╲        ╲
//! memory    │  ╲        ╲        ╲    each tooth: leak, flag, warm reboot by
//!           │    ╲ flag   ╲ flag   ╲  the policy; the last one may go on to
//!           │      ╲│       ╲│       ╲ the end without a policy
//!           └──────────────────────────► time
//! ```

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use hebe_host::ageing::read;
use hebe_policy::ageing::{Indicator, Sample};
use lab::assets::{Assets, KernelName};
use lab::binaries::{HEBE, HEBE_VMM, HEBED};
use lab::probe::wait_for_guest;
use lab::progress::Progress;
use lab::scenario::{GUEST_LIMIT, GuestSpec, Lab, LabOptions};
use lab_guest::status::GuestStatus;
use lab_guest::{SERVICES, SERVICES_LOG};
use serde::Serialize;
use serde_json::Value;

const KERNEL: KernelName = KernelName::V6_1Cloud;
/// How often the daemon takes a sample, and looks at the policy, in seconds.
pub const SAMPLE_EVERY_S: u32 = 2;
const LOOK_EVERY_S: u32 = 4;
/// The host's RAM and the part of it that the store has, in MiB.
const MEMORY_MIB: [u64; 2] = [2048, 384];
/// Longest time from a boot to the reboot that the policy orders.
const TOOTH_LIMIT: Duration = Duration::from_secs(1800);
/// How long the last tooth may go on.
const END_LIMIT: Duration = Duration::from_secs(3600);
/// The host's memory stands still when it changes in so many seconds by less
/// than this part of what leaks in them.
const STILL_S: u64 = 8;
const STILL_PART: u64 = 10;
/// How long that is waited for.
const STILL_LIMIT: Duration = Duration::from_secs(300);
/// How long the host may take to tell how it is.
const STATUS_WAIT: Duration = Duration::from_secs(10);
/// Samples of a boot that show that the leak is gone, and comes again.
const SAMPLES_AFTER: usize = 15;
/// How long a boot lasts at least before the policy reboots the host, in seconds;
/// and how long the leak does, whose prediction is better the longer it was seen.
const UPTIME_S: u64 = 180;
const LEAK_S: u64 = 120;
/// The policy of the host, without what `hebe reboot` is told, and when.
const POLICY: &str = r#"
[[rule]]
when = "ageing"
exhausted_within = "2h"

[ageing]
period = "none"
error_rate = 0.01
"#;

/// What to do to the host.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// What the daemon leaks a second, in KiB.
    pub leak_kib_per_s: u64,
    /// Reboots by the policy.
    pub teeth: u32,
    /// After them the policy is taken away, and the leak goes on until memory
    /// is exhausted, which tells how right the first prediction was.
    pub to_the_end: bool,
}

/// What the monitor said of available memory, and what is true.
#[derive(Clone, Debug, Serialize)]
pub struct Prediction {
    /// Samples of the boot so far.
    pub samples: u64,
    /// What is left at the last sample, in bytes.
    pub available: f64,
    /// In how many seconds after it memory is exhausted, by `hebe host age`.
    pub predicted_s: f64,
    /// Its interval; the end is none where it may never be.
    pub interval_s: (f64, Option<f64>),
    /// What is left, divided by the rate that the daemon leaks at.
    pub true_s: f64,
}

impl Prediction {
    /// How far off, as a part of the truth.
    pub fn off(&self) -> f64 {
        self.predicted_s / self.true_s - 1.0
    }

    /// The truth lies in the interval.
    pub fn holds(&self) -> bool {
        let (from, to) = self.interval_s;
        from <= self.true_s && to.is_none_or(|to| self.true_s <= to)
    }
}

/// One boot that ended by the policy's reboot.
#[derive(Clone, Debug, Serialize)]
pub struct Tooth {
    /// The first prediction, when the leak was flagged.
    pub flagged: Prediction,
    /// The last one before the reboot.
    pub last: Prediction,
    /// What the host had left before the reboot and after it, in bytes.
    pub available: [f64; 2],
    /// The daemon's alert, as its log has it.
    pub alert: String,
    /// The VM stood still for so long, by the host's own report, in ms.
    pub stopped_ms: Option<f64>,
}

/// A leak that went on to the end.
#[derive(Clone, Debug, Serialize)]
pub struct End {
    /// When it was flagged.
    pub flagged: Prediction,
    /// From the sample that the first prediction begins at to the one with the
    /// least memory left, in seconds.
    pub measured_s: f64,
    /// What was left then, in bytes.
    pub least: f64,
}

/// What came out.
#[derive(Debug, Default)]
pub struct Found {
    /// Each boot that ended by the policy.
    pub teeth: Vec<Tooth>,
    /// The last one, if it went on to the end.
    pub end: Option<End>,
    /// All samples of all boots.
    pub samples: Vec<Sample>,
    /// The chart that `hebe host age --svg` draws.
    pub svg: String,
}

/// Runs the plan. What was found before an error is in `found`.
pub fn run(assets: &Assets, plan: Plan, found: &mut Found, progress: &dyn Progress) -> Result<()> {
    let options = LabOptions {
        host: KERNEL,
        product: vec![HEBE, HEBE_VMM, HEBED],
        memory_mib: MEMORY_MIB[0],
        reserve_mib: MEMORY_MIB[1],
        ..LabOptions::default()
    };
    let lab = Lab::boot(assets, options, progress)?;
    let guest = GuestSpec::numbered(0, KERNEL);
    let mut scene = Scene { lab, guest, plan };
    scene.lab.start(std::slice::from_ref(&scene.guest))?;
    scene.quiet(progress)?;
    scene.set_up()?;
    for number in 1..=plan.teeth {
        progress.step(&format!("leak {number} of {}", plan.teeth));
        let tooth = scene.tooth(number == plan.teeth)?;
        progress.note(&format!("  {}", words(&tooth)));
        found.teeth.push(tooth);
    }
    scene.rise()?;
    if plan.to_the_end {
        progress.step("a leak to the end");
        found.end = Some(scene.end()?);
    }
    found.samples = scene.samples()?;
    found.svg = scene.chart()?;
    scene.lab.machine.check()?;
    scene.lab.machine.power_off()
}

/// One tooth in words.
pub fn words(tooth: &Tooth) -> String {
    let (said, last) = (&tooth.flagged, &tooth.last);
    format!(
        "flagged with {} samples: exhausted in {:.0} s, truly {:.0} s ({:+.0} %), with {} samples {:+.0} %; available {:.0} MiB before the reboot, {:.0} MiB after (emulated)",
        said.samples,
        said.predicted_s,
        said.true_s,
        said.off() * 100.0,
        last.samples,
        last.off() * 100.0,
        tooth.available[0] / 1048576.0,
        tooth.available[1] / 1048576.0,
    )
}

struct Scene {
    lab: Lab,
    guest: GuestSpec,
    plan: Plan,
}

impl Scene {
    /// Waits until the VM has booted and the host's memory stands still: what
    /// their start takes is no leak, but falls like one.
    fn quiet(&mut self, progress: &dyn Progress) -> Result<()> {
        self.guest_status()?;
        let still = self.plan.leak_kib_per_s * STILL_S / STILL_PART;
        let end = Instant::now() + STILL_LIMIT;
        let mut before = self.mem_available_kib()?;
        while Instant::now() < end {
            std::thread::sleep(Duration::from_secs(STILL_S));
            let now = self.mem_available_kib()?;
            if before.abs_diff(now) <= still {
                return Ok(());
            }
            before = now;
        }
        progress.note("  the host's memory did not stand still; going on");
        Ok(())
    }

    fn mem_available_kib(&self) -> Result<u64> {
        let text = self.lab.machine.agent.get("/proc/meminfo")?;
        let text = String::from_utf8_lossy(&text);
        let line = text.lines().find_map(|l| l.strip_prefix("MemAvailable:"));
        let number = line.and_then(|l| l.split_whitespace().next()?.parse().ok());
        number.context("the host does not tell its available memory")
    }

    /// The policy and the services, which start now, and by themselves at each
    /// boot.
    fn set_up(&self) -> Result<()> {
        let words = self.lab.reboot_arguments(KERNEL);
        let agent = &self.lab.machine.agent;
        let up_s = agent.status(STATUS_WAIT)?.uptime_ms / 1000;
        let policy = format!(
            "reboot = {}\nleast_uptime = \"{}s\"\n{POLICY}",
            serde_json::to_string(&words)?,
            UPTIME_S.max(up_s + LEAK_S)
        );
        agent.put("/etc/hebe/policy.toml", 0o644, policy.as_bytes())?;
        let services = [
            format!("/bin/hebed --sample-every {SAMPLE_EVERY_S} --look-every {LOOK_EVERY_S}"),
            format!("/init leak {}", self.plan.leak_kib_per_s),
        ];
        agent.put(SERVICES, 0o644, services.join("\n").as_bytes())?;
        for service in &services {
            let argv: Vec<&str> = service.split(' ').collect();
            agent.spawn(&argv, SERVICES_LOG)?;
        }
        Ok(())
    }

    /// What the guest says of itself.
    fn guest_status(&mut self) -> Result<GuestStatus> {
        let ports = self.lab.ports(&self.guest)?;
        let machine = &mut self.lab.machine;
        wait_for_guest(&ports, GUEST_LIMIT, || machine.check())
    }

    /// One boot: until the host reboots itself, and its VM goes on. After the last
    /// one nothing reboots it again, however long it is looked at.
    fn tooth(&mut self, last_one: bool) -> Result<Tooth> {
        let before = self.guest_status()?;
        let said_before = self.log()?.len();
        let (flagged, last) = self.watch(TOOTH_LIMIT, false)?;
        self.lab.wait_for_next_boot()?;
        if last_one {
            self.no_policy()?;
        }
        let after = self.guest_status()?;
        lives_on(&before, &after)?;
        let log = self.log()?;
        let said = log.get(said_before..).unwrap_or(&log);
        let alert = said
            .lines()
            .find(|line| line.contains("the host is ageing"))
            .with_context(|| format!("no alert was told: {said}"))?;
        ensure!(
            alert.contains(Indicator::MemoryAvailable.name()),
            "the alert gives another reason: {alert}"
        );
        ensure!(
            said.contains("(ageing) says go"),
            "the policy did not order the reboot: {said}"
        );
        let report = self
            .lab
            .machine
            .exec_ok(&["hebe", "reboot", "--report", "--json"])?;
        let report: Value = serde_json::from_str(&report).context("the report is no JSON")?;
        ensure!(report["method"] == "warm", "{}", report["method"]);
        let flagged = flagged.context("the host rebooted before anything was flagged")?;
        let last = last.unwrap_or_else(|| flagged.clone());
        let risen = self.available_at_first()?;
        ensure!(
            risen > last.available + self.leaked_least(),
            "the leak is not gone: {:.0} bytes before the reboot, {risen:.0} after",
            last.available
        );
        Ok(Tooth {
            available: [last.available, risen],
            flagged,
            last,
            alert: alert.to_owned(),
            stopped_ms: report["downtime"][0]["stopped_ms"].as_f64(),
        })
    }

    /// What a reboot must give back at least: what leaks in half a minute.
    fn leaked_least(&self) -> f64 {
        self.plan.leak_kib_per_s as f64 * 1024.0 * 30.0
    }

    /// Watches until another boot runs, or, `to_the_end`, until memory comes
    /// back by itself: the first prediction of this boot and the last one.
    fn watch(
        &mut self,
        limit: Duration,
        to_the_end: bool,
    ) -> Result<(Option<Prediction>, Option<Prediction>)> {
        let (old, end) = (self.lab.boot.boot_id.clone(), Instant::now() + limit);
        let (mut flagged, mut last) = (None::<Prediction>, None::<Prediction>);
        while Instant::now() < end {
            std::thread::sleep(Duration::from_millis(700));
            let status = self.lab.machine.agent.status(STATUS_WAIT);
            if status.as_ref().is_ok_and(|s| s.boot_id != old) {
                return Ok((flagged, last));
            }
            if !to_the_end {
                self.lab.machine.check()?;
            }
            let Some(age) = self.age().filter(|_| status.is_ok()) else {
                continue;
            };
            if let Some(now) = self.prediction(&age) {
                let most = last.as_ref().map_or(0.0, |l| l.available);
                if to_the_end && now.available > 2.0 * most && flagged.is_some() {
                    return Ok((flagged, last));
                }
                flagged.get_or_insert_with(|| now.clone());
                last = Some(now);
            } else if to_the_end && flagged.is_some() {
                return Ok((flagged, last));
            }
        }
        bail!(
            "nothing happened within {} s: {}",
            limit.as_secs(),
            self.log().unwrap_or_default()
        )
    }

    /// `hebe host age`, if it can be asked.
    fn age(&self) -> Option<Value> {
        let age = ["hebe", "host", "age", "--json", "--period", "none"];
        let wait = Duration::from_secs(20);
        let output = self.lab.machine.agent.exec(&age, b"", wait).ok()?;
        serde_json::from_slice(&output.stdout).ok()
    }

    /// What it says of available memory, if that is flagged.
    fn prediction(&self, age: &Value) -> Option<Prediction> {
        let mut findings = age["findings"].as_array()?.iter();
        let memory = findings.find(|f| f["indicator"] == "memory-available")?;
        let number = |value: &Value| value.as_f64();
        let available = number(&memory["last"]["value"])?;
        let interval = &memory["exhausted_interval_s"];
        Some(Prediction {
            samples: age["samples"].as_u64()?,
            available,
            predicted_s: number(&memory["exhausted_in_s"])?,
            interval_s: (number(&interval[0])?, number(&interval[1])),
            true_s: available / (self.plan.leak_kib_per_s as f64 * 1024.0),
        })
    }

    /// What the running boot had left at its first sample: it leaks, too, from then
    /// on, whoever looks at it when.
    fn available_at_first(&self) -> Result<f64> {
        let end = Instant::now() + GUEST_LIMIT;
        while self
            .age()
            .is_none_or(|age| age["samples"].as_u64().is_none_or(|n| n == 0))
        {
            ensure!(
                Instant::now() < end,
                "the new boot takes no samples: {}",
                self.log()?
            );
            std::thread::sleep(Duration::from_millis(500));
        }
        let samples = self.samples()?;
        let boot = samples.last().context("no samples")?.boot;
        let first = samples.iter().find(|sample| sample.boot == boot);
        let memory = first.and_then(|sample| sample.readings[0]);
        Ok(memory.context("a sample without memory")?.value)
    }

    /// Waits for enough samples of the running boot to be seen in a chart.
    fn rise(&self) -> Result<()> {
        let end = Instant::now() + GUEST_LIMIT;
        loop {
            let samples = self.age().and_then(|age| age["samples"].as_u64());
            if samples.is_some_and(|n| n as usize >= SAMPLES_AFTER) {
                return Ok(());
            }
            ensure!(Instant::now() < end, "the new boot takes no samples");
            std::thread::sleep(Duration::from_millis(500));
        }
    }

    fn no_policy(&self) -> Result<()> {
        let agent = &self.lab.machine.agent;
        agent.put("/etc/hebe/policy.toml", 0o644, NEVER.as_bytes())
    }

    /// Takes the policy away, and lets the leak go on until memory is exhausted.
    fn end(&mut self) -> Result<End> {
        self.no_policy()?;
        let (flagged, _) = self.watch(END_LIMIT, true)?;
        let flagged = flagged.context("nothing was flagged")?;
        let samples = self.samples()?;
        let boot = samples.last().context("no samples")?.boot;
        let own: Vec<&Sample> = samples.iter().filter(|s| s.boot == boot).collect();
        let memory = |s: &Sample| s.readings[0].map_or(f64::INFINITY, |r| r.value);
        let begin = own.iter().find(|s| memory(s) == flagged.available);
        let begin = begin.context("the flagged sample is gone")?;
        let least = own.iter().min_by(|a, b| memory(a).total_cmp(&memory(b)));
        let least = least.context("no samples")?;
        Ok(End {
            measured_s: least.up_s - begin.up_s,
            least: memory(least),
            flagged,
        })
    }

    /// All samples that the host keeps.
    fn samples(&self) -> Result<Vec<Sample>> {
        let bytes = self.lab.machine.agent.get("/var/lib/hebe/ageing/samples")?;
        let path = self.lab.folder().join("samples");
        std::fs::write(&path, bytes).context("no room for the samples")?;
        read(&path).context("the host's samples cannot be read")
    }

    /// The chart, as an operator gets it.
    fn chart(&self) -> Result<String> {
        let path = "/tmp/age.svg";
        let argv = ["hebe", "host", "age", "--period", "none", "--svg", path];
        let output = self.lab.machine.exec(&argv)?;
        let text = self.lab.machine.agent.get(path);
        let text = text.with_context(|| output.all_text())?;
        String::from_utf8(text).context("the chart is no text")
    }

    fn log(&self) -> Result<String> {
        let log = self.lab.machine.agent.get(SERVICES_LOG)?;
        Ok(String::from_utf8_lossy(&log).into_owned())
    }
}

/// A policy that goes when a person asks, and nobody does.
const NEVER: &str =
    "sentinel = \"/run/nobody\"\n[[rule]]\nwhen = \"by-hand\"\n[ageing]\nperiod = \"none\"\n";

/// The guest did not boot, and its memory is what it was.
fn lives_on(before: &GuestStatus, after: &GuestStatus) -> Result<()> {
    ensure!(
        before.boot_id == after.boot_id,
        "the VM was booted again: {} before, {} after",
        before.boot_id,
        after.boot_id
    );
    let checked = &after.memory_check;
    ensure!(
        checked.errors == 0 && checked.verified >= before.memory_check.verified,
        "the VM's memory is not what it was: {checked:?}"
    );
    ensure!(after.monotonic_backwards == 0, "the VM's clock went back");
    Ok(())
}
