//! What a VMM must refuse, tell apart or leave alone, with a real guest.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use hebe_kvm::Stop;
use hebe_state::StateError;
use hebe_store::ExecStatus;
use hebe_types::VmId;
use hebe_vmm::{Event, Vm, VmError};
use serde::Serialize;

use crate::environment::{Environment, Kind};
use crate::guest::splitmix64;
use crate::rig::{Plan, Rig};

/// One check's result.
#[derive(Clone, Debug, Serialize)]
pub struct Check {
    /// What was checked.
    pub name: &'static str,
    /// Why it failed, if it did.
    pub error: Option<String>,
    /// Why it could not be done here, if so.
    pub skipped: Option<String>,
}

/// KVM without hardware cannot do what a check is about.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct NotHere(String);

/// Runs all checks with guests like `plan`'s.
pub fn run(plan: Plan, seed: u64, limit: Duration) -> Vec<Check> {
    let check = |name, result: Result<()>| {
        let mut check = Check {
            name,
            error: None,
            skipped: None,
        };
        match result {
            Ok(()) => {}
            Err(e) if e.is::<NotHere>() => check.skipped = Some(e.to_string()),
            Err(e) => check.error = Some(format!("{e:#}")),
        }
        check
    };
    let mut checks = vec![
        check(
            "a damaged, truncated or unknown state is refused and kept",
            bad_states(plan, seed, limit),
        ),
        check("another VM's state is refused", other_vm(plan, limit)),
        check(
            "RAM is the same before a freeze's commit and after the resume, and the meter is 0",
            ram_untouched(plan, limit),
        ),
    ];
    for (name, mode, wanted) in [
        (
            "a triple fault is told apart",
            'T',
            Event::VcpuStopped(Stop::Shutdown),
        ),
        ("a reset is told apart", 'R', Event::Reset),
        (
            "a reset by the keyboard controller is told apart",
            'K',
            Event::Reset,
        ),
        ("a power-off is told apart", 'P', Event::PowerOff),
    ] {
        checks.push(check(name, ending(plan, mode, &wanted, limit)));
    }
    checks
}

/// A rig whose guest ran and is frozen, with its state.
fn frozen(plan: Plan, limit: Duration) -> Result<(Rig, Vec<u8>)> {
    let mut rig = Rig::new(plan)?;
    let base = rig.counters();
    rig.vm()?.start()?;
    rig.wait_for_progress(&base, limit)?;
    rig.freeze()?;
    rig.drop_vm()?;
    let state = rig.segment().exec().load()?;
    Ok((rig, state))
}

fn bad_states(plan: Plan, seed: u64, limit: Duration) -> Result<()> {
    let (mut rig, state) = frozen(plan, limit)?;
    let status = rig.expect_frozen()?;
    let ram = ram_hash(&rig);
    let mut random = seed;
    let mut bad: Vec<(String, Vec<u8>)> = Vec::new();
    for _ in 0..24 {
        let bit = splitmix64(&mut random) as usize % (state.len() * 8);
        let mut copy = state.clone();
        copy[bit / 8] ^= 1 << (bit % 8);
        bad.push((format!("bit {bit} flipped"), copy));
    }
    for len in [0, 7, 27, 28, 60, state.len() / 2, state.len() - 1] {
        bad.push((format!("cut to {len} bytes"), state[..len].to_vec()));
    }
    bad.push(("a section of kind 99".into(), with_unknown_section(&state)));
    for (what, copy) in bad {
        match rig.resume_from(&copy) {
            Err(VmError::State(error)) => {
                ensure!(
                    what != "a section of kind 99"
                        || matches!(error, StateError::UnknownKind { kind: 99, .. }),
                    "{what}: refused for another reason: {error}"
                );
            }
            Err(other) => bail!("{what}: refused, but not as a damaged state: {other}"),
            Ok(()) => bail!("{what}: the VM was built all the same"),
        }
        expect_kept(&rig, &status, &state).context(what)?;
    }
    ensure!(ram_hash(&rig) == ram, "a refused resume touched RAM");
    // And the good state is still good.
    let base = rig.counters();
    rig.resume()?;
    rig.wait_for_progress(&base, limit)?;
    rig.drop_vm()
}

fn other_vm(plan: Plan, limit: Duration) -> Result<()> {
    let (mut rig, state) = frozen(plan, limit)?;
    let status = rig.expect_frozen()?;
    let other = VmId([0x22; 16]);
    let result = Vm::resume(
        other,
        rig.dir().to_owned(),
        rig.segment().clone(),
        &state,
        rig.events(),
    );
    match result {
        Err(VmError::OtherVm { expected, found }) if expected == other && found == rig.id() => {}
        Err(error) => bail!("refused for another reason: {error}"),
        Ok(_) => bail!("the VM was built all the same"),
    }
    expect_kept(&rig, &status, &state)?;
    rig.drop_vm()
}

/// The segment says what it said, and holds what it held.
fn expect_kept(rig: &Rig, status: &ExecStatus, state: &[u8]) -> Result<()> {
    let now = rig.segment().exec().status();
    ensure!(now == *status, "the segment is {now:?} now");
    ensure!(
        rig.segment().exec().load()? == state,
        "the state in the segment changed"
    );
    Ok(())
}

/// The same state with one section more, well-formed, of an unknown kind.
fn with_unknown_section(state: &[u8]) -> Vec<u8> {
    let mut copy = state.to_vec();
    let mut section = Vec::new();
    for word in [99u32, 1, 0, crc32fast::hash(b"?")] {
        section.extend_from_slice(&word.to_le_bytes());
    }
    section.extend_from_slice(&1u64.to_le_bytes());
    section.extend_from_slice(&crc32fast::hash(&section).to_le_bytes());
    section.push(b'?');
    copy.extend_from_slice(&section);
    let mut count = [0; 4];
    count.copy_from_slice(&copy[12..16]);
    let count = u32::from_le_bytes(count) + 1;
    copy[12..16].copy_from_slice(&count.to_le_bytes());
    let len = copy.len() as u64;
    copy[16..24].copy_from_slice(&len.to_le_bytes());
    let crc = crc32fast::hash(&copy[..24]);
    copy[24..28].copy_from_slice(&crc.to_le_bytes());
    copy
}

fn ram_untouched(plan: Plan, limit: Duration) -> Result<()> {
    let mut rig = Rig::new(plan)?;
    let base = rig.counters();
    rig.vm()?.start()?;
    rig.wait_for_progress(&base, limit)?;
    // Paused: vCPUs and devices stand still. What follows is the commit.
    rig.vm()?.pause()?;
    let paused = ram_hash(&rig);
    rig.vm()?.unpause()?;
    let base = rig.counters();
    rig.wait_for_progress(&base, limit)?;
    ensure!(
        ram_hash(&rig) != paused,
        "the hash does not see a running guest"
    );
    let (report, _) = rig.freeze()?;
    let frozen = ram_hash(&rig);
    rig.drop_vm()?;
    ensure!(ram_hash(&rig) == frozen, "ending the VM touched RAM");
    let state = rig.segment().exec().load()?;
    rig.resume_from(&state)?;
    ensure!(ram_hash(&rig) == frozen, "building the VM touched RAM");
    let meter = rig.vm()?.status().ram_meter;
    ensure!(
        meter == Default::default() && report.ram_touched == Default::default(),
        "the meter says {meter:?} and {:?}",
        report.ram_touched
    );
    rig.drop_vm()?;
    ensure!(
        ram_hash(&rig) == frozen,
        "ending an unstarted VM touched RAM"
    );
    rig.expect_frozen()?;
    let base = rig.counters();
    rig.resume()?;
    rig.wait_for_progress(&base, limit)?;
    rig.drop_vm()
}

fn ram_hash(rig: &Rig) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    for range in rig.segment().ram() {
        // SAFETY: the segment is mapped as long as the rig is borrowed. A
        // running guest may change the bytes meanwhile; they are plain bytes
        // and the hash is then of no use, which is what one caller wants.
        let bytes = unsafe { std::slice::from_raw_parts(range.host.as_ptr(), range.len as usize) };
        hasher.update(bytes);
    }
    hasher.finalize()
}

fn ending(plan: Plan, mode: char, wanted: &Event, limit: Duration) -> Result<()> {
    let mut rig = Rig::new(Plan { mode, ..plan })?;
    rig.vm()?.start()?;
    let event = rig.wait_for_end(limit)?;
    if mode == 'T'
        && matches!(event, Event::VcpuStopped(Stop::Failed(_)))
        && Environment::detect().kind == Kind::Software
    {
        let why = format!("this KVM has no hardware behind it and reports {event:?}");
        return Err(NotHere(why).into());
    }
    ensure!(event == *wanted, "reported as {event:?}");
    if *wanted != Event::VcpuStopped(Stop::Shutdown) {
        match rig.vm()?.freeze() {
            Err(VmError::Ending) => {}
            Err(error) => bail!("a freeze of an ending VM is refused for another reason: {error}"),
            Ok(_) => bail!("an ending VM was frozen"),
        }
    }
    rig.drop_vm()?;
    match rig.wait_for_end(Duration::ZERO) {
        Ok(more) => bail!("{more:?} was reported as well"),
        Err(_) => Ok(()),
    }
}
