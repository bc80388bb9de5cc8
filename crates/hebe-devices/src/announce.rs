//! What a NIC tells the network after its guest moved to another VMM or
//! another kernel: a RARP frame, from which switches and bridges learn the
//! port at once, and gratuitous ARP for the addresses that the guest claimed.
//!
//! Addresses are taken from ARP frames only, and only where the guest names
//! itself: a guest that routes sends IPv4 frames with other hosts' addresses,
//! and announcing those would lead their traffic astray.

use hebe_types::MacAddr;

/// Most addresses remembered per NIC.
const ADDRESSES_MAX: usize = 8;
const BROADCAST: [u8; 6] = [0xff; 6];
const ETHERTYPE_ARP: [u8; 2] = [0x08, 0x06];
const ETHERTYPE_RARP: [u8; 2] = [0x80, 0x35];
/// Ethernet, IPv4, lengths 6 and 4 (RFC 826).
const ARP_HEAD: [u8; 6] = [0, 1, 8, 0, 6, 4];
const OP_ARP_REQUEST: [u8; 2] = [0, 1];
const OP_RARP_REQUEST: [u8; 2] = [0, 3];
/// Shortest Ethernet frame without its checksum.
const FRAME_MIN: usize = 60;

/// IPv4 addresses that the guest claimed by ARP, the latest last.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Neighbours(Vec<[u8; 4]>);

impl Neighbours {
    pub(crate) fn restore(addresses: &[[u8; 4]]) -> Self {
        let surplus = addresses.len().saturating_sub(ADDRESSES_MAX);
        Self(addresses[surplus..].to_vec())
    }

    pub(crate) fn addresses(&self) -> &[[u8; 4]] {
        &self.0
    }

    /// Looks at a frame that the guest sent.
    pub(crate) fn learn(&mut self, frame: &[u8], mac: MacAddr) {
        let (Some(ethertype), Some(arp)) = (frame.get(12..14), frame.get(14..42)) else {
            return;
        };
        if ethertype != ETHERTYPE_ARP || arp[..6] != ARP_HEAD || arp[8..14] != mac.0 {
            return;
        }
        let address = [arp[14], arp[15], arp[16], arp[17]];
        // 0.0.0.0 is a probe for an address that is not claimed yet (RFC 5227).
        if address == [0; 4] || self.0.last() == Some(&address) {
            return;
        }
        self.0.retain(|known| *known != address);
        if self.0.len() == ADDRESSES_MAX {
            self.0.remove(0);
        }
        self.0.push(address);
    }
}

/// The frames that announce a NIC: RARP first, then one ARP per address.
pub(crate) fn announcements(mac: MacAddr, addresses: &[[u8; 4]]) -> Vec<Vec<u8>> {
    let none = [0; 4];
    let rarp = frame(mac, ETHERTYPE_RARP, OP_RARP_REQUEST, none, mac.0);
    let arps = addresses
        .iter()
        .map(|&address| frame(mac, ETHERTYPE_ARP, OP_ARP_REQUEST, address, [0; 6]));
    std::iter::once(rarp).chain(arps).collect()
}

fn frame(
    mac: MacAddr,
    ethertype: [u8; 2],
    operation: [u8; 2],
    address: [u8; 4],
    target: [u8; 6],
) -> Vec<u8> {
    let mut frame = Vec::with_capacity(FRAME_MIN);
    frame.extend_from_slice(&BROADCAST);
    frame.extend_from_slice(&mac.0);
    frame.extend_from_slice(&ethertype);
    frame.extend_from_slice(&ARP_HEAD);
    frame.extend_from_slice(&operation);
    frame.extend_from_slice(&mac.0);
    frame.extend_from_slice(&address);
    frame.extend_from_slice(&target);
    frame.extend_from_slice(&address);
    frame.resize(FRAME_MIN, 0);
    frame
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: MacAddr = MacAddr([0x52, 0x54, 0, 1, 2, 3]);

    #[test]
    fn announcing_teaches_the_same_addresses() {
        let known = [[10, 0, 0, 2], [192, 168, 1, 9]];
        let mut learned = Neighbours::default();
        for frame in announcements(MAC, &known) {
            assert_eq!(frame.len(), FRAME_MIN);
            learned.learn(&frame, MAC);
        }
        assert_eq!(learned.addresses(), known);
    }

    #[test]
    fn others_probes_and_scraps_teach_nothing() {
        let mut learned = Neighbours::default();
        let other = MacAddr([0x52, 0x54, 9, 9, 9, 9]);
        for frame in announcements(other, &[[10, 0, 0, 3]]) {
            learned.learn(&frame, MAC);
        }
        for frame in announcements(MAC, &[[0; 4]]) {
            learned.learn(&frame, MAC);
        }
        for frame in announcements(MAC, &[[10, 0, 0, 2]]) {
            for len in 0..42 {
                learned.learn(&frame[..len], MAC);
            }
        }
        assert_eq!(learned, Neighbours::default());
    }

    #[test]
    fn the_memory_is_bounded_and_keeps_the_latest() {
        let mut learned = Neighbours::default();
        for last in 1..=20 {
            for frame in announcements(MAC, &[[10, 0, 0, last]]) {
                learned.learn(&frame, MAC);
            }
        }
        assert_eq!(learned.addresses().len(), ADDRESSES_MAX);
        assert_eq!(learned.addresses().last(), Some(&[10, 0, 0, 20]));
    }
}
