//! DHCP (RFC 2131, 2132), as much of it as a server needs that knows each
//! client: an address follows from the client's MAC, is the same for ever, and
//! belongs to nobody else. A guest's packets are untrusted: nothing is kept of
//! them, and who is not known gets no answer.

use std::net::Ipv4Addr;

use hebe_types::MacAddr;

use crate::range::Range;

/// Where servers listen.
pub const SERVER_PORT: u16 = 67;
/// Where clients listen.
pub const CLIENT_PORT: u16 = 68;
/// Longest packet that is looked at, in bytes: Ethernet carries no longer one.
pub const PACKET_MAX: usize = 1500;
/// How long a lease lasts. It never changes, so only clients that ask anew
/// load the helper; a resumed guest whose lease ran out meanwhile asks and gets
/// the same.
const LEASE_S: u32 = 12 * 60 * 60;

/// The fields before the options.
const HEAD_LEN: usize = 236;
const MAGIC: [u8; 4] = [99, 130, 83, 99];
/// Relays and old clients drop shorter packets (RFC 1542, 2.1).
const REPLY_LEN_MIN: usize = 300;

const OP_REQUEST: u8 = 1;
const OP_REPLY: u8 = 2;
const ETHERNET: [u8; 2] = [1, 6];

const PAD: u8 = 0;
const END: u8 = 255;
const MASK: u8 = 1;
const ROUTER: u8 = 3;
const DNS: u8 = 6;
const HOST_NAME: u8 = 12;
const BROADCAST: u8 = 28;
const REQUESTED: u8 = 50;
const LEASE_TIME: u8 = 51;
const MESSAGE: u8 = 53;
const SERVER: u8 = 54;

const DISCOVER: u8 = 1;
const OFFER: u8 = 2;
const REQUEST: u8 = 3;
const ACK: u8 = 5;
const NAK: u8 = 6;
const INFORM: u8 = 8;

/// What a client gets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Offer {
    /// Its address.
    pub address: Ipv4Addr,
    /// The network's range; its first address is the server's and the router's.
    pub range: Range,
    /// Resolvers of names.
    pub dns: Vec<Ipv4Addr>,
    /// Its name.
    pub host_name: String,
}

/// An answer, and where it goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply {
    /// The packet.
    pub bytes: Vec<u8>,
    /// A client's address, or everybody.
    pub to: Ipv4Addr,
}

/// What a client says.
struct Asked<'a> {
    head: &'a [u8],
    message: u8,
    requested: Option<Ipv4Addr>,
    server: Option<Ipv4Addr>,
}

impl<'a> Asked<'a> {
    fn parse(packet: &'a [u8]) -> Option<Self> {
        let (head, rest) = packet.split_at_checked(HEAD_LEN)?;
        let options = rest.strip_prefix(&MAGIC)?;
        if head[0] != OP_REQUEST || head[1..3] != ETHERNET {
            return None;
        }
        let mut asked = Self {
            head,
            message: 0,
            requested: None,
            server: None,
        };
        let mut at = 0;
        while let Some(&code) = options.get(at) {
            at += 1;
            match code {
                PAD => continue,
                END => break,
                _ => {}
            }
            let len = usize::from(*options.get(at)?);
            let value = options.get(at + 1..at + 1 + len)?;
            at += 1 + len;
            match code {
                MESSAGE => asked.message = *value.first()?,
                REQUESTED => asked.requested = Some(address(value)?),
                SERVER => asked.server = Some(address(value)?),
                _ => {}
            }
        }
        Some(asked)
    }

    fn mac(&self) -> MacAddr {
        let mut mac = [0; 6];
        mac.copy_from_slice(&self.head[28..34]);
        MacAddr(mac)
    }

    /// The address that it uses, if any.
    fn current(&self) -> Option<Ipv4Addr> {
        address(&self.head[12..16]).filter(|address| !address.is_unspecified())
    }
}

fn address(bytes: &[u8]) -> Option<Ipv4Addr> {
    let octets: [u8; 4] = bytes.try_into().ok()?;
    Some(octets.into())
}

/// Answers one packet, or does not: `find` knows who gets what.
pub fn answer(packet: &[u8], find: impl Fn(MacAddr) -> Option<Offer>) -> Option<Reply> {
    let asked = Asked::parse(packet)?;
    let offer = find(asked.mac())?;
    let server = offer.range.gateway();
    let message = match asked.message {
        DISCOVER => OFFER,
        // It took another server's offer.
        REQUEST if asked.server.is_some_and(|other| other != server) => return None,
        REQUEST => match asked.requested.or(asked.current())? {
            right if right == offer.address => ACK,
            _ => NAK,
        },
        INFORM => ACK,
        _ => return None,
    };
    let reached = asked.current().filter(|address| *address == offer.address);
    Some(Reply {
        bytes: reply(&asked, message, &offer),
        to: reached
            .filter(|_| message == ACK)
            .unwrap_or(Ipv4Addr::BROADCAST),
    })
}

fn reply(asked: &Asked, message: u8, offer: &Offer) -> Vec<u8> {
    let server = offer.range.gateway();
    let mut bytes = asked.head.to_vec();
    bytes[0] = OP_REPLY;
    // Hops, seconds, and the addresses; names of a server and a file.
    bytes[3] = 0;
    bytes[8..10].fill(0);
    bytes[16..24].fill(0);
    bytes[44..].fill(0);
    if message == NAK {
        bytes[12..16].fill(0);
    } else if asked.message != INFORM {
        bytes[16..20].copy_from_slice(&offer.address.octets());
    }
    bytes.extend_from_slice(&MAGIC);
    let mut put = |code: u8, value: &[u8]| {
        bytes.extend_from_slice(&[code, value.len() as u8]);
        bytes.extend_from_slice(value);
    };
    put(MESSAGE, &[message]);
    put(SERVER, &server.octets());
    if message != NAK {
        if asked.message != INFORM {
            put(LEASE_TIME, &LEASE_S.to_be_bytes());
        }
        put(MASK, &offer.range.mask().octets());
        put(BROADCAST, &offer.range.broadcast().octets());
        put(ROUTER, &server.octets());
        let dns: Vec<u8> = offer.dns.iter().take(3).flat_map(|a| a.octets()).collect();
        if !dns.is_empty() {
            put(DNS, &dns);
        }
        let name = offer.host_name.as_bytes();
        if !name.is_empty() {
            put(HOST_NAME, &name[..name.len().min(63)]);
        }
    }
    bytes.push(END);
    bytes.resize(bytes.len().max(REPLY_LEN_MIN), PAD);
    bytes
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MAC: MacAddr = MacAddr([0x52, 0x54, 0, 1, 2, 3]);

    fn offer() -> Offer {
        Offer {
            address: Ipv4Addr::new(10, 86, 0, 12),
            range: Range::of(Ipv4Addr::new(10, 86, 0, 0)),
            dns: vec![Ipv4Addr::new(192, 0, 2, 53)],
            host_name: "web".into(),
        }
    }

    fn ask(message: u8, options: &[u8], current: [u8; 4]) -> Vec<u8> {
        let mut packet = vec![0; HEAD_LEN];
        packet[..3].copy_from_slice(&[OP_REQUEST, 1, 6]);
        packet[4..8].copy_from_slice(b"xid!");
        packet[12..16].copy_from_slice(&current);
        packet[28..34].copy_from_slice(&MAC.0);
        packet.extend_from_slice(&MAGIC);
        packet.extend_from_slice(&[PAD, MESSAGE, 1, message]);
        packet.extend_from_slice(options);
        packet.push(END);
        packet
    }

    fn answered(packet: &[u8]) -> Option<Reply> {
        answer(packet, |mac| (mac == MAC).then(offer))
    }

    fn option(reply: &[u8], code: u8) -> Option<Vec<u8>> {
        let mut at = HEAD_LEN + 4;
        while reply[at] != END {
            let len = usize::from(reply[at + 1]);
            if reply[at] == code {
                return Some(reply[at + 2..at + 2 + len].to_vec());
            }
            at += 2 + len;
        }
        None
    }

    const NONE: [u8; 4] = [0; 4];
    const OWN: [u8; 6] = [REQUESTED, 4, 10, 86, 0, 12];

    #[test]
    fn a_client_gets_its_address_and_the_way_out() {
        for (packet, message) in [
            (ask(DISCOVER, &[], NONE), OFFER),
            (ask(REQUEST, &OWN, NONE), ACK),
        ] {
            let reply = answered(&packet).expect("an answer");
            assert_eq!(reply.to, Ipv4Addr::BROADCAST);
            let bytes = &reply.bytes;
            assert!(bytes.len() >= REPLY_LEN_MIN && bytes.len() < PACKET_MAX);
            assert_eq!(bytes[4..8], *b"xid!");
            assert_eq!(bytes[16..20], [10, 86, 0, 12]);
            assert_eq!(option(bytes, MESSAGE), Some(vec![message]));
            assert_eq!(option(bytes, ROUTER), Some(vec![10, 86, 0, 1]));
            assert_eq!(option(bytes, MASK), Some(vec![255, 255, 255, 0]));
            assert_eq!(option(bytes, DNS), Some(vec![192, 0, 2, 53]));
            assert_eq!(option(bytes, HOST_NAME), Some(b"web".to_vec()));
            assert_eq!(option(bytes, LEASE_TIME).map(|v| v.len()), Some(4));
        }
    }

    #[test]
    fn one_that_renews_is_answered_where_it_is_and_a_wrong_one_is_told() {
        let renewed = answered(&ask(REQUEST, &[], [10, 86, 0, 12])).expect("an answer");
        assert_eq!(renewed.to, Ipv4Addr::new(10, 86, 0, 12));
        let other = [REQUESTED, 4, 192, 168, 1, 5];
        let refused = answered(&ask(REQUEST, &other, NONE)).expect("an answer");
        assert_eq!(option(&refused.bytes, MESSAGE), Some(vec![NAK]));
        assert_eq!(refused.bytes[16..20], NONE);
        assert_eq!(refused.to, Ipv4Addr::BROADCAST);
        let informed = answered(&ask(INFORM, &[], [10, 86, 0, 12])).expect("an answer");
        assert_eq!(option(&informed.bytes, LEASE_TIME), None);
    }

    #[test]
    fn strangers_and_the_clients_of_others_are_not_answered() {
        let mut stranger = ask(DISCOVER, &[], NONE);
        stranger[33] ^= 1;
        assert_eq!(answered(&stranger), None);
        let elsewhere = [OWN.as_slice(), &[SERVER, 4, 192, 0, 2, 1]].concat();
        assert_eq!(answered(&ask(REQUEST, &elsewhere, NONE)), None);
        for message in [0, 4, 7, 9, 255] {
            assert_eq!(answered(&ask(message, &OWN, NONE)), None);
        }
        assert_eq!(
            answered(&ask(REQUEST, &[], NONE)),
            None,
            "no address at all"
        );
    }

    #[test]
    fn a_packet_cut_off_anywhere_is_answered_rightly_or_not_at_all() {
        let whole = ask(REQUEST, &OWN, NONE);
        for len in 0..whole.len() {
            if let Some(reply) = answered(&whole[..len]) {
                assert_eq!(len, whole.len() - 1, "only the end is missing");
                assert_eq!(option(&reply.bytes, MESSAGE), Some(vec![ACK]));
            }
        }
    }

    proptest! {
        #[test]
        fn no_packet_does_harm(noise in prop::collection::vec(any::<u8>(), 0..PACKET_MAX)) {
            let _ = answer(&noise, |_| Some(offer()));
            let mut packet = ask(DISCOVER, &[], NONE);
            packet.truncate(HEAD_LEN + 4);
            packet.extend_from_slice(&noise);
            if let Some(reply) = answer(&packet, |_| Some(offer())) {
                prop_assert!(reply.bytes.len() < PACKET_MAX);
            }
        }
    }
}
