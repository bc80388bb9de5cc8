//! The programs that go into the lab's machines, built statically.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::apt;
use crate::progress::Progress;

/// The target, named so that proc macros are built without its flags.
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// A program of this workspace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Program {
    /// Cargo package.
    pub package: &'static str,
    /// Binary.
    pub name: &'static str,
}

/// PID 1 of hosts and guests.
pub const LAB_INIT: Program = Program {
    package: "lab-guest",
    name: "lab-init",
};
/// The command line.
pub const HEBE: Program = Program {
    package: "hebe",
    name: "hebe",
};
/// The VMM.
pub const HEBE_VMM: Program = Program {
    package: "hebe-vmm",
    name: "hebe-vmm",
};
/// The daemon.
pub const HEBED: Program = Program {
    package: "hebed",
    name: "hebed",
};
/// The agent in guests.
pub const HEBE_AGENT: Program = Program {
    package: "hebe-agent",
    name: "hebe-agent",
};

/// The programs, built.
#[derive(Clone, Debug)]
pub struct Binaries {
    /// PID 1.
    pub init: PathBuf,
    /// What goes into the host's `/bin`.
    pub product: Vec<PathBuf>,
    /// What goes into the guests' `/bin`.
    pub guest: Vec<PathBuf>,
}

impl Binaries {
    /// Builds `lab-init` and the product's programs for hosts and for guests.
    pub fn build(product: &[Program], guest: &[Program], progress: &dyn Progress) -> Result<Self> {
        progress.step("building the programs for the lab's machines");
        let mut command = cargo("build");
        for program in std::iter::once(&LAB_INIT).chain(product).chain(guest) {
            command.args(["--package", program.package]);
        }
        let status = command.status().context("cannot run cargo")?;
        if !status.success() {
            bail!("the programs for the lab's machines do not build");
        }
        let folder = folder();
        let find = |program: &Program| {
            let path = folder.join(program.name);
            match path.is_file() {
                true => Ok(path),
                false => bail!(
                    "package {} built no program {}",
                    program.package,
                    program.name
                ),
            }
        };
        Ok(Self {
            init: find(&LAB_INIT)?,
            product: product.iter().map(find).collect::<Result<_>>()?,
            guest: guest.iter().map(find).collect::<Result<_>>()?,
        })
    }
}

/// Where the programs are built.
fn folder() -> PathBuf {
    workspace_root().join("target/lab").join(TARGET).join("lab")
}

/// A command of cargo that builds for the lab's machines.
fn cargo(order: &str) -> Command {
    let root = workspace_root();
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command
        .current_dir(&root)
        .args([order, "--quiet", "--profile", "lab", "--target", TARGET])
        .arg("--target-dir")
        .arg(root.join("target/lab"))
        .env("RUSTFLAGS", "-C target-feature=+crt-static")
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .stdin(Stdio::null());
    command
}

/// The test programs of packages, and where those look for `program`.
#[derive(Clone, Debug)]
pub struct Tests {
    /// Each one's executable.
    pub executables: Vec<PathBuf>,
    /// The path of `program` that cargo built into them.
    pub program: PathBuf,
}

impl Tests {
    /// Builds the tests of `packages`, which start `program`.
    pub fn build(packages: &[&str], program: Program, progress: &dyn Progress) -> Result<Self> {
        progress.step("building tests for the lab's machines");
        let mut command = cargo("test");
        command.args(["--no-run", "--lib", "--tests", "--message-format=json"]);
        for package in packages {
            command.args(["--package", package]);
        }
        let messages = apt::run(&mut command)?;
        let executables: Vec<PathBuf> = messages
            .lines()
            .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
            .filter(|message| message["profile"]["test"] == true)
            .filter_map(|message| message["executable"].as_str().map(PathBuf::from))
            .collect();
        if executables.is_empty() {
            bail!("{} have no tests", packages.join(", "));
        }
        Ok(Self {
            executables,
            program: folder().join(program.name),
        })
    }
}

/// The checkout that this program was built from.
pub fn workspace_root() -> PathBuf {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    manifest.parent().unwrap_or(manifest).to_owned()
}
