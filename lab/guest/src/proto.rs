//! The agent's protocol: one request and one reply per TCP connection.
//!
//! A message is a little-endian `u32` length and that many bytes of JSON,
//! then a little-endian `u64` length and that many bytes of payload (standard
//! input, standard output, a file). Both lengths are bounded.

use std::io::{self, Read, Write};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// The agent's TCP port on the lab host.
pub const AGENT_PORT: u16 = 7070;
/// Longest JSON part, in bytes.
pub const HEAD_LEN_MAX: u32 = 1 << 20;
/// Longest payload, in bytes.
pub const PAYLOAD_LEN_MAX: u64 = 512 << 20;

/// What the test machine asks of the agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "kebab-case")]
pub enum Request {
    /// Answered with [`Reply::Status`].
    Status,
    /// Run a program to its end; the payload is its standard input.
    Exec {
        /// Program and arguments.
        argv: Vec<String>,
        /// Killed after this many milliseconds.
        timeout_ms: u64,
    },
    /// Start a program and leave it running; output goes to `log`.
    Spawn {
        /// Program and arguments.
        argv: Vec<String>,
        /// File for standard output and error.
        log: String,
    },
    /// Send a signal to a process.
    Kill {
        /// Process id.
        pid: i32,
        /// Signal number.
        signal: i32,
    },
    /// Write the payload to a file, replacing it; parents are created.
    Put {
        /// Absolute path.
        path: String,
        /// Permission bits.
        mode: u32,
    },
    /// Read a file into the payload.
    Get {
        /// Absolute path.
        path: String,
    },
    /// Turn the legacy pmem namespace into a devdax device.
    MakeDevdax,
    /// Load a kernel and, when `jump`, go there at once.
    Kexec {
        /// Kernel image.
        kernel: String,
        /// Initramfs.
        initrd: String,
        /// The whole command line.
        cmdline: String,
        /// Jump as soon as it is loaded.
        jump: bool,
    },
    /// Sync and power off.
    PowerOff,
}

/// What the agent answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "kebab-case")]
pub enum Reply {
    /// The agent's machine.
    Status(HostStatus),
    /// A program ended; the payload is standard output, then standard error.
    Exited {
        /// Exit status, if it exited.
        code: Option<i32>,
        /// Signal, if one killed it.
        signal: Option<i32>,
        /// It ran out of time.
        timed_out: bool,
        /// How much of the payload is standard output.
        stdout_len: u64,
    },
    /// A program runs.
    Spawned {
        /// Process id.
        pid: u32,
    },
    /// Done; the payload is a file, if one was asked for.
    Done,
    /// It went wrong.
    Failed {
        /// One sentence.
        message: String,
    },
}

/// The lab host as its agent sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostStatus {
    /// `/proc/sys/kernel/random/boot_id`.
    pub boot_id: String,
    /// `uname -r`.
    pub kernel: String,
    /// Milliseconds since the kernel started.
    pub uptime_ms: u64,
    /// Wall clock, nanoseconds since 1970.
    pub realtime_ns: u64,
    /// TSC when init began.
    pub userspace_tsc: u64,
    /// Everything init does was done (modules, data disk, resume).
    pub settled: bool,
}

/// Writes one message.
pub fn write_message<T: Serialize>(
    out: &mut impl Write,
    head: &T,
    payload: &[&[u8]],
) -> io::Result<()> {
    let json = serde_json::to_vec(head)?;
    let len: usize = payload.iter().map(|p| p.len()).sum();
    out.write_all(&(json.len() as u32).to_le_bytes())?;
    out.write_all(&json)?;
    out.write_all(&(len as u64).to_le_bytes())?;
    for part in payload {
        out.write_all(part)?;
    }
    out.flush()
}

/// Reads one message.
pub fn read_message<T: DeserializeOwned>(input: &mut impl Read) -> io::Result<(T, Vec<u8>)> {
    let mut len = [0; 4];
    input.read_exact(&mut len)?;
    let len = u32::from_le_bytes(len);
    if len > HEAD_LEN_MAX {
        return Err(io::Error::other(format!(
            "a message head of {len} bytes is too long"
        )));
    }
    let mut json = vec![0; len as usize];
    input.read_exact(&mut json)?;
    let head = serde_json::from_slice(&json)?;
    let mut len = [0; 8];
    input.read_exact(&mut len)?;
    let len = u64::from_le_bytes(len);
    if len > PAYLOAD_LEN_MAX {
        return Err(io::Error::other(format!(
            "a payload of {len} bytes is too long"
        )));
    }
    let mut payload = Vec::new();
    input.take(len).read_to_end(&mut payload)?;
    if payload.len() as u64 != len {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok((head, payload))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_survives_the_wire() {
        let request = Request::Get { path: "/x".into() };
        let mut wire = Vec::new();
        write_message(&mut wire, &request, &[b"ab", b"c"]).expect("write");
        let (back, payload): (Request, _) = read_message(&mut wire.as_slice()).expect("read");
        assert_eq!((back, payload.as_slice()), (request, b"abc".as_slice()));
        for cut in 0..wire.len() {
            assert!(read_message::<Request>(&mut &wire[..cut]).is_err());
        }
    }

    #[test]
    fn lengths_are_bounded() {
        let wire = [0xff; 16];
        assert!(read_message::<Request>(&mut wire.as_slice()).is_err());
    }
}
