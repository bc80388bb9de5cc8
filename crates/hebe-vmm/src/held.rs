//! What a VM has from outside, opened once and kept for the VMM's life: a
//! reset builds its devices again on the same disks and taps, because the
//! cage leaves no way to open them.

use std::os::fd::OwnedFd;

use hebe_block::BlockBackend;
use hebe_sys::tap::Tap;
use hebe_types::{MacAddr, VmConfig, VmId};

use crate::parts;
use crate::vm::VmError;

/// Open disks and taps, in the order of the definition.
#[derive(Debug)]
pub(crate) struct Held {
    pub(crate) disks: Vec<BlockBackend>,
    pub(crate) nets: Vec<(OwnedFd, MacAddr)>,
}

impl Held {
    /// Opens and locks the disks, opens the taps and joins their bridges.
    pub(crate) fn open(id: VmId, config: &VmConfig) -> Result<Self, VmError> {
        parts::host_boot_id()?;
        let mut disks = Vec::new();
        for disk in &config.disks {
            disks.push(BlockBackend::open(&disk.path, disk.readonly)?);
        }
        let mut nets = Vec::new();
        for (index, net) in config.nets.iter().enumerate() {
            let tap = Tap::open(&net.tap)?;
            if let Some(bridge) = &net.bridge {
                tap.join_bridge(bridge)?;
            }
            tap.set_up()?;
            let mac = net.mac.unwrap_or_else(|| MacAddr::derived(id, index as u8));
            nets.push((tap.into(), mac));
        }
        Ok(Self { disks, nets })
    }
}
