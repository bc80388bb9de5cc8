//! A kernel for tests, with the real one's rules and faults made to order.
//!
//! Only what the real orchestrator cannot produce when asked is what this is
//! for: a token that fails, a session that is lost, a device that is taken.
//! Files are real memfds. At [`FakeKernel::kexec`] everything that was preserved
//! is copied into new files, and everything else of the old kernel is gone.
//!
//! That a preserved file neither grows nor shrinks and keeps its pages is for the
//! real kernel to enforce (EPERM); here `kexec` panics when a test did it.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use rustix::fs::{
    FallocateFlags, MemfdFlags, SealFlags, SeekFrom, fallocate, fcntl_add_seals, fcntl_get_seals,
    fstat, fstatfs, ftruncate, memfd_create, seek,
};

use super::{
    Adopted, Incoming, LuoError, Orchestrator, Outgoing, SessionName, Token, create_error,
    open_error, preserve_error, retrieve_error, retrieve_session_error,
};

const TMPFS_MAGIC: i64 = 0x0102_1994;

/// What goes wrong, once armed by [`FakeKernel::arm`].
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fault {
    /// Making this session fails.
    Create(String),
    /// Preserving this token of this session fails.
    Preserve(String, u64),
    /// Retrieving this token of this session fails.
    Retrieve(String, u64),
    /// Finishing this session fails.
    Finish(String),
    /// This session does not arrive in the next kernel.
    Vanish(String),
    /// The next kernel can read nothing.
    Deserialize,
}

#[derive(Debug)]
struct Kept {
    file: OwnedFd,
    inode: u64,
    size: u64,
    blocks: u64,
}

/// The kernel's end of a session's descriptor: it hears when the last duplicate
/// of that is closed, whoever has it.
#[derive(Debug)]
struct Link {
    end: UnixStream,
    inode: u64,
}

impl Link {
    fn new() -> (Self, OwnedFd) {
        let (end, theirs) = UnixStream::pair().expect("pair");
        end.set_nonblocking(true).expect("non-blocking");
        let inode = fstat(&theirs).expect("fstat").st_ino;
        (Self { end, inode }, theirs.into())
    }

    fn is_open(&self) -> bool {
        let mut byte = [0u8; 1];
        let flags = rustix::net::RecvFlags::PEEK;
        !matches!(rustix::net::recv(&self.end, &mut byte, flags), Ok((_, 0)))
    }
}

#[derive(Debug)]
struct Leaving {
    link: Link,
    files: BTreeMap<u64, Kept>,
}

#[derive(Debug, Default)]
struct Arrived {
    /// Somebody got it.
    link: Option<Link>,
    files: BTreeMap<u64, Result<OwnedFd, i32>>,
}

#[derive(Debug, Default)]
struct State {
    boot: u64,
    device_taken: bool,
    unreadable: bool,
    outgoing: BTreeMap<String, Leaving>,
    incoming: BTreeMap<String, Arrived>,
    faults: BTreeMap<Fault, i32>,
    /// Sessions of which nothing is retrieved for now.
    stalled: BTreeSet<String>,
}

/// One machine, over any number of kernels.
#[derive(Clone, Debug, Default)]
pub struct FakeKernel {
    state: Arc<Mutex<State>>,
    changed: Arc<Condvar>,
}

/// The device, open.
#[derive(Debug)]
pub struct FakeDevice {
    kernel: FakeKernel,
    boot: u64,
}

#[derive(Debug)]
struct Session {
    kernel: FakeKernel,
    boot: u64,
    name: String,
    /// Taken by `drop` alone.
    fd: Option<OwnedFd>,
}

impl State {
    /// Lets go of sessions that nobody has open any more.
    fn purge(&mut self) {
        self.outgoing.retain(|_, leaving| leaving.link.is_open());
        let is_open = |a: &Arrived| a.link.as_ref().is_none_or(Link::is_open);
        self.incoming.retain(|_, arrived| is_open(arrived));
    }
}

fn errno(code: i32) -> io::Error {
    io::Error::from_raw_os_error(code)
}

impl FakeKernel {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Opens the device.
    ///
    /// # Errors
    /// As the real one's.
    pub fn open(&self) -> Result<FakeDevice, LuoError> {
        let mut state = self.lock();
        let refused = |code| open_error(errno(code), || LuoError::NotOffered);
        if state.device_taken {
            return Err(refused(libc::EBUSY));
        }
        if state.unreadable {
            return Err(refused(libc::EIO));
        }
        state.device_taken = true;
        Ok(FakeDevice {
            kernel: self.clone(),
            boot: state.boot,
        })
    }

    /// Makes an operation fail with an errno, until [`FakeKernel::disarm`].
    pub fn arm(&self, fault: Fault, code: i32) {
        self.lock().faults.insert(fault, code);
    }

    /// Lets everything succeed again.
    pub fn disarm(&self) {
        self.lock().faults.clear();
    }

    /// Whoever retrieves something of this session waits, until
    /// [`FakeKernel::go_on`]: a large VM.
    pub fn stall(&self, session: &str) {
        self.lock().stalled.insert(session.to_owned());
    }

    /// Ends every [`FakeKernel::stall`].
    pub fn go_on(&self) {
        self.lock().stalled.clear();
        self.changed.notify_all();
    }

    /// How many sessions the next kernel would get, and how many files in them.
    pub fn outgoing(&self) -> (usize, usize) {
        let mut state = self.lock();
        state.purge();
        (
            state.outgoing.len(),
            state.outgoing.values().map(|l| l.files.len()).sum(),
        )
    }

    /// A session of the kernel before by its descriptor, as [`super::adopt`].
    ///
    /// # Errors
    /// The same.
    pub fn adopt(&self, fd: OwnedFd) -> io::Result<Adopted> {
        let inode = fstat(&fd)?.st_ino;
        let state = self.lock();
        let is_it = |a: &Arrived| a.link.as_ref().is_some_and(|l| l.inode == inode);
        let found = state.incoming.iter().find(|(_, a)| is_it(a));
        let name = found.ok_or(io::ErrorKind::InvalidInput)?.0.clone();
        let session_name = name.parse().map_err(io::Error::other)?;
        let session = Session {
            kernel: self.clone(),
            boot: state.boot,
            name,
            fd: Some(fd),
        };
        Ok((session_name, Box::new(session)))
    }

    /// Tokens in an outgoing session.
    pub fn tokens(&self, name: &str) -> Vec<u64> {
        let state = self.lock();
        let leaving = state.outgoing.get(name);
        leaving.map_or_else(Vec::new, |l| l.files.keys().copied().collect())
    }

    /// Jumps. Handles of the old kernel are dead from here on.
    ///
    /// # Panics
    /// When a preserved file was grown, shrunk or punched, which the real
    /// kernel refuses.
    pub fn kexec(&self) {
        let mut state = self.lock();
        state.purge();
        let outgoing = std::mem::take(&mut state.outgoing);
        let faults = std::mem::take(&mut state.faults);
        state.boot += 1;
        state.device_taken = false;
        state.unreadable = faults.contains_key(&Fault::Deserialize);
        state.incoming = BTreeMap::new();
        for (name, Leaving { files, .. }) in outgoing {
            if faults.contains_key(&Fault::Vanish(name.clone())) {
                continue;
            }
            let mut arrived = Arrived::default();
            for (token, kept) in files {
                arrived.files.insert(token, Ok(carried(&kept)));
            }
            state.incoming.insert(name, arrived);
        }
        // Faults of retrieving are armed before the jump as well as after it.
        state.faults = faults;
    }

    /// Overwrites bytes of a file that arrived and was not retrieved yet.
    ///
    /// # Panics
    /// When there is no such file.
    pub fn scribble(&self, name: &str, token: u64, offset: u64, bytes: &[u8]) {
        let state = self.lock();
        let arrived = state.incoming.get(name).expect("a session that arrived");
        let file = arrived.files.get(&token).expect("a token that arrived");
        let file = file.as_ref().expect("a file that is not lost");
        rustix::io::pwrite(file, bytes, offset).expect("write");
    }

    /// Replaces a file that arrived and was not retrieved yet.
    ///
    /// # Panics
    /// When there is no such session.
    pub fn replace(&self, name: &str, token: u64, file: OwnedFd) {
        let mut state = self.lock();
        let arrived = state
            .incoming
            .get_mut(name)
            .expect("a session that arrived");
        arrived.files.insert(token, Ok(file));
    }
}

/// The file as the next kernel has it.
fn carried(kept: &Kept) -> OwnedFd {
    let now = fstat(&kept.file).expect("fstat");
    assert_eq!(
        now.st_size as u64, kept.size,
        "a preserved file was grown or shrunk; the kernel answers EPERM"
    );
    assert!(
        now.st_blocks as u64 >= kept.blocks,
        "a hole was punched into a preserved file; the kernel answers EPERM"
    );
    let copy = memfd_create("", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).expect("memfd");
    ftruncate(&copy, kept.size).expect("ftruncate");
    let mut buffer = vec![0; 1 << 20];
    let mut at = 0;
    // Pages that were allocated and never written count as holes here, and
    // read as zero in both.
    while let Ok(start) = seek(&kept.file, SeekFrom::Data(at)) {
        let end = seek(&kept.file, SeekFrom::Hole(start)).expect("end of data");
        at = start;
        while at < end {
            let len = buffer.len().min((end - at) as usize);
            let n = rustix::io::pread(&kept.file, &mut buffer[..len], at).expect("read");
            rustix::io::pwrite(&copy, &buffer[..n], at).expect("write");
            at += n as u64;
        }
    }
    if kept.size > 0 {
        fallocate(&copy, FallocateFlags::empty(), 0, kept.size).expect("fallocate");
    }
    let seals = fcntl_get_seals(&kept.file).expect("seals");
    fcntl_add_seals(&copy, seals).expect("seal");
    copy
}

fn may_be_carried(fd: BorrowedFd<'_>) -> Result<Kept, i32> {
    let code = |e: rustix::io::Errno| e.raw_os_error();
    let stat = fstat(fd).map_err(code)?;
    let shmem = fstatfs(fd).is_ok_and(|fs| fs.f_type == TMPFS_MAGIC);
    if !shmem || stat.st_nlink != 0 {
        return Err(libc::ENOENT);
    }
    let known = SealFlags::SEAL
        | SealFlags::SHRINK
        | SealFlags::GROW
        | SealFlags::WRITE
        | SealFlags::FUTURE_WRITE
        | SealFlags::from_bits_retain(0x20);
    if !known.contains(fcntl_get_seals(fd).map_err(code)?) {
        return Err(libc::EOPNOTSUPP);
    }
    if stat.st_size > 0 {
        fallocate(fd, FallocateFlags::empty(), 0, stat.st_size as u64).map_err(code)?;
    }
    let filled = fstat(fd).map_err(code)?;
    Ok(Kept {
        file: fd.try_clone_to_owned().map_err(|_| libc::EMFILE)?,
        inode: stat.st_ino,
        size: stat.st_size as u64,
        blocks: filled.st_blocks as u64,
    })
}

impl Drop for FakeDevice {
    fn drop(&mut self) {
        let mut state = self.kernel.lock();
        if state.boot == self.boot {
            state.device_taken = false;
        }
    }
}

impl FakeDevice {
    fn session(&self, name: &SessionName, fd: OwnedFd) -> Session {
        Session {
            kernel: self.kernel.clone(),
            boot: self.boot,
            name: name.to_string(),
            fd: Some(fd),
        }
    }

    /// Gets a session that the kernel before handed over, as a descriptor.
    ///
    /// # Errors
    /// As [`Orchestrator::retrieve_session`].
    pub fn retrieve_fd(&self, name: &SessionName) -> Result<OwnedFd, LuoError> {
        let mut state = self.kernel.lock();
        let refused = |code| Err(retrieve_session_error(errno(code), name));
        match state.incoming.get_mut(&name.to_string()) {
            None => refused(libc::ENOENT),
            Some(Arrived { link: Some(_), .. }) => refused(libc::EINVAL),
            Some(arrived) => {
                let (link, fd) = Link::new();
                arrived.link = Some(link);
                Ok(fd)
            }
        }
    }
}

impl Orchestrator for FakeDevice {
    fn create_session(&self, name: &SessionName) -> Result<Box<dyn Outgoing>, LuoError> {
        let mut state = self.kernel.lock();
        state.purge();
        let fault = Fault::Create(name.to_string());
        let known = state.outgoing.contains_key(&name.to_string());
        let known = known.then_some(libc::EEXIST);
        if let Some(code) = state.faults.get(&fault).copied().or(known) {
            return Err(create_error(errno(code), name));
        }
        let (link, fd) = Link::new();
        let files = BTreeMap::new();
        let leaving = Leaving { link, files };
        state.outgoing.insert(name.to_string(), leaving);
        Ok(Box::new(self.session(name, fd)))
    }

    fn retrieve_session(&self, name: &SessionName) -> Result<Box<dyn Incoming>, LuoError> {
        let fd = self.retrieve_fd(name)?;
        Ok(Box::new(self.session(name, fd)))
    }
}

impl Outgoing for Session {
    fn descriptor(&self) -> BorrowedFd<'_> {
        self.fd.as_ref().expect("open").as_fd()
    }

    fn preserve(&self, fd: BorrowedFd<'_>, token: Token) -> Result<(), LuoError> {
        let mut state = self.kernel.lock();
        assert_eq!(state.boot, self.boot, "a session of a kernel that is gone");
        let refused = |code| Err(preserve_error(errno(code), token));
        if state.outgoing[&self.name].files.contains_key(&token.0) {
            return refused(libc::EEXIST);
        }
        let inode = fstat(fd).map_or(0, |s| s.st_ino);
        let preserved: BTreeSet<u64> = state
            .outgoing
            .values()
            .flat_map(|leaving| leaving.files.values().map(|kept| kept.inode))
            .collect();
        if preserved.contains(&inode) {
            return refused(libc::EBUSY);
        }
        let fault = Fault::Preserve(self.name.clone(), token.0);
        if let Some(&code) = state.faults.get(&fault) {
            return refused(code);
        }
        match may_be_carried(fd) {
            Ok(kept) => {
                let leaving = state.outgoing.get_mut(&self.name);
                leaving.expect("open").files.insert(token.0, kept);
                Ok(())
            }
            Err(code) => refused(code),
        }
    }
}

impl Incoming for Session {
    fn retrieve(&self, token: Token) -> Result<OwnedFd, LuoError> {
        let is_stalled = |state: &mut State| state.stalled.contains(&self.name);
        let state = self.kernel.lock();
        let waited = self.kernel.changed.wait_while(state, is_stalled);
        let mut state = waited.unwrap_or_else(PoisonError::into_inner);
        assert_eq!(state.boot, self.boot, "a session of a kernel that is gone");
        let refused = |code| Err(retrieve_error(errno(code), token));
        let fault = Fault::Retrieve(self.name.clone(), token.0);
        let code = state.faults.get(&fault).copied();
        let arrived = state.incoming.get_mut(&self.name);
        let Some(file) = arrived.and_then(|a| a.files.get_mut(&token.0)) else {
            return refused(libc::ENOENT);
        };
        if let (Some(code), Ok(_)) = (code, &file) {
            *file = Err(code);
        }
        match file {
            Ok(file) => match file.as_fd().try_clone_to_owned() {
                Ok(copy) => Ok(copy),
                Err(_) => refused(libc::EMFILE),
            },
            Err(code) => refused(*code),
        }
    }

    fn finish(&self) -> Result<(), LuoError> {
        let mut state = self.kernel.lock();
        if let Some(&code) = state.faults.get(&Fault::Finish(self.name.clone())) {
            return Err(LuoError::Refused {
                what: "finish the session",
                source: errno(code),
            });
        }
        if let Some(arrived) = state.incoming.get_mut(&self.name) {
            arrived.files.clear();
        }
        Ok(())
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let mut state = self.kernel.lock();
        drop(self.fd.take());
        if state.boot == self.boot {
            state.purge();
        }
    }
}
