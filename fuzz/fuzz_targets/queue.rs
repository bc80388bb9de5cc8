//! Guest RAM as a hostile guest leaves it, under each kind of device.

#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| hebe_devices::fuzzing::drive_queue(input));
