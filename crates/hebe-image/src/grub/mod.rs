//! What GRUB's `grub.cfg` boots, found without GRUB.
//!
//! A configuration is a program (GRUB manual, "GRUB's scripting language").
//! Enough of it is carried out to follow what distributions write: variables,
//! `if`, functions, `source`, `load_env`, `search`, `menuentry`, `submenu`,
//! `linux`, `initrd`, and `blscfg` of Fedora. Left out are loops, whose bodies
//! are skipped, and arithmetic; commands that are not known succeed and do
//! nothing, as those for screens and modules may.
//!
//! Bounds: nesting of blocks, calls and menus, commands carried out, and what
//! variables may hold together.

mod run;
mod script;

use std::collections::BTreeMap;

pub use run::{Choice, Disk, Place, choose};
pub use script::ScriptError;

/// Why a configuration leads nowhere.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GrubError {
    /// Not a program.
    #[error(transparent)]
    Script(#[from] ScriptError),
    /// No menu, no entry.
    #[error("it has no menu entry")]
    NoEntry,
    /// The default entry boots something else.
    #[error("its default entry '{0}' boots no Linux kernel")]
    NoLinux(String),
    /// More than any sound configuration does.
    #[error("it goes on for too long, or too deep")]
    TooMuch,
}

/// A program's variables.
pub type Variables = BTreeMap<String, String>;
