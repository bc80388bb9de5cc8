//! Orders that cannot be carried out: one clear sentence, a non-zero exit
//! status, and nothing left behind.

use anyhow::{Result, ensure};
use lab::assets::KernelName;
use lab::scenario::{GuestSpec, Lab, LabOptions};

use super::{json, refused, states};
use crate::test::Scene;

/// A definition of a VM, with `change` put in.
fn definition(name: &str, change: &[(&str, &str)]) -> String {
    let mut fields = vec![
        ("name", format!("'{name}'")),
        ("memory", "'64MiB'".to_owned()),
        ("vcpus", "1".to_owned()),
        ("kernel", "'/data/guest/6.1-cloud/vmlinuz'".to_owned()),
    ];
    for (key, value) in change {
        match fields.iter_mut().find(|(k, _)| k == key) {
            Some(field) => field.1 = (*value).to_owned(),
            None => fields.push((key, (*value).to_owned())),
        }
    }
    fields
        .iter()
        .map(|(key, value)| format!("{key} = {value}\n"))
        .collect()
}

/// Fields and their values, as TOML.
type Changes = &'static [(&'static str, &'static str)];

/// Definitions that must be refused, and a word that the refusal must hold.
const BAD: [(&str, Changes, &str); 10] = [
    ("zero", &[("memory", "'0MiB'")], "memory"),
    ("odd", &[("memory", "'65537KiB'")], "memory"),
    ("nine", &[("vcpus", "9")], "vcpus"),
    ("huge", &[("memory", "'8GiB'")], "reserve more"),
    (
        "nokernel",
        &[("kernel", "'/no/such/kernel'")],
        "/no/such/kernel",
    ),
    ("notkernel", &[("kernel", "'/bin/hebe'")], "64-bit bzImage"),
    (
        "nodisk",
        &[("disk", "[{ path = '/no/such/disk' }]")],
        "/no/such/disk",
    ),
    ("badtap", &[("net", "[{ tap = 'a/b' }]")], "a/b"),
    ("unknown", &[("memroy", "'1GiB'")], "memroy"),
    ("mangled", &[("vcpus", "= =")], "mangled.toml"),
];

/// Boots a host and gives it orders that it must refuse.
pub fn run(scene: &Scene) -> Result<()> {
    let lab = Lab::boot(scene.assets, LabOptions::default(), scene.progress)?;
    scene.progress.step("orders that must be refused");
    let store_before = json(&lab, &["hebe", "store", "list", "--json"])?;
    for (name, change, word) in BAD {
        let path = format!("/etc/hebe/vms/{name}.toml");
        lab.machine
            .agent
            .put(&path, 0o644, definition(name, change).as_bytes())?;
        refused(&lab, &["hebe", "start", name], &[word])?;
        lab.machine.exec_ok(&["/bin/hebe", "list"])?;
    }
    refused(&lab, &["hebe", "start", "nobody"], &["nobody"])?;
    for order in ["stop", "suspend", "resume", "console", "show"] {
        refused(&lab, &["hebe", order, "nobody"], &["nobody"])?;
    }
    let store_after = json(&lab, &["hebe", "store", "list", "--json"])?;
    ensure!(
        store_before == store_after,
        "a refused order left something in the store"
    );
    ensure!(
        states(&lab)?
            .iter()
            .all(|(_, state, _)| state == "stopped" || state == "damaged"),
        "a refused order left a VM behind: {:?}",
        states(&lab)?
    );
    reboots(&lab)?;
    lab.machine.power_off()
}

/// Reboots that pre-flight must refuse, and the host goes on.
fn reboots(lab: &Lab) -> Result<()> {
    let boot_id = lab.boot.boot_id.clone();
    let args = lab.reboot_arguments(KernelName::V6_1Cloud);
    let (image, initrd, good) = (args[1].as_str(), args[3].as_str(), args[5].as_str());
    let without: String = good
        .split(' ')
        .filter(|w| !w.starts_with("memmap="))
        .collect::<Vec<_>>()
        .join(" ");
    let moved = good.replace("!4G", "!5G");
    let shrunk = good.replace(
        &format!("memmap={}M", lab.options.reserve_mib),
        "memmap=512M",
    );
    ensure!(
        moved != good && shrunk != good && without != good,
        "no reservation in '{good}'"
    );
    for cmdline in [without, moved, shrunk] {
        let order = [
            "hebe",
            "reboot",
            "--kernel",
            image,
            "--initrd",
            initrd,
            "--cmdline",
            &cmdline,
        ];
        refused(lab, &order, &["memmap"])?;
    }
    refused(
        lab,
        &[
            "hebe",
            "reboot",
            "--kernel",
            "/no/kernel",
            "--initrd",
            initrd,
        ],
        &["/no/kernel"],
    )?;
    refused(
        lab,
        &[
            "hebe",
            "reboot",
            "--kernel",
            "/bin/hebe",
            "--initrd",
            initrd,
        ],
        &["/bin/hebe"],
    )?;
    let guest = GuestSpec::numbered(0, KernelName::V6_1Cloud);
    ensure!(lab.ports(&guest).is_ok(), "the lab has ports");
    let now = lab
        .machine
        .agent
        .status(std::time::Duration::from_secs(120))?;
    ensure!(now.boot_id == boot_id, "a refused reboot rebooted the host");
    Ok(())
}
