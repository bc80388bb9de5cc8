//! A file that outlives the kernel: the host's own record of its slot, where
//! the server keeps none.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use hebe_policy::fleet::slots::{SLOT_VERSION, Slot};

use crate::slots::FleetError;

/// The file.
#[derive(Clone, Debug)]
pub struct Note {
    path: PathBuf,
}

impl Note {
    /// Kept at `path`.
    pub fn at(path: PathBuf) -> Self {
        Self { path }
    }

    fn error(&self, source: io::Error) -> FleetError {
        FleetError::Note {
            path: self.path.clone(),
            source,
        }
    }

    /// What is written down.
    ///
    /// # Errors
    /// When it cannot be read: then nothing is known.
    pub fn read(&self) -> Result<Option<Slot>, FleetError> {
        let bytes = match fs::read(&self.path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            read => read.map_err(|e| self.error(e))?,
        };
        let slot: Slot =
            serde_json::from_slice(&bytes).map_err(|e| self.error(io::Error::from(e)))?;
        if slot.version != SLOT_VERSION {
            let why = format!("its version is {}", slot.version);
            return Err(self.error(io::Error::new(io::ErrorKind::InvalidData, why)));
        }
        Ok(Some(slot))
    }

    /// Writes it down; on the disk when this returns.
    ///
    /// # Errors
    /// When it cannot be written: then the old one is there.
    pub fn write(&self, slot: &Slot) -> Result<(), FleetError> {
        self.write_whole(slot).map_err(|e| self.error(e))
    }

    fn write_whole(&self, slot: &Slot) -> io::Result<()> {
        let folder = self.path.parent().unwrap_or(Path::new("/"));
        fs::create_dir_all(folder)?;
        let fresh = self.path.with_extension("new");
        let mut file = File::create(&fresh)?;
        file.write_all(&serde_json::to_vec_pretty(slot)?)?;
        file.sync_all()?;
        fs::rename(&fresh, &self.path)?;
        File::open(folder)?.sync_all()
    }

    /// Removes it.
    ///
    /// # Errors
    /// When it is still there.
    pub fn remove(&self) -> Result<(), FleetError> {
        match fs::remove_file(&self.path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(self.error(e)),
            _ => Ok(()),
        }
    }
}
