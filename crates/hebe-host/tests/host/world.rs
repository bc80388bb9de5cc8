//! A host in a temporary directory.

use std::fs;
use std::io::{self, BufRead, BufReader};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use hebe_flow::stopping::Going;
use hebe_host::launch::Instance;
use hebe_host::limits::OutOfMemory;
use hebe_host::listing::{self, VmState};
use hebe_host::lock::VmLock;
use hebe_host::luo::keeper::{self, Place};
use hebe_host::luo::store::WithKept;
use hebe_host::preflight::RebootOptions;
use hebe_host::store_init::{InitOptions, init};
use hebe_host::stores::{DeviceStore, NewSegment, StoreAccess, StoreTrouble, StoreView};
use hebe_host::system::{Leave, System, SystemError};
use hebe_host::{Host, Layout};
use hebe_sys::fdstore::FdStore;
use hebe_sys::fdstore::fake::FakeManager;
use hebe_sys::luo::fake::FakeKernel;
use hebe_sys::luo::{Incoming, LuoError, Orchestrator, Outgoing, SessionName};
use hebe_types::{ByteSize, RebootMethod, SegmentId, Stamp, VmId, VmName};

pub const RESERVED: &str = "quiet memmap=256M!4G";

/// The machine: notes what is done to it.
pub struct FakeMachine {
    pub events: PathBuf,
    pub boot_id: Mutex<[u8; 16]>,
    pub cmdline: Mutex<String>,
    pub free: Mutex<u64>,
    /// What lies below these ends with the kernel.
    pub volatile: Mutex<Vec<PathBuf>>,
    pub read_only: AtomicBool,
    pub not_root: AtomicBool,
    pub kexec_disabled: AtomicBool,
    pub refuse_load: AtomicBool,
    /// A kernel is loaded.
    pub loaded: AtomicBool,
    /// What the service manager says; `None` where there is none.
    pub going: Mutex<Option<Result<Going, String>>>,
    pub refuse_services: AtomicBool,
    /// Leaving works: then whoever leaves never returns.
    pub leaves: AtomicBool,
    pub left: AtomicBool,
    pub realtime_set: Mutex<Option<u64>>,
    /// What happens to come between, the next time that disks are flushed.
    pub at_sync: Mutex<Option<Box<dyn FnOnce() + Send>>>,
    /// The same, the next time that services are stopped.
    pub at_services: Mutex<Option<Box<dyn FnOnce() + Send>>>,
    /// The same, the next time that the network's helper is started.
    pub at_net_helper: Mutex<Option<Box<dyn FnOnce() + Send>>>,
    /// Whoever gives orders here is a unit that ends alone.
    pub ends_alone: AtomicBool,
    /// Its Live Update Orchestrator, where it has one.
    pub luo: Mutex<Option<FakeKernel>>,
    /// A PID 1 with a file descriptor store, where it is one.
    pub manager: Mutex<Option<FakeManager>>,
    /// Which call panics, and the how manieth of those that VMs' own threads make.
    pub panics: Mutex<Option<(&'static str, usize)>>,
    /// The session at whose retrieval its keeper panics.
    pub keeper_dies_at: Mutex<Option<String>>,
    /// Processes that its kernel ended for want of memory.
    pub out_of_memory: Mutex<Vec<(u32, OutOfMemory)>>,
    /// Given back when the machine leaves, as a kernel does with all locks.
    pub store: Mutex<Option<Arc<DeviceStore>>>,
}

impl FakeMachine {
    fn event(&self, what: &str) {
        use std::io::Write;
        let mut file = fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(&self.events)
            .expect("events");
        file.write_all(format!("host {what}\n").as_bytes())
            .expect("write");
    }
}

impl FakeMachine {
    /// VMs' own threads have no name.
    fn perhaps_panic(&self, call: &str) {
        if std::thread::current().name().is_some() {
            return;
        }
        let told = {
            let mut panics = self.panics.lock().expect("lock");
            match &mut *panics {
                Some((which, left)) if *which == call => {
                    *left -= 1;
                    let now = *left == 0;
                    if now {
                        *panics = None;
                    }
                    now
                }
                _ => false,
            }
        };
        assert!(!told, "told to");
    }
}

fn refused(command: &str) -> SystemError {
    SystemError::Command {
        command: command.into(),
        how: "failed: told so".into(),
    }
}

impl System for FakeMachine {
    fn load_kernel(&self, kernel: &Path, _: Option<&Path>, _: &str) -> Result<(), SystemError> {
        if self.refuse_load.load(Ordering::Relaxed) {
            return Err(refused(&format!("load {}", kernel.display())));
        }
        self.event("load");
        self.loaded.store(true, Ordering::Relaxed);
        Ok(())
    }
    fn unload_kernel(&self) -> Result<(), SystemError> {
        self.event("unload");
        self.loaded.store(false, Ordering::Relaxed);
        Ok(())
    }
    fn kernel_loaded(&self) -> Option<bool> {
        Some(self.loaded.load(Ordering::Relaxed))
    }
    fn going(&self) -> Result<Going, String> {
        let going = self.going.lock().expect("lock");
        going.clone().unwrap_or(Ok(Going::Stays))
    }
    fn armed(&self) -> Result<(), String> {
        match &*self.going.lock().expect("lock") {
            None => Err("not armed".into()),
            Some(Ok(Going::Stays)) => Ok(()),
            // What is being stopped is not active any more.
            Some(_) => Err("hebe-freeze.service is deactivating".into()),
        }
    }
    fn ask(&self, how: Leave) -> Result<(), String> {
        self.event(&format!("ask {how:?}"));
        let between = self.at_services.lock().expect("lock").take();
        if let Some(between) = between {
            between();
        }
        if self.refuse_services.load(Ordering::Relaxed) {
            return Err("the service manager refused".into());
        }
        Ok(())
    }
    fn kexec_disabled(&self) -> Option<bool> {
        Some(self.kexec_disabled.load(Ordering::Relaxed))
    }
    fn may_reboot(&self) -> bool {
        !self.not_root.load(Ordering::Relaxed)
    }
    fn is_writable(&self, _: &Path) -> io::Result<bool> {
        Ok(!self.read_only.load(Ordering::Relaxed))
    }
    fn leave(&self, how: Leave) -> SystemError {
        self.event(&format!("leave {how:?}"));
        if !self.leaves.load(Ordering::Relaxed) {
            return refused("reboot");
        }
        if let Some(store) = &*self.store.lock().expect("lock") {
            store.release();
        }
        self.left.store(true, Ordering::Release);
        loop {
            std::thread::park();
        }
    }
    fn sync(&self) {
        self.event("sync");
        let between = self.at_sync.lock().expect("lock").take();
        if let Some(between) = between {
            between();
        }
    }
    fn run(&self, command: &str, _: Duration) -> Result<(), SystemError> {
        self.event(&format!("run {command}"));
        let between = self.at_services.lock().expect("lock").take();
        if let Some(between) = between {
            between();
        }
        if command.starts_with("stop") && self.refuse_services.load(Ordering::Relaxed) {
            return Err(refused(command));
        }
        Ok(())
    }
    fn boot_id(&self) -> [u8; 16] {
        *self.boot_id.lock().expect("lock")
    }
    fn cmdline(&self) -> String {
        self.cmdline.lock().expect("lock").clone()
    }
    fn release(&self) -> String {
        format!("6.{}", self.boot_id()[0])
    }
    fn free_space(&self, _: &Path) -> io::Result<ByteSize> {
        Ok(ByteSize(*self.free.lock().expect("lock")))
    }
    fn is_volatile(&self, dir: &Path) -> io::Result<bool> {
        let volatile = self.volatile.lock().expect("lock");
        Ok(volatile.iter().any(|v| dir.starts_with(v)))
    }
    fn stamp(&self) -> Stamp {
        self.perhaps_panic("stamp");
        hebe_sys::clock::stamp_now()
    }
    fn monotonic_ns(&self) -> u64 {
        hebe_sys::proc::monotonic_ns()
    }
    fn since_boot_ns(&self) -> u64 {
        1_000_000
    }
    fn out_of_memory(&self, pid: u32) -> Option<OutOfMemory> {
        let ended = self.out_of_memory.lock().expect("lock");
        let found = ended.iter().find(|(of, _)| *of == pid);
        found.map(|(_, why)| *why)
    }
    fn set_realtime_ns(&self, realtime_ns: u64) -> io::Result<()> {
        *self.realtime_set.lock().expect("lock") = Some(realtime_ns);
        Ok(())
    }
    fn live_update(&self) -> Result<(), LuoError> {
        self.perhaps_panic("live update");
        match &*self.luo.lock().expect("lock") {
            Some(_) => Ok(()),
            None => Err(LuoError::NotOffered),
        }
    }
    fn orchestrator(&self) -> Result<Box<dyn Orchestrator>, LuoError> {
        self.live_update()?;
        let luo = self.luo.lock().expect("lock").clone();
        Ok(Box::new(luo.ok_or(LuoError::NotOffered)?.open()?))
    }
    fn fd_store(&self) -> Result<Arc<dyn FdStore>, String> {
        let manager = self.manager.lock().expect("lock").clone();
        Ok(Arc::new(manager.ok_or("PID 1 is not systemd")?))
    }
    fn fd_store_of(&self, unit: &str, room: usize) -> Result<String, String> {
        let manager = self.manager.lock().expect("lock").clone();
        let manager = manager.ok_or("PID 1 is systemd 257, and 261 is needed")?;
        manager
            .has_room(room)
            .then(|| format!("{unit} of 262"))
            .ok_or("full".into())
    }
    fn was_handed_sessions(&self) -> bool {
        let manager = self.manager.lock().expect("lock");
        manager.as_ref().is_some_and(|m| !m.names().is_empty())
    }
    fn place_ends_alone(&self) -> bool {
        self.ends_alone.load(Ordering::Relaxed)
    }
    fn start_net_helper(&self, _: &Host) -> Result<(), String> {
        self.event("net helper");
        let between = self.at_net_helper.lock().expect("lock").take();
        between.into_iter().for_each(|between| between());
        Ok(())
    }
    fn start_keeper(&self, host: &Host) -> Result<usize, String> {
        let manager = self.manager.lock().expect("lock").clone();
        let luo = self.luo.lock().expect("lock").clone();
        let (mut names, mut handed) = (Vec::new(), Vec::new());
        if let (Some(manager), Some(luo)) = (&manager, luo) {
            for (name, fd) in manager.pass() {
                handed.extend(luo.adopt(fd));
                names.push(name);
            }
        }
        let mut device = keeper::source(host, handed).map_err(|e| e.to_string())?;
        if let Some(session) = self.keeper_dies_at.lock().expect("lock").take() {
            device = Box::new(DiesAt(device, session));
        }
        let (said, word) = std::io::pipe().expect("pipe");
        let place = Place::of(host);
        let let_go = move || {
            for name in names {
                let told = manager.as_ref().map(|manager| manager.remove(&name));
                told.expect("a manager").expect("heard");
            }
        };
        std::thread::spawn(move || keeper::keep_then(device, place, word, let_go));
        let mut line = String::new();
        let read = BufReader::new(said).read_line(&mut line);
        read.map_err(|e| e.to_string())?;
        line.trim().parse().map_err(|_| "no word".to_owned())
    }
}

/// No store.
struct Absent;

impl StoreAccess for Absent {
    fn view(&self) -> Result<Option<StoreView>, StoreTrouble> {
        Ok(None)
    }
    fn create(&self, _: VmId, _: &VmName, _: ByteSize) -> Result<NewSegment, StoreTrouble> {
        Err(StoreTrouble::None)
    }
    fn drop_segment(&self, _: SegmentId, _: Option<VmId>) -> Result<(), StoreTrouble> {
        Err(StoreTrouble::None)
    }
    fn device(&self) -> Result<OwnedFd, StoreTrouble> {
        Err(StoreTrouble::None)
    }
    fn read_report(&self) -> Result<Option<Vec<u8>>, StoreTrouble> {
        Ok(None)
    }
    fn write_report(&self, _: &[u8]) -> Result<(), StoreTrouble> {
        Err(StoreTrouble::None)
    }
    fn hold(&self) -> Result<(), StoreTrouble> {
        Ok(())
    }
    fn release(&self) {}
}

/// Hands on what a kernel has, and panics at one session.
struct DiesAt(Box<dyn Orchestrator>, String);

impl Orchestrator for DiesAt {
    fn create_session(&self, name: &SessionName) -> Result<Box<dyn Outgoing>, LuoError> {
        self.0.create_session(name)
    }
    fn retrieve_session(&self, name: &SessionName) -> Result<Box<dyn Incoming>, LuoError> {
        assert_ne!(name.to_string(), self.1, "told to die at that");
        self.0.retrieve_session(name)
    }
}

/// What PID 1 does in the next kernel: it gets each session that its store had.
fn retrieved(luo: &FakeKernel, names: Vec<String>) -> Vec<(String, OwnedFd)> {
    let Ok(device) = luo.open() else {
        return Vec::new();
    };
    let get = |name: String| {
        let session = device.retrieve_fd(&name.parse().ok()?).ok()?;
        Some((name, session))
    };
    names.into_iter().filter_map(get).collect()
}

/// How long anything may take that is to come about, on a computer that is busy with
/// other things, or stands still for a while.
pub const PATIENCE: Duration = Duration::from_secs(180);

/// A host and everything in it.
pub struct World {
    pub root: tempfile::TempDir,
    pub machine: Arc<FakeMachine>,
    pub host: Host,
}

pub fn name(text: &str) -> VmName {
    text.parse().expect("name")
}

impl World {
    /// A host with a store of 128 MiB.
    pub fn new() -> Self {
        let mut world = Self::without_store();
        let path = world.root.path().join("store");
        let file = fs::File::create(&path).expect("create");
        file.set_len(128 << 20).expect("size");
        let mut layout = world.host.layout.clone();
        layout.store = Some(path.clone());
        let store = Arc::new(DeviceStore::new(Some(path)));
        *world.machine.store.lock().expect("lock") = Some(Arc::clone(&store));
        world.host.layout = layout;
        world.host.store = store;
        init(&world.host, &InitOptions::default()).expect("a store");
        world
    }

    /// A host without one, whose kernel carries memory over.
    pub fn live_update() -> Self {
        let mut world = Self::without_store();
        *world.machine.luo.lock().expect("lock") = Some(FakeKernel::default());
        *world.machine.cmdline.lock().expect("lock") = "kho=on liveupdate=on".into();
        world.keep_arrivals();
        world
    }

    /// The same, and PID 1 is one that can hold sessions over a kexec.
    pub fn with_manager(max: usize) -> Self {
        let world = Self::live_update();
        let socket = world.root.path().join("notify");
        let manager = FakeManager::new(&socket, max);
        *world.machine.manager.lock().expect("lock") = Some(manager);
        world
    }

    /// Its PID 1.
    pub fn manager(&self) -> FakeManager {
        let manager = self.machine.manager.lock().expect("lock");
        manager.clone().expect("systemd")
    }

    /// Lists what the kernel before handed over beside what the store holds.
    pub fn keep_arrivals(&mut self) {
        let socket = self.host.layout.keeper_socket();
        let inner = Arc::clone(&self.host.store);
        self.host.store = Arc::new(WithKept::new(inner, socket));
    }

    /// The kernel's Live Update Orchestrator.
    pub fn luo(&self) -> FakeKernel {
        let luo = self.machine.luo.lock().expect("lock");
        luo.clone().expect("a kernel that has it")
    }

    /// A host without one.
    pub fn without_store() -> Self {
        let root = tempfile::tempdir().expect("dir");
        fs::create_dir(root.path().join("fake")).expect("mkdir");
        fs::write(root.path().join("kernel"), "k").expect("write");
        let machine = Arc::new(FakeMachine {
            events: root.path().join("fake/events"),
            boot_id: Mutex::new([1; 16]),
            cmdline: Mutex::new(RESERVED.into()),
            free: Mutex::new(1 << 40),
            volatile: Mutex::new(Vec::new()),
            read_only: AtomicBool::new(false),
            not_root: AtomicBool::new(false),
            kexec_disabled: AtomicBool::new(false),
            refuse_load: AtomicBool::new(false),
            loaded: AtomicBool::new(false),
            going: Mutex::new(None),
            refuse_services: AtomicBool::new(false),
            leaves: AtomicBool::new(false),
            left: AtomicBool::new(false),
            realtime_set: Mutex::new(None),
            luo: Mutex::new(None),
            manager: Mutex::new(None),
            store: Mutex::new(None),
            at_sync: Mutex::new(None),
            at_net_helper: Mutex::new(None),
            ends_alone: AtomicBool::new(false),
            at_services: Mutex::new(None),
            panics: Mutex::new(None),
            keeper_dies_at: Mutex::new(None),
            out_of_memory: Mutex::new(Vec::new()),
        });
        let mut layout = Layout::below(root.path());
        layout.vmm = std::env::current_exe().expect("exe");
        let host = Host {
            layout,
            store: Arc::new(Absent),
            system: machine.clone(),
        };
        let config = host.layout.config.join("host.toml");
        fs::create_dir_all(config.parent().expect("parent")).expect("mkdir");
        let text = "[services]\nstop = [\"stop a\"]\nstart = [\"start a\"]\n";
        fs::write(config, text).expect("write");
        Self {
            root,
            machine,
            host,
        }
    }

    /// Writes a definition of 4 MiB.
    pub fn define(&self, vm: &str, more: &str) {
        let dir = self.host.layout.config.join("vms");
        fs::create_dir_all(&dir).expect("mkdir");
        let kernel = self.root.path().join("kernel");
        let text = format!(
            "name = \"{vm}\"\nmemory = \"4MiB\"\nkernel = \"{}\"\n{more}\n",
            kernel.display()
        );
        fs::write(dir.join(format!("{vm}.toml")), text).expect("write");
    }

    /// Defines and starts VMs.
    pub fn start(&self, vms: &[&str]) {
        for vm in vms {
            self.define(vm, "");
            hebe_host::ops::start(&self.host, &name(vm)).expect("starts");
        }
    }

    /// Tells a VM's fake VMM what to do wrong.
    pub fn tell(&self, vm: &str, words: &str) {
        fs::write(self.root.path().join("fake").join(vm), words).expect("write");
    }

    /// What happened so far, without who did it unless asked.
    pub fn events(&self) -> Vec<String> {
        let text = fs::read_to_string(&self.machine.events).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }

    pub fn forget_events(&self) {
        let _ = fs::remove_file(&self.machine.events);
    }

    /// Position of an event.
    pub fn at(&self, event: &str) -> usize {
        let events = self.events();
        events
            .iter()
            .position(|e| e == event)
            .unwrap_or_else(|| panic!("{event} did not happen: {events:?}"))
    }

    pub fn state(&self, vm: &str) -> VmState {
        let survey = listing::survey(&self.host);
        survey.rows.get(&name(vm)).expect("listed").state
    }

    pub fn dir(&self, vm: &str) -> PathBuf {
        self.host.layout.vm_dir(&name(vm))
    }

    /// Number of segments in the store.
    pub fn segments(&self) -> usize {
        let view = self.host.store.view().expect("view").expect("store");
        view.segments.len()
    }

    /// Kills the VMM of a VM as a machine that stops does.
    pub fn kill(&self, vm: &str) {
        let survey = listing::survey(&self.host);
        let pid = survey.rows[&name(vm)].pid.expect("up");
        let pid = rustix::process::Pid::from_raw(pid as i32).expect("pid");
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).expect("kill");
        let began = Instant::now();
        while VmLock::is_held(&self.dir(vm)) {
            assert!(began.elapsed() < PATIENCE, "it dies");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// What a stop of the machine leaves: no process, no runtime directory,
    /// another boot.
    pub fn next_boot(&self) {
        if let Some(luo) = &*self.machine.luo.lock().expect("lock") {
            let manager = self.machine.manager.lock().expect("lock");
            let stored = manager.as_ref().map(FakeManager::names);
            luo.kexec();
            if let (Some(manager), Some(names)) = (&*manager, stored) {
                manager.replace(retrieved(luo, names));
            }
        }
        let vms = fs::read_dir(self.host.layout.run.join("vms"));
        for entry in vms.into_iter().flatten().flatten() {
            let vm = entry.file_name().into_string().expect("name");
            if VmLock::is_held(&entry.path()) {
                self.kill(&vm);
            }
        }
        let _ = fs::remove_dir_all(&self.host.layout.run);
        let mut boot = self.machine.boot_id.lock().expect("lock");
        boot[0] += 1;
        self.machine.leaves.store(false, Ordering::Relaxed);
        self.machine.left.store(false, Ordering::Relaxed);
        self.machine.loaded.store(false, Ordering::Relaxed);
        *self.machine.going.lock().expect("lock") = None;
    }

    /// The same host under a kernel without the reservation.
    pub fn bare(&self) -> Host {
        *self.machine.cmdline.lock().expect("lock") = "quiet".into();
        Host {
            store: Arc::new(Absent),
            ..self.host.clone()
        }
    }

    /// The next boot has the reservation again.
    pub fn reserved(&self) {
        self.next_boot();
        *self.machine.cmdline.lock().expect("lock") = RESERVED.into();
    }

    /// What an operator would type for `method`.
    pub fn options(&self, method: RebootMethod) -> RebootOptions {
        RebootOptions {
            method,
            kernel: Some(self.root.path().join("kernel")),
            timeout_s: 20,
            ..RebootOptions::default()
        }
    }

    /// Does `work`, which may hang, in a thread that is not one of a VM.
    pub fn in_time<T: Send + 'static>(&self, work: impl FnOnce(&Host) -> T + Send + 'static) -> T {
        let (sender, receiver) = std::sync::mpsc::channel();
        let host = self.host.clone();
        let driver = std::thread::Builder::new().name("driver".into());
        let started = driver.spawn(move || sender.send(work(&host)));
        drop(started.expect("a thread"));
        let done = receiver.recv_timeout(PATIENCE);
        done.expect("it ends in time")
    }

    /// Reboots until the machine has left, and comes up again.
    pub fn reboot(&self, method: RebootMethod) {
        self.machine.leaves.store(true, Ordering::Relaxed);
        let (host, options) = (self.host.clone(), self.options(method));
        let thread = std::thread::spawn(move || {
            let end = hebe_host::reboot::reboot(&host, &options, &|_| {});
            panic!("the machine did not leave: {end:?}");
        });
        let began = Instant::now();
        while !self.machine.left.load(Ordering::Acquire) {
            assert!(!thread.is_finished(), "the reboot ended early");
            assert!(began.elapsed() < PATIENCE, "it leaves");
            std::thread::sleep(Duration::from_millis(2));
        }
        self.next_boot();
    }

    pub fn instance(&self, vm: &str) -> Option<Instance> {
        Instance::read(&self.dir(vm))
    }
}

impl Drop for World {
    fn drop(&mut self) {
        let vms = fs::read_dir(self.host.layout.run.join("vms"));
        for entry in vms.into_iter().flatten().flatten() {
            let status =
                hebe_host::vmm::status(&entry.path().join("vmm.sock"), Duration::from_secs(5));
            let pid = status.ok().and_then(|s| i32::try_from(s.pid).ok());
            if let Some(pid) = pid.and_then(rustix::process::Pid::from_raw) {
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
            }
        }
    }
}
