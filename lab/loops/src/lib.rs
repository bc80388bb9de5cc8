//! Suspends and resumes a hand-assembled SMP guest, over and over.

pub mod guest;
