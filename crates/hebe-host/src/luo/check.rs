//! Pre-flight of what Linux is to carry.

use std::fs;
use std::path::{Path, PathBuf};

use hebe_types::ByteSize;

use super::carry::{Candidate, candidates, plan};
use super::image::{self, Formats};
use crate::host::{CarrierChoice, Host, LiveUpdateConfig};
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
/// The check that says who holds the memory.
pub(crate) const CARRIER: &str = "live-update:carrier";
/// What an operator can do where a balloon's work is undone.
const GIVE_AGAIN: &str = "have that much memory, or use --method saved; fill_max in host.toml refuses more than a limit; afterwards `hebe balloon NAME --target SIZE` with all of its memory, and then with less, lets the guest give it back again";
/// The first Linux that has it.
pub(crate) const FIRST: (u32, u32) = (6, 19);

/// All checks; none where no VM is to be carried.
pub(crate) fn checks(
    host: &Host,
    next: &NextKernel,
    survey: &Survey,
    verdicts: &[VmVerdict],
    direct: bool,
) -> Vec<Check> {
    let vms = candidates(survey, verdicts);
    if vms.is_empty() {
        return Vec::new();
    }
    let mut checks = vec![running(host), carrier(host, direct), command_line(next)];
    let here = host.system.release();
    let own = PathBuf::from(format!("/boot/vmlinuz-{here}"));
    checks.extend(next_image((&here, &own), &next.kernel));
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

/// Who holds the memory up to the jump, and why; `direct`: nobody else takes the
/// host down.
fn carrier(host: &Host, direct: bool) -> Check {
    let id = CARRIER;
    let chosen = host.config().unwrap_or_default().live_update.carrier;
    let by_manager = match direct {
        true => Err("--direct says so".to_owned()),
        false => host.system.armed().and_then(|()| super::carrier(host)),
    };
    match by_manager {
        Err(_) if direct && chosen == CarrierChoice::Systemd => Check::bad(
            id,
            Level::Fail,
            "host.toml says carrier = \"systemd\", and with --direct systemd does not take the host down",
            "leave --direct out, or set [live_update] carrier = \"auto\"",
        ),
        Ok(words) => Check::ok(
            id,
            format!("while systemd takes the host down, PID 1 holds the memory: {words}"),
        ),
        Err(why) if chosen == CarrierChoice::Systemd => Check::bad(
            id,
            Level::Fail,
            format!("host.toml says carrier = \"systemd\", and that cannot be: {why}"),
            "set [live_update] carrier = \"auto\", or use --method saved",
        ),
        Err(why) => Check::ok(
            id,
            format!("Hebe holds the memory until it leaves by itself: {why}"),
        ),
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

/// What the next kernel's image and its package say, beside the running one's
/// release and image.
fn next_image((here, own): (&str, &Path), next: &Path) -> Vec<Check> {
    let id = "live-update:kernel";
    let Some(release) = image::release(next) else {
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
    if let Some(off) = config_of(next).and_then(|text| switched_off(&text)) {
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
    let next = image::formats(next);
    let lacks = |family: &str| {
        let prefix = format!("{family}-v");
        let known = |formats: &Formats| formats.iter().any(|name| name.starts_with(&prefix));
        next.as_ref().is_some_and(|formats| !known(formats))
    };
    if let Some(family) = ["luo", "kho", "memfd"].into_iter().find(|f| lacks(f)) {
        return fail(format!(
            "the next kernel, Linux {release}, is built without live update of memfds (its image knows no format {family}), and would take nothing over"
        ));
    }
    // The running kernel's own image, where packages put it.
    let own = next.as_ref().and_then(|_| {
        let same = image::release(own).as_deref() == Some(here);
        same.then(|| image::formats(own)).flatten()
    });
    match (own, next) {
        (Some(own), Some(next)) if own == next => vec![Check::ok(
            id,
            format!(
                "the next kernel, Linux {release}, knows the running one's formats: {}",
                list(&own)
            ),
        )],
        (Some(own), Some(next)) => fail(format!(
            "the next kernel, Linux {release}, knows {} and this one, Linux {here}, writes {}: it would take nothing over",
            list(&next),
            list(&own)
        )),
        (_, next) => vec![unknown(here, &release, next)],
    }
}

fn list(formats: &Formats) -> String {
    let names: Vec<&str> = formats.iter().map(String::as_str).collect();
    names.join(", ")
}

/// Judged by the releases alone.
fn unknown(here: &str, release: &str, next: Option<Formats>) -> Check {
    let known = next.map_or_else(
        || "its image cannot be unpacked to see which".to_owned(),
        |formats| {
            format!(
                "it knows {}, and the running one's image is not in /boot",
                list(&formats)
            )
        },
    );
    Check::bad(
        "live-update:kernel",
        Level::Warn,
        format!(
            "the next kernel is Linux {release} and this one {here}: the formats in which one hands memory to the other are not promised to be the same, and {known}"
        ),
        "try this pair of kernels with a VM that may be lost, or use --method saved",
    )
}

pub(crate) fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(['.', '-', '+']);
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

/// The file that packages put beside the image: `config-VERSION`.
fn config_of(image: &Path) -> Option<String> {
    let version = image.file_name()?.to_str()?.strip_prefix("vmlinuz-")?;
    fs::read_to_string(image.with_file_name(format!("config-{version}"))).ok()
}

/// The first option that is not built in.
pub(crate) fn switched_off(config: &str) -> Option<&'static str> {
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
                let sentence = format!("memory of '{}': {plan}", vm.name);
                // An operator who lets guests give memory back counts on it.
                checks.push(match vm.gave_back && plan.fill.bytes() > 0 {
                    false => Check::ok(id, sentence),
                    true => Check::bad(
                        id,
                        Level::Warn,
                        format!("{sentence}; what its balloon gave back is among that, and stays in use after the reboot"),
                        GIVE_AGAIN,
                    ),
                });
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

    const FORMATS: &[u8] = b"some text\0kho-v4\0luo-v5\0memfd-v2\0";

    fn image_with(release: &str, text: &[u8]) -> tempfile::NamedTempFile {
        let bytes = image::tests::bzimage(release, &image::tests::lz4(text));
        let file = tempfile::NamedTempFile::new().expect("file");
        fs::write(file.path(), bytes).expect("write");
        file
    }

    fn image_of(release: &str) -> tempfile::NamedTempFile {
        image_with(release, FORMATS)
    }

    fn judged(here: &str, own: Option<&Path>, next: &Path) -> Vec<Check> {
        next_image((here, own.unwrap_or(Path::new("/no/image"))), next)
    }

    #[test]
    fn an_image_that_is_too_old_or_of_another_release_is_told() {
        let level = |release: &str| judged("7.3.4-lab", None, image_of(release).path())[0].level;
        assert_eq!(level("7.3.4-lab"), Level::Ok);
        assert_eq!(level("7.4.0"), Level::Warn);
        assert_eq!(level("6.19.1"), Level::Warn);
        assert_eq!(level("6.18.9"), Level::Fail);
        assert_eq!(level("6.1.0-40-amd64"), Level::Fail);
        let nothing = tempfile::NamedTempFile::new().expect("file");
        assert!(judged("7.3.4", None, nothing.path()).is_empty());
    }

    #[test]
    fn formats_are_compared_where_both_images_tell_them() {
        let own = image_of("7.3.4");
        let of = |text: &[u8]| {
            let next = image_with("7.4.1", text);
            judged("7.3.4", Some(own.path()), next.path()).remove(0)
        };
        let same = of(FORMATS);
        assert_eq!(same.level, Level::Ok, "{same:?}");
        let newer = of(b"some text\0kho-v4\0luo-v6\0memfd-v2\0");
        assert_eq!(newer.level, Level::Fail);
        assert!(newer.sentence.contains("luo-v6"), "{newer:?}");
        assert!(
            newer.sentence.contains("writes kho-v4, luo-v5"),
            "{newer:?}"
        );
        let without = of(b"some text that is a kernel without it\0");
        assert_eq!(without.level, Level::Fail);
        assert!(
            without.sentence.contains("without live update"),
            "{without:?}"
        );
        // An image of another kernel than the one that runs says nothing of it.
        let other = image_of("7.3.3");
        let next = image_of("7.4.1");
        let told = judged("7.3.4", Some(other.path()), next.path()).remove(0);
        assert_eq!(told.level, Level::Warn);
        assert!(told.sentence.contains("it knows kho-v4"), "{told:?}");
    }

    #[test]
    fn the_packages_configuration_is_read() {
        let dir = tempfile::tempdir().expect("dir");
        let kernel = dir.path().join("vmlinuz-7.3.4");
        fs::copy(image_of("7.3.4").path(), &kernel).expect("copy");
        let config = dir.path().join("config-7.3.4");
        let on: String = OPTIONS.iter().map(|o| format!("{o}=y\n")).collect();
        fs::write(&config, &on).expect("write");
        assert_eq!(judged("7.3.4", None, &kernel)[0].level, Level::Ok);
        let without = on.replace("CONFIG_LIVEUPDATE=y", "# CONFIG_LIVEUPDATE is not set");
        fs::write(&config, without).expect("write");
        let refused = &judged("7.3.4", None, &kernel)[0];
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
