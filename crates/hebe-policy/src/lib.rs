//! When to rejuvenate, and what it costs: pure values, no I/O, no clock, no
//! threads.
//!
//! - [`usage`]: the papers' usage model, fitted to measurements.
//! - [`ageing`]: is the host ageing, and when is it exhausted.
//! - [`calendar`]: events and windows.
//! - [`policy`]: when to go, decided from facts.
//! - [`fleet`]: through a group of hosts, at most k at once.
//! - [`cluster`]: what a group can do over one cycle, by simulation.
//! - [`span`]: lengths of time as people write them.
//!
//! Whoever does the I/O reads the files and the clock, and hands both in.

#![forbid(unsafe_code)]

pub mod ageing;
pub mod calendar;
pub mod cluster;
pub mod fleet;
pub mod policy;
pub mod span;
pub mod usage;

#[cfg(test)]
mod testing;
