//! Which addresses the network has, and who has which of them.

use std::collections::BTreeMap;
use std::fmt;
use std::net::Ipv4Addr;

use serde::{Deserialize, Serialize};

use crate::NetworkError;

/// 256 addresses: `.1` is the host's, `.2` to `.254` are guests'.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Range(Ipv4Addr);

/// Addresses that are somebody else's: a route, a resolver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Block {
    pub network: Ipv4Addr,
    pub mask: Ipv4Addr,
}

/// Length of the range's prefix.
pub const PREFIX: u8 = 24;
const MASK: u32 = 0xffff_ff00;
/// Where the search for an address begins; below are those that people like to
/// give away themselves.
const FIRST: u8 = 10;
const LAST: u8 = 254;

impl Range {
    /// The range that holds an address.
    pub fn of(address: Ipv4Addr) -> Self {
        Self(Ipv4Addr::from_bits(address.to_bits() & MASK))
    }

    /// Its mask.
    pub fn mask(self) -> Ipv4Addr {
        Ipv4Addr::from_bits(MASK)
    }

    /// The host's own address, by which guests reach the world.
    pub fn gateway(self) -> Ipv4Addr {
        self.host(1)
    }

    /// Where everybody in it is reached.
    pub fn broadcast(self) -> Ipv4Addr {
        self.host(255)
    }

    /// The address with this last number.
    pub fn host(self, number: u8) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.0.to_bits() | u32::from(number))
    }

    /// Whether it holds the address.
    pub fn holds(self, address: Ipv4Addr) -> bool {
        Self::of(address) == self
    }

    /// Whether it and `block` have an address in common. Everything that goes
    /// nowhere else is no block.
    pub(crate) fn meets(self, block: &Block) -> bool {
        let both = block.mask.to_bits() & MASK;
        block.mask.to_bits() != 0 && (block.network.to_bits() ^ self.0.to_bits()) & both == 0
    }

    /// The first range that meets none of these. Each host begins with the same
    /// one; ranges that many routers hand out come late.
    pub(crate) fn choose(taken: &[Block]) -> Option<Self> {
        let tens = (86..118).map(|second| Ipv4Addr::new(10, second, 0, 0));
        let others = (16..32).map(|third| Ipv4Addr::new(172, 29, third, 0));
        let last = (230..246).map(|third| Ipv4Addr::new(192, 168, third, 0));
        tens.chain(others)
            .chain(last)
            .map(Self)
            .find(|range| !taken.iter().any(|block| range.meets(block)))
    }
}

impl fmt::Display for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{PREFIX}", self.0)
    }
}

/// The routes in the kernel's table (`/proc/net/route`), but for those of
/// `except`.
pub(crate) fn routes(table: &str, except: &str) -> Vec<Block> {
    let number = |text: &str| {
        // In the processor's own order, which is least byte first.
        let bits = u32::from_str_radix(text, 16).ok()?;
        Some(Ipv4Addr::from(bits.to_le_bytes()))
    };
    let lines = table.lines().skip(1);
    lines
        .filter_map(|line| {
            let words: Vec<&str> = line.split_whitespace().collect();
            if *words.first()? == except {
                return None;
            }
            Some(Block {
                network: number(words.get(1)?)?,
                mask: number(words.get(7)?)?,
            })
        })
        .collect()
}

/// Who has which address, on disk.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Book {
    /// The range that the network had last.
    pub range: Option<Range>,
    /// The last number of each NIC's address, by `VM/INDEX`.
    #[serde(default)]
    pub leases: BTreeMap<String, u8>,
}

impl Book {
    /// The address of NIC `key`: the one that it has, or asks for, or a free one
    /// that its name leads to, so that mostly each host gives it the same. When
    /// none is left, those of VMs that nobody knows any more are taken back.
    pub fn lease(
        &mut self,
        range: Range,
        key: &str,
        wanted: Option<Ipv4Addr>,
        known: &dyn Fn(&str) -> bool,
    ) -> Result<Ipv4Addr, NetworkError> {
        if let Some(address) = wanted {
            return self.lease_this(range, key, address, known);
        }
        if let Some(number) = self.leases.get(key) {
            return Ok(range.host(*number));
        }
        let number = match self.free(key) {
            Some(number) => number,
            None => {
                self.leases.retain(|key, _| known(vm_of(key)));
                self.free(key).ok_or(NetworkError::Full)?
            }
        };
        self.leases.insert(key.to_owned(), number);
        Ok(range.host(number))
    }

    fn lease_this(
        &mut self,
        range: Range,
        key: &str,
        address: Ipv4Addr,
        known: &dyn Fn(&str) -> bool,
    ) -> Result<Ipv4Addr, NetworkError> {
        let number = address.octets()[3];
        if !range.holds(address) || !(2..=LAST).contains(&number) {
            return Err(NetworkError::BadAddress { address, range });
        }
        let other = self.leases.iter().find(|(k, n)| **n == number && *k != key);
        if let Some((other, _)) = other.filter(|(other, _)| known(vm_of(other))) {
            let other = vm_of(other).to_owned();
            return Err(NetworkError::AddressTaken { address, other });
        }
        self.leases.retain(|_, n| *n != number);
        self.leases.insert(key.to_owned(), number);
        Ok(address)
    }

    fn free(&self, key: &str) -> Option<u8> {
        let count = usize::from(LAST - FIRST) + 1;
        // FNV-1a, 32 bits.
        let hash = key.bytes().fold(0x811c_9dc5_u32, |hash, byte| {
            (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193)
        });
        (0..count)
            .map(|step| FIRST + ((hash as usize + step) % count) as u8)
            .find(|number| !self.leases.values().any(|taken| taken == number))
    }
}

fn vm_of(key: &str) -> &str {
    key.split_once('/').map_or(key, |(vm, _)| vm)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const TABLE: &str = "\
Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT
eth0\t00000000\t010200C0\t0003\t0\t0\t0\t00000000\t0\t0\t0
eth0\t000200C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0
vpn\t0000560A\t00000000\t0001\t0\t0\t0\t0000FEFF\t0\t0\t0
hebe0\t0000580A\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0
broken
";

    #[test]
    fn a_range_that_is_routed_somewhere_is_not_taken() {
        let taken = routes(TABLE, "hebe0");
        assert_eq!(taken.len(), 3);
        let lan = Block {
            network: Ipv4Addr::new(192, 0, 2, 0),
            mask: Ipv4Addr::new(255, 255, 255, 0),
        };
        assert!(taken.contains(&lan));
        // 10.86.0.0/15 covers 10.86 and 10.87.
        let range = Range::choose(&taken).expect("free");
        assert_eq!(range.to_string(), "10.88.0.0/24");
        assert_eq!(range.gateway(), Ipv4Addr::new(10, 88, 0, 1));
        let all_tens = Block {
            network: Ipv4Addr::new(10, 0, 0, 0),
            mask: Ipv4Addr::new(255, 0, 0, 0),
        };
        let range = Range::choose(&[all_tens]).expect("free");
        assert_eq!(range.to_string(), "172.29.16.0/24");
        let everything = Block {
            network: Ipv4Addr::UNSPECIFIED,
            mask: Ipv4Addr::new(128, 0, 0, 0),
        };
        let rest = Block {
            network: Ipv4Addr::new(128, 0, 0, 0),
            ..everything
        };
        assert_eq!(Range::choose(&[everything, rest]), None);
    }

    #[test]
    fn an_address_that_is_asked_for_is_had_unless_somebody_has_it() {
        let range = Range::of(Ipv4Addr::new(10, 86, 0, 7));
        let mut book = Book::default();
        let all = |_: &str| true;
        let nobody = |_: &str| false;
        let web = Some(range.host(5));
        assert_eq!(book.lease(range, "web/0", web, &all).ok(), web);
        let taken = book.lease(range, "db/0", web, &all).expect_err("taken");
        assert!(taken.to_string().contains("'web'"), "{taken}");
        assert_eq!(book.lease(range, "db/0", web, &nobody).ok(), web);
        for bad in [range.host(0), range.host(1), range.host(255)] {
            assert!(book.lease(range, "x/0", Some(bad), &all).is_err());
        }
        let outside = Some(Ipv4Addr::new(10, 87, 0, 5));
        assert!(book.lease(range, "x/0", outside, &all).is_err());
    }

    #[test]
    fn what_nobody_knows_any_more_makes_room_and_nothing_else_does() {
        let range = Range::of(Ipv4Addr::new(10, 86, 0, 0));
        let mut book = Book::default();
        let all = |_: &str| true;
        for number in 0..245 {
            let key = format!("vm{number}/0");
            book.lease(range, &key, None, &all).expect("free");
        }
        assert!(matches!(
            book.lease(range, "late/0", None, &all),
            Err(NetworkError::Full)
        ));
        let but_one = |vm: &str| vm != "vm7";
        let of_vm7 = book.leases["vm7/0"];
        let late = book.lease(range, "late/0", None, &but_one).expect("room");
        assert_eq!(late, range.host(of_vm7));
    }

    proptest! {
        /// Whatever is leased in whatever order, nobody shares an address and
        /// everybody keeps theirs.
        #[test]
        fn nobody_shares_an_address(keys in prop::collection::vec("[a-c]{1,2}/[0-3]", 1..60)) {
            let range = Range::of(Ipv4Addr::new(10, 86, 0, 0));
            let mut book = Book::default();
            let all = |_: &str| true;
            let mut had = BTreeMap::new();
            for key in &keys {
                let address = book.lease(range, key, None, &all).expect("room");
                prop_assert!(range.holds(address) && address.octets()[3] >= FIRST);
                let before = had.insert(key.clone(), address);
                prop_assert!(before.is_none_or(|before| before == address));
            }
            let distinct: std::collections::BTreeSet<_> = had.values().collect();
            prop_assert_eq!(distinct.len(), had.len());
        }
    }
}
