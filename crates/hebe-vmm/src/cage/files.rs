//! Which files can be opened: landlock (Documentation/userspace-api/landlock.rst).

use std::path::Path;

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, LandlockStatus,
    PathBeneath, PathFd, Ruleset, RulesetAttr, RulesetCreated, RulesetCreatedAttr, RulesetError,
    RulesetStatus, Scope,
};

use super::Room;

/// The newest interface whose restrictions are asked for; an older kernel
/// enforces those that it has.
const NEWEST: ABI = ABI::V6;

/// Forbids to open anything outside `room`, to use TCP, and to send signals
/// or abstract-socket connections out of here.
pub(super) fn confine(room: &Room) -> Result<String, String> {
    let status = restrict(room).map_err(|e| e.to_string())?;
    let abi = match status.landlock {
        LandlockStatus::Available { effective_abi, .. } => effective_abi as i32,
        LandlockStatus::NotEnabled => {
            return Err("off in this kernel: add landlock to its lsm= words".to_owned());
        }
        _ => return Err("this kernel has none: Linux 5.13 and newer do".to_owned()),
    };
    match status.ruleset {
        RulesetStatus::FullyEnforced => Ok(format!("ABI {abi}")),
        RulesetStatus::PartiallyEnforced => Ok(format!("ABI {abi}, as far as this kernel goes")),
        RulesetStatus::NotEnforced => Err("this kernel does not enforce it".to_owned()),
    }
}

fn restrict(room: &Room) -> Result<landlock::RestrictionStatus, RulesetError> {
    let own = AccessFs::ReadFile
        | AccessFs::ReadDir
        | AccessFs::WriteFile
        | AccessFs::Truncate
        | AccessFs::MakeReg
        | AccessFs::RemoveFile;
    let device = AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::IoctlDev;
    let mut rules = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(NEWEST))?
        .handle_access(AccessNet::from_all(NEWEST))?
        .scope(Scope::from_all(NEWEST))?
        .create()?;
    rules = allow(rules, &room.run_dir, own)?;
    if let Some(dir) = &room.save_dir {
        rules = allow(rules, dir, own)?;
    }
    allow(rules, Path::new("/dev/kvm"), device)?.restrict_self()
}

/// What is not there cannot be opened anyhow: whoever tries says so.
fn allow(
    rules: RulesetCreated,
    path: &Path,
    access: BitFlags<AccessFs>,
) -> Result<RulesetCreated, RulesetError> {
    match PathFd::new(path) {
        Ok(fd) => rules.add_rule(PathBeneath::new(fd, access)),
        Err(_) => Ok(rules),
    }
}
