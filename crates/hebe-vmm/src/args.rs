//! The command line, which only `hebe` writes.

use std::os::fd::RawFd;
use std::path::PathBuf;

use clap::Parser;
use hebe_store::SegmentSpec;
use hebe_types::{VmId, VmName};

use crate::cage::Wish;

/// The process around one VM. Started by `hebe`; see `hebe --help`.
#[derive(Debug, Parser)]
#[command(name = "hebe-vmm", version)]
pub struct Args {
    /// The VM's name.
    #[arg(long)]
    pub name: VmName,
    /// The VM's id: 32 hexadecimal digits.
    #[arg(long, value_parser = parse_id)]
    pub vm_id: VmId,
    /// The VM's definition. Not needed with --resume or --restore: the state holds it.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// An inherited descriptor of the VM's definition, instead of --config.
    #[arg(long, value_name = "FD", conflicts_with = "config")]
    pub config_fd: Option<RawFd>,
    /// With --resume or --restore: the definition that the VM was booted with. A state that
    /// holds another one is refused.
    #[arg(long, value_name = "FILE")]
    pub expect: Option<PathBuf>,
    /// Directory for the control socket, the console log and exit.json.
    #[arg(long, value_name = "DIR")]
    pub run_dir: PathBuf,
    /// An inherited descriptor that holds the VM's lock; kept open to the end.
    #[arg(long, value_name = "FD")]
    pub lock_fd: Option<RawFd>,
    /// An inherited descriptor of the store's device, closed once the segment is mapped; or,
    /// once for each, those of the segment's own files, which stay open.
    #[arg(long, value_name = "FD", requires = "segment")]
    pub segment_fd: Vec<RawFd>,
    /// The segment's place in the store, in JSON.
    #[arg(long, value_name = "JSON", value_parser = parse_segment)]
    pub segment: Option<SegmentSpec>,
    /// An inherited socket that is the network of a NIC, with the NIC's number, from 0.
    #[arg(long, value_name = "NIC=FD", value_parser = parse_net)]
    pub net_fd: Vec<(usize, RawFd)>,
    /// Keep guest RAM in anonymous memory that ends with this process.
    #[arg(long, conflicts_with = "segment")]
    pub memfd: bool,
    /// Resume from the execution state in the segment.
    #[arg(long, conflicts_with = "restore")]
    pub resume: bool,
    /// With --resume or --restore: take disks of the right size that are not the ones, or not
    /// as, the VM had when it was suspended.
    #[arg(long)]
    pub accept_changed_disk: bool,
    /// How this process confines itself before the guest runs.
    #[arg(long, value_enum, default_value_t, value_name = "HOW")]
    pub cage: Wish,
    /// An inherited pipe, by which whoever starts this process says that it is in its control
    /// group, and whether that has limits. The VM is not made before that.
    #[arg(long, value_name = "FD")]
    pub limits_fd: Option<RawFd>,
    /// The VM is made all the same: what it leaves where this process was started keeps
    /// nobody waiting. Not with --cage required.
    #[arg(long, requires = "limits_fd")]
    pub limits_later: bool,
    /// An inherited socket, to boot with: a byte goes there once the VM's disks are locked, and
    /// the VM does not run before one comes back. It never runs if the other side is closed.
    #[arg(long, value_name = "FD", conflicts_with_all = ["resume", "restore"])]
    pub gate_fd: Option<RawFd>,
    /// Restore RAM and execution state from a saved file.
    #[arg(long, value_name = "FILE")]
    pub restore: Option<PathBuf>,
}

fn parse_id(text: &str) -> Result<VmId, String> {
    let digits: String = text.chars().filter(|c| *c != '-').collect();
    let refuse = || format!("'{text}' is not a VM id of 32 hexadecimal digits");
    if digits.len() != 32 || !digits.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Err(refuse());
    }
    let mut id = [0; 16];
    for (i, byte) in id.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&digits[2 * i..2 * i + 2], 16).map_err(|_| refuse())?;
    }
    Ok(VmId(id))
}

fn parse_net(text: &str) -> Result<(usize, RawFd), String> {
    let parsed = text.split_once('=').and_then(|(nic, fd)| {
        let nic = nic.parse().ok()?;
        Some((nic, fd.parse().ok()?))
    });
    parsed.ok_or_else(|| format!("'{text}' is no number of a NIC and a descriptor"))
}

fn parse_segment(text: &str) -> Result<SegmentSpec, String> {
    serde_json::from_str(text).map_err(|e| e.to_string())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_definition_of_the_command_line_is_sound() {
        Args::command().debug_assert();
    }

    #[test]
    fn a_network_is_given_by_number_and_descriptor() {
        assert_eq!(parse_net("1=7"), Ok((1, 7)));
        for text in ["", "1", "1=", "=7", "-1=7", "a=b"] {
            assert!(parse_net(text).is_err(), "{text}");
        }
    }

    #[test]
    fn ids_are_32_digits_with_or_without_hyphens() {
        let id = VmId(*b"\x00\x11\x22\x33\x44\x55\x66\x77\x88\x99\xaa\xbb\xcc\xdd\xee\xff");
        for text in [
            "00112233445566778899aabbccddeeff",
            "00112233-4455-6677-8899-AABBCCDDEEFF",
            &id.to_string(),
        ] {
            assert_eq!(parse_id(text), Ok(id), "{text}");
        }
    }

    #[test]
    fn other_ids_are_refused_with_what_was_said() {
        for text in [
            "",
            "0011",
            "00112233445566778899aabbccddeeff0",
            "00112233445566778899aabbccddeefg",
            "+0112233445566778899aabbccddeeff",
            "é0112233445566778899aabbccddeef",
        ] {
            let refused = parse_id(text).expect_err(text);
            assert!(refused.contains(&format!("'{text}'")), "{refused}");
        }
    }
}
