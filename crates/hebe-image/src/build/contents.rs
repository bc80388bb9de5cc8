//! What goes into an image: packages by mmdebstrap, and files of our own.
//!
//! Our files are gathered in two archives, which hooks of mmdebstrap unpack
//! *inside* the new root, so that no link in it leads out of it: `early` before
//! the packages (what their scripts read), `late` behind them.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use super::tool::{self, Rights};
use super::{BuildError, Order, Watch};
use crate::seed;

/// Packages of every image.
const BASE: [&str; 5] = ["systemd-sysv", "udev", "kmod", "iproute2", "dbus"];
/// What a kernel needs beside it.
const WITH_KERNEL: [&str; 3] = ["initramfs-tools", "zstd", "e2fsprogs"];
/// What stays out of packages: nobody reads manuals on a small server, and
/// licences stay.
const LEFT_OUT: [&str; 8] = [
    "path-exclude=/usr/share/doc/*",
    "path-include=/usr/share/doc/*/copyright",
    "path-exclude=/usr/share/man/*",
    "path-exclude=/usr/share/info/*",
    "path-exclude=/usr/share/lintian/*",
    "path-exclude=/usr/share/locale/*",
    "path-include=/usr/share/locale/locale.alias",
    "path-exclude=/usr/share/bug/*",
];
/// Largest file that is copied in, in bytes.
const FILE_MAX: u64 = 8 << 30;

/// A file to put into an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileIn {
    /// Its path in the image.
    pub to: String,
    /// Its permissions.
    pub mode: u32,
    /// What is in it.
    pub contents: Contents,
}

/// What is in a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Contents {
    /// These bytes.
    Bytes(Vec<u8>),
    /// What is in this file.
    Of(PathBuf),
}

impl FileIn {
    /// A file with text.
    pub fn text(to: &str, text: &str) -> Self {
        let contents = Contents::Bytes(text.as_bytes().to_vec());
        Self {
            to: to.to_owned(),
            mode: 0o644,
            contents,
        }
    }
}

/// Whether a path can only mean a place inside an image.
pub fn is_inside_path(path: &str) -> bool {
    let plain = |part: &str| !part.is_empty() && part != "." && part != "..";
    path.strip_prefix('/')
        .is_some_and(|rest| rest.split('/').all(plain))
        && !path.contains(char::is_control)
}

/// Whether a word is a package's name, perhaps with a version or a suite.
fn is_package(name: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "+-.:=~/_".contains(c);
    name.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '/' || c == '.')
        && name.chars().all(allowed)
}

/// Refuses what would be taken for something else on its way.
pub(super) fn check(order: &Order) -> Result<(), BuildError> {
    let wrong = |text: String| Err(BuildError::Wrong(text));
    let shown = crate::error::shown;
    let suite_ok = |c: char| c.is_ascii_alphanumeric() || "-._/".contains(c);
    if order.suite.is_empty() || order.suite.starts_with('-') || !order.suite.chars().all(suite_ok)
    {
        return wrong(format!("'{}' is no suite of Debian", shown(&order.suite)));
    }
    if let Some(name) = order
        .packages
        .iter()
        .chain(&order.kernel)
        .find(|name| !is_package(name))
    {
        return wrong(format!("'{}' is no name of a package", shown(name)));
    }
    seed::check_hostname(&order.hostname).map_err(|e| BuildError::Wrong(e.to_string()))?;
    let keys = order
        .ssh_keys
        .iter()
        .try_for_each(|key| seed::check_key(key));
    keys.map_err(|e| BuildError::Wrong(e.to_string()))?;
    if order
        .cmdline
        .contains(|c: char| c.is_control() || "\"'$\\`;{}".contains(c))
    {
        return wrong(
            "a command line with quotes, or with what GRUB reads, is not written into an image"
                .to_owned(),
        );
    }
    let places = order
        .files
        .iter()
        .map(|f| &f.to)
        .chain(order.links.iter().map(|(to, _)| to));
    for to in places {
        if !is_inside_path(to) {
            return wrong(format!(
                "'{}' is no path in an image: it begins with / and has no . or ..",
                shown(to)
            ));
        }
    }
    let unit_ok = |c: char| c.is_ascii_alphanumeric() || "-._@:".contains(c);
    match order
        .units
        .iter()
        .find(|u| u.starts_with('-') || !u.chars().all(unit_ok))
    {
        Some(unit) => wrong(format!("'{}' is no name of a unit", shown(unit))),
        None => Ok(()),
    }
}

/// GRUB's configuration, without GRUB: the links are those that Debian's
/// kernel packages keep, so a kernel that the guest installs is the next one.
pub(super) fn grub_cfg(uuid: &str, hostname: &str, cmdline: &str) -> String {
    format!(
        "# Read by the host that boots this disk; no GRUB is installed.\n\
         # /vmlinuz and /initrd.img are kept by the kernel's packages.\n\
         set default=0\n\
         search --no-floppy --fs-uuid --set=root {uuid}\n\
         menuentry 'Debian GNU/Linux ({hostname})' --id debian {{\n\
         \tlinux /vmlinuz {}\n\
         \tinitrd /initrd.img\n\
         }}\n",
        format!("root=UUID={uuid} ro {cmdline}").trim_end()
    )
}

const NETWORK: &str = "[Match]\nName=en* eth*\n\n[Network]\nDHCP=yes\n\n\
    # The lease is the card's, whoever boots from a copy of this disk.\n\
    [DHCPv4]\nClientIdentifier=mac\n";
const AUTOLOGIN: &str = "[Service]\nExecStart=\n\
    ExecStart=-/sbin/agetty --autologin root --keep-baud 115200,57600,38400,9600 - $TERM\n";
const SSH_KEYS: &str = "[Service]\nExecStartPre=\nExecStartPre=/usr/bin/ssh-keygen -A\n\
    ExecStartPre=/usr/sbin/sshd -t\n";

/// What packages' scripts read.
fn early(order: &Order) -> Vec<FileIn> {
    if order.kernel.is_none() {
        return Vec::new();
    }
    vec![
        FileIn::text(
            "/etc/kernel-img.conf",
            "do_symlinks = yes\ndo_initrd = yes\n",
        ),
        // A guest's devices are known: a small initrd, which is quick to unpack.
        FileIn::text(
            "/etc/initramfs-tools/conf.d/hebe",
            "MODULES=list\nCOMPRESS=zstd\n",
        ),
        FileIn::text(
            "/usr/share/initramfs-tools/modules.d/hebe",
            "virtio_pci\nvirtio_blk\next4\ncrc32c_generic\n",
        ),
    ]
}

/// What is put in behind the packages.
fn late(order: &Order, uuid: &str) -> Vec<FileIn> {
    let mut files = vec![
        FileIn::text("/etc/hostname", &format!("{}\n", order.hostname)),
        FileIn::text(
            "/etc/hosts",
            &format!(
                "127.0.0.1 localhost\n::1 localhost\n127.0.1.1 {}\n",
                order.hostname
            ),
        ),
        FileIn::text(
            "/etc/fstab",
            &format!("UUID={uuid} / ext4 errors=remount-ro 0 1\n"),
        ),
        // Each copy finds a name of its own.
        FileIn::text("/etc/machine-id", ""),
    ];
    if order.kernel.is_some() {
        let cfg = grub_cfg(uuid, &order.hostname, &order.cmdline);
        files.push(FileIn::text("/boot/grub/grub.cfg", &cfg));
    }
    if order.dhcp {
        files.push(FileIn::text(
            "/etc/systemd/network/80-dhcp.network",
            NETWORK,
        ));
    }
    if order.autologin {
        let path = "/etc/systemd/system/serial-getty@ttyS0.service.d/autologin.conf";
        files.push(FileIn::text(path, AUTOLOGIN));
    }
    if !order.ssh_keys.is_empty() {
        let mut keys = FileIn::text(
            "/root/.ssh/authorized_keys",
            &(order.ssh_keys.join("\n") + "\n"),
        );
        keys.mode = 0o600;
        files.push(keys);
    }
    if order.has_ssh() {
        files.push(FileIn::text(
            "/etc/systemd/system/ssh.service.d/keys.conf",
            SSH_KEYS,
        ));
    }
    files
}

impl Order {
    fn has_ssh(&self) -> bool {
        !self.ssh_keys.is_empty() || self.packages.iter().any(|p| p == "openssh-server")
    }

    fn all_packages(&self) -> Vec<&str> {
        let mut all: Vec<&str> = BASE.to_vec();
        if let Some(kernel) = &self.kernel {
            all.push(kernel);
            all.extend(WITH_KERNEL);
        }
        if self.dhcp {
            all.push("systemd-resolved");
        }
        if self.has_ssh() {
            all.push("openssh-server");
        }
        all.extend(self.packages.iter().map(String::as_str));
        all
    }

    fn all_units(&self) -> Vec<&str> {
        let dhcp: &[&str] = match self.dhcp {
            true => &["systemd-networkd.service", "systemd-resolved.service"],
            false => &[],
        };
        dhcp.iter()
            .copied()
            .chain(self.units.iter().map(String::as_str))
            .collect()
    }
}

/// Writes what mmdebstrap is given into the work folder.
pub(super) fn write(order: &Order, work: &Path, watch: Watch) -> Result<(), BuildError> {
    let failed = |e| BuildError::io("cannot write in", work, e);
    let uuid = tool::uuid(tool::random_id()?);
    fs::write(work.join("uuid"), &uuid).map_err(failed)?;
    let sources: Vec<String> = order.sources.iter().map(|s| s.to_deb822()).collect();
    fs::write(work.join("debian.sources"), sources.join("\n")).map_err(failed)?;
    archive(work, "early", &early(order), &[], watch)?;
    let files = [late(order, &uuid), order.files.clone()].concat();
    archive(work, "late", &files, &order.links, watch)?;
    Ok(())
}

/// The hooks of mmdebstrap around one archive: it is handed in, unpacked inside
/// the new root, and `more` is done then.
fn hooks(kind: &str, work: &Path, name: &str, more: &str) -> [String; 2] {
    let archive = work.join(format!("{name}.tar"));
    let inside = format!("/hebe-{name}.tar");
    [
        format!(
            "--{kind}-hook=upload {} {inside}",
            quoted(&archive.to_string_lossy())
        ),
        format!(
            "--{kind}-hook=set -eu; root=$1; chroot \"$root\" tar --extract --no-overwrite-dir --keep-directory-symlink --no-same-owner --file={inside}; rm \"$root\"{inside}; {more}"
        ),
    ]
}

/// What is done inside behind everything else.
fn last_words(order: &Order) -> String {
    let units = order.all_units();
    let enable = match units.is_empty() {
        true => String::new(),
        false => format!("chroot \"$root\" systemctl enable {}; ", units.join(" ")),
    };
    // What one machine has for itself, and what was only for the making of it.
    enable
        + "rm -f \"$root\"/etc/ssh/ssh_host_* \"$root\"/etc/apt/apt.conf.d/99mmdebstrap; \
           rm -rf \"$root\"/var/log/apt \"$root\"/var/log/*.log \"$root\"/var/cache/debconf/*-old"
}

/// Makes `NAME.tar` out of files and links.
fn archive(
    work: &Path,
    name: &str,
    files: &[FileIn],
    links: &[(String, String)],
    watch: Watch,
) -> Result<(), BuildError> {
    let tree = work.join(name);
    folders(&tree).map_err(|e| BuildError::io("cannot create", &tree, e))?;
    let parent = |path: &Path| path.parent().map_or(Ok(()), folders);
    for file in files {
        let to = tree.join(file.to.trim_start_matches('/'));
        let failed = |e| BuildError::io("cannot write", &to, e);
        parent(&to).map_err(failed)?;
        match &file.contents {
            Contents::Bytes(bytes) => fs::write(&to, bytes).map_err(failed)?,
            Contents::Of(from) => copy(from, &to)?,
        }
        fs::set_permissions(&to, fs::Permissions::from_mode(file.mode)).map_err(failed)?;
    }
    for (at, target) in links {
        let to = tree.join(at.trim_start_matches('/'));
        let failed = |e| BuildError::io("cannot write", &to, e);
        parent(&to).map_err(failed)?;
        symlink(target, &to).map_err(failed)?;
    }
    let mut command = Command::new("tar");
    command.args([
        "--create",
        "--sparse",
        "--owner=0",
        "--group=0",
        "--numeric-owner",
    ]);
    command.arg("--file").arg(work.join(format!("{name}.tar")));
    command.arg("--directory").arg(&tree).arg(".");
    tool::run("tar", &mut command, watch.silently())
}

/// Makes a folder and those above it, open to everybody whatever this process's
/// mask says.
fn folders(path: &Path) -> io::Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    path.parent().map_or(Ok(()), folders)?;
    fs::create_dir(path)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o755))
}

fn copy(from: &Path, to: &Path) -> Result<(), BuildError> {
    let failed = |e| BuildError::io("cannot read", from, e);
    let meta = fs::metadata(from).map_err(failed)?;
    if !meta.is_file() {
        let text = format!("{} is no file: name each file to copy", from.display());
        return Err(BuildError::Wrong(text));
    }
    let reader = File::open(from).map_err(failed)?;
    let mut writer = File::create(to).map_err(|e| BuildError::io("cannot write", to, e))?;
    io::copy(&mut reader.take(FILE_MAX), &mut writer)
        .map(drop)
        .map_err(failed)
}

/// Runs mmdebstrap.
pub(super) fn unpack(
    order: &Order,
    rights: Rights,
    work: &Path,
    watch: Watch,
) -> Result<(), BuildError> {
    // It gets its rights by itself.
    let mut command = Rights::Root.command("mmdebstrap");
    command.arg("--variant=minbase").args(rights.mmdebstrap());
    command.arg(format!("--include={}", order.all_packages().join(",")));
    for option in LEFT_OUT {
        command.arg(format!("--dpkgopt={option}"));
    }
    for option in apt_options() {
        command.arg(format!("--aptopt={option}"));
    }
    command.args(hooks("essential", work, "early", "true"));
    command.args(hooks("customize", work, "late", &last_words(order)));
    let target = match rights {
        Rights::Root => work.join("root"),
        Rights::Mapped => work.join("root.tar"),
    };
    command
        .arg(&order.suite)
        .arg(&target)
        .arg(work.join("debian.sources"));
    command.current_dir("/");
    let tell = |line: &str| {
        if let Some(line) = line.strip_prefix("I: ")
            && !["running --", "running special", "using "]
                .iter()
                .any(|w| line.starts_with(w))
        {
            (watch.say)(line.trim_end_matches("..."));
        }
    };
    let watch = Watch {
        say: &tell,
        ..watch
    };
    tool::run("mmdebstrap", &mut command, watch)?;
    match rights {
        Rights::Root => Ok(()),
        Rights::Mapped => {
            (watch.say)("unpacking what root is to own");
            tool::extract(rights, &target, &work.join("root"), watch.silently())
        }
    }
}

fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', "'\\''"))
}

/// How this machine reaches its sources: proxies, and whether it believes old
/// lists.
pub fn apt_options() -> Vec<String> {
    let dump = Command::new("apt-config")
        .args(["dump", "--format", "%F \"%v\";%n", "Acquire"])
        .output();
    let text = dump
        .map(|o| String::from_utf8_lossy(&o.stdout).into_owned())
        .unwrap_or_default();
    kept_options(&text)
}

fn kept_options(dump: &str) -> Vec<String> {
    let kept = |line: &&str| {
        let name = line
            .split(' ')
            .next()
            .unwrap_or_default()
            .to_ascii_lowercase();
        name.starts_with("acquire::")
            && (name.contains("::proxy") || name.starts_with("acquire::check-"))
            && !line.ends_with(" \"\";")
    };
    let mut options: Vec<String> = dump.lines().filter(kept).map(str::to_owned).collect();
    // The folder of the build may be closed to the user that apt else takes.
    options.push("APT::Sandbox::User \"root\";".to_owned());
    options
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;

    use super::*;

    #[test]
    fn files_are_handed_over_as_roots_whatever_this_process_is() {
        let dir = tempfile::tempdir().expect("dir");
        let secret = FileIn {
            mode: 0o600,
            ..FileIn::text("/root/.ssh/authorized_keys", "key")
        };
        let links = [(
            "/etc/systemd/system/x.timer".to_owned(),
            "/dev/null".to_owned(),
        )];
        let stop = AtomicBool::new(false);
        let watch = Watch {
            say: &|_| {},
            stop: &stop,
        };
        archive(dir.path(), "late", &[secret], &links, watch).expect("an archive");
        let listed = Command::new("tar")
            .args(["--list", "--verbose", "--numeric-owner", "--file"])
            .arg(dir.path().join("late.tar"))
            .output()
            .expect("tar");
        let text = String::from_utf8_lossy(&listed.stdout).into_owned();
        let has = |begin: &str, end: &str| {
            text.lines()
                .any(|l| l.starts_with(begin) && l.ends_with(end))
        };
        assert!(
            has("-rw------- 0/0", "./root/.ssh/authorized_keys"),
            "{text}"
        );
        assert!(
            has(
                "lrwxrwxrwx 0/0",
                "./etc/systemd/system/x.timer -> /dev/null"
            ),
            "{text}"
        );
        assert!(has("drwxr-xr-x 0/0", "./root/.ssh/"), "{text}");
    }

    #[test]
    fn an_absent_file_is_named() {
        let dir = tempfile::tempdir().expect("dir");
        let to = dir.path().join("to");
        for (from, word) in [("/no/such", "/no/such"), ("/usr", "each file")] {
            let refused = copy(Path::new(from), &to).expect_err("no file").to_string();
            assert!(refused.contains(word), "{refused}");
        }
    }

    #[test]
    fn proxies_of_this_machine_are_passed_on_and_no_more() {
        let dump = "Acquire::http::Proxy \"http://p:3\";\nAcquire::http::Timeout \"9\";\n\
                    Acquire::https::Proxy \"\";\nAcquire::Check-Valid-Until \"false\";\n";
        let kept = kept_options(dump);
        assert_eq!(
            kept[..2],
            [
                "Acquire::http::Proxy \"http://p:3\";",
                "Acquire::Check-Valid-Until \"false\";"
            ]
        );
        assert_eq!(kept.len(), 3);
    }

    #[test]
    fn paths_in_an_image_lead_nowhere_else() {
        for good in ["/a", "/etc/systemd/system/a@b.service", "/a b"] {
            assert!(is_inside_path(good), "{good}");
        }
        for bad in ["", "/", "a", "/a/", "//a", "/../a", "/a/./b", "/a\n"] {
            assert!(!is_inside_path(bad), "{bad:?}");
        }
    }
}
