//! A VM's balloon.

use std::thread;
use std::time::{Duration, Instant};

use hebe_api::{BalloonStatus, ClientError, Request, Response};
use hebe_types::{ByteSize, VmName};

use crate::host::{Host, HostError};
use crate::listing;
use crate::vmm;

/// How long a guest's statistics are waited for; without new ones the last are
/// shown.
const NEWS_WAIT: Duration = Duration::from_secs(2);
const NEWS_POLL: Duration = Duration::from_millis(50);

/// Sets a VM's balloon, so that its guest is left with `target` of RAM, if
/// given; says how it stands, with statistics that the guest gave just now, if
/// it does so. What the guest gives takes its time: the answer does not wait
/// for it.
///
/// # Errors
/// [`HostError::Refused`] where it does not run; [`HostError::Vmm`] where it
/// has no balloon, or cannot have this one.
pub fn balloon(
    host: &Host,
    name: &VmName,
    target: Option<ByteSize>,
) -> Result<BalloonStatus, HostError> {
    let survey = listing::survey(host);
    let row = survey.row(host, name)?;
    if !row.life.has_vmm() {
        return Err(HostError::Refused {
            name: name.clone(),
            why: format!(
                "it is {}, and a balloon is there only while the VM is up",
                row.state.as_str()
            ),
        });
    }
    let ask = |target| {
        let socket = host.layout.socket(name);
        match vmm::ask(&socket, &Request::Balloon { target }, vmm::STATUS_WAIT) {
            Ok(Response::Balloon(status)) => Ok(status),
            Ok(_) => Err(ClientError::Unexpected),
            Err(error) => Err(error),
        }
        .map_err(|source| HostError::Vmm {
            name: name.clone(),
            source,
        })
    };
    let first = ask(target)?;
    let mut last = first.clone();
    let until = Instant::now() + NEWS_WAIT;
    while last.active && last.answers == first.answers && Instant::now() < until {
        thread::sleep(NEWS_POLL);
        last = ask(None)?;
    }
    Ok(last)
}
