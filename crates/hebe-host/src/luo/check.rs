//! Pre-flight of what Linux is to carry.

use std::fs::{self, File};
use std::io::Read;
use std::path::Path;

use hebe_types::ByteSize;

use super::carry::{Candidate, candidates, plan};
use crate::host::{Host, LiveUpdateConfig};
use crate::listing::{Survey, with_cause};
use crate::preflight::{Check, Level, NextKernel, VmVerdict};

/// Words without which a kernel carries nothing.
const WORDS: [&str; 2] = ["kho=on", "liveupdate=on"];
/// What the next kernel has to be built with.
const OPTIONS: [&str; 3] = [
    "CONFIG_KEXEC_HANDOVER",
    "CONFIG_LIVEUPDATE",
    "CONFIG_LIVEUPDATE_MEMFD",
];
/// The first Linux that has it.
const FIRST: (u32, u32) = (6, 19);

/// All checks; none where no VM is to be carried.
pub(crate) fn checks(
    host: &Host,
    next: &NextKernel,
    survey: &Survey,
    verdicts: &[VmVerdict],
) -> Vec<Check> {
    let vms = candidates(survey, verdicts);
    if vms.is_empty() {
        return Vec::new();
    }
    let mut checks = vec![running(host), command_line(next)];
    checks.extend(image(&host.system.release(), &next.kernel));
    match host.config() {
        Ok(config) => checks.extend(memory(host, &vms, config.live_update)),
        Err(error) => checks.push(Check::bad(
            "live-update",
            Level::Fail,
            with_cause(&error),
            "correct host.toml",
        )),
    }
    checks
}

/// The running kernel has it, and nobody else has the device.
fn running(host: &Host) -> Check {
    let id = "live-update";
    let opened = host.system.live_update().and_then(|()| {
        // Closed at once: it is needed only to make sessions.
        host.system.orchestrator().map(drop)
    });
    match opened {
        Ok(()) => Check::ok(id, "the running kernel can carry memory into the next one"),
        Err(error) => Check::bad(id, Level::Fail, with_cause(&error), "or use --method saved"),
    }
}

fn command_line(next: &NextKernel) -> Check {
    let id = "live-update:cmdline";
    let has = |word: &&&str| !next.cmdline.split_whitespace().any(|w| w == **word);
    let missing: Vec<&str> = WORDS.iter().filter(has).copied().collect();
    if missing.is_empty() {
        return Check::ok(id, "the next kernel's command line switches live update on");
    }
    let words = missing.join(" ");
    Check::bad(
        id,
        Level::Fail,
        format!(
            "the next kernel's command line lacks {words}, so it would take nothing over and every VM in store luo would be lost"
        ),
        format!("add --append '{words}', or use --method saved"),
    )
}

/// What the next kernel's image and its package say.
fn image(here: &str, image: &Path) -> Vec<Check> {
    let id = "live-update:kernel";
    let Some(release) = release_of(image) else {
        // Whether the file is a kernel at all is another check's business.
        return Vec::new();
    };
    let fail = |why: String| {
        let remedy = "name a kernel that has it with --kernel, or use --method saved";
        vec![Check::bad(id, Level::Fail, why, remedy)]
    };
    if version(&release).is_some_and(|version| version < FIRST) {
        return fail(format!(
            "the next kernel is Linux {release}, and only 6.19 and newer take memory over"
        ));
    }
    if let Some(off) = config_of(image).and_then(|text| switched_off(&text)) {
        return fail(format!(
            "the next kernel, Linux {release}, is built without {off}, and would take nothing over"
        ));
    }
    if release == here {
        return vec![Check::ok(
            id,
            "the next kernel is of the running one's release",
        )];
    }
    vec![Check::bad(
        id,
        Level::Warn,
        format!(
            "the next kernel is Linux {release} and this one {here}: the format in which one hands memory to the other is not promised to be the same"
        ),
        "try this pair of kernels with a VM that may be lost, or use --method saved",
    )]
}

/// The release that a bzImage says it is (Documentation/arch/x86/boot.rst,
/// `kernel_version`).
fn release_of(image: &Path) -> Option<String> {
    let mut head = Vec::new();
    let file = File::open(image).ok()?;
    file.take(0x10000).read_to_end(&mut head).ok()?;
    if head.get(0x202..0x206)? != b"HdrS" {
        return None;
    }
    let at = u16::from_le_bytes(head.get(0x20e..0x210)?.try_into().ok()?);
    let text = head.get(usize::from(at) + 0x200..)?;
    let end = text.iter().position(|&b| b == 0 || b == b' ')?;
    let release = std::str::from_utf8(&text[..end]).ok()?;
    (at != 0 && !release.is_empty()).then(|| release.to_owned())
}

fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(['.', '-', '+']);
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

/// The file that packages put beside the image: `config-VERSION`.
fn config_of(image: &Path) -> Option<String> {
    let version = image.file_name()?.to_str()?.strip_prefix("vmlinuz-")?;
    fs::read_to_string(image.with_file_name(format!("config-{version}"))).ok()
}

/// The first option that is not built in.
fn switched_off(config: &str) -> Option<&'static str> {
    let on = |option: &&str| {
        let line = format!("{option}=y");
        !config.lines().any(|l| l == line)
    };
    OPTIONS.iter().find(|option| on(option)).copied()
}

/// What each VM would fill, and whether there is so much.
fn memory(host: &Host, vms: &[Candidate], config: LiveUpdateConfig) -> Vec<Check> {
    let mut checks = Vec::new();
    let mut needs = 0u64;
    for vm in vms {
        let id = format!("live-update:{}", vm.name);
        let files = vm.files(host).map_err(|e| with_cause(&e));
        match files.and_then(|files| plan(&files, config)) {
            Ok(plan) => {
                needs += plan.needs().bytes();
                checks.push(Check::ok(id, format!("memory of '{}': {plan}", vm.name)));
            }
            Err(why) => checks.push(Check::bad(
                id,
                Level::Fail,
                format!("the memory of '{}' cannot be carried: {why}", vm.name),
                "use --method saved",
            )),
        }
    }
    let id = "live-update:room";
    let needs = ByteSize(needs);
    match host.system.available_memory() {
        Some(free) if free < needs => checks.push(Check::bad(
            id,
            Level::Fail,
            format!("preserving takes {needs} of memory, and only {free} is available"),
            "stop a VM, or use --method saved",
        )),
        _ => checks.push(Check::ok(
            id,
            format!("preserving takes at most {needs} of memory, which is there"),
        )),
    }
    checks
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image_of(release: &str) -> tempfile::NamedTempFile {
        let mut bytes = vec![0u8; 0x1000];
        bytes[0x202..0x206].copy_from_slice(b"HdrS");
        bytes[0x20e..0x210].copy_from_slice(&0x600u16.to_le_bytes());
        let text = format!("{release} (builder@host) #1 SMP\0");
        bytes[0x800..0x800 + text.len()].copy_from_slice(text.as_bytes());
        let file = tempfile::NamedTempFile::new().expect("file");
        fs::write(file.path(), bytes).expect("write");
        file
    }

    #[test]
    fn an_image_that_is_too_old_or_of_another_release_is_told() {
        let level = |release: &str| image("7.3.4-lab", image_of(release).path())[0].level;
        assert_eq!(level("7.3.4-lab"), Level::Ok);
        assert_eq!(level("7.4.0"), Level::Warn);
        assert_eq!(level("6.19.1"), Level::Warn);
        assert_eq!(level("6.18.9"), Level::Fail);
        assert_eq!(level("6.1.0-40-amd64"), Level::Fail);
        let nothing = tempfile::NamedTempFile::new().expect("file");
        assert!(image("7.3.4", nothing.path()).is_empty());
    }

    #[test]
    fn the_packages_configuration_is_read() {
        let dir = tempfile::tempdir().expect("dir");
        let kernel = dir.path().join("vmlinuz-7.3.4");
        fs::copy(image_of("7.3.4").path(), &kernel).expect("copy");
        let config = dir.path().join("config-7.3.4");
        let on: String = OPTIONS.iter().map(|o| format!("{o}=y\n")).collect();
        fs::write(&config, &on).expect("write");
        assert_eq!(image("7.3.4", &kernel)[0].level, Level::Ok);
        let without = on.replace("CONFIG_LIVEUPDATE=y", "# CONFIG_LIVEUPDATE is not set");
        fs::write(&config, without).expect("write");
        let refused = &image("7.3.4", &kernel)[0];
        assert_eq!(refused.level, Level::Fail);
        assert!(
            refused.sentence.contains("CONFIG_LIVEUPDATE,"),
            "{refused:?}"
        );
    }

    #[test]
    fn a_command_line_without_the_words_is_refused_with_them() {
        let next = |cmdline: &str| NextKernel {
            kernel: "/k".into(),
            initrd: None,
            cmdline: cmdline.into(),
        };
        assert_eq!(
            command_line(&next("a kho=on liveupdate=on")).level,
            Level::Ok
        );
        let refused = command_line(&next("quiet kho=on liveupdate=off"));
        assert_eq!(refused.level, Level::Fail);
        assert!(
            refused.sentence.contains("lacks liveupdate=on"),
            "{refused:?}"
        );
        assert!(
            refused
                .remedy
                .is_some_and(|r| r.contains("--append 'liveupdate=on'"))
        );
    }
}
