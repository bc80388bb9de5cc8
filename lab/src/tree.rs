//! A Debian system as a tree of files, in which Debian's own programs run
//! without a machine around them: in namespaces of their own, with no device
//! but a few that are memory.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use hebe_image::build::{apt_options, sources};

use crate::apt::{self, Tool};
use crate::assets::Assets;
use crate::progress::Progress;
use crate::system;

/// Lines of a script's own words that a failure shows.
const SHOWN_LINES: usize = 25;

/// Unpacks the archive `$2` in the folder `$1` and runs the script `$3` in it.
const ENTER: &str = r#"
set -eu
# Devices belong to a machine, and no user can make them.
tar --extract --file="$2" --directory="$1" --numeric-owner --exclude='./dev/*'
# The root of a file system, as programs in it expect.
mount --bind "$1" "$1"
cd "$1"
mount -t proc proc proc
mount -t tmpfs -o mode=755 dev dev
for node in null zero full random urandom; do
    : > "dev/$node"
    mount --bind "/dev/$node" "dev/$node"
done
ln -s /proc/self/fd dev/fd
ln -s /proc/self/fd/0 dev/stdin
ln -s /proc/self/fd/1 dev/stdout
ln -s /proc/self/fd/2 dev/stderr
exec env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root \
    LC_ALL=C.UTF-8 DEBIAN_FRONTEND=noninteractive chroot . /bin/sh "$3"
"#;

/// A tree in the cache, as an archive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tree {
    archive: PathBuf,
}

impl Tree {
    /// Debian's smallest system with these packages, made at first use.
    pub fn cached(
        assets: &Assets,
        suite: &str,
        packages: &[&str],
        progress: &dyn Progress,
    ) -> Result<Self> {
        let all = packages.join(",");
        let name = format!("tree-{suite}-{:08x}", system::number_of(&all));
        let file = |dir: &Path| dir.join("tree.tar");
        let fill = |dir: &Path| {
            let tool = Tool {
                program: "mmdebstrap",
                package: "mmdebstrap",
            };
            apt::ensure_tools(&[tool], progress)?;
            progress.step(&format!("a tree of {suite} with {all}"));
            let from = system::apt_sources(assets, suite)?;
            make(suite, &all, &from, dir, &file(dir))
        };
        let dir = assets.filled(&name, progress, |dir| file(dir).is_file(), fill)?;
        Ok(Self {
            archive: file(&dir),
        })
    }

    /// Unpacks it in the empty folder `root`, with `files` (its own path, and
    /// what it is a copy of) beside what is there, and runs `script` in it. What
    /// the script wrote is left in `root`.
    pub fn run(&self, root: &Path, files: &[(&str, &Path)], script: &str) -> Result<()> {
        for (to, from) in files {
            let to = root.join(to.trim_start_matches('/'));
            std::fs::copy(from, &to)
                .with_context(|| format!("cannot copy {} into a tree", from.display()))?;
        }
        std::fs::write(root.join("script"), script).context("cannot write in a tree")?;
        let output = as_root("unshare")
            .args(["--mount", "--pid", "--fork", "--kill-child", "--"])
            .args(["sh", "-c", ENTER, "sh"])
            .arg(root)
            .arg(&self.archive)
            .arg("/script")
            .stdin(Stdio::null())
            .output()
            .context("cannot run unshare")?;
        if output.status.success() {
            return Ok(());
        }
        let said = [output.stdout, output.stderr].concat();
        let said = String::from_utf8_lossy(&said).into_owned();
        let lines: Vec<&str> = said.lines().collect();
        let last = lines[lines.len().saturating_sub(SHOWN_LINES)..].join("\n");
        bail!(
            "a script in a Debian tree ended with {}:\n{last}",
            output.status
        )
    }
}

/// Removes a folder in which a tree was unpacked.
pub fn remove(root: &Path) -> Result<()> {
    apt::run(as_root("rm").args(["-rf", "--one-file-system"]).arg(root)).map(drop)
}

/// As root, or as who is root among this user's subordinate ids.
fn as_root(program: &str) -> Command {
    if rustix::process::geteuid().is_root() {
        return Command::new(program);
    }
    let mut command = Command::new("unshare");
    command.args(["--map-root-user", "--map-auto", "--", program]);
    command
}

fn make(
    suite: &str,
    packages: &str,
    from: &[sources::Source],
    dir: &Path,
    archive: &Path,
) -> Result<()> {
    let texts: Vec<String> = from.iter().map(sources::Source::to_deb822).collect();
    let list = dir.join("debian.sources");
    std::fs::write(&list, texts.join("\n")).context("cannot write apt's sources")?;
    let mode = match rustix::process::geteuid().is_root() {
        true => "--mode=root",
        false => "--mode=unshare",
    };
    let mut command = Command::new("mmdebstrap");
    command.args(["--variant=minbase", "--format=tar", "--quiet", mode]);
    command.arg(format!("--include={packages}"));
    for option in apt_options() {
        command.arg(format!("--aptopt={option}"));
    }
    command.arg(suite).arg(archive).arg(&list);
    apt::run(command.current_dir("/")).map(drop)
}
