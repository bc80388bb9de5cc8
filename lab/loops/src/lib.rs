//! Suspends and resumes a hand-assembled SMP guest, over and over.

pub mod environment;
pub mod guest;
pub mod rig;
