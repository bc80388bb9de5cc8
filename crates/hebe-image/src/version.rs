//! Which version is the newer one, as the UAPI group's "Version Format
//! Specification" compares them.

use std::cmp::Ordering;

/// Compares two versions, such as `6.1.0-50` and `6.1.0-9`. Total, and blind to
/// characters that no version has.
pub fn compare(a: &str, b: &str) -> Ordering {
    let (mut a, mut b) = (a.as_bytes(), b.as_bytes());
    loop {
        (a, b) = (skip(a), skip(b));
        // A pre-release comes before what it precedes.
        match (a.first() == Some(&b'~'), b.first() == Some(&b'~')) {
            (true, false) => return Ordering::Less,
            (false, true) => return Ordering::Greater,
            _ => {}
        }
        if a.is_empty() || b.is_empty() {
            return a.len().cmp(&b.len());
        }
        // These part components, the earlier one the more strongly.
        for mark in [b'~', b'-', b'^', b'.'] {
            match (a[0] == mark, b[0] == mark) {
                (true, false) => return Ordering::Less,
                (false, true) => return Ordering::Greater,
                (true, true) => {
                    (a, b) = (&a[1..], &b[1..]);
                    break;
                }
                (false, false) => {}
            }
        }
        let order = if starts_with_digit(a) || starts_with_digit(b) {
            let (x, y) = (
                split(&mut a, u8::is_ascii_digit),
                split(&mut b, u8::is_ascii_digit),
            );
            let (x, y) = (without_zeros(x), without_zeros(y));
            x.len().cmp(&y.len()).then(x.cmp(y))
        } else {
            let letter = u8::is_ascii_alphabetic;
            let (x, y) = (split(&mut a, letter), split(&mut b, letter));
            x.cmp(y)
        };
        if order != Ordering::Equal {
            return order;
        }
    }
}

fn skip(text: &[u8]) -> &[u8] {
    let kept = |b: &u8| b.is_ascii_alphanumeric() || b"~-^.".contains(b);
    let start = text.iter().position(kept).unwrap_or(text.len());
    &text[start..]
}

fn starts_with_digit(text: &[u8]) -> bool {
    text.first().is_some_and(u8::is_ascii_digit)
}

fn split<'a>(text: &mut &'a [u8], of: impl Fn(&u8) -> bool) -> &'a [u8] {
    let end = text.iter().position(|b| !of(b)).unwrap_or(text.len());
    let (head, tail) = text.split_at(end);
    *text = tail;
    head
}

fn without_zeros(digits: &[u8]) -> &[u8] {
    let start = digits.iter().position(|b| *b != b'0');
    &digits[start.unwrap_or(digits.len())..]
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn versions_come_in_the_order_of_the_specification() {
        // Ascending, from its examples and from kernels' names.
        let ascending = [
            "",
            "122.1",
            "123~rc1-1",
            "123",
            "123-a",
            "123-a.1",
            "123-1",
            "123-1.1",
            "123^post1",
            "123.a-1",
            "123.1-1",
            "123a-1",
            "124-1",
        ];
        for (i, a) in ascending.iter().enumerate() {
            for (j, b) in ascending.iter().enumerate() {
                assert_eq!(compare(a, b), i.cmp(&j), "{a} {b}");
            }
        }
        for (older, newer) in [
            ("6.1.0-9-amd64", "6.1.0-50-amd64"),
            ("vmlinuz-6.9.1", "vmlinuz-6.10.0"),
            ("6.1.0-rc1", "6.1.0-1"),
        ] {
            assert_eq!(compare(older, newer), Ordering::Less, "{older} {newer}");
        }
        for (a, b) in [("001", "1"), ("6_1", "6+1"), ("6.1", "6.1")] {
            assert_eq!(compare(a, b), Ordering::Equal, "{a} {b}");
        }
    }

    proptest! {
        #[test]
        fn the_order_is_one(a in "[a1~^.0_-]{0,8}", b in "[a1~^.0_-]{0,8}", c in "[a1~^.0_-]{0,8}") {
            prop_assert_eq!(compare(&a, &b), compare(&b, &a).reverse());
            if compare(&a, &b).is_le() && compare(&b, &c).is_le() {
                prop_assert!(compare(&a, &c).is_le());
            }
        }
    }
}
