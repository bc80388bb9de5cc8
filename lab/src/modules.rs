//! Which module files a kernel needs, and in which order they load.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

/// `modules.dep` and `modules.builtin` of one kernel.
#[derive(Debug, Default)]
pub struct ModuleIndex {
    /// Module name → (path below the module folder, direct and indirect needs
    /// as modules.dep lists them: nearest first).
    files: HashMap<String, (String, Vec<String>)>,
    builtin: HashSet<String>,
}

/// A module's name for comparison: `-` and `_` are the same in it.
fn name_of(path: &str) -> String {
    let base = path.rsplit('/').next().unwrap_or(path);
    base.split(".ko").next().unwrap_or(base).replace('-', "_")
}

impl ModuleIndex {
    /// Reads both files of `dir` (`…/lib/modules/RELEASE`).
    pub fn read(dir: &Path) -> Result<Self> {
        let read = |name: &str| {
            let path = dir.join(name);
            fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))
        };
        Ok(Self::parse(
            &read("modules.dep")?,
            &read("modules.builtin")?,
        ))
    }

    /// Parses the text of both files.
    pub fn parse(dep: &str, builtin: &str) -> Self {
        let files = dep
            .lines()
            .filter_map(|line| {
                let (path, needs) = line.split_once(':')?;
                let needs = needs.split_whitespace().map(name_of).collect();
                Some((name_of(path), (path.to_owned(), needs)))
            })
            .collect();
        Self {
            files,
            builtin: builtin.lines().map(name_of).collect(),
        }
    }

    /// The files for `wanted` and what they need, each once, needs first.
    /// What is built in is left out; what the kernel does not have at all is
    /// an error unless the name ends in `?`.
    pub fn load_order(&self, wanted: &[&str]) -> Result<Vec<String>> {
        let mut order = Vec::new();
        let mut seen = HashSet::new();
        for raw in wanted {
            let optional = raw.ends_with('?');
            let name = name_of(raw.trim_end_matches('?'));
            if self.builtin.contains(&name) {
                continue;
            }
            let Some((_, needs)) = self.files.get(&name) else {
                if optional {
                    continue;
                }
                bail!("the kernel has no module {name}");
            };
            // modules.dep lists what is needed last first.
            for each in needs.iter().rev().chain(std::iter::once(&name)) {
                if seen.insert(each.clone()) {
                    let (path, _) = self.files.get(each).with_context(|| {
                        format!("modules.dep names {each} and does not list it")
                    })?;
                    order.push(path.clone());
                }
            }
        }
        Ok(order)
    }
}

/// The bytes of a module, uncompressed, so that the kernel can take them as
/// they are.
pub fn read_module(path: &Path) -> Result<Vec<u8>> {
    let program = match path.extension().and_then(|e| e.to_str()) {
        Some("xz") => "xz",
        Some("zst") => "zstd",
        Some("gz") => "gzip",
        _ => return fs::read(path).with_context(|| format!("cannot read {}", path.display())),
    };
    let output = Command::new(program)
        .arg("-dc")
        .arg(path)
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot run {program}"))?;
    if !output.status.success() {
        bail!("{program} cannot unpack {}", path.display());
    }
    Ok(output.stdout)
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEP: &str = "kernel/arch/x86/kvm/kvm-amd.ko.xz: kernel/drivers/crypto/ccp/ccp.ko.xz kernel/arch/x86/kvm/kvm.ko.xz kernel/virt/lib/irqbypass.ko.xz\nkernel/arch/x86/kvm/kvm.ko.xz: kernel/virt/lib/irqbypass.ko.xz\nkernel/virt/lib/irqbypass.ko.xz:\nkernel/drivers/crypto/ccp/ccp.ko.xz:\nkernel/net/bridge/bridge.ko: kernel/net/802/stp.ko kernel/net/llc/llc.ko\nkernel/net/802/stp.ko: kernel/net/llc/llc.ko\nkernel/net/llc/llc.ko:\n";

    #[test]
    fn needs_come_first_and_once() {
        let index = ModuleIndex::parse(DEP, "kernel/fs/ext4/ext4.ko\n");
        let order = index
            .load_order(&["bridge", "kvm_amd", "kvm", "ext4"])
            .expect("order");
        let names: Vec<String> = order.iter().map(|p| name_of(p)).collect();
        assert_eq!(
            names,
            ["llc", "stp", "bridge", "irqbypass", "kvm", "ccp", "kvm_amd"]
        );
    }

    #[test]
    fn hyphens_and_underscores_are_the_same() {
        let index = ModuleIndex::parse(DEP, "");
        assert_eq!(
            index.load_order(&["kvm-amd"]).expect("order"),
            index.load_order(&["kvm_amd"]).expect("order")
        );
    }

    #[test]
    fn a_missing_module_is_named_unless_it_is_optional() {
        let index = ModuleIndex::parse(DEP, "");
        let text = index
            .load_order(&["nd_e820"])
            .expect_err("missing")
            .to_string();
        assert!(text.contains("nd_e820"));
        assert!(
            index
                .load_order(&["nd_e820?"])
                .expect("optional")
                .is_empty()
        );
    }
}
