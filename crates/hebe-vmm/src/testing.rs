//! What tests of a VM in this process share.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::Sender;

use hebe_store::Segment;
use hebe_types::{VmConfig, VmId};

use crate::guest;
use crate::vm::{Event, Identity, Vm};

/// A VM that runs and halts, whose definition says `more`; its segment, and what it says.
pub(crate) fn running(
    dir: &Path,
    more: &str,
    events: &Sender<Event>,
) -> anyhow::Result<(Vm, Arc<Segment>)> {
    running_code(guest::IDLE, dir, more, events)
}

/// [`running`], with code of its own.
pub(crate) fn running_code(
    code: &[u8],
    dir: &Path,
    more: &str,
    events: &Sender<Event>,
) -> anyhow::Result<(Vm, Arc<Segment>)> {
    hebe_kvm::install_kick_handler()?;
    let kernel = dir.join("kernel");
    fs::write(&kernel, guest::image(code))?;
    let kernel = kernel.display();
    let text = format!("name = 'web'\nmemory = '8MiB'\nkernel = '{kernel}'\n{more}");
    let config: VmConfig = toml::from_str(&text)?;
    let id = VmId([0x11; 16]);
    let segment = Segment::new_memfd(id, &config.name, config.memory, false)?;
    let segment = Arc::new(segment);
    let run_dir = dir.to_owned();
    let identity = Identity {
        id,
        config,
        run_dir,
    };
    let mut vm = Vm::boot(identity, segment.clone(), events)?;
    vm.start()?;
    Ok((vm, segment))
}
