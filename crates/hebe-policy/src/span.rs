//! Lengths of time as people write them: `90s`, `15min`, `12h`, `1w`, `1d12h`.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A length of time in whole seconds, at most ten thousand years.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Span(u64);

/// Longest span, in seconds.
const SPAN_MAX_S: u64 = 10_000 * 366 * 86_400;

/// Units with their seconds, the longest first.
const UNITS: [(&str, u64); 5] = [
    ("w", 604_800),
    ("d", 86_400),
    ("h", 3_600),
    ("min", 60),
    ("s", 1),
];

/// The text is not a span.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("'{0}' is not a length of time: write numbers with w, d, h, min or s, such as 4w or 1d12h")]
pub struct InvalidSpan(pub String);

impl Span {
    /// `n` seconds; more than ten thousand years count as ten thousand.
    pub const fn seconds(n: u64) -> Self {
        if n > SPAN_MAX_S {
            Self(SPAN_MAX_S)
        } else {
            Self(n)
        }
    }

    /// `n` weeks.
    pub const fn weeks(n: u64) -> Self {
        Self::seconds(n.saturating_mul(604_800))
    }

    /// `n` days.
    pub const fn days(n: u64) -> Self {
        Self::seconds(n.saturating_mul(86_400))
    }

    /// `n` hours.
    pub const fn hours(n: u64) -> Self {
        Self::seconds(n.saturating_mul(3_600))
    }

    /// `n` minutes.
    pub const fn minutes(n: u64) -> Self {
        Self::seconds(n.saturating_mul(60))
    }

    /// In seconds.
    pub const fn as_s(self) -> u64 {
        self.0
    }
}

impl FromStr for Span {
    type Err = InvalidSpan;

    fn from_str(text: &str) -> Result<Self, InvalidSpan> {
        let invalid = || InvalidSpan(text.to_owned());
        let mut rest = text.trim();
        let mut total: u64 = 0;
        if rest.is_empty() {
            return Err(invalid());
        }
        while !rest.is_empty() {
            let digits = rest.len() - rest.trim_start_matches(|c: char| c.is_ascii_digit()).len();
            let (number, tail) = rest.split_at(digits);
            let tail = tail.trim_start();
            let letters = tail.len()
                - tail
                    .trim_start_matches(|c: char| c.is_ascii_alphabetic())
                    .len();
            let (unit, tail) = tail.split_at(letters);
            let number: u64 = number.parse().map_err(|_| invalid())?;
            let seconds = match unit {
                "m" => Some(60),
                _ => UNITS.iter().find(|(name, _)| *name == unit).map(|u| u.1),
            };
            total = seconds
                .and_then(|s| number.checked_mul(s))
                .and_then(|s| total.checked_add(s))
                .filter(|s| *s <= SPAN_MAX_S)
                .ok_or_else(invalid)?;
            rest = tail.trim_start();
        }
        Ok(Self(total))
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0 == 0 {
            return f.write_str("0s");
        }
        let mut rest = self.0;
        for (unit, seconds) in UNITS {
            if rest >= seconds {
                write!(f, "{}{unit}", rest / seconds)?;
                rest %= seconds;
            }
        }
        Ok(())
    }
}

impl Serialize for Span {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Span {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn people_write_it_in_many_ways() {
        for (text, seconds) in [
            ("4w", 2_419_200),
            ("1d12h", 129_600),
            ("1d 12h", 129_600),
            ("90 s", 90),
            ("15min", 900),
            ("15m", 900),
            ("0s", 0),
        ] {
            assert_eq!(text.parse(), Ok(Span::seconds(seconds)), "{text}");
        }
        for text in ["", "4", "w", "-1s", "4 fortnights", "1.5h", "99999999999w"] {
            let error = text.parse::<Span>().expect_err(text);
            assert!(error.to_string().contains("such as 4w"), "{error}");
        }
        assert_eq!(Span::weeks(4).to_string(), "4w");
    }

    proptest! {
        #[test]
        fn what_is_printed_is_read_back(seconds in 0..=SPAN_MAX_S) {
            let span = Span::seconds(seconds);
            prop_assert_eq!(span.to_string().parse(), Ok(span));
        }
    }
}
