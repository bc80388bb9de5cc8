//! NICs, as a definition says them.
//!
//! A NIC is on a tap of the operator's, perhaps in a bridge of theirs; or in a
//! network that Hebe makes: one with translation of addresses for all such VMs
//! of the host, or one of the VM's own, made by `passt` without privileges. Of
//! the latter two the host fills in what the operator left out (tap, bridge, MAC,
//! address) before a VMM sees it, so that a VM's state holds all of it.

use core::net::Ipv4Addr;
use std::collections::HashSet;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::{HostId, MacAddr, VmId, VmName};

/// The bridge of the network that Hebe makes.
pub const NAT_BRIDGE: &str = "hebe0";
/// The guest's address in a network of its own ([`Network::User`]).
pub const USER_ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);
/// Its gateway there.
pub const USER_GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
/// Most ports that are forwarded to one NIC.
pub const FORWARDS_MAX: usize = 64;

/// A network that Hebe makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Network {
    /// The bridge [`NAT_BRIDGE`], with DHCP; what leaves the host has the host's
    /// address.
    Nat,
    /// `passt`: the guest's connections become sockets of an ordinary process.
    User,
}

/// A NIC.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetConfig {
    /// The tap device, created if absent. 1 to 15 bytes. Empty: chosen by the
    /// host, in a network that Hebe makes.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub tap: String,
    /// The bridge that the tap joins, if any.
    #[serde(default)]
    pub bridge: Option<String>,
    /// Derived from the host's id, the VM's name and the NIC's number when absent.
    #[serde(default)]
    pub mac: Option<MacAddr>,
    /// A network that Hebe makes; then `tap` and `bridge` are left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<Network>,
    /// The guest's address there; chosen by the host when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<Ipv4Addr>,
    /// Ports of the host that lead to the guest.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub forward: Vec<Forward>,
}

impl NetConfig {
    /// A NIC on a tap of the operator's.
    pub fn tap(tap: String, bridge: Option<String>) -> Self {
        Self {
            tap,
            bridge,
            ..Self::default()
        }
    }

    /// A NIC in a network that Hebe makes.
    pub fn made(network: Network) -> Self {
        Self {
            network: Some(network),
            ..Self::default()
        }
    }

    /// Its MAC address, as NIC `index` of `vm`, which was booted with this.
    pub fn mac_of(&self, vm: VmId, index: usize) -> MacAddr {
        self.mac
            .unwrap_or_else(|| MacAddr::derived(vm, index as u8))
    }

    /// The same, with all that follows from the VM filled in: a resume finds
    /// everything under the names and addresses it had.
    pub fn resolved(&self, name: &VmName, vm: VmId, index: usize) -> Self {
        let mut net = self.clone();
        match self.network {
            None => return net,
            Some(Network::Nat) => {
                if net.tap.is_empty() {
                    net.tap = made_tap(name, index);
                }
                net.bridge = Some(NAT_BRIDGE.to_owned());
            }
            Some(Network::User) => net.address = Some(USER_ADDRESS),
        }
        net.mac = Some(self.mac_of(vm, index));
        net
    }
}

/// Gives each NIC of the VM called `vm` that has no MAC address its own, as it has
/// at each boot on `host`.
pub fn fill_macs(nets: &mut [NetConfig], host: HostId, vm: &VmName) {
    let mut taken: HashSet<MacAddr> = nets.iter().filter_map(|net| net.mac).collect();
    for (index, net) in nets.iter_mut().enumerate() {
        if net.mac.is_none() {
            let of = |step: u8| MacAddr::of_nic(host, vm, (index as u8).wrapping_add(step));
            // The next one, where somebody gave its own to another NIC.
            net.mac = (0..=u8::MAX).map(of).find(|mac| taken.insert(*mac));
        }
    }
}

/// Two VMs get one name with a chance of one in 2³²; the second is then refused
/// its tap.
fn made_tap(name: &VmName, index: usize) -> String {
    // FNV-1a, 32 bits.
    let key = format!("{name}/{index}");
    let hash = key.bytes().fold(0x811c_9dc5_u32, |hash, byte| {
        (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193)
    });
    format!("hebe{hash:08x}")
}

/// A port of the host that leads to one of the guest's, written
/// `[tcp:|udp:][ADDRESS:]HOST-PORT:GUEST-PORT`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Forward {
    /// UDP, and TCP otherwise.
    pub udp: bool,
    /// An address of the host; without one, all of its addresses.
    pub address: Option<Ipv4Addr>,
    /// The host's port.
    pub host: u16,
    /// The guest's port.
    pub guest: u16,
}

impl Forward {
    /// `tcp` or `udp`.
    pub fn protocol(&self) -> &'static str {
        if self.udp { "udp" } else { "tcp" }
    }

    /// Whether both claim a port of the host.
    pub fn collides(&self, other: &Self) -> bool {
        let same_place = match (self.address, other.address) {
            (Some(a), Some(b)) => a == b,
            _ => true,
        };
        (self.udp, self.host) == (other.udp, other.host) && same_place
    }

    /// Whether programs of the host alone reach it.
    pub fn is_loopback(&self) -> bool {
        self.address.is_some_and(|address| address.is_loopback())
    }
}

impl FromStr for Forward {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let refuse = || {
            format!(
                "'{text}' says no port to forward: write 8080:80, tcp:127.0.0.1:8080:80 or udp:5353:53"
            )
        };
        let (udp, rest) = match text.split_once(':') {
            Some(("tcp", rest)) => (false, rest),
            Some(("udp", rest)) => (true, rest),
            _ => (false, text),
        };
        let (rest, guest) = rest.rsplit_once(':').ok_or_else(refuse)?;
        let (address, host) = match rest.rsplit_once(':') {
            Some((address, host)) => (Some(address.parse().map_err(|_| refuse())?), host),
            None => (None, rest),
        };
        let port = |text: &str| match text.parse::<u16>() {
            Ok(port) if port != 0 => Ok(port),
            _ => Err(refuse()),
        };
        Ok(Self {
            udp,
            address: address.filter(|a: &Ipv4Addr| !a.is_unspecified()),
            host: port(host)?,
            guest: port(guest)?,
        })
    }
}

impl TryFrom<String> for Forward {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Forward> for String {
    fn from(forward: Forward) -> Self {
        forward.to_string()
    }
}

impl fmt::Display for Forward {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:", self.protocol())?;
        if let Some(address) = self.address {
            write!(f, "{address}:")?;
        }
        write!(f, "{}:{}", self.host, self.guest)
    }
}

/// Why a NIC's table is refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum NetError {
    /// The name cannot be an interface's name.
    #[error("'{0}' cannot name a network interface: 1 to 15 bytes, no '/' and no space")]
    Interface(String),
    /// Two NICs share a tap.
    #[error("tap '{0}' is named twice")]
    TapTwice(String),
    /// Nothing to be connected to.
    #[error(
        "a [[net]] says neither tap = nor network =: network = \"nat\" needs nothing else, and tap = names a tap of yours"
    )]
    Nowhere,
    /// A bridge of somebody else's.
    #[error(
        "a [[net]] has network = and bridge = \"{0}\": one of them, because a network that Hebe makes has a bridge of its own"
    )]
    TwoBridges(String),
    /// Without a tap.
    #[error("a [[net]] has network = \"user\" and a tap: leave tap = out")]
    TapForUser,
    /// What only Hebe's own networks have.
    #[error(
        "a [[net]] has {0} =, which goes with network = \"nat\" or \"user\": in a bridge of yours it is up to you"
    )]
    OnlyMade(&'static str),
    /// Its address there is fixed.
    #[error(
        "address = {0} is not possible with network = \"user\": the guest is {USER_ADDRESS} there"
    )]
    UserAddress(Ipv4Addr),
    /// A second one gets nothing.
    #[error("only one [[net]] of a VM can have network = \"user\"")]
    UserTwice,
    /// Two of one port.
    #[error("port {0} of the host is forwarded twice")]
    PortTwice(u16),
    /// Too many.
    #[error("{0} forwarded ports are too many: at most {FORWARDS_MAX} for each [[net]]")]
    Forwards(usize),
    /// Only TCP is passed on there.
    #[error(
        "forward = \"{0}\" is not possible: UDP is forwarded from an address of the host that others reach, or from all, and not from a loopback address"
    )]
    UdpLoopback(Forward),
}

/// Checks everything that can be checked without the host.
pub(crate) fn validate(nets: &[NetConfig]) -> Result<(), NetError> {
    let mut taps = HashSet::new();
    let mut forwards: Vec<&Forward> = Vec::new();
    let users = nets.iter().filter(|n| n.network == Some(Network::User));
    if users.count() > 1 {
        return Err(NetError::UserTwice);
    }
    for net in nets {
        validate_place(net)?;
        let tap = Some(&net.tap).filter(|tap| !tap.is_empty());
        for name in tap.into_iter().chain(&net.bridge) {
            if !interface_name_ok(name) {
                return Err(NetError::Interface(name.clone()));
            }
        }
        if tap.is_some_and(|tap| !taps.insert(tap)) {
            return Err(NetError::TapTwice(net.tap.clone()));
        }
        if net.forward.len() > FORWARDS_MAX {
            return Err(NetError::Forwards(net.forward.len()));
        }
        for forward in &net.forward {
            if forwards.iter().any(|other| other.collides(forward)) {
                return Err(NetError::PortTwice(forward.host));
            }
            if net.network == Some(Network::Nat) && forward.udp && forward.is_loopback() {
                return Err(NetError::UdpLoopback(*forward));
            }
            forwards.push(forward);
        }
    }
    Ok(())
}

fn validate_place(net: &NetConfig) -> Result<(), NetError> {
    let foreign = net.bridge.as_ref().filter(|bridge| *bridge != NAT_BRIDGE);
    match net.network {
        None if net.tap.is_empty() => Err(NetError::Nowhere),
        None if net.address.is_some() => Err(NetError::OnlyMade("address")),
        None if !net.forward.is_empty() => Err(NetError::OnlyMade("forward")),
        None => Ok(()),
        Some(Network::Nat) => match foreign {
            Some(bridge) => Err(NetError::TwoBridges(bridge.clone())),
            None => Ok(()),
        },
        Some(Network::User) => match (&net.bridge, net.address) {
            (Some(bridge), _) => Err(NetError::TwoBridges(bridge.clone())),
            (None, Some(other)) if other != USER_ADDRESS => Err(NetError::UserAddress(other)),
            (None, _) if !net.tap.is_empty() => Err(NetError::TapForUser),
            (None, _) => Ok(()),
        },
    }
}

fn interface_name_ok(name: &str) -> bool {
    let allowed = |b: u8| b.is_ascii_graphic() && b != b'/' && b != b':';
    !name.is_empty() && name.len() <= 15 && name != "." && name != ".." && name.bytes().all(allowed)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(text: &str) -> NetConfig {
        toml::from_str(text).expect(text)
    }

    #[test]
    fn ports_are_read_as_they_are_written() {
        for (text, full) in [
            ("8080:80", "tcp:8080:80"),
            ("tcp:127.0.0.1:8080:80", "tcp:127.0.0.1:8080:80"),
            ("192.0.2.1:1:65535", "tcp:192.0.2.1:1:65535"),
            ("udp:0.0.0.0:53:53", "udp:53:53"),
        ] {
            let forward: Forward = text.parse().expect(text);
            assert_eq!(forward.to_string(), full);
            assert_eq!(full.parse(), Ok(forward));
        }
        for bad in [
            "", "80", "0:80", "8080:0", "x:1:2", "udp:1", "70000:1", "1:2:3:4", ":1:2",
        ] {
            assert!(bad.parse::<Forward>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_nic_is_in_one_place() {
        for (text, word) in [
            ("", "neither"),
            ("mac = \"52:54:00:00:00:01\"", "neither"),
            ("network = \"nat\"\nbridge = \"br0\"", "br0"),
            ("network = \"user\"\ntap = \"t\"", "leave tap"),
            ("network = \"user\"\nbridge = \"hebe0\"", "bridge"),
            ("network = \"user\"\naddress = \"10.0.0.1\"", "10.0.2.15"),
            ("tap = \"t\"\nforward = [\"1:1\"]", "forward ="),
            ("tap = \"t\"\naddress = \"10.0.0.1\"", "address ="),
            (
                "network = \"nat\"\nforward = [\"1:1\", \"127.0.0.1:1:2\"]",
                "twice",
            ),
            (
                "network = \"nat\"\nforward = [\"udp:127.0.0.1:1:2\"]",
                "UDP",
            ),
        ] {
            let refused = validate(&[of(text)]).expect_err(text).to_string();
            assert!(refused.contains(word), "{text}: {refused}");
        }
        let user = of("network = \"user\"");
        assert_eq!(validate(&[user.clone(), user]), Err(NetError::UserTwice));
        let two = [of("network = \"nat\""), of("network = \"nat\"")];
        assert_eq!(validate(&two), Ok(()));
    }

    #[test]
    fn what_follows_from_the_vm_is_filled_in_once_and_stays() {
        let (name, vm) = ("web".parse().expect("name"), VmId([7; 16]));
        let nat = of("network = \"nat\"\nforward = [\"8080:80\"]");
        let made = nat.resolved(&name, vm, 1);
        assert_eq!(validate(std::slice::from_ref(&made)), Ok(()));
        assert_eq!(made.bridge.as_deref(), Some(NAT_BRIDGE));
        assert_eq!(made.mac, Some(MacAddr::derived(vm, 1)));
        assert_eq!(made.resolved(&name, VmId([8; 16]), 1), made);
        assert_ne!(nat.resolved(&name, vm, 0).tap, made.tap);
        let user = of("network = \"user\"").resolved(&name, vm, 0);
        assert_eq!(validate(std::slice::from_ref(&user)), Ok(()));
        assert_eq!(user.address, Some(USER_ADDRESS));
        let own = NetConfig::tap("t".into(), None);
        assert_eq!(own.resolved(&name, vm, 0), own);
    }

    #[test]
    fn a_nic_without_a_mac_gets_one_that_no_other_nic_of_its_vm_has() {
        let (host, vm) = (HostId([7; 16]), "web".parse().expect("name"));
        let given: MacAddr = "52:54:00:00:00:01".parse().expect("mac");
        let taps = |count: usize| -> Vec<NetConfig> {
            let tap = |n| NetConfig::tap(format!("t{n}"), None);
            (0..count).map(tap).collect()
        };
        let mut nets = taps(3);
        nets[1].mac = Some(given);
        fill_macs(&mut nets, host, &vm);
        let macs: Vec<_> = nets.iter().map(|net| net.mac.expect("filled")).collect();
        let own = |nic| MacAddr::of_nic(host, &vm, nic);
        assert_eq!(macs, [own(0), given, own(2)]);
        // Another boot of it.
        let again = nets.clone();
        fill_macs(&mut nets, HostId([8; 16]), &vm);
        assert_eq!(nets, again, "what is there stays");
        // Somebody gave one NIC what another one would have.
        let mut nets = taps(24);
        nets[20].mac = Some(own(0));
        fill_macs(&mut nets, host, &vm);
        let macs: HashSet<_> = nets.iter().map(|net| net.mac.expect("filled")).collect();
        assert_eq!(macs.len(), 24);
    }

    /// An older release reads what it knows: a NIC on a tap is written as before.
    #[test]
    fn a_nic_on_a_tap_is_written_as_ever() {
        let text = toml::to_string(&NetConfig::tap("t".into(), None)).expect("text");
        assert_eq!(text, "tap = \"t\"\n");
    }
}
