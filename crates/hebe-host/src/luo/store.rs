//! A host's store together with what the keeper holds, so that a VM that
//! arrived is listed, resumed and given up like one in a segment.

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;

use hebe_store::luo::{VM_SESSIONS, host_session};
use hebe_types::{ByteSize, SegmentId, VmId, VmName};

use super::asking;
use super::keeper::{FIRST_KEPT, Kept};
use crate::stores::{NewSegment, StoreAccess, StoreTrouble, StoreView};

/// Whether a name in PID 1's store is that of one of Hebe's sessions.
pub(crate) fn is_ours(name: &str) -> bool {
    name == host_session().to_string() || name.starts_with(VM_SESSIONS)
}

/// A store, and beside it what the keeper on `socket` holds.
pub struct WithKept {
    inner: Arc<dyn StoreAccess>,
    socket: PathBuf,
}

impl WithKept {
    /// `inner` is the store of the host's own, which may have none.
    pub fn new(inner: Arc<dyn StoreAccess>, socket: PathBuf) -> Self {
        Self { inner, socket }
    }
}

impl StoreAccess for WithKept {
    fn view(&self) -> Result<Option<StoreView>, StoreTrouble> {
        let own = self.inner.view()?;
        let Some(kept) = asking::list(&self.socket).map_err(StoreTrouble::Keeper)? else {
            return Ok(own);
        };
        let vms = kept.vms.into_iter().map(Kept::into_view);
        let mut view = own.unwrap_or_else(|| StoreView {
            path: self.socket.clone(),
            uuid: [0; 16],
            capacity: ByteSize(0),
            free: ByteSize(0),
            kept_only: true,
            phys_range: None,
            segments: Vec::new(),
        });
        view.segments.extend(vms);
        Ok((!view.kept_only || !view.segments.is_empty()).then_some(view))
    }

    fn settle(&self) {
        self.inner.settle();
    }

    fn check(&self) -> Result<(), StoreTrouble> {
        self.inner.check()
    }

    fn create(
        &self,
        vm: VmId,
        name: &VmName,
        memory: ByteSize,
    ) -> Result<NewSegment, StoreTrouble> {
        self.inner.create(vm, name, memory)
    }

    fn drop_segment(&self, id: SegmentId, vm: Option<VmId>) -> Result<(), StoreTrouble> {
        if id.0 >= FIRST_KEPT {
            return asking::release(&self.socket, id).map_err(StoreTrouble::Keeper);
        }
        self.inner.drop_segment(id, vm)
    }

    fn device(&self) -> Result<OwnedFd, StoreTrouble> {
        self.inner.device()
    }

    fn read_report(&self) -> Result<Option<Vec<u8>>, StoreTrouble> {
        if let Some(report) = self.inner.read_report()? {
            return Ok(Some(report));
        }
        let kept = asking::list(&self.socket).map_err(StoreTrouble::Keeper)?;
        Ok(kept.and_then(|kept| kept.report).map(String::into_bytes))
    }

    fn write_report(&self, bytes: &[u8]) -> Result<(), StoreTrouble> {
        self.inner.write_report(bytes)
    }

    fn hold(&self) -> Result<(), StoreTrouble> {
        match self.inner.hold() {
            // What the keeper holds is not written to.
            Err(StoreTrouble::None) => Ok(()),
            other => other,
        }
    }

    fn release(&self) {
        self.inner.release();
    }
}
