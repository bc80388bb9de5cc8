//! How a VMM is confined.

use std::fmt;

use serde::{Deserialize, Serialize};

/// The parts of a VMM's cage, each on or off.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CageReport {
    /// In the order in which they were put on. Empty: the VMM runs without a
    /// cage, by order.
    pub parts: Vec<CagePart>,
}

/// One part of a cage.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CagePart {
    /// `limits`, `namespaces`, `user`, `capabilities`, `landlock` or `seccomp`.
    pub name: String,
    /// Whether it holds, whole or as far as the kernel has it.
    pub on: bool,
    /// How far, or why not; may be empty.
    pub detail: String,
}

impl CageReport {
    /// The parts that do not hold.
    pub fn open(&self) -> impl Iterator<Item = &CagePart> {
        self.parts.iter().filter(|part| !part.on)
    }

    /// Whether every part holds.
    pub fn is_whole(&self) -> bool {
        !self.parts.is_empty() && self.open().next().is_none()
    }
}

impl fmt::Display for CageReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.parts.is_empty() {
            return f.write_str("off, by --no-sandbox");
        }
        for (index, part) in self.parts.iter().enumerate() {
            let comma = if index == 0 { "" } else { ", " };
            let state = if part.on { "on" } else { "OFF" };
            write!(f, "{comma}{} {state}", part.name)?;
            if !part.detail.is_empty() {
                write!(f, " ({})", part.detail)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cage_is_whole_if_every_part_holds_and_says_what_does_not() {
        let part = |name: &str, on, detail: &str| CagePart {
            name: name.into(),
            on,
            detail: detail.into(),
        };
        let mut cage = CageReport::default();
        assert!(!cage.is_whole());
        assert_eq!(cage.to_string(), "off, by --no-sandbox");
        cage.parts.push(part("seccomp", true, ""));
        assert!(cage.is_whole());
        cage.parts
            .push(part("landlock", false, "off in this kernel"));
        assert!(!cage.is_whole());
        assert_eq!(
            cage.to_string(),
            "seccomp on, landlock OFF (off in this kernel)"
        );
    }
}
