//! A disk image, a configuration of GRUB, or a boot loader entry, as a guest or
//! an attacker leaves it: it boots, or is refused.

#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    hebe_image::fuzzing::look_at(input);
});
