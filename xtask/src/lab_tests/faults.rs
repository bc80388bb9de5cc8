//! Damage to what is kept in memory, and processes and machines that stop at
//! any instant: afterwards every VM runs, is frozen and listed, or is gone
//! with a reason; what runs is what it was.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use lab::assets::KernelName;
use lab::probe;
use lab::progress::Progress;
use lab::scenario::{GuestSpec, Lab, LabOptions};
use lab::trial::{self, Method};

use super::{json, refused, state, states};
use crate::test::Scene;

const KERNEL: KernelName = KernelName::V6_1Cloud;
/// Offset of the first state slot in an execution-state area (docs/formats.md).
const FIRST_SLOT: u64 = 0x2000;
/// A byte well inside any state.
const INTO_STATE: u64 = 200;
/// How long a VM may take to come to where it stays, and how often in a row it is
/// seen there.
const PATIENCE: Duration = Duration::from_secs(180);
const STAYS: u32 = 3;

/// Two guests go through everything.
pub fn run(scene: &Scene) -> Result<()> {
    let guests: Vec<GuestSpec> = (0..2)
        .map(|index| GuestSpec::numbered(index, KERNEL))
        .collect();
    // The range is the top of the machine's RAM, where a kernel that owns it
    // takes its first pages: half of the machine's first 4 GiB lie below it.
    let options = LabOptions {
        reserve_mib: 1024,
        memory_mib: 3072,
        tools: true,
        ..LabOptions::default()
    };
    let mut lab = Lab::boot(scene.assets, options, scene.progress)?;
    scene.progress.step("booting two VMs");
    lab.start(&guests)?;
    lab.wait_for_guests(&guests)?;
    scene.progress.step("damaged execution state");
    damaged_state(&mut lab, &guests)?;
    scene
        .progress
        .step("large pages, and no descriptor of the store");
    locked_room(&lab)?;
    scene.progress.step("a guest that KVM gives up");
    given_up(&mut lab, &guests, scene.progress)?;
    scene.progress.step("kills during suspend and resume");
    kills(&mut lab, &guests, if scene.full { 60 } else { 12 })?;
    scene
        .progress
        .step("hard reset of the machine with VMs frozen");
    hard_reset(&mut lab, &guests)?;
    scene.progress.step("a kernel without the reservation");
    no_reservation(&mut lab, &guests)?;
    lab.machine.power_off()
}

fn boot_id(lab: &mut Lab, guest: &GuestSpec) -> Result<String> {
    let status = lab.wait_for_guests(std::slice::from_ref(guest))?.remove(0);
    ensure!(
        status.memory_check.errors == 0,
        "{}: memory errors",
        guest.name
    );
    ensure!(
        status.monotonic_backwards == 0,
        "{}: its clock went back",
        guest.name
    );
    Ok(status.boot_id)
}

/// Where a VM's execution-state area begins in the store.
fn exec_offset(lab: &Lab, name: &str) -> Result<u64> {
    let show = json(lab, &["hebe", "store", "show", name, "--json"])?;
    show["spec"]["exec"]["offset"]
        .as_u64()
        .with_context(|| format!("no execution-state area of {name} in {show}"))
}

fn flip(lab: &Lab, offset: u64) -> Result<()> {
    lab.machine
        .exec_ok(&["/init", "dax-flip", "/dev/dax0.0", &offset.to_string()])
        .map(drop)
}

/// One flipped bit costs one VM its resume, not its life; the other resumes.
fn damaged_state(lab: &mut Lab, guests: &[GuestSpec]) -> Result<()> {
    let before = [boot_id(lab, &guests[0])?, boot_id(lab, &guests[1])?];
    lab.machine.exec_ok(&["hebe", "suspend", "vm1", "vm2"])?;
    let slot = exec_offset(lab, "vm1")? + FIRST_SLOT;
    flip(lab, slot + INTO_STATE)?;
    let output = lab.machine.exec(&["hebe", "resume", "--all"])?;
    ensure!(
        !output.ok(),
        "a damaged state went unnoticed: {}",
        output.all_text()
    );
    let (state_1, why) = state(lab, "vm1")?;
    ensure!(
        state_1 != "running" && !why.is_empty(),
        "vm1 is {state_1}: '{why}'"
    );
    ensure!(
        state(lab, "vm2")?.0 == "running",
        "vm2 did not resume beside a damaged vm1"
    );
    ensure!(
        boot_id(lab, &guests[1])? == before[1],
        "vm2 is not what it was"
    );
    // Its RAM was left alone: with the bit turned back it lives on.
    flip(lab, slot + INTO_STATE)?;
    lab.machine.exec_ok(&["hebe", "resume", "vm1"])?;
    ensure!(
        boot_id(lab, &guests[0])? == before[0],
        "vm1 is not what it was"
    );
    Ok(())
}

/// KVM maps the guests' RAM with large pages, and a VMM holds no descriptor
/// of the store's device.
fn locked_room(lab: &Lab) -> Result<()> {
    let read = |path: &str| -> Result<String> {
        Ok(String::from_utf8_lossy(&lab.machine.agent.get(path)?)
            .trim()
            .to_owned())
    };
    let large: u64 = read("/sys/kernel/debug/kvm/pages_2m")?.parse()?;
    ensure!(large > 0, "no 2 MiB mapping of guest RAM");
    for name in ["vm1", "vm2"] {
        let show = json(lab, &["hebe", "show", name, "--json"])?;
        let pid = show["pid"]
            .as_u64()
            .or_else(|| show["status"]["pid"].as_u64());
        let pid = pid.with_context(|| format!("no pid of {name} in {show}"))?;
        let listing =
            lab.machine
                .exec_ok(&["/bin/busybox", "ls", "-l", &format!("/proc/{pid}/fd")])?;
        ensure!(
            !listing.contains("/dev/dax"),
            "{name}'s VMM holds the store's device: {listing}"
        );
        ensure!(
            listing.contains("kvm"),
            "{name}'s VMM holds no KVM descriptor: {listing}"
        );
    }
    Ok(())
}

/// An ELF file with a PVH note, whose one act is to jump to where there is no memory:
/// `mov eax,0xd8000000; jmp eax`.
fn jumps_to_nowhere() -> Vec<u8> {
    const ENTRY: u32 = 0x10_0000;
    const CODE: &[u8] = &[0xb8, 0x00, 0x00, 0x00, 0xd8, 0xff, 0xe0];
    let note: Vec<u8> = [
        &4u32.to_le_bytes()[..],
        &4u32.to_le_bytes(),
        // XEN_ELFNOTE_PHYS32_ENTRY.
        &18u32.to_le_bytes(),
        b"Xen\0",
        &ENTRY.to_le_bytes(),
    ]
    .concat();
    let (note_len, code_len) = (note.len() as u64, CODE.len() as u64);
    let headers = 64 + 2 * 56;
    // A program header: its kind, rights, place, address twice, length twice, alignment.
    let segment = |kind: u32, rights: u32, at: u64, address: u64, len: u64| {
        let numbers = [at, address, address, len, len, 1].map(u64::to_le_bytes);
        [
            &kind.to_le_bytes()[..],
            &rights.to_le_bytes(),
            &numbers.concat(),
        ]
        .concat()
    };
    let entry = u64::from(ENTRY);
    let mut elf = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0\x01\0\0\0".to_vec();
    elf.extend([entry, 64, 0].map(u64::to_le_bytes).concat());
    elf.extend([0, 0, 0, 0, 64, 0, 56, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
    elf.extend(segment(4, 4, headers, 0, note_len));
    elf.extend(segment(1, 7, headers + note_len, entry, code_len));
    elf.extend(note);
    elf.extend(CODE);
    elf
}

/// A VM that its guest brings KVM to give up: the warm reboot of its host goes ahead,
/// and it is crashed, with its reason, beside VMs that go on.
fn given_up(lab: &mut Lab, guests: &[GuestSpec], progress: &dyn Progress) -> Result<()> {
    let kernel = "/data/nowhere.elf";
    lab.machine.agent.put(kernel, 0o644, &jumps_to_nowhere())?;
    let definition = format!("name = 'nowhere'\nmemory = '32MiB'\nkernel = '{kernel}'\n");
    let path = "/etc/hebe/vms/nowhere.toml";
    lab.machine.agent.put(path, 0o644, definition.as_bytes())?;
    lab.machine.exec_ok(&["hebe", "start", "nowhere"])?;
    let end = Instant::now() + PATIENCE;
    let mut now = state(lab, "nowhere")?;
    while now.0 != "paused" && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(300));
        now = state(lab, "nowhere")?;
    }
    ensure!(
        now.0 == "paused" && now.1.contains("cannot run again"),
        "KVM did not give nowhere up: {now:?}"
    );
    let trial = trial::reboot(lab, guests, Method::Warm, KERNEL, &[], progress)?;
    for vm in &trial.vms {
        ensure!(
            vm.boot_id_before == vm.boot_id_after,
            "{} is not what it was",
            vm.name
        );
    }
    let (after, why) = state(lab, "nowhere")?;
    let reason = now.1.split(": ").last().unwrap_or_default();
    ensure!(
        after == "crashed" && why.contains(reason),
        "nowhere is {after} after the reboot ({why}), and was {now:?}"
    );
    println!(
        "    nowhere: {} before the reboot, {after} after it: {why}",
        now.0
    );
    lab.machine.exec_ok(&["hebe", "drop", "nowhere"])?;
    lab.machine.exec_ok(&["/bin/busybox", "rm", path])?;
    Ok(())
}

/// A small generator: the same seed gives the same delays.
struct Delays(u64);

impl Delays {
    fn next_ms(&mut self, below: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (self.0 >> 33) % below
    }
}

/// SIGKILL of the VMM or of `hebe` itself at a random instant of a suspend or
/// a resume.
fn kills(lab: &mut Lab, guests: &[GuestSpec], rounds: u32) -> Result<()> {
    let seed = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(1, |d| d.as_nanos() as u64);
    println!("    kills: seed {seed}");
    let mut delays = Delays(seed);
    let mut identity = boot_id(lab, &guests[1])?;
    let mut reboots = 0;
    let mut hits = [0, 0];
    for round in 0..rounds {
        let victim = if round % 2 == 0 { "hebe-vmm" } else { "hebe" };
        let order = if state(lab, "vm2")?.0 == "frozen" {
            "resume"
        } else {
            "suspend"
        };
        let delay_s = delays.next_ms(500) as f64 / 1000.0;
        let script = format!(
            "hebe {order} vm2 & p=$!; sleep {delay_s}; \
             if [ {victim} = hebe ]; then kill -9 $p && echo HIT; else \
             for d in /proc/[0-9]*; do tr '\\0' ' ' < $d/cmdline 2>/dev/null | grep -q '^[^ ]*hebe-vmm .*vm2' \
             && kill -9 ${{d#/proc/}} && echo HIT; done; fi; wait $p; true"
        );
        let said = lab
            .machine
            .exec_ok(&["/bin/busybox", "sh", "-c", &script])?;
        hits[round as usize % 2] += u32::from(said.contains("HIT"));
        let (now, why) = settle(lab, "vm2")?;
        match now.as_str() {
            "frozen" => {}
            "running" => ensure!(boot_id(lab, &guests[1])? == identity, "vm2 is another one"),
            // A VMM killed while its guest ran: gone, with the reason, and the
            // VM can boot again. The end of `hebe` itself costs no VM.
            "crashed" if victim == "hebe-vmm" => {
                ensure!(!why.is_empty(), "vm2 crashed without a reason");
                reboots += 1;
                lab.machine.exec_ok(&["hebe", "start", "vm2"])?;
                identity = boot_id(lab, &guests[1])?;
            }
            other => anyhow::bail!("after {order} and SIGKILL of {victim}: vm2 is {other} ({why})"),
        }
        ensure!(
            state(lab, "vm1")?.0 == "running",
            "vm1 was harmed by vm2's kill"
        );
    }
    if state(lab, "vm2")?.0 == "frozen" {
        lab.machine.exec_ok(&["hebe", "resume", "vm2"])?;
    }
    ensure!(
        boot_id(lab, &guests[1])? == identity,
        "vm2 is not what it was"
    );
    println!(
        "    kills: {} of hebe-vmm, {} of hebe; {reboots} while the guest ran",
        hits[0], hits[1]
    );
    // A process may be gone before its turn; all of them never are.
    ensure!(hits.iter().sum::<u32>() > 0, "nothing was ever killed");
    Ok(())
}

/// A killed `hebe` may leave its VMM at work: waits until the state stays.
fn settle(lab: &Lab, name: &str) -> Result<(String, String)> {
    let end = Instant::now() + PATIENCE;
    let (mut last, mut same) = (state(lab, name)?, 0);
    while same < STAYS && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(300));
        let now = state(lab, name)?;
        let stays = now.0 == last.0 && !matches!(now.0.as_str(), "paused" | "starting");
        same = if stays { same + 1 } else { 0 };
        last = now;
    }
    Ok(last)
}

/// The reset button with one VM frozen and one running: the frozen one
/// resumes, the running one is gone with the reason, nothing is half there.
fn hard_reset(lab: &mut Lab, guests: &[GuestSpec]) -> Result<()> {
    let before = boot_id(lab, &guests[0])?;
    lab.machine.exec_ok(&["hebe", "suspend", "vm1"])?;
    lab.reset()?;
    ensure!(
        state(lab, "vm1")?.0 == "running",
        "vm1 did not come back: {:?}",
        states(lab)?
    );
    ensure!(
        boot_id(lab, &guests[0])? == before,
        "vm1 is not what it was"
    );
    let (lost, why) = state(lab, "vm2")?;
    ensure!(
        lost == "crashed" && !why.is_empty(),
        "vm2 is {lost} after a hard reset ({why})"
    );
    Ok(())
}

/// Booted without the reservation: nothing is resumed, then or later.
fn no_reservation(lab: &mut Lab, guests: &[GuestSpec]) -> Result<()> {
    lab.machine.exec_ok(&["hebe", "suspend", "vm1"])?;
    let good = lab.host_cmdline();
    let bare: Vec<&str> = good
        .split(' ')
        .filter(|w| !w.starts_with("memmap="))
        .collect();
    let (image, initrd) = (
        "/data/boot/6.1-cloud/vmlinuz",
        "/data/boot/6.1-cloud/initrd.img",
    );
    lab.machine
        .agent
        .kexec(image, initrd, &bare.join(" "), true)?;
    lab.wait_for_next_boot()?;
    let (now, why) = state(lab, "vm1")?;
    ensure!(
        now == "lost" && !why.is_empty(),
        "vm1 is {now} without its memory ({why})"
    );
    // What brings it back, and what gives it up; nothing else brings it to life.
    for word in [
        "memmap=",
        "!4G",
        "hebe start vm1 --afresh",
        "hebe drop vm1 --yes",
    ] {
        ensure!(why.contains(word), "'{word}' is not said of vm1: {why}");
    }
    for order in ["start", "resume", "drop"] {
        refused(lab, &["hebe", order, "vm1"], &["vm1", "lost"])?;
    }
    ensure!(
        state(lab, "vm1")?.0 == "lost",
        "vm1 is not lost any more after refused orders"
    );
    // Back on a kernel with the reservation: what was overwritten is noticed.
    lab.machine.agent.kexec(image, initrd, &good, true)?;
    lab.wait_for_next_boot()?;
    let (now, why) = state(lab, "vm1")?;
    ensure!(
        now != "running",
        "vm1 was resumed over memory that another kernel used"
    );
    println!("    after a kernel without the reservation: vm1 is {now}: {why}");
    let silent = probe::guest_status(&lab.ports(&guests[0])?, Duration::from_secs(2)).is_err();
    ensure!(silent, "a guest answers that should not run");
    Ok(())
}
