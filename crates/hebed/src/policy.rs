//! Follows this host's policy, where there is one: looks once a minute, and
//! runs `hebe reboot` when the policy says go.
//!
//! What decides is [`hebe_policy::policy::watch`], which a simulation runs,
//! too. The reboot is a program of its own, in a process group of its own: it
//! may stop this daemon as one of the host's services, and goes on.

use std::fs::File;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, UNIX_EPOCH};

use hebe_fleet::FleetConfig;
use hebe_host::ageing::{path_below, read};
use hebe_host::definitions::read_toml;
use hebe_host::listing::with_cause;
use hebe_host::{Host, files};
use hebe_policy::ageing::{Look, assess};
use hebe_policy::calendar::{Moment, Window};
use hebe_policy::policy::watch::{Seen, Watcher};
use hebe_policy::policy::{Decision, Policy, Rule};
use rustix::time::{ClockId, clock_gettime};
use serde::Deserialize;

use crate::app::App;
use crate::log;

/// Between two looks.
pub const LOOK_EVERY: Duration = Duration::from_secs(60);
/// How many looks apart the samples of the host are assessed.
const ASSESS_EVERY: u32 = 10;
/// The file that asks for a reboot: Debian's packages make it, and kured looks
/// for it.
const SENTINEL: &str = "/run/reboot-required";

/// `policy.toml`: a policy, and how it is carried out.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PolicyFile {
    #[serde(default = "one")]
    at_most: u32,
    #[serde(default, rename = "rule")]
    rules: Vec<Rule>,
    #[serde(default, rename = "blackout")]
    blackouts: Vec<Window>,
    /// Arguments of `hebe reboot`.
    #[serde(default)]
    reboot: Vec<String>,
    /// The file that asks for a reboot, by when it was changed.
    #[serde(default = "sentinel")]
    sentinel: PathBuf,
}

fn one() -> u32 {
    1
}

fn sentinel() -> PathBuf {
    SENTINEL.into()
}

impl PolicyFile {
    /// The policy alone.
    fn policy(&self) -> Policy {
        Policy {
            at_most: self.at_most,
            rules: self.rules.clone(),
            blackouts: self.blackouts.clone(),
        }
    }
}

/// What the daemon has in mind with the host.
#[derive(Debug, Default)]
pub struct Follower {
    watcher: Watcher,
    exhausted_in_s: Option<f64>,
    looks: u32,
    said: String,
}

/// Looks once a minute, for ever. Without `policy.toml` nothing ever happens.
pub async fn follow(app: App, every: Duration) {
    let mut follower = Follower::default();
    loop {
        tokio::time::sleep(every).await;
        if app.engine.is_quiet() {
            continue;
        }
        let looked = app.engine.read(move |host| follower.look(host)).await;
        let Ok((next, go)) = looked else {
            log::error("the policy is not followed any more: please report this");
            return;
        };
        follower = next;
        if let Some(command) = go {
            log::info(format!("policy: runs hebe with: {}", command.join(" ")));
            let done = app
                .engine
                .order(move |host| attempt(&program(), &command, &log_path(host)))
                .await;
            if let Ok(Err(why)) = done {
                log::warning(format!("policy: the host was not rebooted: {why}"));
            }
        }
    }
}

impl Follower {
    /// One look: what is remembered, and the arguments of `hebe` if it is to
    /// be run.
    pub fn look(mut self, host: &Host) -> (Self, Option<Vec<String>>) {
        let path = host.layout.config.join("policy.toml");
        if !path.exists() {
            return (Self::default(), None);
        }
        let file = match read_policy(&path) {
            Ok(file) => file,
            Err(why) => {
                self.say(format!("nothing is done by policy: {why}"));
                return (self, None);
            }
        };
        if self.looks.is_multiple_of(ASSESS_EVERY) {
            self.exhausted_in_s = exhausted_in_s(host);
        }
        self.looks = self.looks.wrapping_add(1);
        let seen = seen(&file.sentinel, self.exhausted_in_s);
        let (watcher, decision) = self.watcher.look(&file.policy(), &seen);
        self.watcher = watcher;
        match decision {
            Decision::Wait { why, .. } => {
                self.say(format!("the policy waits: {why}"));
                (self, None)
            }
            Decision::Go { rule, .. } => {
                self.said.clear();
                log::info(format!("policy: rule {} says go", rule + 1));
                (self, Some(arguments(&file, host)))
            }
        }
    }

    /// Once for each reason.
    fn say(&mut self, text: String) {
        if self.said != text {
            log::info(text.clone());
            self.said = text;
        }
    }
}

fn read_policy(path: &Path) -> Result<PolicyFile, String> {
    let file: PolicyFile = read_toml(path).map_err(|error| with_cause(&error))?;
    let checked = file.policy().check(wall());
    checked.map_err(|error| format!("{}: {error}", path.display()))?;
    Ok(file)
}

/// In a group of hosts it does not wait for its turn: the policy is asked
/// again, which may not want it any more then.
fn arguments(file: &PolicyFile, host: &Host) -> Vec<String> {
    let mut words = vec!["reboot".to_owned()];
    if host.layout.config.join("fleet.toml").exists() {
        words.extend(["--fleet", "--wait", "0s"].map(str::to_owned));
    }
    words.extend(file.reboot.iter().cloned());
    words
}

/// Whether this host may be rebooted without a slot of its group; if not, a
/// sentence.
pub fn without_slot(host: &Host) -> Result<(), String> {
    let path = host.layout.config.join("fleet.toml");
    if !path.exists() {
        return Ok(());
    }
    let fleet: FleetConfig = read_toml(&path).map_err(|error| with_cause(&error))?;
    if fleet.always {
        return Err(format!(
            "the hosts of group '{}' take turns ({}): order `hebe reboot` on the host",
            fleet.group,
            path.display()
        ));
    }
    Ok(())
}

fn wall() -> Moment {
    clock_gettime(ClockId::Realtime).tv_sec
}

fn seen(sentinel: &Path, exhausted_in_s: Option<f64>) -> Seen {
    let now = wall();
    let changed = sentinel.metadata().and_then(|meta| meta.modified());
    let asked = changed
        .ok()
        .and_then(|at| at.duration_since(UNIX_EPOCH).ok());
    Seen {
        now,
        booted: Some(now - clock_gettime(ClockId::Boottime).tv_sec),
        asked: asked.and_then(|at| Moment::try_from(at.as_secs()).ok()),
        exhausted_in_s,
        load: load(&std::fs::read_to_string("/proc/loadavg").unwrap_or_default()),
    }
}

/// The load of the last minute for each processor: 1 is all of them busy.
fn load(loadavg: &str) -> Option<f64> {
    let load: f64 = loadavg.split_whitespace().next()?.parse().ok()?;
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    Some(load / processors as f64)
}

/// What ageing foretells for the running boot. Without a sample of it there is
/// nothing to say: what the last boot suffered from was cured by its end.
fn exhausted_in_s(host: &Host) -> Option<f64> {
    let samples = read(&path_below(&host.layout.state)).ok()?;
    if samples.last()?.boot != host.system.boot_id() {
        return None;
    }
    let assessment = assess(&samples, Look::default()).ok()?;
    assessment.soonest().map(|(_, in_s)| in_s)
}

/// `hebe` beside this program, else in `PATH`.
fn program() -> PathBuf {
    let beside = std::env::current_exe().ok();
    let beside = beside.and_then(|exe| Some(exe.parent()?.join("hebe")));
    beside.filter(|hebe| hebe.exists()).unwrap_or("hebe".into())
}

fn log_path(host: &Host) -> PathBuf {
    host.layout.run.join("hebed").join("policy.log")
}

/// Runs the program, which does not come back if the host is rebooted.
fn attempt(program: &Path, arguments: &[String], log: &Path) -> Result<(), String> {
    let began = || -> io::Result<_> {
        let file = File::create(log)?;
        // Written to a file: nobody has to read it for the program to go on.
        Command::new(program)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file)
            .process_group(0)
            .status()
    };
    let status = began().map_err(|e| format!("{}: {}", program.display(), with_cause(&e)))?;
    if status.success() {
        return Ok(());
    }
    let said = files::tail(log, 3).join(" ");
    Err(format!("{status}, {said}"))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use hebe_host::ageing::SampleStore;
    use hebe_host::host::Layout;
    use hebe_policy::ageing::{Indicator, Reading, Sample};

    use super::*;

    fn host(dir: &Path) -> Host {
        let mut host = Host::here();
        host.layout = Layout::below(dir);
        for sub in ["etc", "run/hebed", "state"] {
            std::fs::create_dir_all(dir.join(sub)).expect("folder");
        }
        host
    }

    #[test]
    fn without_a_policy_nothing_happens_and_a_wrong_one_does_nothing() {
        let dir = tempfile::tempdir().expect("folder");
        let host = host(dir.path());
        let (follower, go) = Follower::default().look(&host);
        assert_eq!((go, follower.said.as_str()), (None, ""));
        for (text, word) in [
            ("at_most = 0\n[[rule]]\nwhen = \"by-hand\"\n", "at_most = 0"),
            ("[[rule]]\nwhen = \"never\"\n", "line 2"),
            ("", "no rule"),
            ("rules = 1\n", "rules"),
        ] {
            std::fs::write(dir.path().join("etc/policy.toml"), text).expect("write");
            let (follower, go) = Follower::default().look(&host);
            assert_eq!(go, None);
            assert!(follower.said.contains(word), "{word}: {}", follower.said);
        }
    }

    #[test]
    fn the_sentinel_file_asks_for_a_reboot_once_in_a_while() {
        let dir = tempfile::tempdir().expect("folder");
        let host = host(dir.path());
        let sentinel = dir.path().join("reboot-required");
        let text = format!(
            "sentinel = {sentinel:?}\nreboot = [\"--method\", \"saved\"]\n[[rule]]\nwhen = \"by-hand\"\n"
        );
        std::fs::write(dir.path().join("etc/policy.toml"), text).expect("write");
        let (follower, go) = Follower::default().look(&host);
        assert_eq!(go, None);
        assert!(
            follower.said.contains("nothing is due"),
            "{}",
            follower.said
        );
        std::fs::write(&sentinel, "").expect("write");
        let (follower, go) = follower.look(&host);
        let words = |go: Option<Vec<String>>| go.expect("it is asked for").join(" ");
        assert_eq!(words(go), "reboot --method saved");
        let (follower, go) = follower.look(&host);
        assert_eq!(go, None, "it was just tried");
        assert!(
            follower.said.contains("a short while ago"),
            "{}",
            follower.said
        );
        std::fs::write(dir.path().join("etc/fleet.toml"), "").expect("write");
        let (_, go) = Follower::default().look(&host);
        assert_eq!(words(go), "reboot --fleet --wait 0s --method saved");
    }

    #[test]
    fn the_leak_of_the_boot_before_is_not_this_boots() {
        let dir = tempfile::tempdir().expect("folder");
        let host = host(dir.path());
        let path = path_below(&host.layout.state);
        let mut store = SampleStore::open(&path, 1_000).expect("store");
        let mut leak = |boot: [u8; 16]| {
            for hour in 0..10 * 24 {
                let up_s = f64::from(hour) * 3_600.0;
                let mut readings = [None; Indicator::ALL.len()];
                readings[0] = Some(Reading {
                    value: 1e9 - up_s * 1e3,
                    limit: 0.0,
                });
                let sample = Sample {
                    boot,
                    up_s,
                    at_s: up_s,
                    readings,
                };
                store.append(&sample).expect("sample");
            }
        };
        leak([7; 16]);
        assert_eq!(exhausted_in_s(&host), None);
        leak(host.system.boot_id());
        assert!(exhausted_in_s(&host).is_some());
    }

    #[test]
    fn a_host_that_always_takes_turns_is_not_rebooted_without_a_slot() {
        let dir = tempfile::tempdir().expect("folder");
        let host = host(dir.path());
        assert_eq!(without_slot(&host), Ok(()));
        let write = |text: &str| std::fs::write(dir.path().join("etc/fleet.toml"), text);
        let group = "group = \"rack1\"\n[etcd]\nendpoints = []\n";
        write(group).expect("write");
        assert_eq!(without_slot(&host), Ok(()));
        for (text, word) in [
            (format!("always = true\n{group}"), "'rack1' take turns"),
            (format!("alway = true\n{group}"), "line 1"),
        ] {
            write(&text).expect("write");
            let why = without_slot(&host).expect_err("refused");
            assert!(why.contains(word), "{why}");
        }
    }

    #[test]
    fn why_it_failed_is_told() {
        let dir = tempfile::tempdir().expect("folder");
        let (hebe, log) = (dir.path().join("hebe"), dir.path().join("log"));
        std::fs::write(
            &hebe,
            "#!/bin/sh\necho \"hebe: $2 is refused\" >&2\nexit 3\n",
        )
        .expect("write");
        let mode = std::fs::Permissions::from_mode(0o755);
        std::fs::set_permissions(&hebe, mode).expect("mode");
        let words = ["reboot", "this"].map(str::to_owned);
        let why = attempt(&hebe, &words, &log).expect_err("3");
        assert!(
            why.contains("this is refused") && why.contains('3'),
            "{why}"
        );
        let why = attempt(&dir.path().join("none"), &words, &log).expect_err("none");
        assert!(why.contains("none"), "{why}");
        assert_eq!(load("1.50 0.1 0.1 1/2 3").map(|l| l > 0.0), Some(true));
        assert_eq!(load(""), None);
    }
}
