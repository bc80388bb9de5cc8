//! What the running PID 1 says of itself and of a unit's store, through
//! systemctl(1), which speaks to it without a bus daemon.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use super::FIRST_VERSION;

/// The running PID 1.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Manager {
    /// The number of its version, such as 262.
    pub version: u32,
}

impl Manager {
    /// Whether it hands stores over a kexec.
    ///
    /// # Errors
    /// One sentence.
    pub fn may_carry(&self) -> Result<(), String> {
        if self.version >= FIRST_VERSION {
            return Ok(());
        }
        Err(format!(
            "PID 1 is systemd {}, and {FIRST_VERSION} is the first that hands descriptors over a kexec",
            self.version
        ))
    }
}

/// A unit's store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnitStore {
    /// The unit is there, and the manager has read it.
    pub loaded: bool,
    /// Most that it takes (`FileDescriptorStoreMax=`).
    pub max: usize,
    /// When it is emptied (`FileDescriptorStorePreserve=`).
    pub preserve: String,
    /// How many are in it.
    pub held: usize,
}

impl UnitStore {
    /// Whether what is in it goes over a kexec.
    ///
    /// # Errors
    /// One sentence.
    pub fn may_carry(&self, unit: &str) -> Result<(), String> {
        if !self.loaded {
            return Err(format!("systemd knows no unit {unit}"));
        }
        if self.max == 0 {
            return Err(format!(
                "{unit} has no file descriptor store: FileDescriptorStoreMax= is 0"
            ));
        }
        if !matches!(self.preserve.as_str(), "yes" | "on-success") {
            return Err(format!(
                "{unit}'s file descriptor store ends with the unit: FileDescriptorStorePreserve={}",
                self.preserve
            ));
        }
        Ok(())
    }
}

impl UnitStore {
    /// Whether so many go into it, when what is in it now was taken out.
    fn has_room(&self, unit: &str, wanted: usize) -> Result<(), String> {
        if self.max >= wanted {
            return Ok(());
        }
        Err(format!(
            "{unit}'s file descriptor store takes {}, and {wanted} are needed: raise FileDescriptorStoreMax=",
            self.max
        ))
    }
}

/// Asks PID 1 who it is.
///
/// # Errors
/// One sentence: it is not systemd, or does not answer.
pub fn manager() -> Result<Manager, String> {
    // sd_booted(3).
    if !Path::new("/run/systemd/system").is_dir() {
        return Err("PID 1 is not systemd".into());
    }
    parse_manager(&show(&["--property=Version"])?)
}

/// Asks PID 1 about a unit.
///
/// # Errors
/// One sentence: it does not answer.
pub fn unit_store(unit: &str) -> Result<UnitStore, String> {
    let wanted = "--property=LoadState,FileDescriptorStoreMax,FileDescriptorStorePreserve,NFileDescriptorStore";
    parse_unit(&show(&[wanted, "--", unit])?)
}

/// Whether PID 1 carries what `unit` puts into its store, and takes so many; in
/// words, what there is.
///
/// # Errors
/// One sentence.
pub fn room_in(unit: &str, wanted: usize) -> Result<String, String> {
    let manager = manager()?;
    manager.may_carry()?;
    let store = unit_store(unit)?;
    store.may_carry(unit)?;
    store.has_room(unit, wanted)?;
    Ok(format!(
        "PID 1 is systemd {}, and {unit} has a file descriptor store of {}",
        manager.version, store.max
    ))
}

/// The service that this process is part of, as its control group says.
pub fn own_unit() -> Option<String> {
    unit_in(&fs::read_to_string("/proc/self/cgroup").ok()?)
}

fn show(arguments: &[&str]) -> Result<String, String> {
    let output = Command::new("systemctl")
        .args(["show", "--no-pager"])
        .args(arguments)
        .env("LC_ALL", "C.UTF-8")
        .stdin(Stdio::null())
        .output()
        .map_err(|e| format!("systemctl cannot be run: {e}"))?;
    if !output.status.success() {
        let why = String::from_utf8_lossy(&output.stderr);
        return Err(format!("systemctl show failed: {}", why.trim()));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn value<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    let mut lines = text.lines();
    lines.find_map(|line| line.strip_prefix(key)?.strip_prefix('='))
}

/// `Version=262.1-1`, `Version=252.39-1~deb12u1` or `Version=v261-rc2`.
fn parse_manager(text: &str) -> Result<Manager, String> {
    let version = value(text, "Version").unwrap_or_default();
    let digits = version.trim_start_matches(|c: char| !c.is_ascii_digit());
    let end = digits.find(|c: char| !c.is_ascii_digit());
    let number = &digits[..end.unwrap_or(digits.len())];
    match number.parse() {
        Ok(version) => Ok(Manager { version }),
        Err(_) => Err(format!("systemd does not say its version: '{version}'")),
    }
}

fn parse_unit(text: &str) -> Result<UnitStore, String> {
    let number = |key: &str| value(text, key).and_then(|v| v.parse().ok());
    Ok(UnitStore {
        loaded: value(text, "LoadState") == Some("loaded"),
        max: number("FileDescriptorStoreMax").unwrap_or(0),
        // Before 254 there was no such setting, and the store ended so.
        preserve: value(text, "FileDescriptorStorePreserve")
            .unwrap_or("restart")
            .to_owned(),
        held: number("NFileDescriptorStore")
            .ok_or("systemd does not say how much a file descriptor store holds")?,
    })
}

/// `0::/system.slice/hebe-resume.service`: the innermost service.
fn unit_in(cgroup: &str) -> Option<String> {
    let line = cgroup.lines().find_map(|l| l.strip_prefix("0::"))?;
    let mut services = line.split('/').filter(|part| part.ends_with(".service"));
    services.next_back().map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_as_distributions_write_them() {
        for (text, version) in [
            ("Version=262.1-1\n", 262),
            ("Version=252.39-1~deb12u1\n", 252),
            ("Version=v261-rc2\n", 261),
            ("Version=257\n", 257),
        ] {
            let manager = parse_manager(text).expect(text);
            assert_eq!(manager, Manager { version });
            assert_eq!(manager.may_carry().is_ok(), version >= 261, "{text}");
        }
        for text in ["", "Version=\n", "Version=git\n"] {
            let why = parse_manager(text).expect_err(text);
            assert!(why.contains("does not say its version"), "{why}");
        }
        let why = Manager { version: 257 }.may_carry().expect_err("too old");
        assert!(why.contains("257") && why.contains("261"), "{why}");
    }

    #[test]
    fn a_store_that_ends_too_early_is_told_from_one_that_lasts() {
        let text = |max: u32, preserve: &str| {
            format!(
                "LoadState=loaded\nFileDescriptorStoreMax={max}\nNFileDescriptorStore=3\nFileDescriptorStorePreserve={preserve}\n"
            )
        };
        let judged = |text: &str| parse_unit(text).expect(text).may_carry("hebe.service");
        let good = parse_unit(&text(256, "yes")).expect("good");
        assert_eq!((good.max, good.held), (256, 3));
        for preserve in ["yes", "on-success"] {
            assert_eq!(judged(&text(256, preserve)), Ok(()));
        }
        for (text, words) in [
            (text(0, "yes"), "FileDescriptorStoreMax= is 0"),
            (text(9, "restart"), "FileDescriptorStorePreserve=restart"),
            (text(9, "no"), "FileDescriptorStorePreserve=no"),
            (
                text(9, "yes").replace("=loaded", "=not-found"),
                "knows no unit hebe.service",
            ),
            // As systemd 252 answers.
            (
                "LoadState=loaded\nFileDescriptorStoreMax=9\nNFileDescriptorStore=0\n".into(),
                "FileDescriptorStorePreserve=restart",
            ),
        ] {
            let why = judged(&text).expect_err("no good");
            assert!(why.contains(words), "{why}");
        }
        assert!(parse_unit("LoadState=loaded\n").is_err());
        assert_eq!(good.has_room("hebe.service", 256), Ok(()));
        let full = good.has_room("hebe.service", 257).expect_err("too many");
        assert!(full.contains("FileDescriptorStoreMax="), "{full}");
    }

    #[test]
    fn the_unit_of_a_process_is_the_innermost_service() {
        let unit = |text: &str| unit_in(text);
        assert_eq!(
            unit("0::/system.slice/hebe-resume.service\n").as_deref(),
            Some("hebe-resume.service")
        );
        assert_eq!(
            unit("1:x:/\n0::/system.slice/a.service/vms/web\n").as_deref(),
            Some("a.service")
        );
        assert_eq!(unit("0::/user.slice/session-1.scope\n"), None);
        assert_eq!(unit(""), None);
    }
}
