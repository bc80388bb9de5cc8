//! Which granules are free: pure arithmetic over extents.
//!
//! A granule is handed out only if it is *provably* free: inside the store,
//! outside head and guard, and in no extent of any record, whatever that record's
//! state. A record that cannot be read might own any granule, so the table
//! calls this module only when every record can be read. There is no second
//! ownership map to consult or to disagree with: refusing to create until the
//! operator gives the damaged record up is the simpler rule, and costs the
//! VMs that are there nothing.

use std::collections::BTreeSet;

use hebe_types::{Extent, GRANULE, RamRange};

use crate::layout::{EXTENTS_MAX, HEAD_LEN};
use crate::spec::Placement;

/// Why there is no plan.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum NoRoom {
    /// Not enough granules.
    Space,
    /// Too many pieces.
    Fragments,
}

/// Where a new segment goes.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Plan {
    pub exec: Extent,
    pub ram: Vec<Placement>,
}

/// Slots of which an extent overlaps one of another slot, or another of the
/// same slot.
pub(crate) fn conflicts(extents: &[(u32, Extent)]) -> BTreeSet<u32> {
    let mut sorted = extents.to_vec();
    sorted.sort_by_key(|(_, e)| (e.offset, e.len));
    let mut out = BTreeSet::new();
    // Comparing with the one that reaches furthest finds every participant: an
    // extent either overlaps it on arrival, or becomes it, and is then
    // overlapped by whichever next one overlaps it at all.
    let mut furthest: Option<(u32, u64)> = None;
    for (slot, extent) in sorted {
        let end = extent.offset + extent.len;
        if let Some((other, reach)) = furthest {
            if reach > extent.offset {
                out.insert(other);
                out.insert(slot);
            }
            if reach >= end {
                continue;
            }
        }
        furthest = Some((slot, end));
    }
    out
}

/// Maximal runs of granules between the head and `end`, where the guard
/// begins, that are in none of the extents, in ascending order.
pub(crate) fn free_runs(end: u64, extents: &[Extent]) -> Vec<Extent> {
    let mut sorted = extents.to_vec();
    sorted.sort_by_key(|e| e.offset);
    let mut runs = Vec::new();
    let mut next = HEAD_LEN;
    let end = Extent {
        offset: end,
        len: 0,
    };
    for extent in sorted.into_iter().chain([end]) {
        if extent.offset > next {
            runs.push(Extent {
                offset: next,
                len: extent.offset - next,
            });
        }
        next = next.max(extent.offset + extent.len);
    }
    runs
}

/// Bytes in all runs.
pub(crate) fn total(runs: &[Extent]) -> u64 {
    runs.iter().map(|r| r.len).sum()
}

/// Places an execution-state area and RAM for `ranges`: in the smallest run
/// that holds all of it, otherwise in the fewest runs, largest first.
pub(crate) fn plan(runs: &[Extent], ranges: &[RamRange]) -> Result<Plan, NoRoom> {
    let needed = GRANULE + ranges.iter().map(|r| r.len).sum::<u64>();
    if total(runs) < needed {
        return Err(NoRoom::Space);
    }
    let whole = runs.iter().filter(|r| r.len >= needed);
    let mut order: Vec<Extent> = match whole.min_by_key(|r| r.len) {
        Some(run) => vec![*run],
        None => {
            let mut all = runs.to_vec();
            all.sort_by_key(|r| std::cmp::Reverse(r.len));
            all
        }
    };
    order.reverse();
    let exec = take(&mut order, GRANULE).ok_or(NoRoom::Space)?;
    let mut ram = Vec::new();
    for range in ranges {
        let mut gpa = range.gpa;
        let mut left = range.len;
        while left > 0 {
            let place = take(&mut order, left).ok_or(NoRoom::Space)?;
            ram.push(Placement { gpa, place });
            gpa.0 += place.len;
            left -= place.len;
        }
    }
    if ram.len() > EXTENTS_MAX {
        return Err(NoRoom::Fragments);
    }
    Ok(Plan { exec, ram })
}

/// Takes up to `len` bytes from the front of the last run.
fn take(runs: &mut Vec<Extent>, len: u64) -> Option<Extent> {
    let run = runs.last_mut()?;
    let taken = Extent {
        offset: run.offset,
        len: run.len.min(len),
    };
    run.offset += taken.len;
    run.len -= taken.len;
    if run.len == 0 {
        runs.pop();
    }
    Some(taken)
}
