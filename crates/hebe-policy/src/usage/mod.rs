//! The usage model: what a rejuvenation costs, and what it saves a year.
//!
//! [`data`] reads measurements, [`mod@line`] fits them, [`model`] holds the papers'
//! formulas, [`paper`] their figures; [`report`] puts an answer together, and
//! [`text`] and [`chart`] show it.

pub mod chart;
pub mod data;
pub mod line;
pub mod model;
pub mod paper;
pub mod report;
pub mod text;
