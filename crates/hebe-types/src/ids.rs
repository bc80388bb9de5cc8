//! Names and ids.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::sip::siphash;

/// Longest VM name, in bytes. Short enough for a fixed-size segment record
/// and for a path of a unix socket.
pub const NAME_LEN_MAX: usize = 32;

/// A VM's name: 1 to 32 of `a-z`, `0-9` and `-`, beginning with a letter or digit.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct VmName(String);

/// The text cannot name a VM.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error(
    "'{0}' cannot name a VM: use 1 to 32 lower-case letters, digits and '-', beginning with a letter or digit"
)]
pub struct InvalidName(pub String);

impl VmName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for VmName {
    type Err = InvalidName;

    fn from_str(text: &str) -> Result<Self, InvalidName> {
        let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        if text.is_empty()
            || text.len() > NAME_LEN_MAX
            || text.starts_with('-')
            || !text.chars().all(allowed)
        {
            return Err(InvalidName(text.to_owned()));
        }
        Ok(Self(text.to_owned()))
    }
}

impl TryFrom<String> for VmName {
    type Error = InvalidName;

    fn try_from(text: String) -> Result<Self, InvalidName> {
        text.parse()
    }
}

impl From<VmName> for String {
    fn from(name: VmName) -> Self {
        name.0
    }
}

impl fmt::Display for VmName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A VM's identity: 16 random bytes, drawn when the VM is created, kept as
/// long as its RAM lives.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct VmId(pub [u8; 16]);

impl fmt::Display for VmId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, byte) in self.0.iter().enumerate() {
            if matches!(i, 4 | 6 | 8 | 10) {
                f.write_str("-")?;
            }
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for VmId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A host's identity: 16 random bytes, drawn once and kept in its state directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostId(pub [u8; 16]);

/// Index of a segment's record in its store's segment table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct SegmentId(pub u32);

impl fmt::Display for SegmentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// An Ethernet address, written `52:54:00:12:34:56`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MacAddr(pub [u8; 6]);

impl MacAddr {
    /// A locally administered unicast address for a NIC of the VM that is called
    /// `vm` on `host`, the same at each boot. Two NICs of one VM never have the same
    /// one; two of other VMs, or of other hosts, with a chance of about one in
    /// 2⁴⁶. The VM's id is not in it, which is drawn anew at each boot.
    pub fn of_nic(host: HostId, vm: &VmName, nic: u8) -> Self {
        let hash = siphash(host.0, format!("mac/{vm}").as_bytes());
        let [a, b, c, d, e, last, ..] = hash.to_le_bytes();
        Self([(a & 0xfc) | 0x02, b, c, d, e, last.wrapping_add(nic)])
    }

    /// A locally administered unicast address derived from a VM id and the
    /// index of the NIC, so that it is the same after every resume. For VMs
    /// that were booted without one: by an earlier release, or on a host that has
    /// no id.
    pub fn derived(vm: VmId, nic_index: u8) -> Self {
        let VmId(id) = vm;
        Self([0x52, 0x54, id[0], id[1], id[2], id[3] ^ nic_index])
    }
}

impl FromStr for MacAddr {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let refuse =
            || format!("'{text}' is not a unicast Ethernet address such as 52:54:00:12:34:56");
        let mut bytes = [0u8; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().filter(|p| p.len() == 2).ok_or_else(refuse)?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| refuse())?;
        }
        if parts.next().is_some() || bytes[0] & 1 != 0 {
            return Err(refuse());
        }
        Ok(Self(bytes))
    }
}

impl TryFrom<String> for MacAddr {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<MacAddr> for String {
    fn from(mac: MacAddr) -> Self {
        mac.to_string()
    }
}

impl fmt::Display for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn names_are_checked() {
        for good in ["a", "web-1", "0", "x".repeat(32).as_str()] {
            assert!(good.parse::<VmName>().is_ok(), "{good}");
        }
        for bad in ["", "-a", "A", "a/b", "..", "a b", "x".repeat(33).as_str()] {
            assert!(bad.parse::<VmName>().is_err(), "{bad}");
        }
    }

    /// Changed, every VM without `mac` would have another one at its next boot.
    #[test]
    fn the_macs_of_a_name_stay_what_they_are() {
        let host = HostId([7; 16]);
        let mac = |vm: &str, nic| MacAddr::of_nic(host, &vm.parse().expect("name"), nic);
        let texts = [mac("web", 0), mac("web", 1), mac("db", 0)].map(|m| m.to_string());
        assert_eq!(
            texts,
            [
                "c6:45:cd:50:25:86",
                "c6:45:cd:50:25:87",
                "fa:7d:25:d6:f4:11"
            ]
        );
    }

    #[test]
    fn no_two_nics_get_one_mac_and_all_are_local_and_unicast() {
        let mut seen = HashSet::new();
        for host in 0..16 {
            for vm in 0..64 {
                let name: VmName = format!("vm{vm}").parse().expect("name");
                for nic in 0..24 {
                    let mac = MacAddr::of_nic(HostId([host; 16]), &name, nic);
                    assert_eq!(mac.0[0] & 3, 2, "{mac}");
                    assert!(seen.insert(mac), "{host} {vm} {nic}");
                }
            }
        }
        let name: VmName = "x".repeat(32).parse().expect("name");
        let all = (0..=u8::MAX).map(|nic| MacAddr::of_nic(HostId([0; 16]), &name, nic));
        assert_eq!(all.collect::<HashSet<_>>().len(), 256);
    }

    #[test]
    fn macs_round_trip_and_multicast_is_refused() {
        let text = "52:54:00:ab:cd:ef";
        assert_eq!(
            text.parse::<MacAddr>().map(|m| m.to_string()),
            Ok(text.into())
        );
        for bad in [
            "01:00:00:00:00:00",
            "52:54",
            "52:54:0:1:2:3",
            "52:54:00:ab:cd:ef:00",
        ] {
            assert!(bad.parse::<MacAddr>().is_err(), "{bad}");
        }
    }
}
