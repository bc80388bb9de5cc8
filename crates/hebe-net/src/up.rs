//! The network is made, changed and taken away here, always under its lock.

use std::fs;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use hebe_sys::link;
use hebe_sys::proc::since_boot_ns;
use hebe_sys::tap::{make_bridge, set_up};
use hebe_types::{Forward, MacAddr, NAT_BRIDGE, NetConfig, Network, VmName};
use rustix::fs::{FlockOperation, flock};
use rustix::process::{Pid, Signal, kill_process};

use crate::dir::{Dir, take};
use crate::range::{Block, Book, PREFIX, Range, routes};
use crate::rules::{self, Rules};
use crate::{NetworkError, Port};

/// The bridge's Ethernet address, the same on each host and in each kernel:
/// resumed guests know it by heart.
const BRIDGE_MAC: MacAddr = MacAddr([0x02, b'H', b'E', b'B', b'E', 1]);
const FORWARDING: &str = "/proc/sys/net/ipv4/ip_forward";
/// How long an old helper may take to end.
const HELPER_WAIT: Duration = Duration::from_secs(5);

const LOCK: &str = "lock";
const HELPER_LOCK: &str = "helper";
const RULES: &str = "rules";
const REMARKS: &str = "remarks";

/// Where the network's files are.
#[derive(Debug)]
pub struct Place {
    /// The run directory: `vms/NAME/lock`, and `net/`.
    run: Dir,
    /// `net/`: who is in the network now.
    pub(crate) net: Dir,
    /// The book, in the state directory.
    book: PathBuf,
}

/// Whether a VM may be refused for its network's sake.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Care {
    /// A VM that boots: all of it, or nothing.
    Whole,
    /// A VM that goes on: as much as there is, and words about the rest.
    WhatThereIs,
}

/// NICs that are noted, with all others that are in the network.
#[derive(Debug)]
pub(crate) struct Admitted {
    pub(crate) range: Range,
    /// In the order in which each look finds them.
    pub(crate) all: Vec<Port>,
    /// What an operator should know.
    pub(crate) remarks: Vec<String>,
}

/// The network's lock, let go in so many words: a child that another thread has
/// forked has the descriptor, too, until it calls `execve`.
#[derive(Debug)]
pub(crate) struct Held(OwnedFd);

impl Drop for Held {
    fn drop(&mut self) {
        // A held lock can be let go; the descriptor's end is the rest.
        let _ = flock(&self.0, FlockOperation::Unlock);
    }
}

impl Place {
    /// With the run directory and the state directory of a host.
    pub fn open(run: &Path, state: &Path) -> Result<Self, NetworkError> {
        let make = || {
            let run = Dir::make(run)?;
            let net = run.sub("net")?;
            Ok((run, net))
        };
        let (run, net) = make().map_err(NetworkError::file("make the network's directory"))?;
        Ok(Self {
            run,
            net,
            book: state.join("net.json"),
        })
    }

    /// Waits for the network's lock; with `wait` off, `None` when it is held.
    pub(crate) fn lock(&self, wait: bool) -> Result<Option<Held>, NetworkError> {
        let file = self.net.lock_file(LOCK);
        let held = file.and_then(|file| take(file, wait));
        let held = held.map_err(NetworkError::file("lock the network"))?;
        Ok(held.map(Held))
    }

    /// Chooses the addresses of a VM that boots, and writes them down before it
    /// does. `known`: which VMs still have a claim to theirs.
    pub fn lease(
        &self,
        name: &VmName,
        nets: &mut [NetConfig],
        known: &dyn Fn(&str) -> bool,
    ) -> Result<(), NetworkError> {
        if !nets.iter().any(|net| net.network == Some(Network::Nat)) {
            return Ok(());
        }
        let _held = self.lock(true)?;
        let mut book = self.read_book()?;
        let before = book.clone();
        let range = self.range_for(&book)?;
        book.range = Some(range);
        for (index, net) in nets.iter_mut().enumerate() {
            if net.network == Some(Network::Nat) {
                let key = format!("{name}/{index}");
                net.address = Some(book.lease(range, &key, net.address, known)?);
            }
        }
        if book != before {
            write_durably(&self.book, &book).map_err(NetworkError::file(format!(
                "write down the VM's address in {}",
                self.book.display()
            )))?;
        }
        Ok(())
    }

    fn read_book(&self) -> Result<Book, NetworkError> {
        match fs::read(&self.book) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Book::default()),
            read => read
                .and_then(|bytes| Ok(serde_json::from_slice(&bytes)?))
                .map_err(NetworkError::file(format!("read {}", self.book.display()))),
        }
    }

    /// The range that the network has, or had, or is to have.
    fn range_for(&self, book: &Book) -> Result<Range, NetworkError> {
        if let Some(port) = self.ports_in_use().first() {
            return Ok(Range::of(port.address));
        }
        let taken = taken();
        let free = |range: &Range| !taken.iter().any(|block| range.meets(block));
        match book.range.filter(free) {
            Some(range) => Ok(range),
            None => Range::choose(&taken).ok_or(NetworkError::NoRange),
        }
    }

    /// Has the network ready for these NICs of one VM, whose lock the caller
    /// holds. `start_helper` starts the helper's process and waits for its word.
    /// Gives what an operator should know.
    pub fn plug(
        &self,
        ports: &[Port],
        care: Care,
        start_helper: &dyn Fn() -> Result<(), String>,
    ) -> Result<Vec<String>, NetworkError> {
        if ports.is_empty() {
            return Ok(Vec::new());
        }
        let _held = self.lock(true)?;
        let mut admitted = self.admit(ports, care)?;
        let made = self.make(admitted.range, &admitted.all, false, care);
        let made = made.and_then(|said| {
            admitted.remarks.extend(said);
            self.have_helper(start_helper)
        });
        if let Err(error) = made {
            if care == Care::WhatThereIs {
                admitted.remarks.push(error.to_string());
            } else {
                self.give_up(ports);
                return Err(error);
            }
        }
        Ok(admitted.remarks)
    }

    /// Notes these NICs, under the network's lock, as far as they can be had.
    pub(crate) fn admit(&self, ports: &[Port], care: Care) -> Result<Admitted, NetworkError> {
        let mut remarks = Vec::new();
        let mut others = self.settle()?;
        others.retain(|other| ports.iter().all(|port| port.tap != other.tap));
        let first = others.first().or(ports.first());
        let range = first.map(|port| Range::of(port.address));
        let range = range.ok_or(NetworkError::NoRange)?;
        let former = self.recorded();
        let mut all = others;
        for port in ports {
            if !range.holds(port.address) {
                return Err(NetworkError::Elsewhere {
                    vm: port.vm.clone(),
                    address: port.address,
                    range,
                });
            }
            rules::check_name(&port.tap)?;
            let mut port = port.clone();
            let own = former.iter().find(|old| old.tap == port.tap);
            check_forwards(&mut port, own, &all, care, &mut remarks)?;
            all.push(port);
        }
        // As the next look finds them: the same rules are the same text.
        all.sort_by(|a, b| a.tap.cmp(&b.tap));
        if !self.has_bridge() && taken().iter().any(|block| range.meets(block)) {
            return Err(NetworkError::Collision(range));
        }
        for port in &all {
            self.note(port)?;
        }
        Ok(Admitted {
            range,
            all,
            remarks,
        })
    }

    /// Of a VM that does not boot, for want of a network: nothing is left.
    fn give_up(&self, ports: &[Port]) {
        for port in ports {
            let _ = self.net.remove(&format!("{}.json", port.tap));
        }
        if self.recorded().is_empty() {
            let _ = self.take_away();
        }
    }

    /// Makes the bridge, with its address, where there is none or none that is
    /// finished; whether it did. It is down and passes nothing on before
    /// [`Place::make`] brings it up, when its rules are in.
    pub(crate) fn make_bridge(&self, range: Range, ports: &[Port]) -> Result<bool, NetworkError> {
        if link::is_up(NAT_BRIDGE) {
            return Ok(false);
        }
        // Whoever brings it up puts them in first.
        let _ = self.net.remove(RULES);
        make_bridge(NAT_BRIDGE)?;
        link::set_mac(NAT_BRIDGE, BRIDGE_MAC)?;
        link::set_address(NAT_BRIDGE, range.gateway(), PREFIX)?;
        // Guests get no IPv6 here, and have no way round the rules by it.
        let off = format!("/proc/sys/net/ipv6/conf/{NAT_BRIDGE}/disable_ipv6");
        let _ = fs::write(off, "1");
        for port in ports {
            // Those of a bridge that somebody removed.
            if link::index(&port.tap).is_some() {
                link::join(&port.tap, NAT_BRIDGE)?;
            }
        }
        Ok(true)
    }

    /// Makes what is missing: bridge, its address, rules, forwarding, and has the
    /// bridge pass frames on. Does nothing where all is there. With `anew` the
    /// rules are put in also where they should be there.
    pub(crate) fn make(
        &self,
        range: Range,
        ports: &[Port],
        anew: bool,
        care: Care,
    ) -> Result<Vec<String>, NetworkError> {
        let mut remarks = Vec::new();
        let fresh = self.make_bridge(range, ports)?;
        if fresh && crate::serve::resolvers().is_empty() {
            remarks.push("the host's resolvers of names are on the host itself, where guests do not reach them: guests of network = \"nat\" get none".to_owned());
        }
        remarks.extend(self.put_rules_in(range, ports, anew, care)?);
        // Also without rules: those who go on then reach the host.
        set_up(NAT_BRIDGE)?;
        Ok(remarks)
    }

    fn put_rules_in(
        &self,
        range: Range,
        ports: &[Port],
        anew: bool,
        care: Care,
    ) -> Result<Vec<String>, NetworkError> {
        let mut remarks = Vec::new();
        let rules = Rules::of(range, ports);
        let wanted = rules.text();
        let last = self.net.read(RULES).ok().flatten();
        if !anew && last.as_deref() == Some(wanted.as_bytes()) {
            remarks.extend(allow_forwarding());
            return Ok(remarks);
        }
        if last.is_none() {
            rules::load_modules();
        }
        // Not said before it is true.
        let _ = self.net.remove(RULES);
        match rules.apply() {
            Err(error) if care == Care::WhatThereIs => remarks.push(error.to_string()),
            Err(error) => return Err(error),
            Ok(unheld) => {
                remarks.extend(unheld);
                let _ = self.net.write(RULES, wanted.as_bytes());
                // Not before: a packet that goes out untranslated has the kernel
                // leave its whole connection so.
                remarks.extend(allow_forwarding());
            }
        }
        Ok(remarks)
    }

    /// Whether the rules were put in as far as is known.
    pub(crate) fn has_rules(&self) -> bool {
        self.net.read(RULES).is_ok_and(|rules| rules.is_some())
    }

    fn has_bridge(&self) -> bool {
        link::index(NAT_BRIDGE).is_some()
    }

    /// Takes rules and bridge away. Forwarding stays: others may rely on it by
    /// now.
    pub(crate) fn take_away(&self) -> Result<(), NetworkError> {
        for script in rules::NOTHING {
            // A kernel without one of these families has nothing there.
            let _ = rules::apply(script);
        }
        let _ = self.net.remove(RULES);
        Ok(link::remove_bridge(NAT_BRIDGE)?)
    }

    /// Every port that is noted, in use or not.
    fn recorded(&self) -> Vec<Port> {
        let names = self.net.names(".json").unwrap_or_default();
        let read = |name: &String| self.net.read_json(&format!("{name}.json")).ok().flatten();
        names.iter().filter_map(read).collect()
    }

    /// Every port whose tap exists, or whose VM somebody holds.
    pub fn ports_in_use(&self) -> Vec<Port> {
        let mut ports = self.recorded();
        ports.retain(|port| self.is_in_use(port));
        ports
    }

    fn is_in_use(&self, port: &Port) -> bool {
        let expected = port
            .expected_until_ns
            .is_some_and(|until| since_boot_ns() < until);
        expected
            || link::index(&port.tap).is_some()
            || self.run.is_locked(&format!("vms/{}/lock", port.vm))
    }

    /// Forgets ports that nobody uses; gives those that are left.
    pub(crate) fn settle(&self) -> Result<Vec<Port>, NetworkError> {
        let (used, unused): (Vec<Port>, Vec<Port>) = self
            .recorded()
            .into_iter()
            .partition(|port| self.is_in_use(port));
        for port in unused {
            let removed = self.net.remove(&format!("{}.json", port.tap));
            removed.map_err(NetworkError::file("forget a port of the network"))?;
        }
        Ok(used)
    }

    /// Starts the helper where VMs use the network and it is gone, and does what it
    /// would have done meanwhile; whether it was started. Does nothing where nobody
    /// uses the network, or somebody changes it.
    pub fn tend(
        &self,
        start_helper: &dyn Fn() -> Result<(), String>,
    ) -> Result<bool, NetworkError> {
        let is_served = || self.net.is_locked(HELPER_LOCK);
        let is_unused = self.recorded().is_empty() && !self.has_rules();
        if is_unused || is_served() {
            return Ok(false);
        }
        let Some(_held) = self.lock(false)? else {
            return Ok(false);
        };
        if is_served() {
            return Ok(false);
        }
        let ports = self.settle()?;
        let Some(first) = ports.first() else {
            self.take_away()?;
            return Ok(false);
        };
        let range = Range::of(first.address);
        for words in self.make(range, &ports, false, Care::WhatThereIs)? {
            self.remark(&words);
        }
        self.have_helper(start_helper)?;
        Ok(true)
    }

    /// Starts the helper where none serves; one of an initramfs is replaced.
    pub(crate) fn have_helper(
        &self,
        start: &dyn Fn() -> Result<(), String>,
    ) -> Result<(), NetworkError> {
        if self.net.is_locked(HELPER_LOCK) {
            if !self.has_stale_helper() {
                return Ok(());
            }
            self.end_helper();
        }
        start().map_err(NetworkError::Helper)
    }

    /// From now on a VM is in use by its lock or its tap alone.
    pub(crate) fn none_is_expected(&self) -> Result<(), NetworkError> {
        for mut port in self.recorded() {
            if port.expected_until_ns.take().is_some() {
                self.note(&port)?;
            }
        }
        Ok(())
    }

    fn note(&self, port: &Port) -> Result<(), NetworkError> {
        let record = format!("{}.json", port.tap);
        let written = self.net.write_json(&record, port);
        written.map_err(NetworkError::file("note a port of the network"))
    }

    /// A helper that began in an initramfs serves, but finds no program.
    fn has_stale_helper(&self) -> bool {
        let Some(pid) = self.helper() else {
            return false;
        };
        let of = |path: &str| fs::metadata(path).map(|m| (m.dev(), m.ino())).ok();
        let theirs = of(&format!("/proc/{pid}/root/"));
        theirs.is_some() && theirs != of("/")
    }

    fn helper(&self) -> Option<i32> {
        let bytes = self.net.read(HELPER_LOCK).ok().flatten()?;
        std::str::from_utf8(&bytes).ok()?.trim().parse().ok()
    }

    fn end_helper(&self) {
        let Some(pid) = self.helper().and_then(Pid::from_raw) else {
            return;
        };
        let _ = kill_process(pid, Signal::TERM);
        let until = Instant::now() + HELPER_WAIT;
        while self.net.is_locked(HELPER_LOCK) && Instant::now() < until {
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// The helper's own lock, with its process's number in it; `None` when
    /// another one lives.
    pub(crate) fn be_helper(&self) -> io::Result<Option<OwnedFd>> {
        let Some(held) = take(self.net.lock_file(HELPER_LOCK)?, false)? else {
            return Ok(None);
        };
        let pid = std::process::id().to_string();
        rustix::fs::ftruncate(&held, 0)?;
        rustix::io::write(&held, pid.as_bytes())?;
        Ok(Some(held))
    }

    /// Keeps words for whoever gives the next order.
    pub fn remark(&self, words: &str) {
        let _ = self.net.append(REMARKS, &format!("{words}\n"));
    }

    /// Words that nobody has heard yet.
    pub fn take_remarks(&self) -> Vec<String> {
        let bytes = self.net.read(REMARKS).ok().flatten().unwrap_or_default();
        if !bytes.is_empty() {
            let _ = self.net.remove(REMARKS);
        }
        let text = String::from_utf8_lossy(&bytes);
        let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
        lines.dedup();
        lines
    }
}

/// Takes out of a resumed VM's port, or refuses for one that boots, what others
/// have.
fn check_forwards(
    port: &mut Port,
    own: Option<&Port>,
    others: &[Port],
    care: Care,
    remarks: &mut Vec<String>,
) -> Result<(), NetworkError> {
    let mut had = Vec::new();
    for forward in std::mem::take(&mut port.forward) {
        let others = others
            .iter()
            .flat_map(|o| o.forward.iter().map(move |f| (o, f)));
        let taken = others
            .filter(|(_, f)| f.collides(&forward))
            .map(|(other, _)| NetworkError::PortTaken {
                forward,
                other: other.vm.clone(),
            })
            .next();
        // Its own helper may still listen there.
        let mine =
            own.is_some_and(|own| own.forward.iter().any(|f: &Forward| f.collides(&forward)));
        let refused = match taken {
            None if mine => None,
            None => rules::try_port(&forward, care).err(),
            some => some,
        };
        match refused {
            None => had.push(forward),
            Some(error) if care == Care::WhatThereIs => remarks.push(error.to_string()),
            Some(error) => return Err(error),
        }
    }
    port.forward = had;
    Ok(())
}

/// What is somebody else's: routes, and the resolvers that guests are told of.
fn taken() -> Vec<Block> {
    let table = fs::read_to_string("/proc/thread-self/net/route").unwrap_or_default();
    let mut taken = routes(&table, NAT_BRIDGE);
    let resolvers = crate::serve::resolvers().into_iter();
    taken.extend(resolvers.map(|network| Block {
        network,
        mask: Ipv4Addr::BROADCAST,
    }));
    taken
}

/// Has the kernel pass packets on between interfaces; says so if it did not.
fn allow_forwarding() -> Option<String> {
    let now = fs::read_to_string(FORWARDING).unwrap_or_default();
    if now.trim() != "0" {
        return None;
    }
    Some(match fs::write(FORWARDING, "1") {
        Ok(()) => "IPv4 forwarding was off on this host and is on now (net.ipv4.ip_forward = 1), because network = \"nat\" needs it; it stays on until somebody turns it off or the host boots".to_owned(),
        Err(e) => format!(
            "IPv4 forwarding is off on this host and cannot be turned on ({e}): guests of network = \"nat\" reach nothing but the host; sysctl -w net.ipv4.ip_forward=1"
        ),
    })
}

fn write_durably(path: &Path, book: &Book) -> io::Result<()> {
    let parent = path.parent().unwrap_or(Path::new("/"));
    fs::create_dir_all(parent)?;
    let fresh = path.with_extension("json.new");
    let mut file = fs::File::create(&fresh)?;
    serde_json::to_writer_pretty(&mut file, book)?;
    file.sync_all()?;
    fs::rename(&fresh, path)?;
    fs::File::open(parent)?.sync_all()
}
