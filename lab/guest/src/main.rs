//! Init of lab guests and hosts.

fn main() {}
