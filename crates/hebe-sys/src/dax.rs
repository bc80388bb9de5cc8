//! DAX devices: finding them, making one of a reserved range, and reading
//! reservations off a kernel command line.
//!
//! A range reserved with `memmap=nn!ss` shows up as a legacy pmem
//! namespace. [`create_from_pmem`] turns it into a devdax device through
//! sysfs, as `ndctl create-namespace --mode devdax` would. The kernel keeps
//! that decision in an info block at the head of the range, and every later
//! kernel that reserves the same range brings the device up by itself.

use std::fs;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use hebe_types::GRANULE;

/// Why a DAX device cannot be found or made.
#[derive(Debug, thiserror::Error)]
pub enum DaxError {
    /// A file of sysfs cannot be read or written.
    #[error("cannot {what} {path}")]
    Sysfs {
        /// What was tried.
        what: &'static str,
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file of sysfs does not hold what it should.
    #[error("{path} says '{text}', which is not a number")]
    NotANumber {
        /// Which file.
        path: PathBuf,
        /// What it holds.
        text: String,
    },
    /// No reserved range.
    #[error(
        "there is no reserved memory: boot with memmap=<size>!<start> on the kernel command line and load the modules nd_e820 and nd_pmem"
    )]
    NoNamespace,
    /// Several reserved ranges, and none was named.
    #[error("there are several reserved ranges ({0}): name the one to use")]
    Ambiguous(String),
    /// The namespace is not there.
    #[error("there is no namespace {0}: /sys/bus/nd/devices lists those there are")]
    UnknownNamespace(String),
    /// The block device of the namespace is in use.
    #[error("{0} is in use (mounted, or held by another device): release it first")]
    InUse(PathBuf),
    /// The range carries another format's info block.
    #[error(
        "namespace {namespace} carries a '{found}' info block that the kernel did not accept: the reservation differs from the one it was made with; boot with that one, or give up what is there with force"
    )]
    InfoBlock {
        /// Which namespace.
        namespace: String,
        /// The signature found.
        found: String,
    },
    /// Everything was written and no device came.
    #[error(
        "namespace {0} was set up and no devdax device appeared: load the modules device_dax and dax_pmem"
    )]
    NotAppeared(String),
}

/// One devdax device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DaxDevice {
    /// Its node, such as `/dev/dax0.0`.
    pub path: PathBuf,
    /// Its size in bytes.
    pub size: u64,
    /// Alignment of mappings in bytes.
    pub align: u64,
    /// Physical start address; unknown to a reader without privilege.
    pub resource: Option<u64>,
    /// A driver has it, so that it can be mapped (`device_dax`), or it was
    /// handed to the page allocator (`kmem`).
    pub driver: Option<String>,
}

/// Where the kernel's files are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Roots {
    /// Usually `/sys`.
    pub sys: PathBuf,
    /// Usually `/dev`.
    pub dev: PathBuf,
}

impl Default for Roots {
    fn default() -> Self {
        Self {
            sys: "/sys".into(),
            dev: "/dev".into(),
        }
    }
}

/// What [`create_from_pmem`] is to do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CreateOptions {
    /// Such as `namespace0.0`; the only one there is, if absent.
    pub namespace: Option<String>,
    /// Overwrite an info block that the kernel did not accept.
    pub force: bool,
}

/// What [`create_from_pmem`] did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Created {
    /// The device was there; nothing was written.
    Existing(DaxDevice),
    /// It is new.
    New(DaxDevice),
}

fn read_text(path: &Path) -> Result<String, DaxError> {
    let text = fs::read_to_string(path).map_err(|source| DaxError::Sysfs {
        what: "read",
        path: path.to_owned(),
        source,
    })?;
    Ok(text.trim().to_owned())
}

fn read_number(path: &Path) -> Result<u64, DaxError> {
    let text = read_text(path)?;
    let number = match text.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16),
        None => text.parse(),
    };
    number.map_err(|_| DaxError::NotANumber {
        path: path.to_owned(),
        text,
    })
}

/// Names in a directory of sysfs, sorted; none if it is not there.
fn names(dir: &Path) -> Result<Vec<String>, DaxError> {
    let fail = |source| DaxError::Sysfs {
        what: "list",
        path: dir.to_owned(),
        source,
    };
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(fail(e)),
    };
    let mut out = Vec::new();
    for entry in entries {
        out.push(
            entry
                .map_err(fail)?
                .file_name()
                .to_string_lossy()
                .into_owned(),
        );
    }
    out.sort();
    Ok(out)
}

fn link_name(path: &Path) -> Option<String> {
    let target = fs::read_link(path).ok()?;
    Some(target.file_name()?.to_string_lossy().into_owned())
}

fn describe(dir: &Path, path: PathBuf) -> Result<DaxDevice, DaxError> {
    Ok(DaxDevice {
        path,
        size: read_number(&dir.join("size"))?,
        align: read_number(&dir.join("align"))?,
        resource: read_number(&dir.join("resource")).ok().filter(|r| *r != 0),
        driver: link_name(&dir.join("driver")),
    })
}

/// Every devdax device, in the order of their names.
///
/// # Errors
/// [`DaxError::Sysfs`] when sysfs cannot be read. A machine without DAX has an
/// empty list.
pub fn list(sys: &Path, dev: &Path) -> Result<Vec<DaxDevice>, DaxError> {
    let bus = sys.join("bus/dax/devices");
    let found = names(&bus)?.into_iter();
    found
        .map(|name| describe(&bus.join(&name), dev.join(&name)))
        .collect()
}

/// Waits until the kernel has probed its ranges. Where the modules are loaded
/// that make devices of them, these are there then.
///
/// # Errors
/// [`DaxError::Sysfs`] when sysfs cannot be read.
pub fn settle(sys: &Path) -> Result<(), DaxError> {
    let devices = sys.join("bus/nd/devices");
    for bus in names(&devices)? {
        if bus.starts_with("ndbus") {
            // Reading it takes until asynchronous probing is over.
            read_text(&devices.join(bus).join("wait_probe"))?;
        }
    }
    Ok(())
}

/// The devdax device behind a character device's number, or `None` if that
/// number is another kind of device.
///
/// # Errors
/// [`DaxError::Sysfs`] when its attributes cannot be read.
pub fn device_of(sys: &Path, major: u32, minor: u32) -> Result<Option<DaxDevice>, DaxError> {
    let dir = sys.join(format!("dev/char/{major}:{minor}"));
    if link_name(&dir.join("subsystem")).as_deref() != Some("dax") {
        return Ok(None);
    }
    let name = link_name(&dir).unwrap_or_default();
    describe(&dir, Path::new("/dev").join(name)).map(Some)
}

/// Turns a reserved range into a devdax device with 2 MiB alignment. Nothing
/// is written if the device is there: an info block on the range belongs to
/// guest RAM of VMs that may be frozen in it.
///
/// # Errors
/// [`DaxError`]; the namespace is given back to `nd_pmem` then.
pub fn create_from_pmem(roots: &Roots, options: &CreateOptions) -> Result<Created, DaxError> {
    let uuid = random_uuid().map_err(|source| DaxError::Sysfs {
        what: "draw a uuid from",
        path: "getrandom".into(),
        source,
    })?;
    Pmem {
        roots,
        write: &mut |path: &Path, text: &str| fs::write(path, text),
    }
    .create(options, &uuid)
}

fn random_uuid() -> io::Result<String> {
    let mut id = [0u8; 16];
    rustix::rand::getrandom(&mut id, rustix::rand::GetRandomFlags::empty())?;
    id[6] = id[6] & 0x0f | 0x40;
    id[8] = id[8] & 0x3f | 0x80;
    let mut text = String::new();
    for (i, byte) in id.iter().enumerate() {
        if matches!(i, 4 | 6 | 8 | 10) {
            text.push('-');
        }
        text.push_str(&format!("{byte:02x}"));
    }
    Ok(text)
}

/// How sysfs files are written; the tests put a kernel's reactions behind it.
type Write<'a> = dyn FnMut(&Path, &str) -> io::Result<()> + 'a;

struct Pmem<'a> {
    roots: &'a Roots,
    write: &'a mut Write<'a>,
}

impl Pmem<'_> {
    fn nd(&self, rest: &str) -> PathBuf {
        self.roots.sys.join("bus/nd").join(rest)
    }

    fn put(&mut self, path: PathBuf, text: &str) -> Result<(), DaxError> {
        (self.write)(&path, text).map_err(|source| DaxError::Sysfs {
            what: "write",
            path,
            source,
        })
    }

    fn create(&mut self, options: &CreateOptions, uuid: &str) -> Result<Created, DaxError> {
        self.settle()?;
        let Some(namespace) = self.choose(options)? else {
            let all = list(&self.roots.sys, &self.roots.dev)?;
            return all
                .into_iter()
                .next()
                .map(Created::Existing)
                .ok_or(DaxError::NoNamespace);
        };
        if let Some(device) = self.device_in(&namespace)? {
            return Ok(Created::Existing(device));
        }
        let driver = self.nd(&format!("devices/{namespace}/driver"));
        if !driver.exists() {
            // Lets the kernel look for an info block of its own. Finding one
            // counts as failure to bind, so the answer tells nothing.
            let _ = self.put(self.nd("drivers/nd_pmem/bind"), &namespace);
            if let Some(device) = self.device_in(&namespace)? {
                return Ok(Created::Existing(device));
            }
        }
        self.check_unused(&namespace, options.force)?;
        match self.convert(&namespace, uuid) {
            Ok(device) => Ok(Created::New(device)),
            Err(e) => {
                let _ = self.put(self.nd("drivers/nd_pmem/bind"), &namespace);
                Err(e)
            }
        }
    }

    /// A device that is about to appear by itself must not be made a second time.
    fn settle(&self) -> Result<(), DaxError> {
        settle(&self.roots.sys)
    }

    /// The namespace meant; `None` if a device is there and none was named.
    fn choose(&self, options: &CreateOptions) -> Result<Option<String>, DaxError> {
        let mut all = names(&self.nd("devices"))?;
        all.retain(|name| name.starts_with("namespace"));
        // A region keeps an empty seed for the next namespace.
        all.retain(|n| read_number(&self.nd(&format!("devices/{n}/size"))).is_ok_and(|s| s > 0));
        if let Some(named) = &options.namespace {
            return match all.contains(named) {
                true => Ok(Some(named.clone())),
                false => Err(DaxError::UnknownNamespace(named.clone())),
            };
        }
        if !list(&self.roots.sys, &self.roots.dev)?.is_empty() {
            return Ok(None);
        }
        match all.len() {
            0 => Err(DaxError::NoNamespace),
            1 => Ok(all.pop()),
            _ => Err(DaxError::Ambiguous(all.join(", "))),
        }
    }

    /// The devdax device on a namespace: `namespace3.0` has `dax3.…`.
    fn device_in(&self, namespace: &str) -> Result<Option<DaxDevice>, DaxError> {
        let prefix = format!("dax{}.", region(namespace));
        let all = list(&self.roots.sys, &self.roots.dev)?;
        Ok(all.into_iter().find(|device| {
            let name = device.path.file_name().unwrap_or_default();
            name.to_string_lossy().starts_with(&prefix)
        }))
    }

    /// Refuses a range that is mounted or that carries an info block.
    fn check_unused(&self, namespace: &str, force: bool) -> Result<(), DaxError> {
        let blocks = names(&self.nd(&format!("devices/{namespace}/block")))?;
        let Some(block) = blocks.first() else {
            return Ok(());
        };
        let path = self.roots.dev.join(block);
        let fail = |source: io::Error| match source.raw_os_error() {
            Some(libc::EBUSY) => DaxError::InUse(path.clone()),
            _ => DaxError::Sysfs {
                what: "read",
                path: path.clone(),
                source,
            },
        };
        // On a block device, O_EXCL without O_CREAT fails while it is mounted.
        let mut options = fs::OpenOptions::new();
        let mut file = options
            .read(true)
            .custom_flags(libc::O_EXCL)
            .open(&path)
            .map_err(fail)?;
        let mut signature = [0u8; 16];
        file.seek(SeekFrom::Start(INFO_BLOCK_OFFSET))
            .map_err(fail)?;
        file.read_exact(&mut signature).map_err(fail)?;
        let known = INFO_BLOCKS
            .iter()
            .find(|known| signature.starts_with(known));
        match known {
            Some(found) if !force => Err(DaxError::InfoBlock {
                namespace: namespace.to_owned(),
                found: String::from_utf8_lossy(found).into_owned(),
            }),
            _ => Ok(()),
        }
    }

    fn convert(&mut self, namespace: &str, uuid: &str) -> Result<DaxDevice, DaxError> {
        let region = region(namespace).to_owned();
        let seed = read_text(&self.nd(&format!("devices/region{region}/dax_seed")))?;
        if self.nd(&format!("devices/{namespace}/driver")).exists() {
            self.put(self.nd("drivers/nd_pmem/unbind"), namespace)?;
        }
        let align = GRANULE.to_string();
        let settings = [
            // The page array lies in the range itself: RAM of the host is not
            // spent on it, and it is not guest RAM.
            ("mode", "pmem"),
            ("align", align.as_str()),
            ("uuid", uuid),
            ("namespace", namespace),
        ];
        for (attribute, value) in settings {
            self.put(self.nd(&format!("devices/{seed}/{attribute}")), value)?;
        }
        self.put(self.nd("drivers/dax_pmem/bind"), &seed)?;
        self.device_in(namespace)?
            .ok_or_else(|| DaxError::NotAppeared(namespace.to_owned()))
    }
}

/// Where libnvdimm keeps its info block, and how each kind begins.
const INFO_BLOCK_OFFSET: u64 = 4096;
const INFO_BLOCKS: [&[u8]; 3] = [b"NVDIMM_DAX_INFO", b"NVDIMM_PFN_INFO", b"BTT_ARENA_INFO"];

/// `namespace3.0` is in region 3.
fn region(namespace: &str) -> &str {
    let number = namespace.trim_start_matches("namespace");
    number.split('.').next().unwrap_or_default()
}

/// A range reserved on a kernel command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Reservation {
    /// Physical start address.
    pub start: u64,
    /// Length in bytes.
    pub len: u64,
}

/// The ranges that `memmap=nn[KMGTPE]!ss[KMGTPE]` reserves, sorted. Other uses
/// of `memmap=` reserve nothing for us; what the kernel would not understand
/// is skipped as the kernel skips it.
pub fn parse_memmap_reservations(cmdline: &str) -> Vec<Reservation> {
    let mut out: Vec<Reservation> = parameters(cmdline)
        .iter()
        .filter_map(|parameter| parameter.strip_prefix("memmap="))
        .flat_map(|value| value.split(','))
        .filter_map(|item| {
            let (len, start) = item.split_once('!')?;
            let (len, start) = (memparse(len)?, memparse(start)?);
            (len > 0).then_some(Reservation { start, len })
        })
        .collect();
    out.sort();
    out
}

/// Splits as the kernel does: at white space outside double quotes, up to the
/// `--` after which everything is for init.
fn parameters(cmdline: &str) -> Vec<String> {
    let mut out = vec![String::new()];
    let mut quoted = false;
    for c in cmdline.chars() {
        match c {
            '"' => quoted = !quoted,
            c if c.is_whitespace() && !quoted => out.push(String::new()),
            c => {
                if let Some(last) = out.last_mut() {
                    last.push(c);
                }
            }
        }
    }
    let end = out.iter().position(|p| p == "--").unwrap_or(out.len());
    out.truncate(end);
    out
}

/// A number as the kernel's `memparse` reads it: decimal, 0x hexadecimal or 0
/// octal, with one suffix.
fn memparse(text: &str) -> Option<u64> {
    let text = text.to_ascii_lowercase();
    let (digits, shift) = match text.char_indices().next_back()? {
        (at, 'k') => (&text[..at], 10),
        (at, 'm') => (&text[..at], 20),
        (at, 'g') => (&text[..at], 30),
        (at, 't') => (&text[..at], 40),
        // In hexadecimal an 'e' is a digit.
        (at, 'p') => (&text[..at], 50),
        (at, 'e') if !text.starts_with("0x") => (&text[..at], 60),
        _ => (text.as_str(), 0),
    };
    let number = match digits.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16),
        None if digits.len() > 1 && digits.starts_with('0') => u64::from_str_radix(digits, 8),
        None => digits.parse(),
    };
    number.ok()?.checked_mul(1 << shift)
}

#[cfg(test)]
#[path = "dax_tests.rs"]
mod tests;
