//! The guests' status page, `GET /status`.

use serde::{Deserialize, Serialize};

/// UDP echo.
pub const UDP_ECHO_PORT: u16 = 7;
/// TCP echo.
pub const TCP_ECHO_PORT: u16 = 9;
/// HTTP.
pub const HTTP_PORT: u16 = 80;
/// The slow-starting service.
pub const SLOW_PORT: u16 = 8080;
/// Size of one web object, in bytes (R-49 used files of 512 KB).
pub const WEB_OBJECT_LEN: usize = 512 << 10;

/// A guest as it sees itself.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct GuestStatus {
    /// `/proc/sys/kernel/random/boot_id`.
    pub boot_id: String,
    /// `uname -r`.
    pub kernel: String,
    /// Seconds since the guest's kernel started.
    pub uptime_s: f64,
    /// Wall clock, nanoseconds since 1970.
    pub realtime_ns: u64,
    /// Monotonic clock, nanoseconds.
    pub monotonic_ns: u64,
    /// The memory checker.
    pub memory_check: MemoryCheck,
    /// Times the monotonic clock was seen to go backwards, on any CPU.
    pub monotonic_backwards: u64,
    /// CPUs online.
    pub cpus: u32,
    /// The disk writer, if the guest has a disk.
    pub disk: Option<DiskCheck>,
    /// Blocks of 512 bytes read from the guest's first disk since boot.
    pub block_reads: u64,
    /// Nanoseconds of monotonic time at which the slow service began to listen.
    pub slow_service_ready_ns: Option<u64>,
}

/// What the memory checker has seen since the guest booted.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryCheck {
    /// Times the whole working set was verified and rewritten.
    pub passes: u64,
    /// Pages verified so far.
    pub verified: u64,
    /// Pages that did not hold what was written.
    pub errors: u64,
    /// Pages in the working set.
    pub pages: u64,
}

/// What the disk writer has done since the guest booted.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskCheck {
    /// Records written.
    pub writes: u64,
    /// Records whose fsync returned: the last acknowledged sequence number.
    pub fsyncs: u64,
    /// Failed writes, failed fsyncs, records read back wrong.
    pub errors: u64,
    /// Acknowledged records found intact when the guest booted on this disk.
    pub found_at_boot: u64,
}

/// What `GET /generation` answers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GenerationCheck {
    /// A driver of the kernel is bound to the VM generation ID.
    pub bound: bool,
    /// Times the kernel reseeded its random numbers since it booted, because
    /// the ID had changed.
    pub changes: u64,
}

/// What `GET /file` answers.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct FileRead {
    /// Bytes read.
    pub bytes: u64,
    /// How long that took, by the guest's monotonic clock.
    pub elapsed_ns: u64,
    /// Blocks of 512 bytes that came from the disk.
    pub block_reads: u64,
}
