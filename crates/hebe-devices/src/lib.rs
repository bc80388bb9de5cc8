//! Bus, PCI, virtio devices and serial port.
