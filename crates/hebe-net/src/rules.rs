//! The rules in nftables: tables of Hebe's own. Two are replaced as wholes; the third
//! counts what each guest has, and keeps that over every change of its rules.

use std::env;
use std::fmt::Write;
use std::io::{self, Write as _};
use std::path::PathBuf;
use std::process::{Command, Stdio};

use hebe_types::{Forward, NAT_BRIDGE};

use crate::range::Range;
use crate::{Care, NetworkError, Port, hush};

/// The table's name, in each family.
const TABLE: &str = "hebe";
/// The name of the one that counts.
const COUNTING: &str = "hebe_guests";

/// Connections that a guest begins and that are not closed, at most: an eighth of
/// what a host with more than 1 GiB of memory tracks, a thirty-second part of what
/// one with more than 4 GiB does (Linux since 5.15, `nf_conntrack_max`).
const CONNECTIONS_MAX: u32 = 8192;
/// Connections that a guest begins in a second, at most, and at once. Each of them
/// has the kernel go through those that it has (`nf_conncount`, once a tick), and one
/// that is refused stays in that list for some ticks: without this bound, who begins
/// them without end would have the list grow without end.
const CONNECTIONS_PER_SECOND: u32 = 1000;
const CONNECTIONS_AT_ONCE: u32 = 5000;

/// What the kernel needs for the rules.
const MODULES: [&str; 9] = [
    "nf_tables",
    "nft_chain_nat",
    "nft_nat",
    "nft_masq",
    "nft_ct",
    "nft_fib_ipv4",
    "nft_meta_bridge",
    "nft_limit",
    "nft_connlimit",
];

/// Takes the tables away.
pub(crate) const NOTHING: [&str; 3] = [
    "table ip hebe_guests\ndelete table ip hebe_guests\n",
    "table ip hebe\ndelete table ip hebe\n",
    "table bridge hebe\ndelete table bridge hebe\n",
];

/// Translation, forwarded ports, and who may reach guests: nobody whom they did
/// not ask, but for forwarded ports.
pub(crate) fn translation(range: Range, ports: &[Port]) -> String {
    let mut to_guests = String::new();
    let mut from_host = String::new();
    for port in ports {
        for forward in port.forward.iter().filter(|f| !f.is_loopback()) {
            let place = match forward.address {
                Some(address) => format!("ip daddr {address}"),
                None => "fib daddr type local".to_owned(),
            };
            let dnat = format!(
                "{place} {} dport {} dnat to {}:{}",
                forward.protocol(),
                forward.host,
                port.address,
                forward.guest
            );
            let _ = writeln!(to_guests, "    iifname != \"{NAT_BRIDGE}\" {dnat}");
            let _ = writeln!(from_host, "    ip daddr != 127.0.0.0/8 {dnat}");
        }
    }
    format!(
        "table ip {TABLE}
delete table ip {TABLE}
table ip {TABLE} {{
  chain prerouting {{
    type nat hook prerouting priority -100; policy accept;
{to_guests}  }}
  chain output {{
    type nat hook output priority -100; policy accept;
{from_host}  }}
  chain postrouting {{
    type nat hook postrouting priority 100; policy accept;
    ip saddr {range} ip daddr != {range} oifname != \"{NAT_BRIDGE}\" masquerade
  }}
  chain forward {{
    type filter hook forward priority 0; policy accept;
    iifname \"{NAT_BRIDGE}\" ip saddr != {range} drop
    oifname \"{NAT_BRIDGE}\" iifname \"{NAT_BRIDGE}\" accept
    oifname \"{NAT_BRIDGE}\" ct state established,related accept
    oifname \"{NAT_BRIDGE}\" ct status dnat accept
    oifname \"{NAT_BRIDGE}\" drop
  }}
}}
"
    )
}

/// A guest sends from its own addresses: who took over a VM cannot pass for its
/// neighbour, nor for the host.
///
/// What is not named is dropped. Rules that name what is wrong miss what is the
/// same to whoever gets it: a frame with the tag of VLAN 0 has another type here,
/// and Linux takes it for one without (`__netif_receive_skb_core`).
pub(crate) fn own_addresses(ports: &[Port]) -> String {
    let mut rules = String::new();
    for Port {
        tap, mac, address, ..
    } in ports
    {
        let own = format!("saddr {{ {address}, 0.0.0.0 }} accept");
        let own_arp = format!("saddr ip {{ {address}, 0.0.0.0 }} accept");
        for rule in [
            &format!("ether saddr != {mac} drop"),
            // As the host's server of addresses.
            "ether type ip udp sport 67 drop",
            &format!("ether type ip ip {own}"),
            &format!("ether type arp arp {own_arp}"),
            // What a VMM announces its guest with: RARP.
            "ether type 0x8035 accept",
            "drop",
        ] {
            let _ = writeln!(rules, "    iifname \"{tap}\" {rule}");
        }
    }
    format!(
        "table bridge {TABLE}
delete table bridge {TABLE}
table bridge {TABLE} {{
  chain prerouting {{
    type filter hook prerouting priority -300; policy accept;
{rules}  }}
}}
"
    )
}

/// How often a guest may ask for its address: the one helper answers all of them,
/// and who asks without end would have the others wait. An addition to
/// [`own_addresses`] that not every kernel may take: it needs `nft_limit`.
pub(crate) fn own_questions(ports: &[Port]) -> String {
    let mut rules = String::new();
    for Port { tap, .. } in ports {
        let _ = writeln!(
            rules,
            "    iifname \"{tap}\" ether type ip udp dport 67 limit rate over 10/second burst 20 packets drop"
        );
    }
    format!(
        "table bridge {TABLE} {{
  chain questions {{
    type filter hook prerouting priority -299; policy accept;
{rules}  }}
}}
"
    )
}

/// How many connections a guest may have the host track: the table of all of them is
/// the host's and its guests', and with it full nobody gets a new one. Before routing,
/// so that connections to the host itself count, too; only what begins one is looked
/// at. An addition that not every kernel may take: it needs `nft_limit` and
/// `nft_connlimit`.
///
/// Only the rules are replaced: in new sets a guest would begin at nothing again.
pub(crate) fn own_connections(range: Range) -> String {
    format!(
        "table ip {COUNTING} {{
  set begun {{ type ipv4_addr; size 512; flags dynamic,timeout; timeout 1m; }}
  set open {{ type ipv4_addr; size 512; flags dynamic; }}
  chain prerouting {{
    type filter hook prerouting priority -150; policy accept;
  }}
}}
flush chain ip {COUNTING} prerouting
table ip {COUNTING} {{
  chain prerouting {{
    iifname != \"{NAT_BRIDGE}\" accept
    ct state != new accept
    ct status confirmed accept
    ip saddr 0.0.0.0 udp sport 68 udp dport 67 accept
    ip saddr != {range} drop
    update @begun {{ ip saddr limit rate over {CONNECTIONS_PER_SECOND}/second burst {CONNECTIONS_AT_ONCE} packets }} counter drop
    add @open {{ ip saddr ct count over {CONNECTIONS_MAX} }} counter drop
  }}
}}
"
    )
}

/// Names go into rules as they are.
pub(crate) fn check_name(tap: &str) -> Result<(), NetworkError> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    if tap.is_empty() || !tap.chars().all(plain) {
        return Err(NetworkError::TapName(tap.to_owned()));
    }
    Ok(())
}

/// Whether a program of the host would lose the port to the rules. For a VM that
/// goes on the host need not have the port's address yet, early as it comes.
pub(crate) fn try_port(forward: &Forward, care: Care) -> Result<(), NetworkError> {
    let early = care == Care::WhatThereIs;
    hush::bound(forward, early)
        .map(drop)
        .map_err(|error| NetworkError::PortInUse {
            forward: *forward,
            source: error.into(),
        })
}

/// The program `nft`, if it is installed.
pub fn program() -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    // Where administrators' programs are, whatever PATH says.
    let places = ["/usr/sbin", "/sbin", "/usr/bin"].map(PathBuf::from);
    let dirs = places.into_iter().chain(env::split_paths(&path));
    dirs.map(|dir| dir.join("nft")).find(|p| p.is_file())
}

fn nft(arguments: &[&str]) -> Command {
    let mut command = Command::new(program().unwrap_or_else(|| "nft".into()));
    command.args(arguments);
    command
}

/// Loads what the rules need. For each module that it misses the kernel starts a
/// program of its own and nft begins anew, which takes far longer.
pub fn load_modules() {
    // What cannot be loaded may be built in, or is told of by nft.
    let _ = Command::new("modprobe")
        .arg("-aq")
        .args(MODULES)
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
}

/// Puts a script into effect, wholly or not at all.
pub(crate) fn apply(script: &str) -> Result<(), NetworkError> {
    let mut command = nft(&["-f", "-"]);
    command.stdin(Stdio::piped()).stdout(Stdio::null());
    command.stderr(Stdio::piped());
    let absent = |e: io::Error| match e.kind() {
        io::ErrorKind::NotFound => NetworkError::NoNft,
        _ => NetworkError::Rules(e.to_string()),
    };
    let mut child = command.spawn().map_err(absent)?;
    let written = child
        .stdin
        .take()
        .map_or(Ok(()), |mut stdin| stdin.write_all(script.as_bytes()));
    let output = child.wait_with_output().map_err(absent)?;
    if output.status.success() && written.is_ok() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let first = said.lines().find(|line| !line.trim().is_empty());
    let first = first.unwrap_or("it ended without a word").trim();
    let first = first.trim_start_matches("/dev/stdin:");
    Err(NetworkError::Rules(first.chars().take(200).collect()))
}

/// All of the rules.
pub(crate) struct Rules {
    translation: String,
    own_addresses: String,
    own_questions: String,
    own_connections: String,
}

impl Rules {
    /// For these guests.
    pub(crate) fn of(range: Range, ports: &[Port]) -> Self {
        Self {
            translation: translation(range, ports),
            own_addresses: own_addresses(ports),
            own_questions: own_questions(ports),
            own_connections: own_connections(range),
        }
    }

    /// As one script.
    pub(crate) fn text(&self) -> String {
        let Self {
            translation,
            own_addresses,
            own_questions,
            own_connections,
        } = self;
        format!("{translation}{own_addresses}{own_questions}{own_connections}")
    }

    /// Puts translation into effect, and with it, as far as that can be had, what
    /// holds guests to what is theirs; in words what could not. One program for all
    /// where all go: VMs that are resumed wait for it.
    pub(crate) fn apply(&self) -> Result<Vec<String>, NetworkError> {
        if apply(&self.text()).is_ok() {
            return Ok(Vec::new());
        }
        apply(&self.translation)?;
        let mut unheld = Vec::new();
        match apply(&self.own_addresses) {
            // A guest may then pass for its neighbour, and goes on all the same.
            Err(error) => unheld.push(format!(
                "guests are not held to their own addresses: {error}"
            )),
            // A kernel without nft_limit: who asks without end has others wait.
            Ok(()) => drop(apply(&self.own_questions)),
        }
        if let Err(error) = apply(&self.own_connections) {
            unheld.push(format!(
                "a guest that begins connections without end can take the network from its neighbours and the host, for want of nft_limit or nft_connlimit: {error}"
            ));
        }
        Ok(unheld)
    }
}

/// Whether the table of translation is there: others may flush all rules.
pub(crate) fn are_there() -> bool {
    let mut command = nft(&["list", "table", "ip", TABLE]);
    command.stdin(Stdio::null()).stdout(Stdio::null());
    command.stderr(Stdio::null());
    command.status().is_ok_and(|status| status.success())
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    #[test]
    fn the_unit_loads_what_the_rules_need() {
        let unit = include_str!("../../../packaging/hebe-modules.service");
        let order = format!("ExecStart=-/sbin/modprobe -aq {}\n", MODULES.join(" "));
        assert!(unit.contains(&order), "{order}");
    }

    #[test]
    fn what_is_forwarded_and_to_whom_stands_in_the_rules() {
        let range = Range::of(Ipv4Addr::new(10, 86, 0, 0));
        let port = Port {
            vm: "web".parse().expect("name"),
            tap: "hebe01".into(),
            mac: "52:54:00:00:00:01".parse().expect("mac"),
            address: range.host(12),
            forward: ["8080:80", "udp:192.0.2.1:53:5353", "127.0.0.1:2222:22"]
                .map(|f| f.parse().expect("forward"))
                .to_vec(),
            expected_until_ns: None,
        };
        let text = translation(range, std::slice::from_ref(&port));
        for line in [
            "iifname != \"hebe0\" fib daddr type local tcp dport 8080 dnat to 10.86.0.12:80",
            "ip daddr 192.0.2.1 udp dport 53 dnat to 10.86.0.12:5353",
            "ip saddr 10.86.0.0/24 ip daddr != 10.86.0.0/24",
        ] {
            assert!(text.contains(line), "{line}: {text}");
        }
        assert!(!text.contains("2222"), "passed on by the helper: {text}");
        let text = own_addresses(&[port]);
        assert!(
            text.contains("ether saddr != 52:54:00:00:00:01 drop"),
            "{text}"
        );
        assert!(check_name("hebe01").is_ok());
        for bad in ["", "a\"b", "a;b", "a b", "a\nb"] {
            assert!(check_name(bad).is_err(), "{bad}");
        }
    }

    /// As on a kernel that lacks one of the modules: what it refuses is another rule
    /// here.
    #[test]
    fn what_the_kernel_refuses_is_said_and_the_rest_is_put_in() {
        const APART: &str = "HEBE_TEST_RULES_APART";
        if env::var_os(APART).is_none() {
            let this = env::current_exe().expect("this program");
            let mut again = Command::new("unshare");
            again.arg("-n").arg(this);
            again.arg("rules::tests::what_the_kernel_refuses_is_said_and_the_rest_is_put_in");
            let again = again.env(APART, "yes").output();
            let mut able = Command::new("unshare");
            able.args(["-n", "nft", "list", "ruleset"]);
            if !able.output().is_ok_and(|o| o.status.success()) {
                let mut stderr = io::stderr();
                writeln!(
                    stderr,
                    "skipped: rules: no nftables, or no network of its own"
                )
                .expect("stderr");
                return;
            }
            let again = again.expect("unshare");
            let said = [again.stdout, again.stderr].concat();
            let said = String::from_utf8_lossy(&said);
            assert!(
                again.status.success() && said.contains("1 passed"),
                "{said}"
            );
            return;
        }
        let range = Range::of(Ipv4Addr::new(10, 86, 0, 0));
        let mut rules = Rules::of(range, &[]);
        assert_eq!(rules.apply().expect("all of it"), Vec::<String>::new());
        let none = "table ip hebe_none { chain c { jump nowhere; } }\n";
        rules.own_connections = none.to_owned();
        let said = rules.apply().expect("the rest");
        assert_eq!(said.len(), 1, "{said:?}");
        assert!(said[0].contains("nft_connlimit"), "{said:?}");
        assert!(are_there());
        rules.translation = none.to_owned();
        assert!(rules.apply().is_err());
        for script in NOTHING {
            apply(script).expect("taken away");
        }
        let left = nft(&["list", "ruleset"]).output().expect("nft").stdout;
        assert!(left.is_empty(), "{}", String::from_utf8_lossy(&left));
    }
}
