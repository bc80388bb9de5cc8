//! Talking to VMMs.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;
use std::time::Duration;

use hebe_api::{
    Client, ClientError, FreezeReport, Request, Response, SaveReport, VmStatus, VmmState,
};
use hebe_types::VmName;

use crate::host::{Host, HostError};
use crate::launch::Instance;

/// How long a VMM may take to say how it is. Emulated machines are slow.
pub const STATUS_WAIT: Duration = Duration::from_secs(10);
/// How long a freeze may take: an outstanding disk request can hold it up.
pub const FREEZE_WAIT: Duration = Duration::from_secs(60);
/// How long a save may take at most.
pub const SAVE_WAIT: Duration = Duration::from_secs(3600);

/// One request on a connection of its own.
pub fn ask(socket: &Path, request: &Request, wait: Duration) -> Result<Response, ClientError> {
    let mut client = Client::connect(socket)?;
    client.set_timeout(Some(wait))?;
    client.call(request)
}

/// How the VM is.
pub fn status(socket: &Path, wait: Duration) -> Result<VmStatus, ClientError> {
    match ask(socket, &Request::Status, wait)? {
        Response::Status(status) => Ok(status),
        _ => Err(ClientError::Unexpected),
    }
}

/// The process that listens on a VM's control socket, by the kernel's word.
pub fn process(socket: &Path) -> Option<u32> {
    Client::connect(socket).ok()?.peer()
}

/// [`status`], of the VM `name` and no other: what its VMM says must agree
/// with what this host noted when it started it.
///
/// # Errors
/// [`ClientError::OtherVm`] where it does not.
pub fn status_of(host: &Host, name: &VmName, wait: Duration) -> Result<VmStatus, ClientError> {
    let status = status(&host.layout.socket(name), wait)?;
    let noted = Instance::read(&host.layout.vm_dir(name));
    let is_it = status.name == *name && noted.is_none_or(|noted| noted.vm == status.id);
    if is_it {
        Ok(status)
    } else {
        Err(ClientError::OtherVm)
    }
}

/// Freezes the VM.
pub fn freeze(socket: &Path, wait: Duration) -> Result<FreezeReport, ClientError> {
    match ask(socket, &Request::Freeze, wait)? {
        Response::Frozen(report) => Ok(report),
        _ => Err(ClientError::Unexpected),
    }
}

/// Saves the VM into `file`, which messages call `name`. The VMM gets the open
/// file: it has no way to a name, and may have another root directory.
pub fn save(
    socket: &Path,
    file: &File,
    name: &Path,
    wait: Duration,
) -> Result<SaveReport, ClientError> {
    let request = Request::Save {
        name: name.to_owned(),
    };
    let mut client = Client::connect(socket)?;
    client.set_timeout(Some(wait))?;
    match client.call_with(&request, &[file.as_fd()])? {
        Response::Saved(report) => Ok(report),
        _ => Err(ClientError::Unexpected),
    }
}

/// A request that is answered with nothing more than "done".
pub fn order(socket: &Path, request: &Request, wait: Duration) -> Result<(), ClientError> {
    match ask(socket, request, wait)? {
        Response::Done => Ok(()),
        _ => Err(ClientError::Unexpected),
    }
}

/// Brings a frozen, paused or saved VM back to running in the VMM it is in;
/// one that runs is left alone.
pub fn let_run(socket: &Path) -> Result<(), ClientError> {
    match status(socket, STATUS_WAIT)?.state {
        VmmState::Running => Ok(()),
        VmmState::Frozen => order(socket, &Request::Thaw, FREEZE_WAIT),
        VmmState::Paused | VmmState::Saved => order(socket, &Request::Unpause, FREEZE_WAIT),
    }
}

/// Whether the VMM itself refused, so that the VM is as it was before.
pub fn is_refusal(error: &ClientError) -> bool {
    matches!(error, ClientError::Refused(_))
}

/// Ends the VMM; a connection that breaks while it does so is its end.
pub fn quit(host: &Host, name: &VmName, expected: Option<VmmState>) -> Result<(), HostError> {
    let socket = host.layout.socket(name);
    match order(&socket, &Request::Quit { expected }, STATUS_WAIT) {
        Ok(()) | Err(ClientError::Broken(_)) => Ok(()),
        Err(source) => Err(HostError::Vmm {
            name: name.clone(),
            source,
        }),
    }
}
