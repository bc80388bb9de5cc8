//! Freezes and thaws file systems.
//!
//! ```text
//!  thawed ──freeze──► under way ──all of them──► frozen
//!    ▲                   │                         │
//!    └──thaw, time over──┴───────thaw, time over───┘
//! ```
//! Owner is the [`Freezer`]. To freeze one file system is to write it out, which
//! may take minutes in which the others stay frozen: so time runs from the
//! beginning, and no lock is held meanwhile. The one that is written out when a
//! freeze ends is thawed as soon as that is done: the kernel lets nobody
//! interrupt it.
//!
//! A freeze outlasts whoever did it: what an agent that died left frozen is
//! thawed by [`thaw_left`].

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

/// `_IOWR('X', 119, int)` and `_IOWR('X', 120, int)` (<linux/fs.h>).
const FIFREEZE: libc::c_ulong = 0xc004_5877;
const FITHAW: libc::c_ulong = 0xc004_5878;

/// What is done to a file system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Act {
    Freeze,
    Thaw,
}

/// Why a freeze failed that something else ended.
const OVER: &str = "they were thawed, or time was over, before all were frozen";

/// Who does it: the kernel, or a test in its place.
type Control = dyn Fn(&File, Act) -> io::Result<()> + Send + Sync;

fn kernel(file: &File, act: Act) -> io::Result<()> {
    let request = match act {
        Act::Freeze => FIFREEZE,
        Act::Thaw => FITHAW,
    };
    // SAFETY: neither takes an argument.
    match unsafe { libc::ioctl(file.as_raw_fd(), request as _, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Freezes file systems for a time.
pub(crate) struct Freezer {
    control: Box<Control>,
    state: Mutex<State>,
    /// What `state` comes to, for whoever must not wait for its lock.
    frozen: AtomicBool,
}

#[derive(Default)]
struct State {
    /// Of the freeze that stands. Whatever ends it changes that.
    number: u64,
    under_way: bool,
    /// Frozen, in this order.
    mounts: Vec<File>,
}

impl Default for Freezer {
    fn default() -> Self {
        Self::new(kernel)
    }
}

impl Freezer {
    fn new(control: impl Fn(&File, Act) -> io::Result<()> + Send + Sync + 'static) -> Self {
        Self {
            control: Box::new(control),
            state: Mutex::default(),
            frozen: AtomicBool::new(false),
        }
    }

    /// Whether something is frozen, or is being frozen. Never waits.
    pub(crate) fn is_frozen(&self) -> bool {
        self.frozen.load(Ordering::Acquire)
    }

    /// Freezes `points` until [`Freezer::thaw`], at most for `time` from now
    /// on; says how many could be frozen.
    ///
    /// # Errors
    /// Why none is.
    pub(crate) fn freeze(
        self: &Arc<Self>,
        points: &[PathBuf],
        time: Duration,
    ) -> Result<u32, String> {
        // All are open before the first is frozen: opening may need another.
        let open = open_all(points);
        let number = self.begin()?;
        let result = self
            .limit(number, time)
            .and_then(|()| self.freeze_each(open, number));
        let mut state = self.lock();
        state.under_way = false;
        let result = result.and_then(|()| match state.mounts.len() {
            _ if state.number != number => Err(OVER.to_owned()),
            0 => Err("there is no file system that can be frozen".to_owned()),
            count => Ok(count as u32),
        });
        if result.is_err() && state.number == number {
            self.end(&mut state);
        }
        self.note(&state);
        result
    }

    /// Thaws what is frozen, and ends a freeze that is under way; says how many
    /// were thawed.
    ///
    /// # Errors
    /// If nothing is frozen.
    pub(crate) fn thaw(&self) -> Result<u32, String> {
        let mut state = self.lock();
        if !state.under_way && state.mounts.is_empty() {
            return Err("no file system is frozen (any more)".into());
        }
        Ok(self.end(&mut state))
    }

    fn begin(&self) -> Result<u64, String> {
        let mut state = self.lock();
        if state.under_way || !state.mounts.is_empty() {
            return Err("file systems are frozen already: thaw them first".into());
        }
        state.number += 1;
        state.under_way = true;
        self.note(&state);
        Ok(state.number)
    }

    /// Ends a freeze when its time is over.
    fn limit(self: &Arc<Self>, number: u64, time: Duration) -> Result<(), String> {
        let this = Arc::clone(self);
        let late = thread::Builder::new().spawn(move || {
            thread::sleep(time);
            let mut state = this.lock();
            if state.number == number {
                this.end(&mut state);
            }
        });
        late.map(|_| ())
            .map_err(|e| format!("nothing could thaw them in time: {e}"))
    }

    fn freeze_each(&self, open: Vec<(File, &PathBuf)>, number: u64) -> Result<(), String> {
        for (file, point) in open {
            if self.lock().number != number {
                return Err(OVER.into());
            }
            if let Err(error) = (self.control)(&file, Act::Freeze) {
                // It cannot be frozen, or somebody else froze it.
                if matches!(
                    error.raw_os_error(),
                    Some(libc::EOPNOTSUPP | libc::EBUSY | libc::ENOTTY)
                ) {
                    continue;
                }
                return Err(format!("{} cannot be frozen: {error}", point.display()));
            }
            let mut state = self.lock();
            if state.number != number {
                drop(state);
                thaw_all(&mut vec![file], &*self.control);
                return Err(OVER.into());
            }
            state.mounts.push(file);
        }
        Ok(())
    }

    fn end(&self, state: &mut State) -> u32 {
        state.number += 1;
        let count = thaw_all(&mut state.mounts, &*self.control);
        self.note(state);
        count
    }

    fn note(&self, state: &State) {
        let frozen = state.under_way || !state.mounts.is_empty();
        self.frozen.store(frozen, Ordering::Release);
    }

    /// Not to be held while a file system is being frozen.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Thaws every file system that the agent could have frozen, and says how many
/// were frozen: for an agent that begins, or after one that ended.
///
/// # Errors
/// If mounts cannot be listed, or one cannot be thawed; the others are all the
/// same.
pub fn thaw_left() -> Result<u32, String> {
    thaw_mounts(&mounts(&table()?), &kernel)
}

fn thaw_mounts(points: &[PathBuf], control: &Control) -> Result<u32, String> {
    let (mut count, mut failed) = (0, None);
    // In the opposite order of their freeze.
    for (file, point) in open_all(points).into_iter().rev() {
        match control(&file, Act::Thaw) {
            Ok(()) => count += 1,
            // It is not frozen, or cannot be.
            Err(e)
                if matches!(
                    e.raw_os_error(),
                    Some(libc::EINVAL | libc::EOPNOTSUPP | libc::ENOTTY)
                ) => {}
            Err(e) => failed = Some(format!("{} cannot be thawed: {e}", point.display())),
        }
    }
    failed.map_or(Ok(count), Err)
}

/// The table of mounts.
pub(crate) fn table() -> Result<String, String> {
    let table = fs::read_to_string("/proc/self/mountinfo");
    table.map_err(|e| format!("mounts cannot be listed: {e}"))
}

/// Mount points of file systems on block devices that can be written to, each
/// once, those mounted last first (proc_pid_mountinfo(5)).
pub(crate) fn mounts(table: &str) -> Vec<PathBuf> {
    let mut devices = Vec::new();
    let mut found = Vec::new();
    for line in table.lines() {
        let Some((before, after)) = line.split_once(" - ") else {
            continue;
        };
        let before: Vec<&str> = before.split(' ').collect();
        let after: Vec<&str> = after.split(' ').collect();
        let (Some(device), Some(point)) = (before.get(2), before.get(4)) else {
            continue;
        };
        let (Some(source), Some(options)) = (after.get(1), after.get(2)) else {
            continue;
        };
        let writable = options.split(',').any(|o| o == "rw");
        if source.starts_with("/dev/") && writable && !devices.contains(device) {
            devices.push(*device);
            found.push(unescaped(point));
        }
    }
    found.reverse();
    found
}

/// A path in which the kernel wrote spaces and others as `\040`.
fn unescaped(text: &str) -> PathBuf {
    use std::os::unix::ffi::OsStringExt;
    let mut bytes = Vec::new();
    let mut rest = text.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        let octal = tail.get(..3).filter(|_| first == b'\\');
        let octal = octal.and_then(|t| std::str::from_utf8(t).ok());
        match octal.and_then(|t| u8::from_str_radix(t, 8).ok()) {
            Some(byte) => {
                bytes.push(byte);
                rest = &tail[3..];
            }
            None => {
                bytes.push(first);
                rest = tail;
            }
        }
    }
    PathBuf::from(std::ffi::OsString::from_vec(bytes))
}

fn open_all(points: &[PathBuf]) -> Vec<(File, &PathBuf)> {
    let mut open = Vec::new();
    for point in points {
        let directory = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_DIRECTORY)
            .open(point);
        // Hidden below another mount, or gone: not ours to freeze.
        open.extend(directory.ok().map(|file| (file, point)));
    }
    open
}

/// Thaws in the opposite order; says how many.
fn thaw_all(mounts: &mut Vec<File>, control: &Control) -> u32 {
    let mut count = 0;
    while let Some(file) = mounts.pop() {
        // Fails where somebody else thawed the file system already.
        count += u32::from(control(&file, Act::Thaw).is_ok());
    }
    count
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;
    use std::sync::mpsc;
    use std::time::Instant;

    use super::*;

    #[test]
    fn only_writable_file_systems_on_devices_are_frozen_and_each_once() {
        let table = "\
22 1 254:1 / / rw,relatime shared:1 - ext4 /dev/vda1 rw
23 22 0:5 / /proc rw,nosuid - proc proc rw
24 22 254:16 / /mnt/with\\040space\\134 rw - xfs /dev/vdb rw,attr2
25 22 254:1 /sub /bind rw - ext4 /dev/vda1 rw
26 22 254:32 / /cd ro - iso9660 /dev/vdc ro
27 22 254:48 / /ro rw - ext4 /dev/vdd ro,errors=rw-not
nonsense
28 22 - x";
        let wanted = ["/mnt/with space\\", "/"].map(PathBuf::from);
        assert_eq!(mounts(table), wanted);
        assert_eq!(mounts(""), Vec::<PathBuf>::new());
    }

    #[test]
    fn what_is_no_mount_point_is_not_frozen() {
        let freezer = Arc::new(Freezer::default());
        let nowhere = ["/no/such/mount".into()];
        let refused = freezer.freeze(&nowhere, LONG).expect_err("nothing");
        assert!(refused.contains("no file system"), "{refused}");
        assert!(!freezer.is_frozen());
    }

    const SHORT: Duration = Duration::from_millis(500);
    const LONG: Duration = Duration::from_secs(60);

    type Tried = Arc<Mutex<Vec<(usize, Act)>>>;

    /// Directories in place of mounts, and what is done to them instead of
    /// freezing and thawing: noted, then answered by `answer`.
    struct Mounts {
        points: Vec<PathBuf>,
        tried: Tried,
        _dirs: Vec<tempfile::TempDir>,
    }

    impl Mounts {
        fn new(count: usize) -> Self {
            let dirs: Vec<_> = (0..count)
                .map(|_| tempfile::tempdir().expect("dir"))
                .collect();
            Self {
                points: dirs.iter().map(|dir| dir.path().into()).collect(),
                tried: Tried::default(),
                _dirs: dirs,
            }
        }

        fn control(
            &self,
            answer: impl Fn(usize, Act) -> i32 + Send + Sync + 'static,
        ) -> impl Fn(&File, Act) -> io::Result<()> + Send + Sync + 'static {
            let inode = |file: &File| file.metadata().expect("metadata").ino();
            let opened = self.points.iter().map(File::open);
            let inodes: Vec<u64> = opened.map(|f| inode(&f.expect("open"))).collect();
            let tried = Arc::clone(&self.tried);
            move |file, act| {
                let at = inodes.iter().position(|known| *known == inode(file));
                let at = at.expect("a mount");
                tried.lock().expect("tried").push((at, act));
                match answer(at, act) {
                    0 => Ok(()),
                    errno => Err(io::Error::from_raw_os_error(errno)),
                }
            }
        }

        fn tried(&self) -> Vec<(usize, Act)> {
            self.tried.lock().expect("tried").clone()
        }

        fn wait(&self, at: usize, act: Act) {
            let until = Instant::now() + LONG;
            while !self.tried().contains(&(at, act)) {
                assert!(Instant::now() < until, "{act:?} of {at}: not in time");
                thread::sleep(Duration::from_millis(1));
            }
        }
    }

    /// The second of three mounts is frozen no sooner than `meanwhile` is over.
    fn slow_freeze(time: Duration, meanwhile: impl FnOnce(&Arc<Freezer>, &Mounts)) -> String {
        let mounts = Mounts::new(3);
        let (written_out, wait) = mpsc::channel::<()>();
        let wait = Mutex::new(wait);
        let freezer = Arc::new(Freezer::new(mounts.control(move |at, act| {
            if (at, act) == (1, Act::Freeze) {
                let _ = wait.lock().expect("wait").recv();
            }
            0
        })));
        let failed = thread::scope(|scope| {
            let freeze = scope.spawn(|| freezer.freeze(&mounts.points, time));
            mounts.wait(1, Act::Freeze);
            meanwhile(&freezer, &mounts);
            drop(written_out);
            freeze.join().expect("no panic").expect_err("it is over")
        });
        use Act::{Freeze, Thaw};
        let wanted = [(0, Freeze), (1, Freeze), (0, Thaw), (1, Thaw)];
        assert_eq!(mounts.tried(), wanted);
        assert!(!freezer.is_frozen());
        failed
    }

    #[test]
    fn time_runs_while_a_file_system_is_written_out_and_the_others_thaw_by_it() {
        let failed = slow_freeze(SHORT, |freezer, mounts| {
            mounts.wait(0, Act::Thaw);
            assert!(freezer.is_frozen(), "one is under way");
        });
        assert_eq!(failed, OVER);
    }

    #[test]
    fn a_freeze_that_is_under_way_can_be_thawed_and_asked_about() {
        let failed = slow_freeze(LONG, |freezer, mounts| {
            assert!(freezer.is_frozen());
            assert!(freezer.freeze(&mounts.points, LONG).is_err(), "another");
            assert_eq!(freezer.thaw(), Ok(1));
            assert!(freezer.freeze(&mounts.points, LONG).is_err(), "one works");
        });
        assert_eq!(failed, OVER);
    }

    #[test]
    fn a_freeze_ends_with_its_own_time_and_thaws_what_it_froze() {
        let mounts = Mounts::new(3);
        let fails = |at, act| match (at, act) {
            (1, Act::Freeze) => libc::EOPNOTSUPP,
            _ => 0,
        };
        let freezer = Arc::new(Freezer::new(mounts.control(fails)));
        // On a busy computer its time may be over before it is thawed.
        let thawed = || freezer.freeze(&mounts.points, SHORT) == Ok(2) && freezer.thaw() == Ok(2);
        assert!((0..50).any(|_| thawed()), "never in its time");
        assert!(freezer.thaw().is_err());
        assert_eq!(freezer.freeze(&mounts.points, LONG), Ok(2));
        thread::sleep(SHORT * 2);
        assert!(freezer.is_frozen(), "that was the first one's time");
        assert_eq!(freezer.thaw(), Ok(2));
        assert!(!freezer.is_frozen());
    }

    #[test]
    fn one_that_cannot_be_frozen_thaws_the_others() {
        let mounts = Mounts::new(2);
        let fails = |at, _| if at == 1 { libc::EIO } else { 0 };
        let freezer = Arc::new(Freezer::new(mounts.control(fails)));
        let failed = freezer.freeze(&mounts.points, LONG).expect_err("broken");
        assert!(failed.contains("cannot be frozen"), "{failed}");
        assert_eq!(mounts.tried().last(), Some(&(0, Act::Thaw)));
        assert!(!freezer.is_frozen());
    }

    #[test]
    fn what_another_agent_left_frozen_is_thawed_and_the_rest_is_as_it_was() {
        let mut mounts = Mounts::new(4);
        let fake = mounts.control(|at, _| [0, libc::EINVAL, libc::EIO, 0][at]);
        mounts.points.push("/no/such/mount".into());
        assert_eq!(thaw_mounts(&mounts.points[..2], &fake), Ok(1));
        let failed = thaw_mounts(&mounts.points, &fake).expect_err("one is broken");
        let broken = mounts.points[2].to_string_lossy();
        assert!(failed.contains(&*broken), "{failed}");
        let wanted = [1, 0, 3, 2, 1, 0].map(|at| (at, Act::Thaw));
        assert_eq!(mounts.tried(), wanted);
    }
}
