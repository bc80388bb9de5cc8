//! VM generation ID: 16 bytes in guest RAM that change when the guest goes on
//! from a state that another copy of it may go on from, too, so that it draws
//! new random numbers and gives up what must be unique (Virtual Machine
//! Generation ID, Microsoft 2012).
//!
//! | The VM | ID |
//! |---|---|
//! | boots, resets itself | drawn once, kept |
//! | is paused; is resumed from memory, as by a warm reboot | kept: memory cannot be copied, and its state is withdrawn before it runs |
//! | is restored from a file, which can | drawn anew |
//!
//! A resume from memory touches no byte of it. A restore writes it once, into
//! RAM that it has just read from the file, before a vCPU runs.

use std::sync::{Mutex, MutexGuard, PoisonError};

use hebe_boot::layout;
use hebe_devices::Ram;
use hebe_state::v1::machine::GenerationIdV1;
use rustix::rand::{GetRandomFlags, getrandom};
use vm_memory::{Bytes, GuestAddress};

use crate::vm::VmError;

type Id = [u8; 16];

/// A VM's ID, for as long as its VMM lives: a reset does not change it.
#[derive(Debug, Default)]
pub(crate) struct Generation(Mutex<Option<Id>>);

impl Generation {
    fn place(&self) -> MutexGuard<'_, Option<Id>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The ID; drawn now if there is none yet.
    pub(crate) fn id(&self) -> Result<Id, VmError> {
        let mut place = self.place();
        match *place {
            Some(id) => Ok(id),
            None => Ok(*place.insert(draw()?)),
        }
    }

    /// Takes over the ID that the guest has.
    pub(crate) fn restore(&self, state: GenerationIdV1) {
        *self.place() = Some(state.id);
    }

    /// The ID as it is saved.
    pub(crate) fn save(&self) -> Result<GenerationIdV1, VmError> {
        Ok(GenerationIdV1 { id: self.id()? })
    }

    /// Another ID, also in the guest's memory. The guest is to be told.
    pub(crate) fn renew(&self, ram: &Ram) -> Result<(), VmError> {
        let id = draw()?;
        ram.write_slice(&id, GuestAddress(layout::GENERATION_ID))
            .map_err(|e| VmError::Mismatch(e.to_string()))?;
        *self.place() = Some(id);
        Ok(())
    }
}

fn draw() -> Result<Id, VmError> {
    let mut id = [0; 16];
    // So few bytes come whole, or not at all (getrandom(2)).
    match getrandom(&mut id, GetRandomFlags::empty()) {
        Ok(_) => Ok(id),
        Err(errno) => Err(VmError::Io {
            what: "the host gives no random numbers for the VM's generation ID",
            source: errno.into(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_drawn_once_kept_and_changed_only_by_order() {
        let generation = Generation::default();
        let id = generation.id().expect("drawn");
        assert_eq!(generation.id().expect("kept"), id);
        let saved = generation.save().expect("saved");
        assert_eq!(saved.id, id);
        let other = Generation::default();
        assert_ne!(other.id().expect("drawn"), id);
        other.restore(saved);
        assert_eq!(other.save().expect("saved"), saved);
        let ram = Ram::from_ranges(&[(GuestAddress(0), 2 << 20)]).expect("RAM");
        other.renew(&ram).expect("renewed");
        let mut seen = [0; 16];
        let at = GuestAddress(layout::GENERATION_ID);
        ram.read_slice(&mut seen, at).expect("read");
        assert_ne!(seen, id);
        assert_eq!(other.id().expect("kept"), seen);
    }
}
