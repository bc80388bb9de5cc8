//! A leak in a daemon of the host: flagged with its time to exhaustion, gone
//! after the warm reboot that the policy ordered by itself, under a VM that
//! goes on.

use anyhow::{Result, ensure};
use hebe_policy::ageing::Sample;

use crate::sawtooth::{self, Found, Plan};
use crate::test::Scene;

/// How far off the prediction may be that the policy acts on.
const OFF_MAX: f64 = 0.2;
/// And the first one, from ten samples: the sampler's own start is in them.
const FIRST_OFF_MAX: f64 = 0.6;

pub fn run(scene: &Scene) -> Result<()> {
    let plan = Plan {
        leak_kib_per_s: 2048,
        teeth: 1,
        to_the_end: false,
    };
    let mut found = Found::default();
    sawtooth::run(scene.assets, plan, &mut found, scene.progress)?;
    for tooth in &found.teeth {
        let (first, last) = (&tooth.flagged, &tooth.last);
        ensure!(
            first.holds() || first.off().abs() <= FIRST_OFF_MAX,
            "exhaustion was foretold wrongly at first: {first:?}"
        );
        ensure!(
            last.off().abs() <= OFF_MAX,
            "exhaustion was foretold wrongly: {last:?}, {first:?} at first"
        );
    }
    teeth(&found.samples)?;
    ensure!(
        found.svg.contains(">reboot<") && found.svg.contains("available memory"),
        "the chart shows no sawtooth: {}",
        found.svg
    );
    Ok(())
}

/// Memory falls in each boot and is higher at the beginning of the next: the
/// samples themselves make the sawtooth.
fn teeth(samples: &[Sample]) -> Result<()> {
    let memory = |s: &Sample| s.readings[0].map_or(f64::NAN, |r| r.value);
    let boots: Vec<&[Sample]> = samples.chunk_by(|a, b| a.boot == b.boot).collect();
    ensure!(boots.len() == 2, "{} boots were sampled", boots.len());
    for boot in &boots {
        let (first, last) = (memory(&boot[0]), memory(&boot[boot.len() - 1]));
        ensure!(first > last, "memory did not fall: {first} to {last}");
    }
    let low = memory(&boots[0][boots[0].len() - 1]);
    let high = memory(&boots[1][0]);
    ensure!(high > low, "memory did not come back: {low} to {high}");
    Ok(())
}
