//! Packets of the socket device: a header, and for data what follows it
//! (virtio 1.2, 5.10.6).

/// Bytes of a header, `struct virtio_vsock_hdr`.
pub(super) const HEADER_LEN: usize = 44;
/// The host's context id.
pub(super) const CID_HOST: u64 = 2;
/// `VIRTIO_VSOCK_TYPE_STREAM`.
pub(super) const TYPE_STREAM: u16 = 1;
/// `VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE`: whoever says it takes no more.
pub(super) const SHUTDOWN_TAKES_NO_MORE: u32 = 1;
/// `VIRTIO_VSOCK_SHUTDOWN_F_SEND`: whoever says it sends no more.
pub(super) const SHUTDOWN_SENDS_NO_MORE: u32 = 2;

/// What a packet is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub(super) enum Op {
    /// Opens a connection.
    Request = 1,
    /// Accepts one.
    Response = 2,
    /// Refuses or ends one.
    Reset = 3,
    /// One end sends or takes no more.
    Shutdown = 4,
    /// Data.
    Data = 5,
    /// Says how much room there is.
    CreditUpdate = 6,
    /// Asks how much room there is.
    CreditRequest = 7,
}

impl Op {
    /// The operation of a header, unless it is none.
    pub(super) fn of(number: u16) -> Option<Self> {
        Some(match number {
            1 => Self::Request,
            2 => Self::Response,
            3 => Self::Reset,
            4 => Self::Shutdown,
            5 => Self::Data,
            6 => Self::CreditUpdate,
            7 => Self::CreditRequest,
            _ => return None,
        })
    }
}

/// A header, as the guest wrote it or is to read it. Nothing in it is
/// checked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) src_cid: u64,
    pub(super) dst_cid: u64,
    pub(super) src_port: u32,
    pub(super) dst_port: u32,
    /// Bytes of data behind the header.
    pub(super) len: u32,
    pub(super) kind: u16,
    pub(super) op: u16,
    pub(super) flags: u32,
    /// Room that the sender has for a connection, in all.
    pub(super) buf_alloc: u32,
    /// Bytes that the sender has handed on so far, modulo 2^32.
    pub(super) fwd_cnt: u32,
}

impl Header {
    pub(super) fn parse(bytes: &[u8; HEADER_LEN]) -> Self {
        let byte = |at: usize| bytes[at];
        let u16_at = |at| u16::from_le_bytes([byte(at), byte(at + 1)]);
        let u32_at = |at| u32::from(u16_at(at)) | u32::from(u16_at(at + 2)) << 16;
        let u64_at = |at| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
        Self {
            src_cid: u64_at(0),
            dst_cid: u64_at(8),
            src_port: u32_at(16),
            dst_port: u32_at(20),
            len: u32_at(24),
            kind: u16_at(28),
            op: u16_at(30),
            flags: u32_at(32),
            buf_alloc: u32_at(36),
            fwd_cnt: u32_at(40),
        }
    }

    pub(super) fn to_bytes(self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        bytes[..8].copy_from_slice(&self.src_cid.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.dst_cid.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.src_port.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.dst_port.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.len.to_le_bytes());
        bytes[28..30].copy_from_slice(&self.kind.to_le_bytes());
        bytes[30..32].copy_from_slice(&self.op.to_le_bytes());
        bytes[32..36].copy_from_slice(&self.flags.to_le_bytes());
        bytes[36..40].copy_from_slice(&self.buf_alloc.to_le_bytes());
        bytes[40..].copy_from_slice(&self.fwd_cnt.to_le_bytes());
        bytes
    }

    /// The reset that answers this packet.
    pub(super) fn reset(&self) -> Self {
        Self {
            src_cid: self.dst_cid,
            dst_cid: self.src_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            kind: self.kind,
            op: Op::Reset as u16,
            ..Self::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_is_44_bytes_in_the_order_of_the_standard() {
        let mut bytes = [0; HEADER_LEN];
        for (value, byte) in (1..).zip(&mut bytes) {
            *byte = value;
        }
        let header = Header::parse(&bytes);
        assert_eq!(header.src_cid, 0x0807_0605_0403_0201);
        assert_eq!(header.dst_cid, 0x100f_0e0d_0c0b_0a09);
        assert_eq!(
            (header.src_port, header.dst_port),
            (0x1413_1211, 0x1817_1615)
        );
        assert_eq!((header.len, header.kind), (0x1c1b_1a19, 0x1e1d));
        assert_eq!((header.op, header.flags), (0x201f, 0x2423_2221));
        assert_eq!(
            (header.buf_alloc, header.fwd_cnt),
            (0x2827_2625, 0x2c2b_2a29)
        );
        assert_eq!(header.to_bytes(), bytes);
    }

    #[test]
    fn operations_are_1_to_7() {
        let known: Vec<u16> = (0..=u16::MAX).filter(|n| Op::of(*n).is_some()).collect();
        assert_eq!(known, [1, 2, 3, 4, 5, 6, 7]);
        assert!(
            known
                .iter()
                .all(|n| Op::of(*n).map(|op| op as u16) == Some(*n))
        );
    }
}
