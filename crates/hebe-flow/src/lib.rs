//! The state machines: pure values, no I/O, no clock.
