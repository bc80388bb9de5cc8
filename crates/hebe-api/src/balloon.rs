//! A VM's balloon, in bytes.

use hebe_types::ByteSize;
use serde::{Deserialize, Serialize};

/// How much memory a guest has, and how much of it went back to the host.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonStatus {
    /// RAM of the VM.
    pub memory: ByteSize,
    /// RAM that the guest is to be left with.
    pub target: ByteSize,
    /// RAM that the guest is left with, by its own word.
    pub actual: ByteSize,
    /// The guest's driver is there.
    pub active: bool,
    /// The guest reports memory that it freed.
    pub reporting: bool,
    /// The VM's memory can be given back at all: a reserved range cannot.
    pub gives_back: bool,
    /// Given back because it went into the balloon, since the VMM began.
    pub inflated: ByteSize,
    /// Given back because the guest reported it free, since the VMM began.
    pub reported: ByteSize,
    /// Not given back though the guest offered it: the kernel was about to
    /// carry it over a reboot, or the guest needs what is in it.
    pub kept: ByteSize,
    /// RAM that the host has memory for, where it can be told.
    pub resident: Option<ByteSize>,
    /// How often the guest gave statistics, since the VMM began.
    pub answers: u64,
    /// What it said last.
    pub guest: GuestMemory,
}

/// A guest's statistics, as far as it gives them. Its own words.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct GuestMemory {
    /// Bytes read from swap.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub swapped_in: Option<u64>,
    /// Bytes written to swap.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub swapped_out: Option<u64>,
    /// Page faults that read from a disk.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub major_faults: Option<u64>,
    /// Page faults that did not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub minor_faults: Option<u64>,
    /// Bytes that nothing uses.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub free: Option<u64>,
    /// Bytes that there are.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub total: Option<u64>,
    /// Bytes that programs can have without swapping.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub available: Option<u64>,
    /// Bytes of the page cache.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub caches: Option<u64>,
    /// Programs that were ended for want of memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub oom_kills: Option<u64>,
}
