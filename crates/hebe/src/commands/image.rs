//! `image`: its commands.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use hebe_host::Host;
use hebe_host::claims::of_vm_at_rest;
use hebe_image::Seed;
use hebe_image::build::sources::{self, Source};
use hebe_image::build::{self, Contents, FileIn, Format, Order, Watch};
use hebe_sys::interrupt;
use serde::Serialize;

use crate::cli::{ImageBuildArgs, ImageCommand, ImageFormat};
use crate::output::{Exit, Failure, Outcome, Output};

/// Units of the agent in the guest.
const AGENT_UNITS: [(&str, &str); 2] = [
    (
        "hebe-agent.service",
        include_str!("../../../../packaging/hebe-agent.service"),
    ),
    (
        "hebe-agent-ready.service",
        include_str!("../../../../packaging/hebe-agent-ready.service"),
    ),
];
/// Who signs Debian's packages, where this machine has it.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

#[derive(Serialize)]
struct Done<'a> {
    path: &'a Path,
    format: &'static str,
    suite: &'a str,
    hostname: &'a str,
    /// Bytes of the disk.
    size: u64,
    /// Bytes that the file takes.
    allocated: u64,
    /// Bytes of what it boots.
    kernel: u64,
    initrd: u64,
    cmdline: &'a str,
}

/// `hebe image`.
pub fn image(host: &Host, command: &ImageCommand, out: &Output) -> Outcome {
    match command {
        ImageCommand::Build(args) => build_image(host, args, out),
    }
}

fn build_image(host: &Host, args: &ImageBuildArgs, out: &Output) -> Outcome {
    let order = order(args)?;
    // One that runs has it locked.
    if args.force
        && let Some((name, how)) = of_vm_at_rest(host, &args.output)
    {
        return Err(Failure(format!(
            "{} is a disk of VM '{name}', which is {how} and could not be continued without it: name another file, or give the VM up with `hebe drop {name} --yes`",
            args.output.display()
        )));
    }
    let stop = interrupt::noted().map_err(|e| Failure(format!("cannot watch for Ctrl-C: {e}")))?;
    let watch = Watch {
        say: &|text| out.progress(text),
        stop,
    };
    let built = build::build(&order, &args.output, args.force, watch);
    let built = built.map_err(|e| Failure(with_causes(&e)))?;
    let boots = built.boots.unwrap_or_default();
    let done = Done {
        path: &args.output,
        format: match order.format {
            Format::Raw => "raw",
            Format::Qcow2 => "qcow2",
        },
        suite: &order.suite,
        hostname: &order.hostname,
        size: built.size,
        allocated: built.allocated,
        kernel: boots.kernel,
        initrd: boots.initrd,
        cmdline: &boots.cmdline,
    };
    out.answer(&done, || {
        format!(
            "{}: Debian {}, a disk of {} MiB in {} MiB, boots '{}'",
            done.path.display(),
            done.suite,
            done.size >> 20,
            done.allocated.div_ceil(1 << 20),
            done.cmdline
        )
    });
    Ok(Exit::Done)
}

fn with_causes(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |e| e.source());
    causes.fold(error.to_string(), |text, cause| {
        let more = cause.to_string();
        match text.ends_with(&more) {
            true => text,
            false => format!("{text}: {more}"),
        }
    })
}

/// What the flags ask for.
fn order(args: &ImageBuildArgs) -> Result<Order, Failure> {
    let release = fs::read_to_string("/etc/os-release").unwrap_or_default();
    let own = codename(&release);
    let suite = match (&args.suite, &own) {
        (Some(suite), _) => suite.clone(),
        (None, Some(own)) => own.clone(),
        (None, None) => {
            return Err(Failure(
                "this machine is no Debian: say which one, as in --suite trixie --mirror URI"
                    .into(),
            ));
        }
    };
    let qcow2 = args.output.extension().is_some_and(|e| e == "qcow2");
    let format = match (args.format, qcow2) {
        (Some(ImageFormat::Raw), true) => {
            return Err(Failure(
                "`hebe run` takes a file whose name ends in .qcow2 for a qcow2 image: call a raw one otherwise".into(),
            ));
        }
        (Some(ImageFormat::Qcow2), _) | (None, true) => Format::Qcow2,
        _ => Format::Raw,
    };
    let mut order = Order {
        sources: sources(args, own.as_deref(), &suite)?,
        suite,
        kernel: Some(args.kernel_package.clone()),
        packages: args.include.clone(),
        size: args.size.bytes(),
        hostname: args
            .hostname
            .clone()
            .unwrap_or_else(|| hostname(&args.output)),
        cmdline: args.cmdline.clone(),
        dhcp: true,
        autologin: args.autologin,
        format,
        ..Order::default()
    };
    for file in &args.ssh_key {
        let text = String::from_utf8_lossy(&super::seed::read(file)?).into_owned();
        let keys = Seed::keys_in(&text);
        let keys = keys.map_err(|e| Failure(format!("{}: {e}", file.display())))?;
        order.ssh_keys.extend(keys);
    }
    for copy in &args.copy {
        order.files.push(copied(copy)?);
    }
    if let Some(program) = &args.agent {
        agent(program.clone(), &mut order)?;
    }
    Ok(order)
}

/// Code name of a Debian, from os-release(5).
fn codename(release: &str) -> Option<String> {
    let field = |name: &str| {
        let value = release
            .lines()
            .find_map(|l| l.strip_prefix(name)?.strip_prefix('='));
        value
            .map(|v| v.trim().trim_matches('"').to_owned())
            .unwrap_or_default()
    };
    let name = field("VERSION_CODENAME");
    (field("ID") == "debian" && !name.is_empty()).then_some(name)
}

fn sources(args: &ImageBuildArgs, own: Option<&str>, suite: &str) -> Result<Vec<Source>, Failure> {
    if let Some(mirror) = &args.mirror {
        let uri_ok =
            mirror.contains(':') && !mirror.contains(|c: char| c.is_whitespace() || c.is_control());
        if !uri_ok {
            return Err(Failure(format!("'{mirror}' is no address of a mirror")));
        }
        let signed = Path::new(KEYRING)
            .exists()
            .then(|| ("Signed-By".to_owned(), KEYRING.to_owned()));
        let one = |text: &str| vec![text.to_owned()];
        return Ok(vec![Source {
            types: one("deb"),
            uris: one(mirror),
            suites: one(suite),
            components: one("main"),
            others: signed.into_iter().collect(),
        }]);
    }
    let all = sources::read_machine(Path::new("/etc/apt"));
    let all = all.map_err(|e| Failure(format!("cannot read apt's sources: {e}")))?;
    Ok(own
        .map(|own| sources::for_suite(&all, own, suite))
        .unwrap_or_default())
}

/// A host name out of a file's name.
fn hostname(output: &Path) -> String {
    let stem = output
        .file_stem()
        .unwrap_or_default()
        .to_string_lossy()
        .to_lowercase();
    let kept = |c: char| if c.is_ascii_alphanumeric() { c } else { '-' };
    let name: String = stem.chars().map(kept).take(63).collect();
    match name.trim_matches('-') {
        "" => "debian".to_owned(),
        name => name.to_owned(),
    }
}

/// `FILE:PATH`; a file may have a colon in its name, a path in an image not.
fn copied(text: &str) -> Result<FileIn, Failure> {
    let parts = text.rsplit_once(':');
    let Some((from, to)) = parts.filter(|(from, to)| !from.is_empty() && build::is_inside_path(to))
    else {
        return Err(Failure(format!(
            "--copy {text}: say FILE:PATH, with the whole path that the file has in the image"
        )));
    };
    file(Path::new(from), to)
}

fn file(from: &Path, to: &str) -> Result<FileIn, Failure> {
    let meta =
        fs::metadata(from).map_err(|e| Failure(format!("cannot read {}: {e}", from.display())))?;
    Ok(FileIn {
        to: to.to_owned(),
        mode: meta.permissions().mode() & 0o777,
        contents: Contents::Of(from.to_owned()),
    })
}

/// The agent and its units.
fn agent(program: Option<PathBuf>, order: &mut Order) -> Result<(), Failure> {
    let missing = || {
        Failure(
            "there is no hebe-agent beside hebe nor in PATH: say where, as in --agent=FILE".into(),
        )
    };
    let program = program.or_else(|| find("hebe-agent")).ok_or_else(missing)?;
    let program = FileIn {
        mode: 0o755,
        ..file(&program, "/usr/sbin/hebe-agent")?
    };
    order.files.push(program);
    for (name, text) in AGENT_UNITS {
        order
            .files
            .push(FileIn::text(&format!("/etc/systemd/system/{name}"), text));
        order.units.push(name.to_owned());
    }
    Ok(())
}

fn find(name: &str) -> Option<PathBuf> {
    let own = std::env::current_exe().ok();
    let beside = own.as_deref().and_then(Path::parent).map(Path::to_owned);
    let path = std::env::var_os("PATH").unwrap_or_default();
    let dirs = beside.into_iter().chain(std::env::split_paths(&path));
    dirs.map(|dir| dir.join(name)).find(|file| file.is_file())
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cli::{Cli, Command};

    fn args(line: &str) -> ImageBuildArgs {
        let words = ["hebe", "image", "build"]
            .into_iter()
            .chain(line.split_whitespace());
        match Cli::try_parse_from(words).expect("a good line").command {
            Command::Image(ImageCommand::Build(args)) => args,
            other => panic!("{other:?}"),
        }
    }

    fn ordered(line: &str) -> Result<Order, String> {
        order(&args(line)).map_err(|failure| failure.0)
    }

    #[test]
    fn flags_say_what_goes_in() {
        let line = "Web_1.qcow2 --suite trixie --mirror file:/m --include nginx-light,curl --include vim --size 4GiB --autologin";
        let order = ordered(line).expect("an order");
        assert_eq!(order.packages, ["nginx-light", "curl", "vim"]);
        assert_eq!((order.size, order.format), (4 << 30, Format::Qcow2));
        assert_eq!(
            (order.hostname.as_str(), order.suite.as_str()),
            ("web-1", "trixie")
        );
        assert_eq!(order.sources.len(), 1);
        assert!(
            order.sources[0]
                .to_deb822()
                .starts_with("Types: deb\nURIs: file:/m\nSuites: trixie\n")
        );
        assert!(order.autologin && order.dhcp && order.ssh_keys.is_empty());
    }

    #[test]
    fn files_are_copied_with_their_permissions_and_the_agent_with_its_units() {
        let dir = tempfile::tempdir().expect("dir");
        let tool = dir.path().join("to:ol");
        fs::write(&tool, "x").expect("written");
        fs::set_permissions(&tool, fs::Permissions::from_mode(0o4751)).expect("mode");
        let name = tool.display();
        let line =
            format!("d.img --mirror file:/m --suite s --copy {name}:/opt/tool --agent={name}");
        let order = ordered(&line).expect("an order");
        let found: Vec<(&str, u32)> = order
            .files
            .iter()
            .map(|f| (f.to.as_str(), f.mode))
            .collect();
        assert_eq!(
            found[..2],
            [("/opt/tool", 0o751), ("/usr/sbin/hebe-agent", 0o755)]
        );
        assert_eq!(
            order.units,
            ["hebe-agent.service", "hebe-agent-ready.service"]
        );
        assert!(AGENT_UNITS[0].1.contains("ExecStart=/usr/sbin/hebe-agent"));
    }

    #[test]
    fn what_cannot_be_meant_is_refused_with_a_sentence() {
        for (line, word) in [
            ("d.qcow2 --format raw --suite s --mirror file:/m", ".qcow2"),
            ("d.img --suite s --mirror nowhere", "mirror"),
            ("d.img --suite s --mirror file:/m --copy x", "FILE:PATH"),
            (
                "d.img --suite s --mirror file:/m --copy x:../y",
                "FILE:PATH",
            ),
            (
                "d.img --suite s --mirror file:/m --copy /no/such:/y",
                "/no/such",
            ),
            (
                "d.img --suite s --mirror file:/m --ssh-key /no/key",
                "/no/key",
            ),
            (
                "d.img --suite s --mirror file:/m --agent=/no/agent",
                "/no/agent",
            ),
        ] {
            let refused = ordered(line).expect_err(line);
            assert!(refused.contains(word), "{line}: {refused}");
        }
    }

    #[test]
    fn a_debian_is_known_by_its_code_name_and_a_name_by_its_file() {
        assert_eq!(
            codename("ID=debian\nVERSION_CODENAME=\"trixie\"\n"),
            Some("trixie".into())
        );
        assert_eq!(codename("ID=ubuntu\nVERSION_CODENAME=noble\n"), None);
        assert_eq!(hostname(Path::new("/x/Ä_.img")), "debian");
        assert_eq!(hostname(Path::new("db.1.raw")), "db-1");
    }
}
