//! The network of VMs that are about to be resumed, all at once. It is made beside
//! their resume, not before it, because they stand still meanwhile.
//!
//! ```text
//!   Place::expect          Expected::finish                     Expected::over
//!   ports noted,           rules in ──▶ bridge up ──▶ helper    nobody is expected
//!   bridge made, down      (a thread beside the VMs' resume)    any more
//! ```
//!
//! **A guest that runs before its rules are in can do nothing that they forbid.**
//! Its tap is a port of a bridge that is down: no port of such a bridge forwards,
//! so that the kernel drops each frame that comes in there, and the host sends none
//! to it (`br_handle_frame()`, `br_dev_open()`; for the host an address on an
//! interface that is down leads nowhere). It is a switch without power, which the
//! guest takes for lost frames. The bridge goes up when the rules are in; forwarding
//! between interfaces is allowed before that, and translates.
//!
//! And nobody answers in a guest's place: ports of the host that lead to guests are
//! held by sockets that hear nothing, so that what comes there is lost and not
//! refused ([`crate::hush`]).
//!
//! All of it is under the network's lock, which is held from the first step to the
//! end of the second: whoever else changes the network waits, and if this process is
//! killed, finds a bridge without its rules and puts them in.

use std::collections::BTreeSet;
use std::time::Duration;

use hebe_sys::proc::since_boot_ns;
use hebe_types::VmName;

use crate::hush::Hush;
use crate::range::Range;
use crate::up::{Admitted, Care, Held, Place};
use crate::{NetworkError, Port};

/// How long a VM is expected that is to be resumed.
const EXPECTED: Duration = Duration::from_secs(120);

/// A network that is being made for VMs that are about to be resumed, and is locked.
#[derive(Debug)]
#[must_use = "the bridge is down until this is finished"]
pub struct Expected<'a> {
    place: &'a Place,
    lock: Held,
    admitted: Admitted,
    vms: BTreeSet<VmName>,
    hush: Hush,
}

impl Place {
    /// Notes the NICs of VMs that are about to be resumed, and makes their bridge,
    /// down. `None` where there are none. Those that do not come after all are
    /// forgotten in a while.
    ///
    /// # Errors
    /// There is no network: each VM is told of it by [`Place::plug`].
    pub fn expect(&self, ports: &[Port]) -> Result<Option<Expected<'_>>, NetworkError> {
        let until = since_boot_ns() + EXPECTED.as_nanos() as u64;
        let mut ports = ports.to_vec();
        let first = ports.first().map(|port| Range::of(port.address));
        // Others are told of by themselves.
        ports.retain(|port| first.is_some_and(|range| range.holds(port.address)));
        for port in &mut ports {
            port.expected_until_ns = Some(until);
        }
        if ports.is_empty() {
            return Ok(None);
        }
        let Some(lock) = self.lock(true)? else {
            return Ok(None);
        };
        let admitted = self.admit(&ports, Care::WhatThereIs)?;
        let hush = Hush::on(&admitted.all);
        self.make_bridge(admitted.range, &admitted.all)?;
        Ok(Some(Expected {
            place: self,
            lock,
            admitted,
            vms: ports.into_iter().map(|port| port.vm).collect(),
            hush,
        }))
    }

    /// Those that were expected and have not come are in use no more.
    ///
    /// # Errors
    /// They are forgotten in a while all the same.
    pub fn over(&self) -> Result<(), NetworkError> {
        let _held = self.lock(true)?;
        self.none_is_expected()
    }
}

impl Expected<'_> {
    /// Those that find their network without doing anything for it.
    pub fn vms(&self) -> &BTreeSet<VmName> {
        &self.vms
    }

    /// Puts the rules in, lets the bridge pass frames on, which `passes` is told,
    /// and has the helper started. Gives what an operator should know.
    pub fn finish(
        self,
        passes: impl FnOnce(),
        start_helper: &dyn Fn() -> Result<(), String>,
    ) -> Vec<String> {
        let Admitted {
            range,
            all,
            mut remarks,
        } = self.admitted;
        let made = self.place.make(range, &all, false, Care::WhatThereIs);
        drop(self.hush);
        if made.is_ok() {
            passes();
        }
        let served = made.and_then(|said| {
            remarks.extend(said);
            self.place.have_helper(start_helper)
        });
        remarks.extend(served.err().map(|error| error.to_string()));
        drop(self.lock);
        remarks
    }
}
