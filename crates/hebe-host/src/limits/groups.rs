//! Control groups of version 2, by their file system (Linux,
//! Documentation/admin-guide/cgroup-v2.rst): for hosts whose PID 1 makes none.
//!
//! One group for each VMM, `hebe/NAME-PID`. It is removed when the VMM is gone, by
//! whoever sees that first.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use hebe_types::{ByteSize, VmName};

use super::{GroupView, Limits};

/// The group of all VMs' groups.
const TOP: &str = "hebe";
/// Those that a host is protected by.
const CONTROLLERS: [&str; 2] = ["memory", "pids"];
/// The share of all VMs together, as large as can be said: beside them, each
/// process of the root group counts for itself.
const TOP_WEIGHT: &str = "10000";
/// How long the last thread of a process may take from closing its files to leaving
/// its group; one that takes longer leaves that to the next look.
const GONE_WAIT: Duration = Duration::from_millis(20);
/// The period of a limit of processor time, in microseconds.
const PERIOD_US: u64 = 100_000;

/// Where control groups of version 2 are mounted.
///
/// # Errors
/// Nowhere.
pub(crate) fn mount() -> Result<PathBuf, String> {
    let text = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    mount_in(&text).ok_or_else(|| "control groups of version 2 are not mounted".to_owned())
}

/// From `/proc/self/mountinfo` (proc(5)): the fifth field is the mount point, and
/// behind " - " stands the type.
fn mount_in(mountinfo: &str) -> Option<PathBuf> {
    mountinfo.lines().find_map(|line| {
        let (mount, kind) = line.split_once(" - ")?;
        (kind.split(' ').next() == Some("cgroup2")).then_some(())?;
        let point = mount.split(' ').nth(4)?;
        Some(PathBuf::from(point.replace("\\040", " ")))
    })
}

/// What holds in the group of a process, from its `/proc/PID/cgroup`.
pub(crate) fn look(mount: &Path, cgroup: &str) -> Result<GroupView, String> {
    let path = cgroup.lines().find_map(|line| line.strip_prefix("0::"));
    let path = path.ok_or("it is in no control group of version 2")?;
    let dir = mount.join(path.trim_start_matches('/'));
    let read = |file: &str| fs::read_to_string(dir.join(file)).ok();
    let number = |file: &str| read(file)?.trim().parse::<u64>().ok();
    let quota = read("cpu.max").and_then(|text| {
        let mut words = text.split_whitespace();
        let quota: u64 = words.next()?.parse().ok()?;
        let period: u64 = words.next()?.parse().ok()?;
        quota.saturating_mul(100).checked_div(period)
    });
    Ok(GroupView {
        path: path.to_owned(),
        memory_max: number("memory.max"),
        memory_now: number("memory.current"),
        tasks_max: number("pids.max"),
        cpu_percent: quota,
        cpu_weight: number("cpu.weight"),
    })
}

/// The groups of a host.
#[derive(Clone, Debug)]
pub(crate) struct Groups {
    mount: PathBuf,
}

impl Groups {
    /// Those of this host.
    pub(crate) fn here() -> Result<Self, String> {
        Ok(Self { mount: mount()? })
    }

    #[cfg(test)]
    fn at(mount: &Path) -> Self {
        Self {
            mount: mount.to_owned(),
        }
    }

    /// Whether limits of memory and of tasks can be set, and if not why; changes
    /// nothing.
    pub(crate) fn check(&self) -> Result<String, String> {
        let path = self.mount.join("cgroup.controllers");
        let text = fs::read_to_string(&path).map_err(|e| format!("{}: {e}", path.display()))?;
        let has = |name: &&str| text.split_whitespace().any(|word| word == *name);
        let lacking: Vec<&str> = CONTROLLERS.iter().filter(|c| !has(c)).copied().collect();
        if !lacking.is_empty() {
            let where_is = self.mount.display();
            return Err(format!(
                "the control groups at {where_is} do not have what limits {}",
                lacking.join(" and ")
            ));
        }
        let place = [self.mount.join(TOP), self.mount.clone()];
        let place = place.iter().find(|dir| dir.exists());
        let access = rustix::fs::Access::WRITE_OK;
        match place.map(|dir| rustix::fs::access(dir, access)) {
            Some(Ok(())) => Ok(format!("{}/{TOP}", self.mount.display())),
            _ => Err(format!("{} cannot be written", self.mount.display())),
        }
    }

    /// Makes the group of a VMM with these limits, and puts it there.
    ///
    /// # Errors
    /// It could not be made, or memory or tasks are not limited there.
    pub(crate) fn confine(&self, vm: &VmName, pid: u32, limits: &Limits) -> Result<(), String> {
        self.check()?;
        self.place(vm, pid, limits)
    }

    /// [`Groups::confine`], with what can be had.
    fn place(&self, vm: &VmName, pid: u32, limits: &Limits) -> Result<(), String> {
        let top = self.mount.join(TOP);
        let make = |dir: &Path| match fs::create_dir(dir) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => {
                Err(format!("{} cannot be made: {e}", dir.display()))
            }
            _ => Ok(()),
        };
        // Shares change what all others get, so they are there for who wants them.
        let cpu = limits.cpu_weight.is_some() || limits.cpu_limit.is_some();
        let shares = [("cpu", cpu), ("io", limits.io_weight.is_some())];
        let shares = shares.iter().filter(|(_, wanted)| *wanted);
        let wanted: Vec<&str> = CONTROLLERS
            .into_iter()
            .chain(shares.map(|(c, _)| *c))
            .collect();
        // Each by itself: one that this kernel lacks keeps the others from nothing.
        let enable = |dir: &Path| {
            for controller in &wanted {
                let _ = fs::write(dir.join("cgroup.subtree_control"), format!("+{controller}"));
            }
        };
        enable(&self.mount);
        make(&top)?;
        for file in ["cpu.weight", "io.weight"].map(|file| top.join(file)) {
            if file.exists() {
                let _ = fs::write(file, TOP_WEIGHT);
            }
        }
        enable(&top);
        let dir = top.join(format!("{vm}-{pid}"));
        let began = Instant::now();
        loop {
            make(&dir)?;
            let failed = set(&dir, limits);
            match fs::write(dir.join("cgroup.procs"), pid.to_string()) {
                Ok(()) if failed.is_empty() => return Ok(()),
                Ok(()) => return Err(failed.join("; ")),
                // Somebody took it for one whose VMM is gone.
                Err(e) if !dir.exists() && began.elapsed() < GONE_WAIT => drop(e),
                Err(e) => return Err(format!("{}: {e}", dir.display())),
            }
        }
    }

    /// Removes the group of a VM whose VMM has ended just now.
    pub(crate) fn remove(&self, vm: &VmName) {
        let began = Instant::now();
        let own = || self.groups().filter(|(name, _)| is_of(name, vm));
        own().for_each(|(_, group)| drop(fs::remove_dir(group)));
        while own().next().is_some() && began.elapsed() < GONE_WAIT {
            thread::sleep(Duration::from_millis(2));
            own().for_each(|(_, group)| drop(fs::remove_dir(group)));
        }
    }

    /// Removes the groups of all VMs whose VMMs are gone: others are not empty, and
    /// the kernel does not remove them.
    pub(crate) fn sweep(&self) {
        for (_, group) in self.groups() {
            let _ = fs::remove_dir(group);
        }
    }

    fn groups(&self) -> impl Iterator<Item = (String, PathBuf)> {
        let entries = fs::read_dir(self.mount.join(TOP)).into_iter().flatten();
        let groups = entries.flatten().filter(|e| e.path().is_dir());
        groups.filter_map(|e| Some((e.file_name().into_string().ok()?, e.path())))
    }
}

/// Whether a group is that of a VMM of this VM.
fn is_of(group: &str, vm: &VmName) -> bool {
    let rest = group.strip_prefix(vm.as_str());
    let pid = rest.and_then(|rest| rest.strip_prefix('-'));
    pid.is_some_and(|pid| pid.parse::<u32>().is_ok())
}

/// Sets what is to be set; why memory or tasks are not limited.
fn set(dir: &Path, limits: &Limits) -> Vec<String> {
    let write = |file: &str, value: String| {
        fs::write(dir.join(file), value).map_err(|e| format!("{file} cannot be set: {e}"))
    };
    let size = |size: ByteSize| size.0.to_string();
    let max = "max".to_owned();
    let (high, most) = match limits.memory {
        Some(memory) => (size(memory.high), size(memory.max)),
        None => (max.clone(), max.clone()),
    };
    let mut failed = Vec::new();
    // A former VMM's limits may be here, so that everything is set.
    failed.extend(write("memory.max", most.clone()).err());
    failed.extend(write("pids.max", limits.tasks.to_string()).err());
    let _ = write("memory.high", high);
    let _ = write("memory.swap.max", most);
    let weight = |weight: Option<u32>| weight.unwrap_or(100);
    let _ = write("cpu.weight", weight(limits.cpu_weight).to_string());
    let quota = limits.cpu_limit.map_or(max, |limit| {
        (u64::from(limit.percent()) * PERIOD_US / 100).to_string()
    });
    let _ = write("cpu.max", format!("{quota} {PERIOD_US}"));
    let _ = write("io.weight", format!("default {}", weight(limits.io_weight)));
    failed
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::process::{Command, Stdio};

    use hebe_types::CpuLimit;

    use super::*;
    use crate::limits::{MemoryLimits, TASKS_MAX};

    fn limits() -> Limits {
        Limits {
            memory: Some(MemoryLimits {
                high: ByteSize::mib(600),
                max: ByteSize::mib(1100),
            }),
            tasks: TASKS_MAX,
            cpu_weight: Some(50),
            cpu_limit: "150%".parse::<CpuLimit>().ok(),
            io_weight: None,
        }
    }

    fn name(text: &str) -> VmName {
        text.parse().expect("name")
    }

    #[test]
    fn the_mount_is_found_among_others() {
        let text = "29 23 0:26 / /sys/fs/cgroup rw shared:4 - tmpfs tmpfs rw\n\
                    30 29 0:27 / /sys/fs/cgroup/a\\040b rw,relatime - cgroup2 cgroup2 rw\n";
        let found = mount_in(text).expect("mounted");
        assert_eq!(found, Path::new("/sys/fs/cgroup/a b"));
        assert_eq!(mount_in("29 23 0:26 / /proc rw - proc proc rw\n"), None);
        assert_eq!(mount_in(""), None);
    }

    /// On plain files, which take whatever is written.
    #[test]
    fn everything_is_written_where_the_kernel_reads_it() {
        let root = tempfile::tempdir().expect("dir");
        let groups = Groups::at(root.path());
        let read = |file: &str| {
            let text = fs::read_to_string(root.path().join("hebe/web-42").join(file));
            text.expect(file)
        };
        assert!(groups.confine(&name("web"), 42, &limits()).is_err());
        assert!(
            !root.path().join("hebe").exists(),
            "nothing is made in vain"
        );
        let placed = groups.place(&name("web"), 42, &limits());
        placed.expect("limited");
        for (file, value) in [
            ("memory.high", "629145600"),
            ("memory.max", "1153433600"),
            ("memory.swap.max", "1153433600"),
            ("pids.max", "256"),
            ("cpu.weight", "50"),
            ("cpu.max", "150000 100000"),
            ("io.weight", "default 100"),
            ("cgroup.procs", "42"),
        ] {
            assert_eq!(read(file), value, "{file}");
        }
        let view = look(root.path(), "1:x:/y\n0::/hebe/web-42\n").expect("a group");
        assert!(view.is_limited(), "{view:?}");
        assert_eq!((view.cpu_percent, view.cpu_weight), (Some(150), Some(50)));
        // No limit of what is not known, nor of what its definition says nothing of.
        let open = Limits {
            memory: None,
            cpu_limit: None,
            ..limits()
        };
        groups.place(&name("web"), 42, &open).expect("as wanted");
        assert_eq!(read("memory.max"), "max");
        assert_eq!(read("cpu.max"), "max 100000");
        let view = look(root.path(), "0::/hebe/web-42").expect("a group");
        assert!(!view.is_limited() && view.cpu_percent.is_none(), "{view:?}");
        assert!(look(root.path(), "1:x:/y\n").is_err());
    }

    #[test]
    fn what_cannot_be_had_is_told() {
        let root = tempfile::tempdir().expect("dir");
        let groups = Groups::at(root.path());
        assert!(groups.check().is_err(), "no control groups");
        let list = root.path().join("cgroup.controllers");
        fs::write(&list, "cpuset cpu io memory hugetlb\n").expect("write");
        let why = groups.check().expect_err("no pids");
        assert!(why.contains("pids") && !why.contains("memory"), "{why}");
        fs::write(&list, "cpu io memory pids\n").expect("write");
        assert!(groups.check().is_ok());
        // A file in the way of one limit leaves the others.
        fs::create_dir_all(root.path().join("hebe/web-1/pids.max")).expect("mkdir");
        let why = groups.confine(&name("web"), 1, &limits());
        assert!(why.expect_err("tasks").contains("pids.max"));
        let set = root.path().join("hebe/web-1/memory.max");
        assert!(set.exists());
        let nowhere = Groups::at(&root.path().join("none"));
        assert!(nowhere.confine(&name("web"), 1, &limits()).is_err());
        nowhere.remove(&name("web"));
        nowhere.sweep();
    }

    /// Straight to stderr: what did not run must not look like what did.
    fn skipped(why: &str) {
        writeln!(io::stderr(), "skipped: control groups: {why}").expect("stderr");
    }

    /// With the kernel's own, where this computer has them and lets us.
    #[test]
    fn a_process_is_confined_and_its_group_goes_with_it() {
        let groups = match Groups::here() {
            Ok(groups) if rustix::process::geteuid().is_root() => groups,
            Ok(_) => return skipped("not root"),
            Err(why) => return skipped(&why),
        };
        let vm = name("hebe-self-test");
        let mut sleeper = Command::new("sleep")
            .arg("60")
            .stdin(Stdio::null())
            .spawn()
            .expect("sleep");
        let dir = groups
            .mount
            .join(TOP)
            .join(format!("{vm}-{}", sleeper.id()));
        let confined = groups.place(&vm, sleeper.id(), &limits());
        let view = crate::limits::look(sleeper.id());
        groups.sweep();
        let while_it_lives = dir.exists();
        sleeper.kill().expect("kill");
        sleeper.wait().expect("wait");
        groups.remove(&name("hebe-self"));
        let others = dir.exists();
        groups.remove(&vm);
        let after = dir.exists();
        let _ = fs::remove_dir(groups.mount.join(TOP));
        let view = view.expect("a group");
        if !while_it_lives {
            let why = confined.expect_err("no group");
            return skipped(&why);
        }
        assert_eq!(view.path, format!("/{TOP}/{vm}-{}", sleeper.id()));
        assert!(others && !after, "it is removed, and no other VM's");
        match (groups.check(), confined) {
            (Ok(_), Ok(())) => {
                assert_eq!(view.memory_max, Some(1100 << 20), "{view:?}");
                assert_eq!(view.tasks_max, Some(TASKS_MAX));
                assert!(view.memory_now.is_some());
            }
            // Here the kernel's controllers are in use elsewhere.
            (_, Err(why)) => {
                assert!(why.contains("memory.max"), "{why}");
                assert!(!view.is_limited());
                skipped(&format!("the limits themselves: {why}"));
            }
            (Err(why), Ok(())) => panic!("limited, although {why}"),
        }
    }
}
