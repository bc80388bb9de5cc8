//! From a disk to what it boots.

use std::cell::RefCell;
use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;

use crate::error::{ImageError, shown};
use crate::fs::{self, Content, FileError, FileSystem};
use crate::grub::{self, Choice, Disk, Place, Variables};
use crate::source::{Piece, Source};
use crate::table;
use crate::{bls, version};

/// Longest configuration file.
const CONFIG_MAX: u64 = 1 << 20;
/// Where a boot loader's files may be: on a volume of their own, or below the
/// root directory.
const PREFIXES: [&str; 2] = ["", "/boot"];

/// How much is taken from an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Largest kernel, in bytes.
    pub kernel: u64,
    /// Largest initrd, all of its parts together, in bytes.
    pub initrd: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            kernel: 256 << 20,
            initrd: 1 << 30,
        }
    }
}

/// What an image boots.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// The menu entry's title, or the kernel's path: for people, with nothing
    /// in it that a terminal would obey.
    pub title: String,
    /// The kernel's command line, as the image has it.
    pub cmdline: String,
    /// Length of the kernel, in bytes.
    pub kernel: u64,
    /// Length of the initrd, in bytes; 0 where there is none.
    pub initrd: u64,
}

/// Finds what the disk `source` boots, and writes its kernel and its initrd
/// into `kernel` and `initrd`.
///
/// # Errors
/// [`ImageError`]; the sinks may hold anything then.
pub fn load(
    source: Rc<dyn Source>,
    limits: Limits,
    kernel: &mut dyn Write,
    initrd: &mut dyn Write,
) -> Result<Found, ImageError> {
    // The readers of file systems are for sound ones first.
    let work = AssertUnwindSafe(|| {
        let disk = Volumes::open(&Piece::whole(source))?;
        let plan = disk.plan()?;
        disk.fetch(plan, limits, kernel, initrd)
    });
    catch_unwind(work).unwrap_or(Err(ImageError::Damaged))
}

/// Where kernel and initrd are.
struct Plan {
    title: String,
    cmdline: String,
    kernel: Place,
    initrds: Vec<Place>,
}

struct Volume {
    /// The partition's number; 0 for the whole disk.
    number: u32,
    uuid: String,
    label: String,
    fs: FileSystem,
}

struct Volumes {
    volumes: Vec<Volume>,
    /// Where the last search for a file was in vain, to look there once.
    absent: RefCell<String>,
}

impl Volumes {
    fn open(disk: &Piece) -> Result<Self, ImageError> {
        let mut sector = [0; 512];
        disk.read_at(&mut sector, 0).map_err(ImageError::Read)?;
        let mut pieces: Vec<(u32, Piece)> = table::partitions(disk)
            .into_iter()
            .map(|p| (p.number, p.piece))
            .collect();
        if pieces.is_empty() {
            pieces.push((0, disk.clone()));
        }
        let mut volumes = Vec::new();
        let mut others = Vec::new();
        for (number, piece) in pieces {
            let other = match fs::look(&piece) {
                Content::Readable { fs, uuid, label } => {
                    volumes.push(Volume {
                        number,
                        uuid,
                        label,
                        fs,
                    });
                    continue;
                }
                Content::Nothing => continue,
                Content::Other(name) => name.to_owned(),
                Content::Damaged(name) => format!("{name} that is damaged"),
            };
            if !others.contains(&other) {
                others.push(other);
            }
        }
        if volumes.is_empty() {
            let found = match others.is_empty() {
                true => "none".to_owned(),
                false => others.join(", "),
            };
            return Err(ImageError::NoFileSystem { found });
        }
        let absent = RefCell::default();
        Ok(Self { volumes, absent })
    }

    fn plan(&self) -> Result<Plan, ImageError> {
        if let Some(plan) = self.by_grub()? {
            return Ok(plan);
        }
        for volume in 0..self.volumes.len() {
            if let Some(plan) = self.by_entries(volume, None, &Variables::new())? {
                return Ok(plan);
            }
        }
        self.by_name().ok_or_else(|| {
            let name = |v: &Volume| match v.number {
                0 => "the whole disk".to_owned(),
                number => format!("partition {number}"),
            };
            let looked: Vec<String> = self.volumes.iter().map(name).collect();
            ImageError::NoEntry {
                looked: looked.join(", "),
            }
        })
    }

    /// By the first `grub.cfg`.
    fn by_grub(&self) -> Result<Option<Plan>, ImageError> {
        for (volume, v) in self.volumes.iter().enumerate() {
            for (prefix, dir) in pairs(PREFIXES, ["grub", "grub2"]) {
                let path = format!("{prefix}/{dir}/grub.cfg");
                if !v.fs.has_file(&path) {
                    continue;
                }
                let unusable = |why: String| ImageError::Config {
                    file: path.clone(),
                    why,
                };
                let text = v.fs.text(&path, CONFIG_MAX);
                let text = text.map_err(|e| unusable(e.to_string()))?;
                let place = Place {
                    volume,
                    path: path.clone(),
                };
                let choice = grub::choose(&text, &place, self);
                return match choice.map_err(|e| unusable(e.to_string()))? {
                    Choice::Linux {
                        title,
                        kernel,
                        cmdline,
                        initrds,
                    } => Ok(Some(Plan {
                        title,
                        cmdline,
                        kernel,
                        initrds,
                    })),
                    Choice::Entries { default, variables } => {
                        let plan = self.by_entries(volume, Some(&default), &variables)?;
                        let none = || unusable("it has no boot loader entry".to_owned());
                        plan.map(Some).ok_or_else(none)
                    }
                };
            }
        }
        Ok(None)
    }

    /// By the boot loader entries of a volume, the default of which GRUB or a
    /// `loader.conf` names.
    fn by_entries(
        &self,
        volume: usize,
        default: Option<&str>,
        variables: &Variables,
    ) -> Result<Option<Plan>, ImageError> {
        let fs = &self.volumes[volume].fs;
        for prefix in PREFIXES {
            let dir = format!("{prefix}/loader/entries");
            let mut names = fs.names(&dir);
            names.retain(|name| name.ends_with(".conf"));
            names.sort_by(|a, b| version::compare(b, a));
            let read = |name: &String| {
                let text = fs.text(&format!("{dir}/{name}"), CONFIG_MAX).ok()?;
                bls::parse(name, &text, variables)
            };
            let entries = names.iter().take(bls::ENTRIES_MAX).filter_map(read);
            let mut entries: Vec<bls::Entry> = entries.collect();
            let conf = fs.text(&format!("{prefix}/loader/loader.conf"), CONFIG_MAX);
            let conf = conf.unwrap_or_default();
            let default = default.unwrap_or_else(|| bls::default_of(&conf));
            let Some(entry) = bls::choose(&mut entries, default) else {
                continue;
            };
            // From the root of the volume; some write it as it is mounted.
            let place = |path: &String| {
                let below = format!("{prefix}/{path}");
                let path = match fs.has_file(path) {
                    true => path.clone(),
                    false => below,
                };
                Place { volume, path }
            };
            let title = match entry.title.is_empty() {
                true => entry.id.clone(),
                false => entry.title.clone(),
            };
            return Ok(Some(Plan {
                title,
                cmdline: entry.options.clone(),
                kernel: place(&entry.linux),
                initrds: entry.initrds.iter().map(place).collect(),
            }));
        }
        Ok(None)
    }

    /// By the name that a kernel usually has; what it is told is in
    /// `/etc/kernel/cmdline`, or is where its root file system seems to be.
    fn by_name(&self) -> Option<Plan> {
        let (volume, path, initrd) = (0..self.volumes.len()).find_map(|volume| {
            let fs = &self.volumes[volume].fs;
            PREFIXES
                .iter()
                .find_map(|prefix| kernel_in(fs, prefix))
                .map(|(kernel, initrd)| (volume, kernel, initrd))
        })?;
        let is_root = |v: &&Volume| v.fs.has_file("/etc/fstab") || v.fs.has_file("/etc/os-release");
        let root = self.volumes.iter().find(is_root);
        let told = root.and_then(|v| v.fs.text("/etc/kernel/cmdline", CONFIG_MAX).ok());
        let cmdline = told.unwrap_or_else(|| match root.unwrap_or(&self.volumes[volume]).number {
            0 => "root=/dev/vda ro".to_owned(),
            number => format!("root=/dev/vda{number} ro"),
        });
        let words: Vec<&str> = cmdline.split_ascii_whitespace().collect();
        let place = |path| Place { volume, path };
        Some(Plan {
            title: path.clone(),
            cmdline: words.join(" "),
            kernel: place(path),
            initrds: initrd.map(place).into_iter().collect(),
        })
    }

    fn fetch(
        &self,
        plan: Plan,
        limits: Limits,
        kernel: &mut dyn Write,
        initrd: &mut dyn Write,
    ) -> Result<Found, ImageError> {
        let kernel = self.copy("kernel", &plan.kernel, limits.kernel, kernel)?;
        let mut total = 0u64;
        for place in &plan.initrds {
            // Each part begins at a multiple of four bytes.
            let pad = total.next_multiple_of(4) - total;
            let zeros = &[0; 3][..pad as usize];
            initrd.write_all(zeros).map_err(ImageError::Sink)?;
            let left = limits.initrd.saturating_sub(total + pad);
            let max = |error| match error {
                ImageError::TooLarge { what, path, .. } => ImageError::TooLarge {
                    what,
                    path,
                    max: limits.initrd,
                },
                other => other,
            };
            let len = self.copy("initrd", place, left, initrd).map_err(max)?;
            total += pad + len;
        }
        Ok(Found {
            title: shown(&plan.title),
            cmdline: plan.cmdline,
            kernel,
            initrd: total,
        })
    }

    fn copy(
        &self,
        what: &'static str,
        place: &Place,
        max: u64,
        sink: &mut dyn Write,
    ) -> Result<u64, ImageError> {
        let path = shown(&place.path);
        let copied = match self.volumes.get(place.volume) {
            Some(volume) => volume.fs.copy(&place.path, max, sink),
            None => Err(FileError::Absent),
        };
        copied.map_err(|error| match error {
            FileError::TooLarge(max) => ImageError::TooLarge { what, path, max },
            FileError::Sink(source) => ImageError::Sink(source),
            other => ImageError::Missing {
                what,
                path,
                why: other.to_string(),
            },
        })
    }
}

fn pairs<const A: usize, const B: usize>(
    a: [&'static str; A],
    b: [&'static str; B],
) -> impl Iterator<Item = (&'static str, &'static str)> {
    a.into_iter().flat_map(move |a| b.map(|b| (a, b)))
}

/// The kernel that `vmlinuz` in `prefix` points to, or the newest of the name;
/// and the initrd that belongs to it.
fn kernel_in(fs: &FileSystem, prefix: &str) -> Option<(String, Option<String>)> {
    let first = |names: &[String]| {
        let path = |name: &String| format!("{prefix}/{name}");
        names.iter().map(path).find(|path| fs.has_file(path))
    };
    let plain = |names: &[&str]| first(&names.iter().map(|n| (*n).to_owned()).collect::<Vec<_>>());
    if let Some(kernel) = plain(&["vmlinuz", "vmlinuz-linux", "bzImage"]) {
        let initrds = [
            "initrd.img",
            "initramfs-linux.img",
            "initrd",
            "initramfs.img",
        ];
        return Some((kernel, plain(&initrds)));
    }
    let mut names = fs.names(&format!("{prefix}/"));
    names.retain(|name| name.starts_with("vmlinuz-"));
    let newest = names.into_iter().max_by(|a, b| version::compare(a, b))?;
    let release = newest.trim_start_matches("vmlinuz-");
    let initrds = [
        format!("initrd.img-{release}"),
        format!("initramfs-{release}.img"),
        format!("initrd-{release}"),
        format!("initramfs-{release}"),
    ];
    Some((format!("{prefix}/{newest}"), first(&initrds)))
}

impl Disk for Volumes {
    fn named(&self, device: &str) -> Option<usize> {
        let digits = |c: char| c.is_ascii_digit();
        let (disk, part) = device.split_once(',').unwrap_or((device, ""));
        let number = part.trim_start_matches(|c| !digits(c));
        let known = ["gpt", "msdos", ""].contains(&&part[..part.len() - number.len()]);
        let number: u32 = match part {
            "" => 0,
            _ => number.parse().ok()?,
        };
        let disk = disk.starts_with("hd") && known;
        let volume = self.volumes.iter().position(|v| v.number == number)?;
        disk.then_some(volume)
    }

    fn with_uuid(&self, uuid: &str) -> Option<usize> {
        let same = |v: &Volume| !uuid.is_empty() && v.uuid.eq_ignore_ascii_case(uuid);
        self.volumes.iter().position(same)
    }

    fn with_label(&self, label: &str) -> Option<usize> {
        let same = |v: &Volume| !label.is_empty() && v.label == label;
        self.volumes.iter().position(same)
    }

    fn with_file(&self, path: &str) -> Option<usize> {
        if *self.absent.borrow() == path {
            return None;
        }
        let found = self.volumes.iter().position(|v| v.fs.has_file(path));
        if found.is_none() {
            path.clone_into(&mut self.absent.borrow_mut());
        }
        found
    }

    fn has_file(&self, place: &Place) -> bool {
        let volume = self.volumes.get(place.volume);
        volume.is_some_and(|v| v.fs.has_file(&place.path))
    }

    fn text(&self, place: &Place) -> Option<String> {
        let volume = self.volumes.get(place.volume)?;
        volume.fs.text(&place.path, CONFIG_MAX).ok()
    }
}
