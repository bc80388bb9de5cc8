//! System calls that no crate wraps, or none safely: kexec, live update, DAX
//! set-up, tap, io_uring; and the clock that survives a kexec.

pub mod clock;
pub mod dax;
pub mod fdpass;
pub mod fdstore;
pub mod interrupt;
pub mod kexec;
pub mod link;
pub mod lock;
pub mod luo;
pub mod proc;
pub mod ring;
pub mod tap;
pub mod thread;
