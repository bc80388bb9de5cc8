//! Devices: PCI functions, virtio transports and queues, the serial port.
