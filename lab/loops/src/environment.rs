//! What the guest runs on: figures count only with it.

use std::arch::x86_64::__cpuid;
use std::fs;
use std::time::Duration;

use anyhow::Result;
use serde::Serialize;

use crate::guest::Counters;
use crate::rig::{Plan, Rig};

/// Who executes guest instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// The processor, on bare metal.
    Native,
    /// The processor, under another hypervisor that nests.
    Nested,
    /// An emulated processor with emulated virtualization.
    Emulated,
    /// A KVM without hardware behind it.
    Software,
}

/// Where a run took place.
#[derive(Clone, Debug, Serialize)]
pub struct Environment {
    /// Who executes guest instructions.
    pub kind: Kind,
    /// The processor's name.
    pub processor: String,
    /// `uname -r`.
    pub kernel: String,
    /// The KVM modules loaded.
    pub modules: Vec<String>,
}

impl Environment {
    /// Looks at this machine.
    pub fn detect() -> Self {
        let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let field = |name: &str| {
            cpuinfo
                .lines()
                .find(|line| line.starts_with(name))
                .and_then(|line| line.split_once(':'))
                .map(|(_, value)| value.trim().to_owned())
                .unwrap_or_default()
        };
        let flags = field("flags");
        let has = |flag| flags.split_whitespace().any(|f| f == flag);
        let kind = if !has("vmx") && !has("svm") {
            Kind::Software
        } else if !has("hypervisor") {
            Kind::Native
        } else if hypervisor_name() == *b"TCGTCGTCGTCG" {
            Kind::Emulated
        } else {
            Kind::Nested
        };
        let modules = fs::read_dir("/sys/module")
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|entry| entry.file_name().into_string().ok())
            .filter(|name| name.starts_with("kvm"))
            .collect();
        Self {
            kind,
            processor: field("model name"),
            kernel: fs::read_to_string("/proc/sys/kernel/osrelease")
                .map(|text| text.trim().to_owned())
                .unwrap_or_default(),
            modules,
        }
    }
}

/// The host kernel takes its TSCs for synchronous. Where it does not, KVM
/// says of an SMP guest that "guest TSC will not be reliable".
pub fn tsc_is_stable() -> bool {
    fs::read_to_string("/sys/devices/system/clocksource/clocksource0/available_clocksource")
        .is_ok_and(|names| names.split_whitespace().any(|name| name == "tsc"))
}

fn hypervisor_name() -> [u8; 12] {
    let leaf = __cpuid(0x4000_0000);
    let mut name = [0; 12];
    for (bytes, word) in name.chunks_exact_mut(4).zip([leaf.ebx, leaf.ecx, leaf.edx]) {
        bytes.copy_from_slice(&word.to_le_bytes());
    }
    name
}

/// A trial run's result.
#[derive(Clone, Debug)]
pub enum Trial {
    /// With this plan every vCPU went round the loop in time.
    Runs(Plan, Vec<Counters>),
    /// It does not, and why.
    Cannot(String),
}

/// Boots the guest with `vcpus` vCPUs and waits until each made progress of
/// every kind; `limit` is the most that may take. A KVM that cannot run the
/// full guest gets the one for interpreters.
pub fn trial(vcpus: u8, limit: Duration) -> Result<Trial> {
    if let Err(error) = hebe_kvm::host_can_run() {
        return Ok(Trial::Cannot(error.to_string()));
    }
    let mut reasons = Vec::new();
    for plan in [Plan::looping(vcpus), Plan::interpreted(vcpus)] {
        match attempt(plan, limit) {
            Ok(counters) => return Ok(Trial::Runs(plan, counters)),
            Err(error) => reasons.push(format!("{error:#}")),
        }
    }
    Ok(Trial::Cannot(reasons.join("; with less: ")))
}

fn attempt(plan: Plan, limit: Duration) -> Result<Vec<Counters>> {
    let mut rig = Rig::new(plan)?;
    let base = rig.counters();
    rig.vm()?.start()?;
    rig.wait_for_progress(&base, limit)?;
    let counters = rig.counters();
    rig.drop_vm()?;
    Ok(counters)
}
