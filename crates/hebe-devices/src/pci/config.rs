//! Configuration space of one function (PCI local bus 3.0, 6.1): an image,
//! and a mask of the bits that the guest may change.

/// Bytes of conventional configuration space.
pub(crate) const CONFIG_LEN: usize = 256;
pub(crate) const COMMAND: usize = 0x04;
pub(crate) const CACHE_LINE_SIZE: usize = 0x0c;
pub(crate) const BAR0: usize = 0x10;
pub(crate) const INTERRUPT_LINE: usize = 0x3c;
const STATUS: usize = 0x06;
const CAPABILITIES: usize = 0x34;
/// Bit in the status register: there is a capability list.
const STATUS_CAP_LIST: u16 = 0x10;
/// Bit in the command register: memory decoding.
pub(crate) const COMMAND_MEMORY: u16 = 2;
/// Memory decoding, bus master, INTx disable.
pub(crate) const COMMAND_MASK: u16 = 0x0406;

/// Identity of a function.
pub(crate) struct Identity {
    pub(crate) vendor: u16,
    pub(crate) device: u16,
    /// Class, subclass, programming interface.
    pub(crate) class: [u8; 3],
    pub(crate) revision: u8,
    pub(crate) subsystem_vendor: u16,
    pub(crate) subsystem: u16,
}

/// Configuration space of one function.
pub(crate) struct ConfigSpace {
    image: [u8; CONFIG_LEN],
    mask: [u8; CONFIG_LEN],
    /// Where the pointer to the next capability goes.
    link: usize,
}

impl ConfigSpace {
    pub(crate) fn new(id: &Identity) -> Self {
        let mut space = Self {
            image: [0; CONFIG_LEN],
            mask: [0; CONFIG_LEN],
            link: CAPABILITIES,
        };
        space.put(0x00, &id.vendor.to_le_bytes());
        space.put(0x02, &id.device.to_le_bytes());
        let [class, subclass, interface] = id.class;
        space.put(0x08, &[id.revision, interface, subclass, class]);
        space.put(0x2c, &id.subsystem_vendor.to_le_bytes());
        space.put(0x2e, &id.subsystem.to_le_bytes());
        space.allow(COMMAND, &COMMAND_MASK.to_le_bytes());
        space.allow(CACHE_LINE_SIZE, &[0xff]);
        space.allow(INTERRUPT_LINE, &[0xff]);
        space
    }

    /// Makes BAR 0 a 32-bit memory BAR of `size` bytes, a power of two.
    pub(crate) fn set_bar0(&mut self, size: u32, addr: u32) {
        self.allow(BAR0, &(!(size - 1)).to_le_bytes());
        self.put(BAR0, &(addr & !(size - 1)).to_le_bytes());
    }

    /// Adds a capability at `at`; `body` begins after the pointer byte.
    pub(crate) fn add_capability(&mut self, at: u8, id: u8, body: &[u8]) {
        let status = self.u16(STATUS) | STATUS_CAP_LIST;
        self.put(STATUS, &status.to_le_bytes());
        self.put(self.link, &[at]);
        self.put(usize::from(at), &[id, 0]);
        self.put(usize::from(at) + 2, body);
        self.link = usize::from(at) + 1;
    }

    /// Sets bytes, whatever the mask says.
    pub(crate) fn put(&mut self, at: usize, bytes: &[u8]) {
        self.image[at..at + bytes.len()].copy_from_slice(bytes);
    }

    /// Lets the guest change the bits set in `bits`.
    pub(crate) fn allow(&mut self, at: usize, bits: &[u8]) {
        self.mask[at..at + bits.len()].copy_from_slice(bits);
    }

    /// Reads; what lies beyond the end reads as ones.
    pub(crate) fn read(&self, at: usize, data: &mut [u8]) {
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = self.image.get(at + i).copied().unwrap_or(0xff);
        }
    }

    /// Writes the bits that the guest may change.
    pub(crate) fn write(&mut self, at: usize, data: &[u8]) {
        for (i, byte) in data.iter().enumerate().take(CONFIG_LEN.saturating_sub(at)) {
            let mask = self.mask[at + i];
            let image = &mut self.image[at + i];
            *image = *image & !mask | byte & mask;
        }
    }

    pub(crate) fn u8(&self, at: usize) -> u8 {
        self.image[at]
    }

    pub(crate) fn u16(&self, at: usize) -> u16 {
        u16::from_le_bytes([self.image[at], self.image[at + 1]])
    }

    pub(crate) fn u32(&self, at: usize) -> u32 {
        u32::from(self.u16(at)) | u32::from(self.u16(at + 2)) << 16
    }
}
