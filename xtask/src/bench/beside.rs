//! Hebe and QEMU as two VMMs of one lab host: what the benches of one beside
//! the other have in common.
//!
//! Both run the same kernel, initramfs and command line, but for names and
//! addresses, with RAM in a memfd of ordinary pages, the same kinds of devices,
//! and disks that are raw files on the host's own disk.

use anyhow::{Context, Result};
use lab::peer::{self, PeerGuest};
use lab::scenario::{GuestSpec, Lab};
use serde::Serialize;

/// Which program runs a VM, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Vmm {
    /// Hebe, the guest's RAM in a memfd.
    Hebe,
    /// Hebe, the guest's RAM in the reserved range.
    HebeDevdax,
    /// Hebe; the guest's network driver leaves nothing to the host: no
    /// checksums, no long frames.
    HebePlain,
    /// QEMU.
    Qemu,
    /// QEMU, the network card served by the host's kernel.
    QemuVhost,
}

impl Vmm {
    /// As it is written in tables.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Hebe => "hebe",
            Self::HebeDevdax => "hebe-devdax",
            Self::HebePlain => "hebe-plain",
            Self::Qemu => "qemu",
            Self::QemuVhost => "qemu-vhost",
        }
    }

    /// Hebe's own.
    pub fn is_hebe(self) -> bool {
        matches!(self, Self::Hebe | Self::HebeDevdax | Self::HebePlain)
    }

    /// Defines guests, so that they can be started by [`Vmm::order`].
    pub fn define(self, lab: &Lab, guests: &[GuestSpec]) -> Result<()> {
        if self.is_hebe() {
            return guests.iter().try_for_each(|guest| lab.define(guest));
        }
        let vhost = self == Self::QemuVhost;
        let guests: Vec<PeerGuest<'_>> = guests
            .iter()
            .map(|spec| PeerGuest { spec, vhost })
            .collect();
        peer::define(lab, &guests)
    }

    /// What starts guests that were just defined.
    pub fn order(self, guests: &[GuestSpec]) -> Vec<String> {
        let names = guests.iter().map(|guest| guest.name.clone());
        match self.is_hebe() {
            true => ["hebe", "start"]
                .map(str::to_owned)
                .into_iter()
                .chain(names)
                .collect(),
            false => peer::START.map(str::to_owned).into(),
        }
    }

    /// Defines and starts guests; the process id of each one's VMM, in order.
    pub fn start(self, lab: &Lab, guests: &[GuestSpec]) -> Result<Vec<u32>> {
        self.define(lab, guests)?;
        let order = self.order(guests);
        let words: Vec<&str> = order.iter().map(String::as_str).collect();
        let said = lab.machine.exec_ok(&words)?;
        match self.is_hebe() {
            true => lab.vmm_pids(guests),
            false => peer_pids(&said, guests),
        }
    }

    /// Ends guests at once.
    pub fn stop(self, lab: &Lab, guests: &[GuestSpec]) -> Result<()> {
        if !self.is_hebe() {
            self.define(lab, guests)?;
            return peer::stop(lab);
        }
        let mut words = vec!["hebe", "stop", "--force", "--timeout", "0"];
        words.extend(guests.iter().map(|guest| guest.name.as_str()));
        lab.machine.exec_ok(&words).map(drop)
    }
}

fn peer_pids(said: &str, guests: &[GuestSpec]) -> Result<Vec<u32>> {
    let pid = |guest: &GuestSpec| {
        let line = said.lines().find_map(|line| {
            let (name, pid) = line.split_once(' ')?;
            (name == guest.name).then_some(pid)
        });
        let pid = line.and_then(|pid| pid.parse().ok());
        pid.with_context(|| format!("{} has no QEMU: {said}", guest.name))
    };
    guests.iter().map(pid).collect()
}

#[cfg(test)]
mod tests {
    use lab::assets::KernelName;

    use super::*;

    #[test]
    fn pids_are_read_by_name() {
        let guest = |index| GuestSpec::numbered(index, KernelName::V6_1Cloud);
        let guests = [guest(0), guest(1)];
        let pids = peer_pids("vm2 17\nvm1 16\n", &guests).expect("both");
        assert_eq!(pids, [16, 17]);
        assert!(peer_pids("vm1 16\n", &guests).is_err());
    }
}
