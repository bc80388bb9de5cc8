//! `cargo xtask deb`: a Debian package, by `dpkg-deb` from a staged tree.
//!
//! The programs are linked statically, so the package depends on no library.
//! Manual pages and completions come from the program itself. Everything in it
//! has the time of the last commit, so that the same tree gives the same
//! package (with the same compiler, at the same place).

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use lab::binaries::workspace_root;
use lab::progress::Progress;
use serde_json::Value;

/// What is packed.
const PROGRAMS: [&str; 3] = ["hebe", "hebe-vmm", "hebed"];
/// The target, named so that proc macros are built without its flags.
const TARGET: &str = "x86_64-unknown-linux-gnu";
const UNITS: [&str; 7] = [
    "hebe.slice",
    "hebe-freeze.service",
    "hebe-modules.service",
    "hebe-resume.service",
    "hebe-fleet-release.service",
    "hebed.service",
    "hebed.socket",
];
const MAINTAINER: &str = "The Hebe developers <hebe@localhost>";
const SYSTEM_UNITS: &str = "lib/systemd/system";

/// What to pack.
#[derive(Args)]
pub struct DebArgs {
    /// Where to write the package.
    #[arg(long, value_name = "DIR", default_value = "target/deb")]
    out: PathBuf,
    /// Programs that are built already, instead of building them.
    #[arg(long, value_name = "DIR")]
    binaries: Option<PathBuf>,
}

/// Builds the programs and the package.
pub fn run(args: &DebArgs, progress: &dyn Progress) -> Result<ExitCode> {
    let built = match &args.binaries {
        Some(dir) => dir.clone(),
        None => {
            progress.step("building the programs");
            build()?
        }
    };
    progress.step("packing");
    let package = pack(&built, &workspace_root().join(&args.out))?;
    println!("{}", package.display());
    Ok(ExitCode::SUCCESS)
}

fn build() -> Result<PathBuf> {
    let root = workspace_root();
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let target = root.join("target/package");
    // Paths of this checkout and of cargo's folder are no part of a program.
    let home = std::env::var("CARGO_HOME").unwrap_or_else(|_| {
        let home = std::env::var("HOME").unwrap_or_default();
        format!("{home}/.cargo")
    });
    let flags = format!(
        "-C target-feature=+crt-static --remap-path-prefix={}=/hebe --remap-path-prefix={home}=/cargo",
        root.display()
    );
    let mut command = Command::new(cargo);
    command.current_dir(&root).env("RUSTFLAGS", flags);
    command.env_remove("CARGO_ENCODED_RUSTFLAGS");
    command.args([
        "build",
        "--release",
        "--locked",
        "--quiet",
        "--target",
        TARGET,
    ]);
    command.arg("--target-dir").arg(&target);
    for program in PROGRAMS {
        command.args(["--package", program]);
    }
    command.args(["--config", "profile.release.strip=true"]);
    let status = command.status().context("cannot run cargo")?;
    ensure!(status.success(), "the programs do not build");
    Ok(target.join(TARGET).join("release"))
}

/// Packs the programs in `built`; the package's path.
pub fn pack(built: &Path, out: &Path) -> Result<PathBuf> {
    let root = workspace_root();
    fs::create_dir_all(out).with_context(|| format!("cannot make {}", out.display()))?;
    let tree = Tree::new(out.join("tree"))?;
    for program in PROGRAMS {
        tree.copy(&built.join(program), &format!("usr/bin/{program}"), 0o755)?;
    }
    let packaging = root.join("packaging");
    for unit in UNITS {
        tree.copy(
            &packaging.join(unit),
            &format!("{SYSTEM_UNITS}/{unit}"),
            0o644,
        )?;
    }
    let deb = packaging.join("deb");
    for (from, to, mode) in [
        (
            "hebed-group.conf",
            "lib/systemd/system/hebed.socket.d/group.conf",
            0o644,
        ),
        ("hebe.sysusers", "usr/lib/sysusers.d/hebe.conf", 0o644),
        ("hebe.tmpfiles", "usr/lib/tmpfiles.d/hebe.conf", 0o644),
        ("host.toml", "etc/hebe/host.toml", 0o644),
        ("hebe-vmm.8", "usr/share/man/man8/hebe-vmm.8", 0o644),
        (
            "hebe.lintian-overrides",
            "usr/share/lintian/overrides/hebe",
            0o644,
        ),
        (
            "initramfs-hook",
            "usr/share/initramfs-tools/hooks/hebe",
            0o755,
        ),
        ("postinst", "DEBIAN/postinst", 0o755),
        ("prerm", "DEBIAN/prerm", 0o755),
        ("postrm", "DEBIAN/postrm", 0o755),
        ("triggers", "DEBIAN/triggers", 0o644),
    ] {
        tree.copy(&deb.join(from), to, mode)?;
    }
    tree.write("DEBIAN/conffiles", "/etc/hebe/host.toml\n")?;
    from_the_programs(&tree, built)?;
    documents(&tree, &root)?;
    let version = env!("CARGO_PKG_VERSION");
    tree.sums()?;
    tree.write("DEBIAN/control", &control(version, tree.kib()?))?;
    let package = out.join(format!("hebe_{version}_amd64.deb"));
    tree.pack(&package, &commit_time(&root, "%ct")?)?;
    Ok(package)
}

/// Manual pages and completions, from the definitions of the command lines.
fn from_the_programs(tree: &Tree, built: &Path) -> Result<()> {
    let hebe = &built.join("hebe");
    let daemon = Command::new(built.join("hebed"))
        .arg("--manual-page")
        .output();
    let daemon = daemon.context("cannot run hebed")?;
    ensure!(daemon.status.success(), "no manual page of hebed");
    let page = String::from_utf8(daemon.stdout)?;
    tree.write("usr/share/man/man8/hebed.8", &page)?;
    for page in files(&tree.dir("usr/share/man/man8")?)? {
        gzip(&page)?;
    }
    let man = tree.dir("usr/share/man/man1")?;
    let made = Command::new(hebe)
        .args(["man", "--dir"])
        .arg(&man)
        .stderr(Stdio::null())
        .status();
    ensure!(
        made.context("cannot run hebe")?.success(),
        "no manual pages"
    );
    for page in files(&man)? {
        gzip(&page)?;
    }
    for (program, order) in [("hebe", "completions"), ("hebed", "--completions")] {
        for (shell, to) in [
            (
                "bash",
                format!("usr/share/bash-completion/completions/{program}"),
            ),
            (
                "zsh",
                format!("usr/share/zsh/vendor-completions/_{program}"),
            ),
            (
                "fish",
                format!("usr/share/fish/vendor_completions.d/{program}.fish"),
            ),
        ] {
            let output = Command::new(built.join(program))
                .args([order, shell])
                .output()?;
            ensure!(
                output.status.success(),
                "no completions of {program} for {shell}"
            );
            tree.write(&to, &String::from_utf8(output.stdout)?)?;
        }
    }
    Ok(())
}

fn documents(tree: &Tree, root: &Path) -> Result<()> {
    let doc = "usr/share/doc/hebe";
    let mut copyright = fs::read_to_string(root.join("packaging/deb/copyright"))?;
    copyright.push_str(&fs::read_to_string(root.join("LICENSE-MIT"))?);
    tree.write(&format!("{doc}/copyright"), &copyright)?;
    for name in ["README.md", "SPECIFICATION.md"] {
        tree.copy(&root.join(name), &format!("{doc}/{name}"), 0o644)?;
    }
    for page in files(&root.join("docs"))? {
        let name = page
            .file_name()
            .context("a name")?
            .to_string_lossy()
            .into_owned();
        tree.copy(&page, &format!("{doc}/docs/{name}"), 0o644)?;
    }
    let changes = format!("{doc}/CHANGELOG.md");
    tree.copy(&root.join("CHANGELOG.md"), &changes, 0o644)?;
    gzip(&tree.root.join(changes))?;
    let changelog = format!("{doc}/changelog");
    tree.write(&changelog, &debian_changelog(&commit_time(root, "%cD")?))?;
    gzip(&tree.root.join(changelog))?;
    let third = format!("{doc}/THIRD-PARTY");
    tree.write(&third, &third_party(root)?)?;
    gzip(&tree.root.join(third))
}

/// The licences of everything that is linked into the programs: each text once,
/// with the packages that it is of.
fn third_party(root: &Path) -> Result<String> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .current_dir(root)
        .args([
            "metadata",
            "--format-version",
            "1",
            "--locked",
            "--filter-platform",
            TARGET,
        ])
        .output()
        .context("cannot run cargo metadata")?;
    ensure!(output.status.success(), "cargo metadata failed");
    let metadata: Value = serde_json::from_slice(&output.stdout)?;
    let mut list = String::from("Libraries in hebe, hebe-vmm and hebed, and their licences.\n\n");
    let mut texts: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for package in linked(&metadata)? {
        let text = |key: &str| package[key].as_str().unwrap_or_default();
        let name = format!("{} {}", text("name"), text("version"));
        list.push_str(&format!("{name}: {}\n", text("license")));
        let folder = Path::new(text("manifest_path"))
            .parent()
            .context("a folder")?;
        for file in files(folder)? {
            let file_name = file
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .to_uppercase();
            if ["LICEN", "COPYING", "NOTICE", "COPYRIGHT"]
                .iter()
                .any(|w| file_name.starts_with(w))
            {
                let words = String::from_utf8_lossy(&fs::read(&file)?).into_owned();
                texts.entry(words).or_default().push(name.clone());
            }
        }
    }
    let mut of: Vec<(Vec<String>, String)> = texts.into_iter().map(|(t, n)| (n, t)).collect();
    of.sort();
    for (names, text) in of {
        list.push_str(&format!(
            "\n{}\n{}\n\n{text}\n",
            "-".repeat(72),
            names.join(", ")
        ));
    }
    Ok(list)
}

/// Packages from elsewhere that the programs need to run.
fn linked(metadata: &Value) -> Result<Vec<&Value>> {
    let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let nodes = list(&metadata["resolve"]["nodes"]);
    let packages = metadata["packages"].as_array().context("no packages")?;
    let is_ours = |p: &&Value| p["source"].is_null();
    let mut open: Vec<String> = packages
        .iter()
        .filter(is_ours)
        .filter(|p| PROGRAMS.iter().any(|name| p["name"] == **name))
        .filter_map(|p| Some(p["id"].as_str()?.to_owned()))
        .collect();
    ensure!(open.len() == PROGRAMS.len(), "a program is no package");
    let mut seen: Vec<String> = Vec::new();
    while let Some(id) = open.pop() {
        if seen.contains(&id) {
            continue;
        }
        let node = nodes.iter().find(|n| n["id"] == id.as_str());
        for dep in node.map(|n| list(&n["deps"])).unwrap_or_default() {
            // What only builds or tests is in no program.
            let linked = list(&dep["dep_kinds"]).iter().any(|k| k["kind"].is_null());
            if let (true, Some(id)) = (linked, dep["pkg"].as_str()) {
                open.push(id.to_owned());
            }
        }
        seen.push(id);
    }
    let foreign = packages.iter().filter(|p| !is_ours(p));
    let mut found: Vec<&Value> = foreign
        .filter(|p| {
            p["id"]
                .as_str()
                .is_some_and(|id| seen.iter().any(|s| s == id))
        })
        .collect();
    found.sort_by_key(|p| (p["name"].to_string(), p["version"].to_string()));
    Ok(found)
}

/// What Debian's tools read of a package's history.
fn debian_changelog(date: &str) -> String {
    let version = env!("CARGO_PKG_VERSION");
    format!(
        "hebe ({version}) unstable; urgency=medium\n\n  * What changed stands in CHANGELOG.md.gz beside this file.\n\n -- {MAINTAINER}  {date}\n"
    )
}

fn control(version: &str, kib: u64) -> String {
    format!(
        "Package: hebe
Version: {version}
Architecture: amd64
Maintainer: {MAINTAINER}
Installed-Size: {kib}
Pre-Depends: init-system-helpers (>= 1.54~)
Recommends: systemd (>= 252), kmod, nftables
Suggests: initramfs-tools, grub2-common, mmdebstrap, passt
Section: admin
Priority: optional
Description: keeps VMs alive under a new host kernel
 Hebe runs KVM virtual machines and puts a new host kernel under them: their
 memory stays where it is while the host is rebooted by kexec.
 .
 This package has the command hebe, the VMM, the daemon hebed, and units that
 keep VMs over whatever systemd does to the host.
"
    )
}

/// The time that everything in the package bears, in a format of `git log`.
fn commit_time(root: &Path, format: &str) -> Result<String> {
    let output = Command::new("git")
        .current_dir(root)
        .args(["log", "-1", &format!("--format={format}")])
        .output()
        .context("cannot run git")?;
    let text = String::from_utf8(output.stdout)?.trim().to_owned();
    ensure!(
        output.status.success() && !text.is_empty(),
        "this is no checkout of git"
    );
    Ok(text)
}

fn files(dir: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(dir).with_context(|| format!("cannot read {}", dir.display()))?;
    let mut found = Vec::new();
    for entry in entries {
        let path = entry?.path();
        if path.is_file() {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

/// Without name and time, which differ from one run to the next.
fn gzip(path: &Path) -> Result<()> {
    let status = Command::new("gzip").args(["-9nf"]).arg(path).status();
    ensure!(status.context("cannot run gzip")?.success(), "gzip failed");
    Ok(())
}

/// The tree that is packed.
struct Tree {
    root: PathBuf,
}

impl Tree {
    fn new(root: PathBuf) -> Result<Self> {
        if root.exists() {
            fs::remove_dir_all(&root).context("cannot remove the last tree")?;
        }
        fs::create_dir_all(root.join("DEBIAN"))?;
        fs::set_permissions(&root, fs::Permissions::from_mode(0o755))?;
        Ok(Self { root })
    }

    fn dir(&self, at: &str) -> Result<PathBuf> {
        let path = self.root.join(at);
        fs::create_dir_all(&path).with_context(|| format!("cannot make {}", path.display()))?;
        Ok(path)
    }

    fn place(&self, at: &str) -> Result<PathBuf> {
        let path = self.root.join(at);
        let parent = path.parent().context("a file in a folder")?;
        fs::create_dir_all(parent)?;
        Ok(path)
    }

    fn copy(&self, from: &Path, at: &str, mode: u32) -> Result<()> {
        let to = self.place(at)?;
        fs::copy(from, &to).with_context(|| format!("cannot copy {}", from.display()))?;
        Ok(fs::set_permissions(&to, fs::Permissions::from_mode(mode))?)
    }

    fn write(&self, at: &str, text: &str) -> Result<()> {
        let to = self.place(at)?;
        fs::write(&to, text)?;
        Ok(fs::set_permissions(&to, fs::Permissions::from_mode(0o644))?)
    }

    /// Every file that is installed, by its path.
    fn installed(&self) -> Result<Vec<PathBuf>> {
        let mut open = vec![self.root.clone()];
        let mut found = Vec::new();
        while let Some(dir) = open.pop() {
            for entry in fs::read_dir(&dir)? {
                let path = entry?.path();
                if path.is_dir() {
                    if path != self.root.join("DEBIAN") {
                        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
                        open.push(path);
                    }
                } else {
                    found.push(path);
                }
            }
        }
        found.sort();
        Ok(found)
    }

    fn kib(&self) -> Result<u64> {
        let sizes = self
            .installed()?
            .into_iter()
            .map(|p| Ok(fs::metadata(p)?.len().div_ceil(1024)));
        sizes.sum()
    }

    fn sums(&self) -> Result<()> {
        let inside = |path: &PathBuf| path.strip_prefix(&self.root).map(Path::to_owned);
        let names: Vec<PathBuf> = self
            .installed()?
            .iter()
            .map(inside)
            .collect::<Result<_, _>>()?;
        let output = Command::new("md5sum")
            .current_dir(&self.root)
            .args(&names)
            .output()?;
        ensure!(output.status.success(), "md5sum failed");
        self.write("DEBIAN/md5sums", &String::from_utf8(output.stdout)?)
    }

    fn pack(&self, package: &Path, time: &str) -> Result<()> {
        let output = Command::new("dpkg-deb")
            .env("SOURCE_DATE_EPOCH", time)
            .args(["--build", "--root-owner-group", "-Zxz"])
            .arg(&self.root)
            .arg(package)
            .stdout(Stdio::null())
            .output()
            .context("cannot run dpkg-deb: install dpkg")?;
        if !output.status.success() {
            bail!(
                "dpkg-deb: {}",
                String::from_utf8_lossy(&output.stderr).trim()
            );
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_only_built_or_tested_with_is_not_linked() {
        let package = |name: &str, source: Value| serde_json::json!({"name": name, "id": name, "source": source, "version": "1"});
        let dep =
            |pkg: &str, kind: Value| serde_json::json!({"pkg": pkg, "dep_kinds": [{"kind": kind}]});
        let node = |id: &str, deps: Vec<Value>| serde_json::json!({"id": id, "deps": deps});
        let metadata = serde_json::json!({
            "packages": [
                package("hebe", Value::Null), package("hebe-vmm", Value::Null), package("hebed", Value::Null),
                package("used", "r".into()), package("below", "r".into()), package("tool", "r".into()),
            ],
            "resolve": {"nodes": [
                node("hebe", vec![dep("used", Value::Null), dep("tool", "dev".into())]),
                node("used", vec![dep("below", Value::Null)]),
            ]},
        });
        let found: Vec<_> = linked(&metadata)
            .expect("linked")
            .into_iter()
            .map(|p| p["name"].clone())
            .collect();
        assert_eq!(found, ["below", "used"]);
    }

    #[test]
    fn every_unit_and_script_that_is_packed_is_there() {
        let packaging = workspace_root().join("packaging");
        for unit in UNITS {
            assert!(packaging.join(unit).is_file(), "{unit}");
        }
        // What maintainer scripts speak of is what is packed.
        for script in ["postinst", "prerm", "postrm"] {
            let text = fs::read_to_string(packaging.join("deb").join(script)).expect("a script");
            assert!(text.starts_with("#!/bin/sh\nset -e\n"), "{script}");
            let words = text.split(|c: char| !(c.is_ascii_alphanumeric() || "-.".contains(c)));
            for word in words.filter(|w| w.ends_with(".service") || w.ends_with(".socket")) {
                assert!(UNITS.contains(&word), "{script}: {word}");
            }
        }
        let control = control("1.2.3", 5);
        assert!(control.contains("Version: 1.2.3\n") && control.ends_with('\n'));
    }
}
