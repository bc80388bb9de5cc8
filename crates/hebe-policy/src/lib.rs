//! When to rejuvenate, and what it costs: pure values, no I/O, no clock, no
//! threads.
//!
//! - [`usage`]: the papers' usage model, fitted to measurements.
//! - [`ageing`]: is the host ageing, and when is it exhausted.
//! - [`span`]: lengths of time as people write them.
//!
//! Whoever does the I/O reads the files and the clock, and hands both in.

#![forbid(unsafe_code)]

pub mod ageing;
pub mod span;
pub mod usage;

#[cfg(test)]
mod testing;
