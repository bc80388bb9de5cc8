//! `hebe image build` from packages: one image, and one that is given up half-way.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use lab::apt::{self, Tool};
use lab::binaries::workspace_root;
use serde_json::Value;

use crate::test::Scene;

pub fn run(scene: &Scene) -> Result<()> {
    let tool = |program, package| Tool { program, package };
    let tools = [
        tool("mmdebstrap", "mmdebstrap"),
        tool("mke2fs", "e2fsprogs"),
        tool("qemu-img", "qemu-utils"),
    ];
    apt::ensure_tools(&tools, scene.progress)?;
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut build = Command::new(cargo);
    build.args(["build", "--quiet", "--locked", "--package", "hebe"]);
    apt::run(build.current_dir(workspace_root()))?;
    let hebe = workspace_root().join("target/debug/hebe");
    let folder = tempfile::tempdir_in(workspace_root().join("target"))?;
    scene.progress.step("a build that is ended");
    ended(&hebe, folder.path())?;
    scene.progress.step("a build to the end");
    whole(&hebe, folder.path())
}

fn left_in(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder)?;
    entries.map(|e| Ok(e?.path())).collect()
}

/// SIGTERM while packages are unpacked: nothing is left.
fn ended(hebe: &Path, folder: &Path) -> Result<()> {
    let mut child = Command::new(hebe)
        .args(["image", "build"])
        .arg(folder.join("ended.img"))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .context("cannot run hebe")?;
    let said = BufReader::new(child.stderr.take().context("no pipe")?);
    let mut last = String::new();
    let mut told = false;
    for line in said.lines() {
        last = line?;
        if !told && last.contains("extracting archives") {
            told = true;
            ensure!(!left_in(folder)?.is_empty(), "nothing is under way");
            let pid = rustix::process::Pid::from_child(&child);
            rustix::process::kill_process(pid, rustix::process::Signal::TERM)?;
        }
    }
    let status = child.wait()?;
    ensure!(told, "it ended before it was told to: {last}");
    ensure!(status.code() == Some(1), "{status}: {last}");
    ensure!(last.contains("was ended"), "its last words: {last}");
    let left = left_in(folder)?;
    ensure!(left.is_empty(), "left behind: {left:?}");
    Ok(())
}

fn whole(hebe: &Path, folder: &Path) -> Result<()> {
    let output = folder.join("small.qcow2");
    let note = folder.join("note");
    fs::write(&note, "a note\n")?;
    let mut command = Command::new(hebe);
    command.args(["--json", "image", "build", "--size", "1GiB", "--autologin"]);
    command
        .arg("--copy")
        .arg(format!("{}:/etc/note", note.display()));
    let text = apt::run(command.arg(&output))?;
    let done: Value = serde_json::from_str(&text).with_context(|| format!("no JSON: {text}"))?;
    let number = |key: &str| done[key].as_u64().unwrap_or_default();
    ensure!(
        done["format"] == "qcow2" && done["hostname"] == "small",
        "{done}"
    );
    ensure!(number("size") == 1 << 30, "{done}");
    ensure!(
        number("kernel") > 1 << 20 && number("initrd") > 1 << 20,
        "{done}"
    );
    ensure!(number("allocated") < 600 << 20, "it is not small: {done}");
    let cmdline = done["cmdline"].as_str().unwrap_or_default();
    ensure!(
        cmdline.starts_with("root=UUID=") && cmdline.ends_with("console=ttyS0"),
        "{done}"
    );
    let mut magic = [0; 4];
    fs::File::open(&output)?.read_exact_at(&mut magic, 0)?;
    ensure!(&magic == b"QFI\xfb", "it is no qcow2 image");
    match left_in(folder)?.len() {
        2 => Ok(()),
        _ => bail!("left behind: {:?}", left_in(folder)?),
    }
}
