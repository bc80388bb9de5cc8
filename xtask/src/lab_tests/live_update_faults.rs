//! Live updates that the real kernel refuses, or that are given up half-way:
//! afterwards the same guests run, and nothing is left of the attempt.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use lab::assets::KernelName;
use lab::progress::Progress;
use lab::scenario::{GuestSpec, Lab};

use super::{refused, states};

/// A kernel without live update: Debian's.
pub const STOCK: [KernelName; 2] = [KernelName::V6_1Cloud, KernelName::V7_3Cloud];
/// How long an order may take to come so far.
const LIMIT: Duration = Duration::from_secs(400);
const LOG: &str = "/tmp/fault.log";
/// Kills an order that says that it preserves memory: in the host itself, for whoever
/// looks from outside may come too late, on a busy computer.
const KILL_IN_TIME: &str = r#""$@" & p=$!
until grep -q 'preserving vm1' /tmp/fault.log; do sleep 0.02; done
kill -9 $p; wait $p; test $? = 137 && echo order killed"#;
const KILLED: &str = "order killed";

/// All of them, with guests that run; `to` is a kernel that takes memory over.
pub fn run(
    lab: &mut Lab,
    guests: &[GuestSpec],
    to: KernelName,
    progress: &dyn Progress,
) -> Result<()> {
    let before = boot_ids(lab, guests)?;
    progress.step("kernels that take no memory over");
    for (kernel, words) in STOCK
        .into_iter()
        .zip(["only 6.19 and newer", "without live update"])
    {
        refused(
            lab,
            &words_of(&order(lab, kernel)),
            &[words, "--method saved"],
        )?;
    }
    progress.step("another owner of /dev/liveupdate");
    taken(lab, to)?;
    same(lab, guests, &before)?;
    progress.step("a jump that fails with all memory preserved");
    jump_fails(lab, to)?;
    same(lab, guests, &before)?;
    progress.step("an order that is killed while memory is preserved");
    killed(lab, to)?;
    same(lab, guests, &before)
}

fn order(lab: &Lab, kernel: KernelName) -> Vec<String> {
    let words = ["hebe", "reboot", "--method", "warm"].map(str::to_owned);
    words
        .into_iter()
        .chain(lab.reboot_arguments(kernel))
        .collect()
}

fn words_of(order: &[String]) -> Vec<&str> {
    order.iter().map(String::as_str).collect()
}

fn boot_ids(lab: &mut Lab, guests: &[GuestSpec]) -> Result<Vec<String>> {
    let answers = lab.wait_for_guests(guests)?;
    let wrong: u64 = answers.iter().map(|a| a.memory_check.errors).sum();
    ensure!(wrong == 0, "{wrong} wrong pages in the guests");
    Ok(answers.into_iter().map(|a| a.boot_id).collect())
}

/// The guests run on, and nothing says otherwise.
fn same(lab: &mut Lab, guests: &[GuestSpec], before: &[String]) -> Result<()> {
    ensure!(
        boot_ids(lab, guests)? == before,
        "a guest is not what it was"
    );
    let states = states(lab)?;
    ensure!(
        states.iter().all(|(_, state, _)| state == "running"),
        "not all run: {states:?}"
    );
    Ok(())
}

/// The device has one owner; a reboot beside it is refused before anything is
/// done.
fn taken(lab: &Lab, to: KernelName) -> Result<()> {
    let hold = "exec 3<>/dev/liveupdate && echo held && sleep 600";
    let owner = lab
        .machine
        .agent
        .spawn(&["/bin/busybox", "sh", "-c", hold], LOG)?;
    wait_for(lab, "held")?;
    let words = ["another process has /dev/liveupdate open", "fuser"];
    let result = refused(lab, &words_of(&order(lab, to)), &words);
    kill(lab, owner)?;
    result
}

/// The next kernel is taken away after it was loaded: reboot(2) comes back with
/// an error, with all VMs frozen and all of their memory preserved.
fn jump_fails(lab: &Lab, to: KernelName) -> Result<()> {
    let config = "[services]\nstop = [\"/init kexec-unload\"]\n";
    let path = "/etc/hebe/host.toml";
    lab.machine.agent.put(path, 0o644, config.as_bytes())?;
    let output = lab.machine.exec(&words_of(&order(lab, to)))?;
    lab.machine
        .exec_ok(&["/bin/busybox", "rm", path])
        .map(drop)?;
    let text = output.all_text();
    ensure!(!output.ok(), "the jump did not fail: {text}");
    for words in ["preserving vm1", "undone and every VM runs"] {
        ensure!(text.contains(words), "without '{words}': {text}");
    }
    Ok(())
}

/// Killed, it closes its sessions: the kernel lets everything go. Whatever was
/// frozen by then is let run by the next resume.
fn killed(lab: &Lab, to: KernelName) -> Result<()> {
    let order = order(lab, to);
    let shell = [
        &["/bin/busybox", "sh", "-c", KILL_IN_TIME, "sh"],
        &words_of(&order)[..],
    ];
    let job = lab.machine.agent.spawn(&shell.concat(), LOG)?;
    wait_for(lab, KILLED)?;
    let end = Instant::now() + LIMIT;
    while lab.machine.agent.alive(job)? {
        ensure!(Instant::now() < end, "it does not die");
        std::thread::sleep(Duration::from_millis(100));
    }
    lab.machine.exec_ok(&["hebe", "resume", "--all"]).map(drop)
}

fn wait_for(lab: &Lab, words: &str) -> Result<()> {
    let end = Instant::now() + LIMIT;
    loop {
        let bytes = lab.machine.agent.get(LOG).unwrap_or_default();
        let text = String::from_utf8_lossy(&bytes);
        if text.contains(words) {
            return Ok(());
        }
        if Instant::now() > end {
            bail!("'{words}' was not said: {text}");
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// With all that the shell started.
fn kill(lab: &Lab, pid: u32) -> Result<()> {
    let group = i32::try_from(pid).context("a process id")?;
    lab.machine.agent.kill(-group, 9)
}
