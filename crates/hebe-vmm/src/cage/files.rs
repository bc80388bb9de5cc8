//! Which files can be opened: none, by landlock
//! (Documentation/userspace-api/landlock.rst).

use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, LandlockStatus, RestrictionStatus,
    Ruleset, RulesetAttr, RulesetError, RulesetStatus, Scope,
};

/// The newest interface whose restrictions are asked for; an older kernel
/// enforces those that it has.
const NEWEST: ABI = ABI::V6;

/// Forbids to open, make, rename or remove anything, to use TCP, and to send
/// signals or abstract-socket connections out of here.
pub(super) fn confine() -> Result<String, String> {
    let status = restrict().map_err(|e| e.to_string())?;
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

/// Without a single rule that would allow anything.
fn restrict() -> Result<RestrictionStatus, RulesetError> {
    Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(NEWEST))?
        .handle_access(AccessNet::from_all(NEWEST))?
        .scope(Scope::from_all(NEWEST))?
        .create()?
        .restrict_self()
}
