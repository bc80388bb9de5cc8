//! A save area as damage or an attacker leaves it: read as it is, and once
//! more behind checksums that are right; what decodes is constructed.

#![no_main]

use hebe_state::fuzzing::{read_state, seal};

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    let _ = read_state(input);
    if let Ok(functions) = read_state(&seal(input)) {
        hebe_devices::fuzzing::restore_devices(&functions);
    }
});
