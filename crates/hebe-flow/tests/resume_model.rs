//! One VM on a host that stops at any step, under kernels with and without the
//! store: whatever `plan` decides, the memory that goes on is as new as the disk.
//!
//! The model carries decisions out in the steps that `hebe_host::saving` takes,
//! and may stop before each of them. Memory and disk carry the number of the
//! last time that the VM ran, and so does what is made of that memory.

use hebe_flow::resume::{Decision, ExecFact, Facts, SavedFact, SegmentFact, plan};
use hebe_types::{SegmentId, VmId, VmName};

const SEEDS: u64 = 3_000;
const STEPS: usize = 60;

#[derive(Clone, Debug)]
struct Segment {
    vm: u8,
    exec: ExecFact,
    ran: u32,
}

#[derive(Clone, Debug)]
struct File {
    vm: u8,
    ran: u32,
    /// A restore from it began.
    aside: bool,
    /// And not in a segment.
    apart: bool,
    in_store: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Up {
    InSegment,
    Apart,
}

/// The host and its one VM.
#[derive(Debug)]
struct Host {
    random: u64,
    /// This kernel has the store.
    store: bool,
    segment: Option<Segment>,
    file: Option<File>,
    up: Option<(u8, Up)>,
    /// How often the VM ran.
    disk: u32,
    lives: u8,
    /// Steps until the host stops.
    fuse: Option<u32>,
    restored_apart: u32,
    done: Vec<String>,
}

/// The host stopped.
struct Stopped;

fn name() -> VmName {
    "web".parse().expect("name")
}

fn id(vm: u8) -> VmId {
    VmId([vm; 16])
}

impl Host {
    fn new(seed: u64) -> Self {
        Self {
            random: seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1,
            store: true,
            segment: None,
            file: None,
            up: None,
            disk: 0,
            lives: 0,
            fuse: None,
            restored_apart: 0,
            done: vec![format!("seed {seed}")],
        }
    }

    fn below(&mut self, end: u64) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random % end
    }

    /// Before anything that outlives the host is changed.
    fn step(&mut self, what: &str) -> Result<(), Stopped> {
        match &mut self.fuse {
            Some(0) => return Err(Stopped),
            Some(left) => *left -= 1,
            None => {}
        }
        self.done.push(what.into());
        Ok(())
    }

    /// It runs, with memory that is `ran` old.
    fn runs(&mut self, vm: u8, ran: u32, place: Up) {
        assert_eq!(ran, self.disk, "old memory met a newer disk: {self:#?}");
        self.disk += 1;
        let disk = self.disk;
        if let (Up::InSegment, Some(segment)) = (&place, &mut self.segment) {
            segment.exec = ExecFact::Running;
            segment.ran = disk;
        }
        self.up = Some((vm, place));
    }

    fn boot(&mut self) -> Result<(), Stopped> {
        // As `clear_files` has it: a file that its own segment outlived goes.
        if let Some(file) = &self.file {
            let of = self.segment.as_ref().filter(|_| self.store);
            let own = file.aside && file.in_store && !file.apart;
            let ran = |s: &Segment| matches!(s.exec, ExecFact::Running | ExecFact::Ended);
            if !of.is_some_and(|s| own && s.vm == file.vm && ran(s)) {
                return Ok(());
            }
            self.step("withdraw an outlived file")?;
            self.file = None;
        }
        if self.store {
            let kept = |s: &Segment| matches!(s.exec, ExecFact::Frozen);
            if self.segment.as_ref().is_some_and(kept) {
                return Ok(());
            }
            self.step("a new segment")?;
            self.lives += 1;
            self.segment = Some(Segment {
                vm: self.lives,
                exec: ExecFact::Empty,
                ran: self.disk,
            });
        } else {
            self.lives += 1;
        }
        let place = if self.store { Up::InSegment } else { Up::Apart };
        self.step("boot")?;
        self.runs(self.lives, self.disk, place);
        Ok(())
    }

    fn save(&mut self) -> Result<(), Stopped> {
        let Some((vm, place)) = self.up.clone() else {
            return Ok(());
        };
        self.step("withdraw a stale file")?;
        self.file = None;
        self.step("commit the file")?;
        self.file = Some(File {
            vm,
            ran: self.disk,
            aside: false,
            apart: false,
            in_store: place == Up::InSegment,
        });
        self.up = None;
        self.step("end the segment")?;
        if let (Up::InSegment, Some(segment)) = (&place, &mut self.segment) {
            segment.exec = ExecFact::Ended;
        }
        Ok(())
    }

    fn freeze(&mut self) -> Result<(), Stopped> {
        if !matches!(self.up, Some((_, Up::InSegment))) {
            return Ok(());
        }
        self.step("withdraw a stale file")?;
        self.file = None;
        self.step("commit the state")?;
        if let Some(segment) = &mut self.segment {
            segment.exec = ExecFact::Frozen;
        }
        self.up = None;
        Ok(())
    }

    fn restore(&mut self) -> Result<(), Stopped> {
        let file = self.file.clone().expect("a file");
        let own = file.aside && !file.apart && file.in_store;
        if let Some(old) = self.segment.clone().filter(|_| self.store) {
            if own && old.vm == file.vm && old.exec == ExecFact::Empty {
                self.step("put the file back")?;
                self.file_mut().aside = false;
            }
            self.step("drop the segment")?;
            self.segment = None;
        }
        let place = match self.store && file.in_store {
            true => Up::InSegment,
            false => Up::Apart,
        };
        if place == Up::InSegment {
            self.step("make a segment")?;
            self.segment = Some(Segment {
                vm: file.vm,
                exec: ExecFact::Empty,
                ran: file.ran,
            });
        } else {
            self.restored_apart += u32::from(file.in_store);
        }
        self.step("note the place")?;
        self.file_mut().apart = file.in_store && place == Up::Apart;
        self.step("set the file aside")?;
        self.file_mut().aside = true;
        self.step("run")?;
        self.runs(file.vm, file.ran, place);
        self.step("withdraw the file")?;
        self.file = None;
        Ok(())
    }

    fn file_mut(&mut self) -> &mut File {
        self.file.as_mut().expect("a file")
    }

    fn facts(&mut self) -> Facts {
        let segment = self
            .segment
            .iter()
            .filter(|_| self.store)
            .map(|s| SegmentFact {
                id: SegmentId(1),
                name: Some(name()),
                vm: Some(id(s.vm)),
                exec: s.exec.clone(),
            });
        let fact = |file: &File| match file.aside {
            false => SavedFact::Complete,
            true => SavedFact::Restoring {
                into: (file.in_store && !file.apart).then_some(id(file.vm)),
            },
        };
        let mut facts = Facts {
            segments: segment.collect(),
            saved: self.file.iter().map(|f| (name(), fact(f))).collect(),
            alive: self.up.iter().map(|_| name()).collect(),
            ..Facts::default()
        };
        // A note tells of a state in a store that is away.
        let frozen = |s: &Segment| s.exec == ExecFact::Frozen;
        if !self.store && self.segment.as_ref().is_some_and(frozen) {
            facts.elsewhere.insert(name(), "frozen elsewhere".into());
        }
        facts
    }

    fn carry_out(&mut self) -> Result<(), Stopped> {
        let decision = plan(&self.facts()).remove(&name());
        self.done.push(format!("{decision:?}"));
        match decision {
            Some(Decision::Resume { .. }) => {
                let segment = self.segment.clone().expect("a segment");
                self.step("resume")?;
                self.runs(segment.vm, segment.ran, Up::InSegment);
            }
            Some(Decision::Restore { .. }) => self.restore()?,
            Some(Decision::Boot { .. }) => self.boot()?,
            Some(Decision::Clean { .. }) => {
                self.step("free the segment")?;
                self.segment = None;
            }
            Some(Decision::Already | Decision::Leave { .. } | Decision::Lost { .. }) | None => {}
        }
        Ok(())
    }

    /// A whole file that no guest ran after is never lost.
    fn keeps_what_counts(&self, before: &Option<File>) {
        let whole = |file: &File| !file.aside && file.ran == self.disk;
        if before.as_ref().is_some_and(whole) && self.up.is_none() {
            assert!(self.file.is_some(), "a saved VM is gone: {self:#?}");
        }
    }

    fn turn(&mut self) {
        self.fuse = (self.below(2) == 0).then(|| self.below(7) as u32);
        let (before, running) = (self.file.clone(), self.up.is_some());
        let done = match self.below(6) {
            // A person who was left the choice gives the VM up.
            0 if !running && self.file.as_ref().is_some_and(|f| f.aside) => {
                self.file = None;
                Ok(())
            }
            0 | 4 => self.carry_out(),
            1 if !running && self.facts().elsewhere.is_empty() => self.boot(),
            2 => self.save(),
            3 => self.freeze(),
            _ => Err(Stopped),
        };
        self.keeps_what_counts(&before);
        if done.is_err() {
            self.up = None;
            self.store = self.below(2) == 0;
            self.done
                .push(format!("the host starts, store: {}", self.store));
            self.fuse = None;
            let _ = self.carry_out();
        }
    }
}

#[test]
fn old_memory_never_meets_a_newer_disk_whatever_kernel_comes_when() {
    let mut apart = 0;
    for seed in 0..SEEDS {
        let mut host = Host::new(seed);
        for _ in 0..STEPS {
            host.turn();
        }
        apart += host.restored_apart;
    }
    assert!(apart > 100, "restored apart from the store: {apart}");
}
