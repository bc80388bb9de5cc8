//! System calls that no crate wraps: kexec, DAX set-up, tap; and the clock
//! that survives a kexec.

pub mod clock;
pub mod dax;
pub mod kexec;
pub mod lock;
pub mod proc;
pub mod tap;
