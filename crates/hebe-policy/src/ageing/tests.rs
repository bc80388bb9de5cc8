use super::*;
use crate::testing::Noise;
use proptest::prelude::*;

const GIB: f64 = 1_073_741_824.0;
const TEN_MINUTES: f64 = 600.0;

/// Available memory with noise, a daily cycle, and a leak.
fn host(noise: &mut Noise, days: f64, leak_per_day: f64) -> Vec<Sample> {
    let count = (days * 86_400.0 / TEN_MINUTES) as usize;
    (0..count)
        .map(|i| {
            let up_s = 300.0 + i as f64 * TEN_MINUTES;
            let day = up_s / 86_400.0;
            let cycle = 2.0 * GIB * (std::f64::consts::TAU * day).sin();
            let value = 20.0 * GIB + cycle + 0.1 * GIB * noise.normal() - leak_per_day * day;
            sample(up_s, value)
        })
        .collect()
}

fn sample(up_s: f64, available: f64) -> Sample {
    let mut readings = [None; Indicator::ALL.len()];
    readings[0] = Some(Reading {
        value: available,
        limit: 0.0,
    });
    Sample {
        boot: [1; 16],
        up_s,
        at_s: 1_700_000_000.0 + up_s,
        readings,
    }
}

fn only(assessment: &Assessment) -> Trend {
    assert_eq!(assessment.findings.len(), 1);
    assessment.findings[0].trend
}

fn look(samples: &[Sample]) -> Trend {
    only(&assess(samples, Look::default()).expect("assessment"))
}

#[test]
fn a_leak_is_found_and_its_end_foretold_within_a_fifth() {
    let mut noise = Noise::new(1);
    let samples = host(&mut noise, 8.0, 0.5 * GIB);
    let Trend::Ageing {
        per_day,
        per_day_interval: (low, high),
        exhausted_in_s,
        exhausted_interval_s: (earliest, latest),
        ..
    } = look(&samples)
    else {
        panic!("not found");
    };
    assert!((per_day / (-0.5 * GIB) - 1.0).abs() < 0.1, "{per_day}");
    assert!(low <= per_day && per_day <= high);
    // 20 − 4 GiB are left on average, at half a GiB a day: 32 days.
    let days = exhausted_in_s / 86_400.0;
    assert!((days / 32.0 - 1.0).abs() < 0.2, "{days}");
    assert!(earliest <= exhausted_in_s && latest.is_some_and(|l| l >= exhausted_in_s));
}

/// The cycle's rising flank, and noise: 200 seeded hosts, error rate 5 %.
#[test]
fn a_host_without_a_leak_is_called_ageing_no_more_often_than_stated() {
    let mut noise = Noise::new(2);
    let mut alarms = 0;
    for _ in 0..200 {
        let samples = host(&mut noise, 7.3, 0.0);
        alarms += usize::from(matches!(look(&samples), Trend::Ageing { .. }));
    }
    // Half of 5 % point the wrong way; three standard errors above 10 are 19.
    assert!(alarms <= 19, "{alarms}");
}

#[test]
fn less_than_five_days_say_nothing_but_a_look_without_a_period_may() {
    let mut noise = Noise::new(3);
    let samples = host(&mut noise, 4.5, 0.5 * GIB);
    let need = Trend::TooShort { have: 4, need: 5 };
    assert_eq!(look(&samples), need);
    let minutes: Vec<Sample> = (0..60)
        .map(|i| {
            sample(
                f64::from(i) * 10.0,
                1e9 - 1e5 * f64::from(i) + 1e4 * noise.normal(),
            )
        })
        .collect();
    let plain = Look {
        period: None,
        ..Look::default()
    };
    let found = assess(&minutes, plain).expect("assessment");
    let Trend::Ageing { exhausted_in_s, .. } = only(&found) else {
        panic!("not found");
    };
    let expected = (1e9 - 59e5) / 1e4;
    assert!(
        (exhausted_in_s / expected - 1.0).abs() < 0.2,
        "{exhausted_in_s}"
    );
    let short = assess(&minutes[..9], plain).expect("assessment");
    assert_eq!(only(&short), Trend::TooShort { have: 9, need: 10 });
}

#[test]
fn what_gets_better_is_no_finding() {
    let mut noise = Noise::new(4);
    let samples = host(&mut noise, 8.0, -0.5 * GIB);
    assert!(matches!(look(&samples), Trend::None { .. }));
}

#[test]
fn clock_jumps_change_nothing_but_their_count() {
    let mut noise = Noise::new(5);
    let samples = host(&mut noise, 8.0, 0.5 * GIB);
    let mut jumped = samples.clone();
    for sample in jumped.iter_mut().skip(300) {
        sample.at_s += 1e7;
    }
    for sample in jumped.iter_mut().skip(700) {
        sample.at_s -= 3e7;
    }
    let plain = assess(&samples, Look::default()).expect("assessment");
    let after = assess(&jumped, Look::default()).expect("assessment");
    assert_eq!((plain.clock_jumps, after.clock_jumps), (0, 2));
    assert_eq!(plain.findings, after.findings);
}

#[test]
fn a_sampler_that_was_away_or_ran_twice_finds_the_same_leak() {
    let mut noise = Noise::new(6);
    let samples = host(&mut noise, 9.0, 0.5 * GIB);
    let away: Vec<Sample> = samples
        .iter()
        .enumerate()
        .filter(|(i, _)| !(200..350).contains(i) && !(700..730).contains(i))
        .map(|(_, s)| s.clone())
        .collect();
    assert!(matches!(look(&away), Trend::Ageing { .. }));
    // A second sampler wrote old ones in between: they are left out.
    let mut twice = samples.clone();
    twice.insert(900, samples[10].clone());
    twice.insert(901, samples[900].clone());
    let found = assess(&twice, Look::default()).expect("assessment");
    assert_eq!(found.dropped, 2);
    assert!(matches!(only(&found), Trend::Ageing { .. }));
}

#[test]
fn a_reboot_begins_anew() {
    let mut noise = Noise::new(7);
    let mut samples = host(&mut noise, 8.0, 0.5 * GIB);
    let mut young = host(&mut noise, 1.0, 0.5 * GIB);
    for sample in &mut young {
        sample.boot = [2; 16];
    }
    samples.append(&mut young);
    let found = assess(&samples, Look::default()).expect("assessment");
    assert_eq!((found.samples, found.dropped), (144, 0));
    assert!(matches!(only(&found), Trend::TooShort { .. }));
    assert_eq!(found.soonest(), None);
}

#[test]
fn what_cannot_be_meant_is_refused() {
    let samples = [sample(1.0, 1.0)];
    for (bad, word) in [
        (
            Look {
                error_rate: 0.0,
                ..Look::default()
            },
            "error rate",
        ),
        (
            Look {
                confidence: 1.0,
                ..Look::default()
            },
            "confidence",
        ),
        (
            Look {
                period: Some(Span::seconds(5)),
                ..Look::default()
            },
            "too short",
        ),
    ] {
        let error = assess(&samples, bad).expect_err(word).to_string();
        assert!(error.contains(word), "{error}");
    }
    assert_eq!(assess(&[], Look::default()), Err(LookError::NoSamples));
}

proptest! {
    /// Whatever a store held, a look at it ends, and says nothing that is no
    /// number.
    #[test]
    fn any_samples_can_be_looked_at(
        raw in prop::collection::vec((0u8..3, prop::num::f64::ANY, prop::num::f64::ANY, 0u32..2_000_000), 1..80),
        period in prop::option::of(24u64..200_000),
    ) {
        let samples: Vec<Sample> = raw.iter().map(|(boot, value, limit, up)| {
            let mut one = sample(f64::from(*up), *value);
            one.boot = [*boot; 16];
            one.readings[1] = Some(Reading { value: *limit, limit: *value });
            one
        }).collect();
        let look = Look { period: period.map(Span::seconds), ..Look::default() };
        let found = assess(&samples, look).expect("assessment");
        for finding in found.findings {
            if let Trend::Ageing { p, exhausted_in_s, .. } = finding.trend {
                prop_assert!(!p.is_nan() && !exhausted_in_s.is_nan());
            }
        }
    }
}
