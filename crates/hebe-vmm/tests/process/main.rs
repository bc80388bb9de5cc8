//! `hebe-vmm` as a process: what it takes over, what it leaves behind.

mod booting;
mod caged;
mod descriptors;
mod ending;
mod failing;
mod files;
mod gate;
mod guest;
mod listed;
mod root;
mod vmm;
