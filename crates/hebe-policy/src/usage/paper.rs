//! The papers' own figures: the fitted functions and the downtimes and
//! availabilities of JBoss, with the swapped labels (D1).

use std::collections::BTreeMap;

use serde::Serialize;

use super::data::{Quantity, Sample};
use super::line::Line;
use super::model::{Availability, Method, Model, ModelError, Usage};
use crate::span::Span;

/// Number of VMs in.
pub const PAPER_N: u32 = 11;
/// α in R-47.
pub const PAPER_ALPHA: f64 = 0.5;
/// Downtime of a JBoss guest's OS rejuvenation, in seconds.
pub const JBOSS_OS_S: f64 = 33.6;
/// A VM's downtime in a live migration between two machines (V-36: VMBeam's
/// 0.6 s are 0.2 s more), in seconds; of another test bed than the rest.
pub const MIGRATION_PAUSE_S: f64 = 0.4;
/// Intervals in R-47.
pub const OS_INTERVAL: Span = Span::weeks(1);
/// Intervals in R-47.
pub const HOST_INTERVAL: Span = Span::weeks(4);

/// The papers' functions, in seconds.
pub fn model() -> Model {
    let saved = Sample {
        quantity: Quantity::Saved,
        n: f64::from(PAPER_N),
        seconds: 429.0,
    };
    Model {
        lines: BTreeMap::from([
            (Quantity::RebootVmm, Line::published(-0.55, 43.0)),
            (Quantity::Resume, Line::published(0.43, -0.07)),
            (Quantity::RebootOs, Line::published(3.8, 13.0)),
            (Quantity::Boot, Line::published(3.4, 2.8)),
            (Quantity::ResetHw, Line::constant(47.0)),
            (Quantity::Evacuate, Line::constant(MIGRATION_PAUSE_S)),
        ]),
        samples: Vec::new(),
        points: vec![saved],
    }
}

/// One method's availability, computed and as the paper prints it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Published {
    /// Which method.
    pub method: Method,
    /// Measured downtime, nothing credited, in seconds.
    pub measured_s: f64,
    /// What the model makes of it.
    pub computed: Availability,
    /// What the paper's text says of this method, in percent.
    pub printed_percent: f64,
}

/// The availability of JBoss at n = 11, from the measured downtimes:
/// warm 42 s, saved 429 s, cold 241 s.
pub fn published(confidence: f64) -> Result<Vec<Published>, ModelError> {
    let measured = [
        (Method::Warm, Quantity::Warm, 42.0, 99.993),
        (Method::Saved, Quantity::Saved, 429.0, 99.985),
        (Method::Cold, Quantity::Cold, 241.0, 99.977),
    ];
    let lines = measured.map(|(_, quantity, seconds, _)| (quantity, Line::constant(seconds)));
    let model = Model {
        lines: BTreeMap::from(lines),
        samples: Vec::new(),
        points: Vec::new(),
    };
    let usage = Usage {
        n: PAPER_N,
        alpha: PAPER_ALPHA,
        os_interval: OS_INTERVAL,
        host_interval: HOST_INTERVAL,
        os_downtime_s: Some(JBOSS_OS_S),
        evacuate_pause_s: None,
        moves: 0,
        confidence,
    };
    let mut all = Vec::new();
    for (method, quantity, measured_s, printed_percent) in measured {
        let computed = model.availability(method, &usage)?;
        all.push(Published {
            method,
            measured_s,
            computed: computed.ok_or(ModelError::Unknown(quantity, "none"))?,
            printed_percent,
        });
    }
    Ok(all)
}
