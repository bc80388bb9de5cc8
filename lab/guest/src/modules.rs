//! Loads the modules that the initramfs brings, in their order.

use std::fs;
use std::path::Path;

/// Where the initramfs lists its modules: `GROUP CONDITION PATH` per line.
const LIST: &str = "/lab/modules";

/// Loads a group; a module that will not load is reported and passed over.
pub fn load(group: &str) {
    let Ok(list) = fs::read_to_string(LIST) else {
        return;
    };
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let flags: Vec<&str> = cpuinfo
        .lines()
        .find_map(|l| l.strip_prefix("flags"))
        .unwrap_or("")
        .split_whitespace()
        .collect();
    let cmdline = fs::read_to_string("/proc/cmdline").unwrap_or_default();
    for line in list.lines() {
        let mut words = line.split_whitespace();
        let (Some(of), Some(condition), Some(path)) = (words.next(), words.next(), words.next())
        else {
            continue;
        };
        if of != group || (condition != "-" && !flags.contains(&condition)) {
            continue;
        }
        let path = Path::new(path);
        if let Err(e) = crate::sys::load_module(path, &parameters(path, &cmdline)) {
            println!("LAB: module {}: {e}", path.display());
        }
    }
}

/// What the kernel command line has for a module, as `MODULE.NAME=VALUE`: the
/// kernel gives such words only to what is built in.
fn parameters(path: &Path, cmdline: &str) -> String {
    let plain = |name: &str| name.replace('-', "_");
    let file = path.file_name().unwrap_or_default().to_string_lossy();
    let module = plain(file.split('.').next().unwrap_or_default());
    let of_module = |word: &str| {
        let (name, parameter) = word.split_once('.')?;
        (plain(name) == module).then(|| parameter.to_owned())
    };
    let words = cmdline.split_whitespace().filter_map(of_module);
    words.collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_are_those_of_the_module_alone() {
        let cmdline = "quiet kvm.mmio_caching=0 kvm_amd.npt=1 kvm-amd.avic=0 kvmish.x=1";
        let of = |path: &str| parameters(Path::new(path), cmdline);
        assert_eq!(of("/lab/kvm.ko"), "mmio_caching=0");
        assert_eq!(of("/lab/kvm-amd.ko.xz"), "npt=1 avic=0");
        assert_eq!(of("/lab/tun.ko"), "");
    }
}
