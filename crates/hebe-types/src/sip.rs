//! SipHash-2-4: a keyed hash of short inputs, the same in every release.
//!
//! Source: J.-P. Aumasson, D. J. Bernstein, "SipHash: a fast short-input PRF",
//! 2012. The standard library has it too, and promises nothing about it.

/// The hash of `data` under `key`.
pub(crate) fn siphash(key: [u8; 16], data: &[u8]) -> u64 {
    let [k0, k1] = [word(&key[..8]), word(&key[8..])];
    let mut v = [
        k0 ^ 0x736f_6d65_7073_6575,
        k1 ^ 0x646f_7261_6e64_6f6d,
        k0 ^ 0x6c79_6765_6e65_7261,
        k1 ^ 0x7465_6462_7974_6573,
    ];
    let mut take = |m: u64| {
        v[3] ^= m;
        rounds(&mut v, 2);
        v[0] ^= m;
    };
    let whole = data.chunks_exact(8);
    let rest = whole.remainder();
    whole.for_each(|chunk| take(word(chunk)));
    take(word(rest) | ((data.len() as u64) << 56));
    v[2] ^= 0xff;
    rounds(&mut v, 4);
    v[0] ^ v[1] ^ v[2] ^ v[3]
}

/// Up to eight bytes, the lowest first.
fn word(bytes: &[u8]) -> u64 {
    let all = bytes.iter().rev();
    all.fold(0, |word, byte| (word << 8) | u64::from(*byte))
}

fn rounds(v: &mut [u64; 4], count: usize) {
    for _ in 0..count {
        v[0] = v[0].wrapping_add(v[1]);
        v[2] = v[2].wrapping_add(v[3]);
        v[1] = v[1].rotate_left(13) ^ v[0];
        v[3] = v[3].rotate_left(16) ^ v[2];
        v[0] = v[0].rotate_left(32);
        v[2] = v[2].wrapping_add(v[1]);
        v[0] = v[0].wrapping_add(v[3]);
        v[1] = v[1].rotate_left(17) ^ v[2];
        v[3] = v[3].rotate_left(21) ^ v[0];
        v[2] = v[2].rotate_left(32);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_the_papers() {
        let bytes: Vec<u8> = (0..16).collect();
        let key: [u8; 16] = bytes.clone().try_into().expect("16 bytes");
        // Appendix A.
        assert_eq!(siphash(key, &bytes[..15]), 0xa129_ca61_49be_45e5);
        assert_ne!(siphash(key, &bytes[..14]), siphash(key, &bytes[..15]));
    }
}
