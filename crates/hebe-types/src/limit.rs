//! How much of the host's processors and disks a VM gets.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// Least and most of a [`CpuLimit`], in percent of one processor. With less a
/// VMM could not suspend its VM in time.
const PERCENT: std::ops::RangeInclusive<u32> = 10..=100_000;

/// Most time of processors, in percent of one: `"150%"` is one and a half.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CpuLimit(u32);

/// A text that is none.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "'{0}' is no limit of processor time: write it in percent of one processor, such as \"150%\", from 10% to 100000%"
)]
pub struct InvalidCpuLimit(String);

impl CpuLimit {
    /// In percent of one processor.
    pub fn percent(self) -> u32 {
        self.0
    }
}

impl FromStr for CpuLimit {
    type Err = InvalidCpuLimit;

    fn from_str(text: &str) -> Result<Self, InvalidCpuLimit> {
        let digits = text.trim().strip_suffix('%').map(str::trim_end);
        let plain = digits.filter(|d| d.bytes().all(|b| b.is_ascii_digit()));
        plain
            .and_then(|digits| digits.parse().ok())
            .filter(|percent| PERCENT.contains(percent))
            .map(Self)
            .ok_or_else(|| InvalidCpuLimit(text.to_owned()))
    }
}

impl fmt::Display for CpuLimit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}%", self.0)
    }
}

impl Serialize for CpuLimit {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for CpuLimit {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_is_a_number_of_percent() {
        for (text, percent) in [("150%", 150), (" 10 %", 10), ("100000%", 100_000)] {
            let limit: CpuLimit = text.parse().expect(text);
            assert_eq!(limit.percent(), percent);
            assert_eq!(limit.to_string().parse(), Ok(limit));
        }
        for text in [
            "",
            "%",
            "150",
            "1.5",
            "9%",
            "0%",
            "-20%",
            "+20%",
            "100001%",
            "99999999999%",
        ] {
            let refused = text.parse::<CpuLimit>().expect_err(text);
            assert!(refused.to_string().contains("percent of one"), "{refused}");
        }
    }
}
