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
    for line in list.lines() {
        let mut words = line.split_whitespace();
        let (Some(of), Some(condition), Some(path)) = (words.next(), words.next(), words.next())
        else {
            continue;
        };
        if of != group || (condition != "-" && !flags.contains(&condition)) {
            continue;
        }
        if let Err(e) = crate::sys::load_module(Path::new(path)) {
            println!("LAB: module {path}: {e}");
        }
    }
}
