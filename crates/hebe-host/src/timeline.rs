//! The report of a reboot, spanning both kernels.
//!
//! The old kernel writes what it saw into the store just before the jump; the
//! new one adds its own part. Instants are stamps of the TSC, which a kexec
//! does not reset, so that both parts lie on one axis. After a hardware reset
//! the TSC starts again: then the wall clock carries the axis, and the report
//! says so.

use std::collections::BTreeMap;

use hebe_api::{FreezeReport, ResumeReport, SaveReport};
use hebe_types::{ByteSize, RebootMethod, Stamp, VmName};
use serde::{Deserialize, Serialize};

/// Version of the report's JSON.
pub const FORMAT: u32 = 1;
/// Wall clock and TSC may differ by so much and still count as one axis: the
/// hardware clock from which a kernel starts has whole seconds.
const CLOCK_SLACK_NS: i128 = 5_000_000_000;
/// A difference that nobody minds, in nanoseconds.
const CLOCK_NOISE_NS: i128 = 5_000_000;

/// In which kernel something happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Side {
    /// The kernel that was left.
    Before,
    /// The kernel that was entered.
    After,
}

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EventKind {
    /// The order was given.
    Asked,
    /// All checks passed.
    Checked,
    /// The next kernel is in memory.
    ImageLoaded,
    /// Host services are down.
    ServicesStopped,
    /// VM: the kernel begins to preserve its memory, while it runs.
    PreserveBegan,
    /// VM: its memory is preserved.
    Preserved,
    /// Dirty pages were flushed while the VMs ran.
    Prepared,
    /// VM: the order to freeze, save or shut down arrived.
    SuspendAsked,
    /// VM: no vCPU runs any more; its downtime begins.
    VcpusStopped,
    /// VM: its devices are drained.
    DevicesDrained,
    /// VM: its state is built.
    StateBuilt,
    /// VM: its state is committed.
    Committed,
    /// VM: its file is on disk.
    Saved,
    /// VM: its guest is off; its downtime began before.
    PoweredOff,
    /// No VM runs any more.
    AllSuspended,
    /// What guests wrote last is on disk.
    Flushed,
    /// The last instruction of the old kernel's user space.
    Jump,
    /// The new kernel set up its clocks.
    KernelEntry,
    /// The first hebe process ran.
    UserSpace,
    /// The store was opened and read.
    StoreFound,
    /// The network that Hebe makes has its rules, and passes frames on.
    NetworkReady,
    /// VM: the keeper asks the kernel for its memory.
    Retrieving,
    /// VM: all of its memory is there.
    Arrived,
    /// VM: its VMM began.
    VmmStarted,
    /// VM: its state is read and checked.
    StateRead,
    /// VM: it is built around its RAM.
    Constructed,
    /// VM: its first vCPU entered the guest.
    Running,
    /// VM: it was booted from its kernel.
    Booted,
    /// VM: its guest sent a first frame.
    FirstReply,
    /// Every VM was taken care of.
    AllResumed,
}

impl EventKind {
    /// In a reader's words.
    pub fn label(self) -> &'static str {
        match self {
            Self::Asked => "reboot asked",
            Self::Checked => "checks passed",
            Self::ImageLoaded => "kernel loaded",
            Self::ServicesStopped => "services stopped",
            Self::PreserveBegan => "preserving begun",
            Self::Preserved => "memory preserved",
            Self::Prepared => "prepared, disks flushed",
            Self::SuspendAsked => "suspend asked",
            Self::VcpusStopped => "vCPUs stopped",
            Self::DevicesDrained => "devices drained",
            Self::StateBuilt => "state built",
            Self::Committed => "state committed",
            Self::Saved => "saved to file",
            Self::PoweredOff => "guest powered off",
            Self::AllSuspended => "all VMs suspended",
            Self::Flushed => "last writes flushed",
            Self::Jump => "jump",
            Self::KernelEntry => "new kernel entered",
            Self::UserSpace => "user space",
            Self::StoreFound => "store found",
            Self::NetworkReady => "network ready",
            Self::Retrieving => "retrieving begun",
            Self::Arrived => "memory arrived",
            Self::VmmStarted => "VMM started",
            Self::StateRead => "state read",
            Self::Constructed => "VM constructed",
            Self::Running => "VM runs",
            Self::Booted => "VM booted",
            Self::FirstReply => "first frame sent",
            Self::AllResumed => "all VMs resumed",
        }
    }
}

/// One instant.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// When.
    #[serde(flatten)]
    pub at: Stamp,
    /// In which kernel.
    pub side: Side,
    /// Which VM, if it concerns one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm: Option<VmName>,
    /// What.
    pub kind: EventKind,
}

/// One kernel.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KernelInfo {
    /// `uname -r`.
    pub release: String,
    /// Its boot id.
    pub boot_id: String,
}

/// How instants of the two kernels are compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Axis {
    /// By the TSC, which went on.
    Tsc,
    /// By the wall clock, because the TSC was reset or its rate is not known.
    WallClock,
}

/// The report.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timeline {
    /// [`FORMAT`].
    pub format: u32,
    /// Which kind of reboot.
    pub method: RebootMethod,
    /// The kernel that was left.
    pub before: KernelInfo,
    /// The kernel that was entered, once it was.
    pub after: Option<KernelInfo>,
    /// TSC ticks per second, measured against the monotonic clock.
    pub tsc_hz: Option<u64>,
    /// By which clock the two parts are joined, once they are.
    pub axis: Option<Axis>,
    /// What happened, in the order in which it was noted.
    pub events: Vec<Event>,
    /// What the kernel itself carried over, by VM.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub carried: Vec<CarriedRow>,
    /// What a reader should know besides.
    #[serde(default)]
    pub notes: Vec<String>,
}

/// A VM's memory that the kernel carried over, in bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CarriedRow {
    /// Which VM.
    pub vm: VmName,
    /// Guest RAM.
    pub memory: ByteSize,
    /// Of it, what was preserved; the rest was empty and left out.
    pub preserved: ByteSize,
    /// Of that, what the guest did not use: filled with zeros by preserving.
    pub filled: ByteSize,
    /// Parts that the guest began to use after the first look.
    pub late_parts: u32,
    /// What the next kernel gave back, once it did.
    pub retrieved: Option<ByteSize>,
}

/// Downtime of one VM, in milliseconds, as seen from the host.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Downtime {
    /// Which VM.
    pub vm: VmName,
    /// From the last instruction before to the first one after.
    pub stopped_ms: Option<f64>,
    /// From the last instruction before to the first frame sent after.
    pub to_first_reply_ms: Option<f64>,
}

/// One row of a printed report.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Row {
    /// Since the first event, in milliseconds.
    pub at_ms: f64,
    /// In which kernel.
    pub side: Side,
    /// Which VM.
    pub vm: Option<VmName>,
    /// What.
    pub kind: EventKind,
}

impl Timeline {
    /// An empty report.
    pub fn new(method: RebootMethod, before: KernelInfo) -> Self {
        Self {
            format: FORMAT,
            method,
            before,
            after: None,
            tsc_hz: None,
            axis: None,
            events: Vec::new(),
            carried: Vec::new(),
            notes: Vec::new(),
        }
    }

    /// Reads a report; one of another format is refused by name.
    pub fn parse(bytes: &[u8]) -> Result<Self, String> {
        let timeline: Self = serde_json::from_slice(bytes).map_err(|e| {
            format!("the report cannot be read ({e}): it is damaged or of another release")
        })?;
        if timeline.format != FORMAT {
            return Err(format!(
                "the report has format {} and this release reads {FORMAT}: use the release that wrote it",
                timeline.format
            ));
        }
        Ok(timeline)
    }

    /// As kept in the store.
    pub fn to_bytes(&self) -> Vec<u8> {
        serde_json::to_vec(self).unwrap_or_default()
    }

    /// Notes an event, once per VM, side and kind.
    pub fn note(&mut self, at: Stamp, side: Side, vm: Option<&VmName>, kind: EventKind) {
        let known = self
            .events
            .iter()
            .any(|e| (e.side, e.vm.as_ref(), e.kind) == (side, vm, kind));
        if !known {
            self.events.push(Event {
                at,
                side,
                vm: vm.cloned(),
                kind,
            });
        }
    }

    /// Notes the instants of a freeze.
    pub fn note_freeze(&mut self, vm: &VmName, report: &FreezeReport) {
        let instants = [
            (report.asked, EventKind::SuspendAsked),
            (report.vcpus_stopped, EventKind::VcpusStopped),
            (report.devices_drained, EventKind::DevicesDrained),
            (report.saved, EventKind::StateBuilt),
            (report.committed, EventKind::Committed),
        ];
        for (at, kind) in instants {
            self.note(at, Side::Before, Some(vm), kind);
        }
    }

    /// Notes the instants of a save.
    pub fn note_save(&mut self, vm: &VmName, report: &SaveReport) {
        let instants = [
            (report.asked, EventKind::SuspendAsked),
            (report.vcpus_stopped, EventKind::VcpusStopped),
            (report.durable, EventKind::Saved),
        ];
        for (at, kind) in instants {
            self.note(at, Side::Before, Some(vm), kind);
        }
    }

    /// Notes the instants of a resume.
    pub fn note_resume(&mut self, vm: &VmName, report: &ResumeReport) {
        let instants = [
            (report.process_started, EventKind::VmmStarted),
            (report.state_read, EventKind::StateRead),
            (report.constructed, EventKind::Constructed),
            (report.running, EventKind::Running),
        ];
        for (at, kind) in instants {
            self.note(at, Side::After, Some(vm), kind);
        }
    }

    /// The instant of an event.
    pub fn at(&self, side: Side, vm: Option<&VmName>, kind: EventKind) -> Option<Stamp> {
        self.events
            .iter()
            .find(|e| (e.side, e.vm.as_ref(), e.kind) == (side, vm, kind))
            .map(|e| e.at)
    }

    /// The last instant of the old kernel.
    pub fn last_before(&self) -> Option<Stamp> {
        let before = self.events.iter().filter(|e| e.side == Side::Before);
        before.map(|e| e.at).max_by_key(|at| at.tsc)
    }

    /// Wall clock of the last event, in nanoseconds.
    pub fn ended_ns(&self) -> u64 {
        let ends = self.events.iter().map(|e| e.at.realtime_ns);
        ends.max().unwrap_or(0)
    }

    /// Decides by which clock the parts are joined, given an instant of the
    /// new kernel.
    pub fn join(&mut self, now: Stamp) -> Axis {
        let continues = self
            .last_before()
            .zip(self.tsc_hz)
            .is_some_and(|(before, hz)| tsc_continues(before, now, hz));
        let axis = if continues {
            Axis::Tsc
        } else {
            Axis::WallClock
        };
        if axis == Axis::WallClock && self.axis != Some(axis) {
            self.notes.push(
                "the TSC did not go on across the reboot, so instants after it are placed by the wall clock, which may be up to a second off".into(),
            );
        }
        self.axis = Some(axis);
        axis
    }

    /// Milliseconds from `from` to `to`. Within one kernel the TSC counts.
    fn between_ms(&self, from: (Side, Stamp), to: (Side, Stamp)) -> f64 {
        let same = from.0 == to.0;
        match self.tsc_hz {
            Some(hz) if hz > 0 && (same || self.axis == Some(Axis::Tsc)) => {
                let ticks = i128::from(to.1.tsc) - i128::from(from.1.tsc);
                ticks as f64 * 1e3 / hz as f64
            }
            _ => {
                let ns = i128::from(to.1.realtime_ns) - i128::from(from.1.realtime_ns);
                ns as f64 / 1e6
            }
        }
    }

    /// Milliseconds between two events of a VM in one kernel.
    pub fn took_ms(&self, side: Side, vm: &VmName, from: EventKind, to: EventKind) -> Option<f64> {
        let at = |kind| Some((side, self.at(side, Some(vm), kind)?));
        Some(self.between_ms(at(from)?, at(to)?))
    }

    /// All events on one axis, in order of time.
    pub fn rows(&self) -> Vec<Row> {
        let first = self
            .events
            .iter()
            .map(|e| (e.side, e.at))
            .min_by_key(|(side, at)| (*side, at.tsc));
        let Some(first) = first else {
            return Vec::new();
        };
        let mut rows: Vec<Row> = self
            .events
            .iter()
            .map(|e| Row {
                at_ms: self.between_ms(first, (e.side, e.at)),
                side: e.side,
                vm: e.vm.clone(),
                kind: e.kind,
            })
            .collect();
        rows.sort_by(|a, b| a.at_ms.total_cmp(&b.at_ms).then(a.kind.cmp(&b.kind)));
        rows
    }

    /// Downtime per VM.
    pub fn downtimes(&self) -> Vec<Downtime> {
        let mut begins: BTreeMap<&VmName, Stamp> = BTreeMap::new();
        for event in &self.events {
            let begin = match event.kind {
                EventKind::VcpusStopped | EventKind::PoweredOff => event.at,
                _ => continue,
            };
            if let Some(vm) = &event.vm {
                begins.entry(vm).or_insert(begin);
            }
        }
        let after = |vm, kind| self.at(Side::After, Some(vm), kind);
        begins
            .into_iter()
            .map(|(vm, begin)| {
                let to = |end: Stamp| self.between_ms((Side::Before, begin), (Side::After, end));
                let runs = after(vm, EventKind::Running).or(after(vm, EventKind::Booted));
                Downtime {
                    vm: vm.clone(),
                    stopped_ms: runs.map(to),
                    to_first_reply_ms: after(vm, EventKind::FirstReply).map(to),
                }
            })
            .collect()
    }
}

/// Whether the TSC went on from `before` to `after`: it grew, and by as much
/// as the wall clock says, within the clock's own doubt.
pub fn tsc_continues(before: Stamp, after: Stamp, hz: u64) -> bool {
    if hz == 0 || after.tsc <= before.tsc {
        return false;
    }
    let by_tsc = i128::from(after.tsc - before.tsc) * 1_000_000_000 / i128::from(hz);
    let by_clock = i128::from(after.realtime_ns) - i128::from(before.realtime_ns);
    (by_tsc - by_clock).abs() < CLOCK_SLACK_NS
}

/// What the wall clock should show now, if it is worth setting.
///
/// A kernel starts its wall clock from the hardware clock, which has whole
/// seconds: after a kexec it can be a second behind, and every guest would be
/// given that wrong time at its resume. The TSC went on, so the old kernel's
/// last stamp plus the ticks since then is right to within its measured rate
/// (parts per million over some seconds). A difference of seconds is not that
/// fault: then somebody set a clock, and it is left alone.
pub fn corrected_clock(before: Stamp, now: Stamp, hz: u64) -> Option<u64> {
    if !tsc_continues(before, now, hz) {
        return None;
    }
    let elapsed = i128::from(now.tsc - before.tsc) * 1_000_000_000 / i128::from(hz);
    let expected = i128::from(before.realtime_ns) + elapsed;
    let off = expected - i128::from(now.realtime_ns);
    if off.abs() < CLOCK_NOISE_NS || off.abs() >= CLOCK_SLACK_NS {
        return None;
    }
    u64::try_from(expected).ok()
}

/// TSC ticks per second, from two readings of TSC and monotonic clock.
pub fn rate(first: (u64, u64), second: (u64, u64)) -> Option<u64> {
    let ticks = second.0.checked_sub(first.0)?;
    let ns = second.1.checked_sub(first.1)?;
    // Less than this and the two readings' own jitter shows.
    if ns < 10_000_000 {
        return None;
    }
    u64::try_from(u128::from(ticks) * 1_000_000_000 / u128::from(ns)).ok()
}

/// As a table for people.
pub fn table(timeline: &Timeline) -> String {
    let after = timeline.after.as_ref();
    let mut text = format!(
        "{:?} reboot, {} → {}\n",
        timeline.method,
        timeline.before.release,
        after.map_or("(not yet entered)", |k| k.release.as_str()),
    );
    text.push_str("     at (ms)  kernel  VM                event\n");
    for row in timeline.rows() {
        let side = match row.side {
            Side::Before => "old",
            Side::After => "new",
        };
        let vm = row.vm.as_ref().map_or("", |v| v.as_str());
        let label = row.kind.label();
        text.push_str(&format!("{:12.1}  {side:6}  {vm:16}  {label}\n", row.at_ms));
    }
    let downtimes = timeline.downtimes();
    if !downtimes.is_empty() {
        text.push_str("\nVM                stopped (ms)  to first frame (ms)\n");
    }
    for down in downtimes {
        let number = |n: Option<f64>| n.map_or("-".to_owned(), |n| format!("{n:.1}"));
        text.push_str(&format!(
            "{:16}  {:>12}  {:>19}\n",
            down.vm.as_str(),
            number(down.stopped_ms),
            number(down.to_first_reply_ms)
        ));
    }
    carried_table(timeline, &mut text);
    for note in &timeline.notes {
        text.push_str(&format!("note: {note}\n"));
    }
    text
}

/// What the kernel carried, and how long it took; a line per VM.
fn carried_table(timeline: &Timeline, text: &mut String) {
    if timeline.carried.is_empty() {
        return;
    }
    text.push_str("\nVM                RAM       preserved  filled    preserve (ms)  per GiB  retrieve (ms)  per GiB\n");
    for row in &timeline.carried {
        let took = |side, from, to| timeline.took_ms(side, &row.vm, from, to);
        let per_gib = |ms: Option<f64>, bytes: ByteSize| {
            let gib = bytes.0 as f64 / f64::from(1u32 << 30);
            ms.filter(|_| gib > 0.0).map(|ms| ms / gib)
        };
        let preserve = took(Side::Before, EventKind::PreserveBegan, EventKind::Preserved);
        let retrieve = took(Side::After, EventKind::Retrieving, EventKind::Arrived);
        let retrieved = row.retrieved.unwrap_or_default();
        let number = |n: Option<f64>| n.map_or("-".to_owned(), |n| format!("{n:.1}"));
        text.push_str(&format!(
            "{:16}  {:8}  {:9}  {:8}  {:>13}  {:>7}  {:>13}  {:>7}\n",
            row.vm.as_str(),
            row.memory.to_string(),
            row.preserved.to_string(),
            row.filled.to_string(),
            number(preserve),
            number(per_gib(preserve, row.preserved)),
            number(retrieve),
            number(per_gib(retrieve, retrieved)),
        ));
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// 2 GHz, so that one tick is half a nanosecond.
    const HZ: u64 = 2_000_000_000;

    fn stamp(ms: u64) -> Stamp {
        Stamp {
            tsc: 1_000 + ms * (HZ / 1000),
            realtime_ns: 1_700_000_000_000_000_000 + ms * 1_000_000,
        }
    }

    /// A warm reboot of two VMs that is over.
    pub(crate) fn sample() -> Timeline {
        let kernel = |release: &str| KernelInfo {
            release: release.into(),
            boot_id: "b".into(),
        };
        let mut timeline = Timeline::new(RebootMethod::Warm, kernel("6.1.0"));
        timeline.tsc_hz = Some(HZ);
        let (before, after) = (Side::Before, Side::After);
        timeline.note(stamp(0), before, None, EventKind::Asked);
        timeline.note(stamp(900), before, None, EventKind::ServicesStopped);
        for (i, vm) in ["db", "web"].iter().enumerate() {
            let vm: VmName = vm.parse().expect("name");
            let late = i as u64;
            timeline.note(
                stamp(1000 + late),
                before,
                Some(&vm),
                EventKind::SuspendAsked,
            );
            timeline.note(
                stamp(1010 + late),
                before,
                Some(&vm),
                EventKind::VcpusStopped,
            );
            timeline.note(stamp(1030 + late), before, Some(&vm), EventKind::Committed);
            timeline.note(stamp(3100 + late), after, Some(&vm), EventKind::VmmStarted);
            timeline.note(stamp(3200 + late), after, Some(&vm), EventKind::Running);
            timeline.note(stamp(3300 + late), after, Some(&vm), EventKind::FirstReply);
        }
        timeline.note(stamp(1050), before, None, EventKind::Jump);
        timeline.note(stamp(2000), after, None, EventKind::KernelEntry);
        timeline.note(stamp(3000), after, None, EventKind::UserSpace);
        timeline.after = Some(kernel("7.3.0"));
        timeline.join(stamp(3000));
        timeline
    }

    #[test]
    fn both_kernels_lie_on_one_axis() {
        let timeline = sample();
        assert_eq!(timeline.axis, Some(Axis::Tsc));
        let downtimes = timeline.downtimes();
        assert_eq!(downtimes.len(), 2);
        assert_eq!(downtimes[0].stopped_ms, Some(2190.0));
        assert_eq!(downtimes[0].to_first_reply_ms, Some(2290.0));
        let rows = timeline.rows();
        assert!(rows.windows(2).all(|w| w[0].at_ms <= w[1].at_ms));
        assert!(table(&timeline).contains("6.1.0 → 7.3.0"));
    }

    #[test]
    fn a_hard_reset_falls_back_to_the_wall_clock_and_says_so() {
        let mut timeline = sample();
        let mut reset = stamp(3000);
        reset.tsc = 5;
        assert_eq!(timeline.join(reset), Axis::WallClock);
        assert!(timeline.notes[0].contains("wall clock"));
        let again = timeline.join(reset);
        assert_eq!((again, timeline.notes.len()), (Axis::WallClock, 1));
        assert_eq!(timeline.downtimes()[0].stopped_ms, Some(2190.0));
    }

    #[test]
    fn the_wall_clock_is_corrected_when_and_only_when_it_lags_by_the_rtc() {
        let before = stamp(0);
        let mut now = stamp(8000);
        assert_eq!(corrected_clock(before, now, HZ), None, "right already");
        now.realtime_ns -= 730_000_000;
        let expected = stamp(8000).realtime_ns;
        assert_eq!(corrected_clock(before, now, HZ), Some(expected));
        now.realtime_ns -= 3_600_000_000_000;
        assert_eq!(corrected_clock(before, now, HZ), None, "somebody set it");
        let mut reset = stamp(8000);
        reset.tsc = 1;
        assert_eq!(corrected_clock(before, reset, HZ), None);
    }

    #[test]
    fn the_report_survives_the_store_and_foreign_ones_are_refused() {
        let timeline = sample();
        let bytes = timeline.to_bytes();
        assert_eq!(Timeline::parse(&bytes), Ok(timeline.clone()));
        assert!(bytes.len() < 8 << 10, "{}", bytes.len());
        let mut newer = timeline;
        newer.format = 2;
        let error = Timeline::parse(&newer.to_bytes()).expect_err("newer");
        assert!(error.contains("format 2"), "{error}");
        assert!(Timeline::parse(b"{").is_err());
    }

    #[test]
    fn the_rate_needs_some_time() {
        assert_eq!(rate((0, 0), (200_000_000, 100_000_000)), Some(HZ));
        assert_eq!(rate((0, 0), (2, 1)), None);
        assert_eq!(rate((5, 0), (2, 100_000_000)), None);
    }
}
