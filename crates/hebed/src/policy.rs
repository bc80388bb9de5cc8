//! Follows this host's policy, where there is one: looks once a minute, at how
//! the host is ageing, too, and runs `hebe reboot` when the policy says go.
//!
//! What decides is [`hebe_policy::policy::watch`], which a simulation runs,
//! too. The reboot is a program of its own, in a process group of its own: it
//! may stop this daemon as one of the host's services, and goes on. One that
//! was undone is not tried again before a person says so ([`halt`]).

pub mod halt;
pub mod sentinel;
pub mod turn;

use std::fs::File;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use hebe_fleet::FleetConfig;
use hebe_host::definitions::read_toml;
use hebe_host::listing::with_cause;
use hebe_host::{Host, files};
use hebe_policy::ageing::Look;
use hebe_policy::calendar::{Moment, Window};
use hebe_policy::policy::watch::{Seen, Watcher};
use hebe_policy::policy::{Decision, Policy, Rule, Why};
use hebe_policy::span::Span;
use rustix::time::{ClockId, clock_gettime};
use serde::Deserialize;

use crate::ageing::Monitor;
use crate::app::App;
use crate::log;
use halt::Failed;

/// Between two questions whether it is this host's turn in a roll: others wait
/// for it.
const ASK_EVERY: Duration = Duration::from_secs(10);
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
    #[serde(default)]
    least_uptime: Option<Span>,
    /// How samples are looked at.
    #[serde(default)]
    ageing: Look,
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
            least_uptime: self.least_uptime,
        }
    }
}

/// What the daemon has in mind with the host.
#[derive(Debug, Default)]
pub struct Follower {
    watcher: Watcher,
    monitor: Monitor,
    said: String,
    /// Whether the policy has a rule for rolls.
    rolls: bool,
    /// Whether it was this host's turn when that was asked last.
    turn: bool,
    /// The files by which a person says that it may go on after a reboot that
    /// was undone.
    files: Vec<PathBuf>,
}

/// Looks at the samples and the policy, for ever. Without `policy.toml` nothing
/// ever happens but alerts.
pub async fn follow(app: App, every: Duration) {
    let mut follower = Follower::default();
    let mut rest = every;
    loop {
        let nap = if follower.rolls {
            rest.min(ASK_EVERY)
        } else {
            rest
        };
        tokio::time::sleep(nap).await;
        rest -= nap;
        let is_time = rest.is_zero();
        if is_time {
            rest = every;
        }
        if app.engine.is_quiet() {
            continue;
        }
        let teller = app.clone();
        let looked = app.engine.read(move |host| {
            let (next, go) = follower.tick(host, is_time, &|text, trouble| {
                teller.tell_ageing(text, trouble)
            });
            teller.note_exhaustions(next.monitor.exhaustions());
            (next, go)
        });
        let Ok((next, go)) = looked.await else {
            log::error("the policy is not followed any more: please report this");
            return;
        };
        follower = next;
        if let Some(command) = go {
            log::info(format!("policy: runs hebe with: {}", command.join(" ")));
            let files = follower.files.clone();
            let done = app
                .engine
                .order(move |host| {
                    let run = || attempt(&program(), &command, &log_path(host));
                    halt::guarded(host, &files, run)
                })
                .await;
            if let Ok(Err(failed)) = done {
                let why = failed.why;
                log::warning(format!("policy: the host was not rebooted: {why}"));
            }
        }
    }
}

impl Follower {
    /// A look, where it is time for one, or this host's turn in a roll has just
    /// come.
    pub fn tick(
        mut self,
        host: &Host,
        is_time: bool,
        tell: &dyn Fn(String, bool),
    ) -> (Self, Option<Vec<String>>) {
        let mut mine = None;
        if self.rolls {
            mine = turn::ask(host).unwrap_or_else(|why| {
                self.say(format!(
                    "whether it is this host's turn is not known: {why}"
                ));
                None
            });
        }
        let came = mine.is_some() && !self.turn;
        self.turn = mine.is_some();
        if !is_time && !came {
            return (self, None);
        }
        let (mut next, go) = self.look(host, tell);
        if let Some(mine) = mine.filter(|_| go.is_none())
            && let Err(why) = mine.waits(next.said.clone())
        {
            next.say(format!("the roll does not know why this host waits: {why}"));
        }
        (next, go)
    }

    /// One look: what is remembered, and the arguments of `hebe` if it is to
    /// be run. `tell` is told of ageing, and whether somebody should look.
    pub fn look(mut self, host: &Host, tell: &dyn Fn(String, bool)) -> (Self, Option<Vec<String>>) {
        let path = host.layout.config.join("policy.toml");
        let file = path.exists().then(|| read_policy(&path));
        let look = match &file {
            Some(Ok(file)) => file.ageing,
            _ => Look::default(),
        };
        let (monitor, news) = self.monitor.look(host, look);
        self.monitor = monitor;
        if let Some(news) = news {
            tell(news.text, news.trouble);
        }
        let file = match file {
            Some(Ok(file)) => file,
            Some(Err(why)) => {
                self.say(format!("nothing is done by policy: {why}"));
                return (self, None);
            }
            None => {
                let monitor = self.monitor;
                let idle = Self::default();
                return (Self { monitor, ..idle }, None);
            }
        };
        let halted = halt::in_force(host, &[&path, &file.sentinel]);
        let mut seen = seen(host, &file.sentinel, &self.monitor);
        seen.halted = halted.is_some();
        seen.turn = self.turn;
        self.rolls = file.rules.contains(&Rule::Roll);
        self.files = vec![path.clone(), file.sentinel.clone()];
        let (watcher, decision) = self.watcher.look(&file.policy(), &seen);
        self.watcher = watcher;
        match decision {
            Decision::Wait { why, .. } => {
                let halted = halted.filter(|_| why == Why::Halted);
                let halted = halted.map(|reason| {
                    format!(
                        " ({reason}); it goes on when {} or {} is changed",
                        path.display(),
                        file.sentinel.display()
                    )
                });
                let halted = halted.unwrap_or_default();
                self.say(format!("the policy waits: {why}{halted}"));
                (self, None)
            }
            Decision::Go { rule, .. } => {
                self.said.clear();
                let rule_is = file.rules.get(rule).map_or("", Rule::name);
                log::info(format!("policy: rule {} ({rule_is}) says go", rule + 1));
                let is_turn = file.rules.get(rule) == Some(&Rule::Roll);
                (self, Some(arguments(&file, host, is_turn)))
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
    let at = |error: &dyn std::fmt::Display| format!("{}: {error}", path.display());
    file.policy().check(wall()).map_err(|error| at(&error))?;
    file.ageing.check().map_err(|error| at(&error))?;
    Ok(file)
}

/// In a group of hosts it does not wait for its turn: the policy is asked
/// again, which may not want it any more then.
fn arguments(file: &PolicyFile, host: &Host, is_turn: bool) -> Vec<String> {
    let mut words = vec!["reboot".to_owned()];
    if is_turn {
        // Whoever else has a slot just now gives it back soon, or not at all.
        words.extend(["--roll", "--wait", "1min"].map(str::to_owned));
    } else if host.layout.config.join("fleet.toml").exists() {
        words.extend(["--fleet", "--wait", "0s"].map(str::to_owned));
    }
    words.extend(file.reboot.iter().cloned());
    words
}

/// Why the policy does not go whatever it says, if so.
pub fn halted(host: &Host) -> Option<String> {
    let path = host.layout.config.join("policy.toml");
    let file = read_policy(&path).ok()?;
    halt::in_force(host, &[&path, &file.sentinel])
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

fn seen(host: &Host, sentinel: &Path, monitor: &Monitor) -> Seen {
    let (now, up_s) = (wall(), clock_gettime(ClockId::Boottime).tv_sec);
    let booted = now - up_s;
    Seen {
        now,
        booted: Some(booted),
        up_s: Some(up_s),
        asked: sentinel::asked(host, sentinel, now, booted),
        turn: false,
        exhausted_in_s: monitor.exhausted_in_s(up_s as f64),
        halted: false,
        load: load(&std::fs::read_to_string("/proc/loadavg").unwrap_or_default()),
    }
}

/// The load of the last minute for each processor: 1 is all of them busy.
fn load(loadavg: &str) -> Option<f64> {
    let load: f64 = loadavg.split_whitespace().next()?.parse().ok()?;
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    Some(load / processors as f64)
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
fn attempt(program: &Path, arguments: &[String], log: &Path) -> Result<(), Failed> {
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
    let status = began().map_err(|e| Failed {
        why: format!("{}: {}", program.display(), with_cause(&e)),
        touched: false,
    })?;
    if status.success() {
        return Ok(());
    }
    let said = files::tail(log, 3).join(" ");
    Err(Failed {
        why: format!("{status}, {said}"),
        // It failed, was asked wrongly or was refused; all else, a signal
        // too, may have come in the midst of it.
        touched: !matches!(status.code(), Some(1..=3)),
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::time::SystemTime;

    use hebe_host::ageing::{SampleStore, path_below};
    use hebe_host::host::Layout;
    use hebe_policy::ageing::{Indicator, Reading, Sample};

    use super::*;

    fn silent(_: String, _: bool) {}

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
        let (follower, go) = Follower::default().look(&host, &silent);
        assert_eq!((go, follower.said.as_str()), (None, ""));
        for (text, word) in [
            ("at_most = 0\n[[rule]]\nwhen = \"by-hand\"\n", "at_most = 0"),
            ("[[rule]]\nwhen = \"never\"\n", "line 2"),
            ("", "no rule"),
            ("rules = 1\n", "rules"),
        ] {
            std::fs::write(dir.path().join("etc/policy.toml"), text).expect("write");
            let (follower, go) = Follower::default().look(&host, &silent);
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
        let (follower, go) = Follower::default().look(&host, &silent);
        assert_eq!(go, None);
        assert!(
            follower.said.contains("nothing is due"),
            "{}",
            follower.said
        );
        std::fs::write(&sentinel, "").expect("write");
        let (follower, go) = follower.look(&host, &silent);
        let words = |go: Option<Vec<String>>| go.expect("it is asked for").join(" ");
        assert_eq!(words(go), "reboot --method saved");
        let (follower, go) = follower.look(&host, &silent);
        assert_eq!(go, None, "it was just tried");
        assert!(
            follower.said.contains("a short while ago"),
            "{}",
            follower.said
        );
        std::fs::write(dir.path().join("etc/fleet.toml"), "").expect("write");
        let (_, go) = Follower::default().look(&host, &silent);
        assert_eq!(words(go), "reboot --fleet --wait 0s --method saved");
    }

    /// Half a minute of samples, each with less memory.
    fn leak(host: &Host) {
        let path = path_below(&host.layout.state);
        let mut store = SampleStore::open(&path, 1_000).expect("store");
        let now_s = clock_gettime(ClockId::Boottime).tv_sec as f64;
        for i in 0..30 {
            let up_s = now_s - 30.0 + f64::from(i);
            let mut readings = [None; Indicator::ALL.len()];
            readings[0] = Some(Reading {
                value: 1e6 - f64::from(i) * 1e3,
                limit: 0.0,
            });
            let sample = Sample {
                boot: host.system.boot_id(),
                up_s,
                at_s: up_s,
                readings,
            };
            store.append(&sample).expect("sample");
        }
    }

    #[test]
    fn a_leak_is_told_without_a_policy_and_reboots_the_host_with_one() {
        let dir = tempfile::tempdir().expect("folder");
        let host = host(dir.path());
        leak(&host);
        let told = std::sync::Mutex::new(Vec::new());
        let tell = |text, trouble| told.lock().expect("lock").push((text, trouble));
        let write = |text: &str| std::fs::write(dir.path().join("etc/policy.toml"), text);
        // A look by days says nothing of half a minute.
        let (follower, go) = Follower::default().look(&host, &tell);
        assert_eq!(go, None);
        let rest = "least_uptime = \"1s\"\n";
        let rule = "[[rule]]\nwhen = \"ageing\"\nexhausted_within = \"1h\"\n";
        let plain = "[ageing]\nperiod = \"none\"\n";
        write(&format!("{rest}{rule}")).expect("write");
        let (follower, go) = follower.look(&host, &tell);
        assert_eq!((go, told.lock().expect("lock").len()), (None, 0));
        write(&format!("{rest}{rule}{plain}")).expect("write");
        let (follower, go) = follower.look(&host, &tell);
        assert_eq!(go.expect("go"), ["reboot"]);
        assert_eq!(follower.monitor.exhaustions().len(), 1);
        let told = told.into_inner().expect("lock");
        assert!(
            told[0].0.contains("available memory") && told[0].1,
            "{told:?}"
        );
        // Further off than the rule says.
        let near = rule.replace("1h", "1min");
        write(&format!("{rest}{near}{plain}")).expect("write");
        let (_, go) = Follower::default().look(&host, &silent);
        assert_eq!(go, None);
        write(&format!("{rest}{rule}[ageing]\nerror_rate = 2.0\n")).expect("write");
        let (follower, go) = Follower::default().look(&host, &silent);
        assert_eq!(go, None);
        assert!(follower.said.contains("error rate"), "{}", follower.said);
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

    /// A program that ends as it is told, in place of `hebe`.
    fn stand_in(dir: &Path, end: &str) -> PathBuf {
        let hebe = dir.join("hebe");
        let text = format!("#!/bin/sh\necho \"hebe: $2 is not done\" >&2\n{end}\n");
        let file = dir.join("text");
        std::fs::write(&file, text).expect("write");
        // What this process has open to write, a child that another test has forked
        // may have open still, and no such file can be run.
        let copied = std::process::Command::new("cp")
            .args([&file, &hebe])
            .status();
        assert!(copied.expect("cp runs").success());
        let mode = std::fs::Permissions::from_mode(0o755);
        std::fs::set_permissions(&hebe, mode).expect("mode");
        hebe
    }

    #[test]
    fn why_it_failed_is_told_and_whether_vms_were_touched() {
        let dir = tempfile::tempdir().expect("folder");
        let log = dir.path().join("log");
        let words = ["reboot", "this"].map(str::to_owned);
        for (end, touched) in [
            ("exit 1", false),
            ("exit 3", false),
            ("exit 4", true),
            ("exit 5", true),
            ("kill -9 $$", true),
        ] {
            let hebe = stand_in(dir.path(), end);
            let failed = attempt(&hebe, &words, &log).expect_err(end);
            assert!(failed.why.contains("this is not done"), "{failed:?}");
            assert_eq!(failed.touched, touched, "{failed:?}");
        }
        let failed = attempt(&dir.path().join("none"), &words, &log).expect_err("none");
        assert!(failed.why.contains("none") && !failed.touched, "{failed:?}");
        assert_eq!(load("1.50 0.1 0.1 1/2 3").map(|l| l > 0.0), Some(true));
        assert_eq!(load(""), None);
    }

    #[test]
    fn a_reboot_that_was_undone_is_not_repeated_until_somebody_says_so() {
        let dir = tempfile::tempdir().expect("folder");
        let host = host(dir.path());
        let (policy, sentinel) = (dir.path().join("etc/policy.toml"), dir.path().join("asked"));
        let text = format!("sentinel = {sentinel:?}\n[[rule]]\nwhen = \"by-hand\"\n");
        std::fs::write(&policy, text).expect("write");
        let touch = |path: &Path, s: i32| {
            let at = SystemTime::now() + Duration::from_secs(10);
            let at = if s < 0 {
                at - Duration::from_secs(20)
            } else {
                at
            };
            let file = File::options().create(true).append(true).open(path);
            file.and_then(|f| f.set_modified(at)).expect("touch");
        };
        touch(&policy, -1);
        touch(&sentinel, -1);
        // Each look is that of a fresh daemon.
        let look = || Follower::default().look(&host, &silent);
        let files = [policy.clone(), sentinel.clone()];
        let run = |end: &str| {
            let hebe = stand_in(dir.path(), end);
            halt::guarded(&host, &files, || attempt(&hebe, &[], &log_path(&host))).expect_err(end)
        };
        run("exit 3");
        assert!(look().1.is_some(), "it was refused: nothing was touched");
        assert_eq!(halted(&host), None);
        run("exit 4");
        let (follower, go) = look();
        assert_eq!(go, None);
        for word in ["is not done", "policy.toml", "asked"] {
            assert!(follower.said.contains(word), "{word}: {}", follower.said);
        }
        assert!(halted(&host).expect("halted").contains("is not done"));
        // The clock may have been set back since.
        for later in [1, -1] {
            for file in [&policy, &sentinel] {
                let modified = |file: &Path| file.metadata().and_then(|meta| meta.modified());
                let was = modified(file).expect("time");
                touch(file, later);
                assert_eq!(halted(&host), None);
                let opened = File::options().append(true).open(file);
                opened.and_then(|f| f.set_modified(was)).expect("touch");
                assert!(halted(&host).is_some());
            }
        }
        // What it says was written by the last boot.
        let other = std::fs::read_to_string(halt::path(&host)).expect("text");
        let id = hebe_types::VmId(host.system.boot_id()).to_string();
        std::fs::write(halt::path(&host), other.replace(&id, "other")).expect("write");
        assert!(look().1.is_some());
    }

    #[test]
    fn how_long_the_host_is_up_is_seen_by_a_clock_that_nobody_sets() {
        let up_s = || clock_gettime(ClockId::Boottime).tv_sec;
        let before = up_s();
        let dir = tempfile::tempdir().expect("folder");
        let sentinel = Path::new("/nonexistent/sentinel");
        let seen = seen(&host(dir.path()), sentinel, &Monitor::default());
        let told = seen.up_s.expect("told");
        assert!((before..=up_s()).contains(&told), "{told}");
    }

    #[test]
    fn a_daemon_that_its_own_reboot_ends_leaves_word() {
        let dir = tempfile::tempdir().expect("folder");
        let host = host(dir.path());
        let policy = dir.path().join("etc/policy.toml");
        std::fs::write(policy, "[[rule]]\nwhen = \"by-hand\"\n").expect("write");
        let mut told = None;
        let done = halt::guarded(&host, &[], || {
            told = halted(&host);
            Ok(())
        });
        assert_eq!(done, Ok(()));
        assert!(told.expect("already").contains("policy.log"));
        assert_eq!(halted(&host), None);
    }
}
