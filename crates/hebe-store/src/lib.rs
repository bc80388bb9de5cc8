//! Stores and segments: where guest RAM outlives a VMM or a host kernel.
