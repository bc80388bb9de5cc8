use super::*;
use crate::testing::Noise;
use proptest::prelude::*;

const GIB: f64 = 1_073_741_824.0;
const TEN_MINUTES: f64 = 600.0;
const BOOT: [u8; 16] = [1; 16];

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
        boot: BOOT,
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
    only(&assess(samples, BOOT, Look::default()).expect("assessment"))
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
    let found = assess(&minutes, BOOT, plain).expect("assessment");
    let Trend::Ageing { exhausted_in_s, .. } = only(&found) else {
        panic!("not found");
    };
    let expected = (1e9 - 59e5) / 1e4;
    assert!(
        (exhausted_in_s / expected - 1.0).abs() < 0.2,
        "{exhausted_in_s}"
    );
    let short = assess(&minutes[..9], BOOT, plain).expect("assessment");
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
    let plain = assess(&samples, BOOT, Look::default()).expect("assessment");
    let after = assess(&jumped, BOOT, Look::default()).expect("assessment");
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
    let found = assess(&twice, BOOT, Look::default()).expect("assessment");
    assert_eq!(found.dropped, 2);
    assert!(matches!(only(&found), Trend::Ageing { .. }));
}

#[test]
fn a_reboot_begins_anew_even_before_its_first_sample() {
    let mut noise = Noise::new(7);
    let mut samples = host(&mut noise, 8.0, 0.5 * GIB);
    let old = samples.len();
    assert!(matches!(look(&samples), Trend::Ageing { .. }));
    let assess = |samples: &[Sample]| assess(samples, [2; 16], Look::default()).expect("look");
    let none = assess(&samples);
    assert_eq!((none.samples, none.samples_before), (0, old));
    assert_eq!((none.span_s, none.soonest()), (0.0, None));
    assert!(none.findings.is_empty());
    let mut young = host(&mut noise, 1.0, 0.5 * GIB);
    for sample in &mut young {
        sample.boot = [2; 16];
    }
    samples.append(&mut young);
    let found = assess(&samples);
    assert_eq!((found.samples, found.dropped), (144, 0));
    assert!(matches!(only(&found), Trend::TooShort { .. }));
    assert_eq!(found.soonest(), None);
}

/// A part of a day, and what part of its height a daily cycle has then.
type Cycle = fn(f64) -> f64;

/// What repeats itself daily, from 0 to 1, by the part of the day that has gone
/// by: not only sines.
const CYCLES: [(&str, Cycle); 4] = [
    ("office hours", |day| f64::from((0.33..0.75).contains(&day))),
    // Caches that fill all day, and a job at night that empties them.
    ("emptied nightly", |day| 1.0 - day),
    ("a short job", |day| f64::from((0.1..0.12).contains(&day))),
    ("two humps", |day| {
        (std::f64::consts::TAU * 2.0 * day).sin().abs()
    }),
];

/// A host with such a cycle of 6 GiB, whose days differ as a whole, sampled
/// every seven minutes and a little: no whole number of times a day.
fn cyclic(noise: &mut Noise, cycle: Cycle, days: f64, leak_per_day: f64) -> Vec<Sample> {
    let (mut samples, mut up_s) = (Vec::new(), 100.0);
    let (mut today, mut busy) = (0, 1.0);
    while up_s < days * 86_400.0 {
        let day = up_s / 86_400.0;
        if day as u32 != today {
            (today, busy) = (day as u32, 1.0 + 0.1 * noise.normal());
        }
        let used = 6.0 * GIB * cycle(day.fract()) * busy + leak_per_day * day;
        samples.push(sample(
            up_s,
            20.0 * GIB - used + 0.05 * GIB * noise.normal(),
        ));
        up_s += 420.0 + 30.0 * noise.uniform();
    }
    samples
}

/// 60 seeded hosts of each kind, looked at when a day and a half more than the
/// least has gone by, in the midst of a cycle.
#[test]
fn daily_cycles_of_any_shape_are_no_trend() {
    let mut noise = Noise::new(21);
    for (name, cycle) in CYCLES {
        let mut alarms = 0;
        for _ in 0..60 {
            let samples = cyclic(&mut noise, cycle, 6.6, 0.0);
            alarms += usize::from(matches!(look(&samples), Trend::Ageing { .. }));
        }
        // Half of 5 % point the wrong way: 1.5, and three standard errors.
        assert!(alarms <= 5, "{name}: {alarms} of 60");
    }
}

/// A leak of a fifteenth of the cycle's height a day is found under each of them
/// within nine days, with its slope.
#[test]
fn a_leak_far_smaller_than_the_cycle_is_found_under_it() {
    let mut noise = Noise::new(22);
    for (name, cycle) in CYCLES {
        let mut found = 0;
        for _ in 0..20 {
            let samples = cyclic(&mut noise, cycle, 9.4, 0.4 * GIB);
            if let Trend::Ageing { per_day, .. } = look(&samples) {
                found += usize::from((per_day / (-0.4 * GIB) - 1.0).abs() < 0.3);
            }
        }
        assert!(found >= 18, "{name}: {found} of 20");
    }
}

/// The flank of a cycle: that is why a look has a period by default.
#[test]
fn without_its_period_a_cycle_does_look_like_a_trend() {
    let mut noise = Noise::new(23);
    let samples = cyclic(&mut noise, CYCLES[1].1, 0.9, 0.0);
    // Caches that fill all day, upside down: memory gets less all day.
    let worse: Vec<Sample> = samples
        .iter()
        .map(|s| sample(s.up_s, 40.0 * GIB - s.readings[0].expect("value").value))
        .collect();
    let plain = Look {
        period: None,
        ..Look::default()
    };
    let found = assess(&worse, BOOT, plain).expect("assessment");
    assert!(matches!(only(&found), Trend::Ageing { .. }));
    assert!(matches!(look(&worse), Trend::TooShort { .. }));
}

#[test]
fn how_to_look_is_read_as_people_write_it() {
    let read = |text: &str| toml::from_str::<Look>(text);
    assert_eq!(read("").expect("default"), Look::default());
    let look = read("period = \"none\"\nerror_rate = 0.01\n").expect("look");
    assert_eq!((look.period, look.error_rate), (None, 0.01));
    let look = read("period = \"1w\"\n").expect("look");
    assert_eq!(look.period, Some(Span::weeks(1)));
    for bad in ["period = \"soon\"", "period = 7", "rate = 1"] {
        assert!(read(bad).is_err(), "{bad}");
    }
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
        let error = assess(&samples, BOOT, bad).expect_err(word).to_string();
        assert!(error.contains(word), "{error}");
    }
    assert_eq!(
        assess(&[], BOOT, Look::default()),
        Err(LookError::NoSamples)
    );
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
        let found = assess(&samples, BOOT, look).expect("assessment");
        for finding in found.findings {
            if let Trend::Ageing { p, exhausted_in_s, .. } = finding.trend {
                prop_assert!(!p.is_nan() && !exhausted_in_s.is_nan());
            }
        }
    }
}
