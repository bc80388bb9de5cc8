//! Makes a disk image out of Debian's packages, without mounting it and
//! without a loop device.
//!
//! ```text
//!  mmdebstrap ──► directory ──► mke2fs -d ──► image: [GPT │ ext4 │ spare GPT]
//!   packages, then               at 1 MiB               │
//!   our own files                                       ▼
//!                                     read back by `load`, renamed into place
//! ```
//!
//! Everything happens in a folder beside the output, which is renamed at the
//! end: an image is complete or not there. [`Order`] says what goes in;
//! [`build`] does it.

mod contents;
mod error;
mod gpt;
pub mod sources;
mod tool;

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::atomic::AtomicBool;

pub use contents::{Contents, FileIn, apt_options, is_inside_path};
pub use error::BuildError;
use gpt::Gpt;
use rustix::fs::{CWD, FlockOperation, RenameFlags, flock, renameat_with};
use rustix::io::Errno;
use sources::Source as AptSource;
use tool::Rights;

use crate::{Found, Limits, Source, load};

/// Smallest disk, in bytes.
pub const SIZE_MIN: u64 = 64 << 20;
/// Largest disk, in bytes.
pub const SIZE_MAX: u64 = 16 << 40;

/// How an image is written down.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Format {
    /// As it is, with holes.
    #[default]
    Raw,
    /// qcow2, by `qemu-img`.
    Qcow2,
}

/// What an image is to hold.
#[derive(Clone, Debug, Default)]
pub struct Order {
    /// Suite or code name of Debian.
    pub suite: String,
    /// Where its packages come from.
    pub sources: Vec<AptSource>,
    /// The package that brings the kernel; without one the image has neither
    /// kernel nor boot loader's configuration, and somebody else boots it.
    pub kernel: Option<String>,
    /// Packages besides those that every image has.
    pub packages: Vec<String>,
    /// Bytes of the disk, rounded up to mebibytes.
    pub size: u64,
    /// Host name.
    pub hostname: String,
    /// The kernel's command line, behind `root=`.
    pub cmdline: String,
    /// Addresses by DHCP, and names by what DHCP says.
    pub dhcp: bool,
    /// Public keys with which root may log in over SSH.
    pub ssh_keys: Vec<String>,
    /// Root is logged in on the serial console without being asked for anything.
    pub autologin: bool,
    /// Files to put in, after the packages.
    pub files: Vec<FileIn>,
    /// Symbolic links to put in: where, and to what.
    pub links: Vec<(String, String)>,
    /// Units to enable.
    pub units: Vec<String>,
    /// How it is written down.
    pub format: Format,
}

/// An image that was made.
#[derive(Clone, Debug)]
pub struct Built {
    /// What it boots, as [`load`] reads it; none without a kernel.
    pub boots: Option<Found>,
    /// Bytes of its disk.
    pub size: u64,
    /// Bytes that it takes on this machine's disk.
    pub allocated: u64,
}

/// Who looks on while an image is made.
#[derive(Clone, Copy)]
pub struct Watch<'a> {
    /// Is told what is going on.
    pub say: &'a dyn Fn(&str),
    /// Becomes true when the work is to end.
    pub stop: &'a AtomicBool,
}

impl Watch<'_> {
    /// The same, and nothing is told.
    fn silently(self) -> Self {
        Self {
            say: &|_| {},
            ..self
        }
    }
}

/// Makes an image at `output`.
///
/// # Errors
/// [`BuildError`]; then nothing is left at `output` but what was there.
pub fn build(
    order: &Order,
    output: &Path,
    replace: bool,
    watch: Watch,
) -> Result<Built, BuildError> {
    order.check()?;
    may_be_put_at(output, replace)?;
    let rights = Rights::of_this_process();
    tool::need_all(order, rights)?;
    let work = Work::create(output, rights)?;
    contents::write(order, &work.path, watch)?;
    contents::unpack(order, rights, &work.path, watch)?;
    (watch.say)("making the file system");
    let image = work.path.join("image");
    make_disk(order, rights, &work.path, &image, watch)?;
    let boots = match order.kernel {
        Some(_) => {
            (watch.say)("reading the image back");
            Some(read_back(&image)?)
        }
        None => None,
    };
    let done = match order.format {
        Format::Raw => image,
        Format::Qcow2 => {
            (watch.say)("converting it to qcow2");
            let to = work.path.join("qcow2");
            tool::qcow2(&image, &to, watch)?;
            to
        }
    };
    let file = File::open(&done).map_err(|e| BuildError::io("cannot open", &done, e))?;
    file.sync_all()
        .map_err(|e| BuildError::io("cannot write", &done, e))?;
    let allocated = tool::allocated(&file).map_err(|e| BuildError::io("cannot read", &done, e))?;
    put_in_place(&done, output, replace)?;
    Ok(Built {
        boots,
        size: order.disk_len(),
        allocated,
    })
}

/// Refuses to take the place of a file that is to stay, or of a disk that a VM
/// has open: it would go on with a file that has no name, and lose it at its end.
fn may_be_put_at(output: &Path, replace: bool) -> Result<(), BuildError> {
    if !replace && output.symlink_metadata().is_ok() {
        return Err(BuildError::Exists(output.to_owned()));
    }
    let Ok(there) = output.metadata() else {
        return Ok(());
    };
    if !there.is_file() {
        return Err(BuildError::NoFile(output.to_owned()));
    }
    let file = File::open(output).map_err(|e| BuildError::io("cannot look at", output, e))?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Err(Errno::WOULDBLOCK) => Err(BuildError::InUse(output.to_owned())),
        // Where nothing can be locked no VM could use it.
        _ => Ok(()),
    }
}

/// Gives the image its name. What may have come there is looked at once more:
/// making it took minutes.
fn put_in_place(done: &Path, output: &Path, replace: bool) -> Result<(), BuildError> {
    may_be_put_at(output, replace)?;
    let renamed = match replace {
        true => fs::rename(done, output),
        false => match renameat_with(CWD, done, CWD, output, RenameFlags::NOREPLACE) {
            // A file system that cannot tell.
            Err(Errno::INVAL | Errno::NOSYS) => fs::rename(done, output),
            Err(Errno::EXIST) => return Err(BuildError::Exists(output.to_owned())),
            other => other.map_err(io::Error::from),
        },
    };
    renamed.map_err(|e| BuildError::io("cannot put in place", output, e))
}

impl Order {
    fn disk_len(&self) -> u64 {
        self.size.next_multiple_of(1 << 20)
    }

    fn check(&self) -> Result<(), BuildError> {
        if self.sources.is_empty() {
            return Err(BuildError::NoSource(self.suite.clone()));
        }
        if !(SIZE_MIN..=SIZE_MAX).contains(&self.size) {
            return Err(BuildError::Size);
        }
        contents::check(self)
    }
}

/// The file system and the table around it.
fn make_disk(
    order: &Order,
    rights: Rights,
    work: &Path,
    image: &Path,
    watch: Watch,
) -> Result<(), BuildError> {
    let size = order.disk_len();
    let failed = |e| BuildError::io("cannot write", image, e);
    let file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(image)
        .map_err(failed)?;
    file.set_len(size).map_err(failed)?;
    let [disk_id, partition_id] = [tool::random_id()?, tool::random_id()?];
    let gpt = Gpt {
        disk_len: size,
        disk_id,
        partition_id,
    };
    let uuid = fs::read_to_string(work.join("uuid"));
    let uuid = uuid.map_err(|e| BuildError::io("cannot read", work, e))?;
    tool::mke2fs(
        rights,
        &work.join("root"),
        image,
        &uuid,
        gpt::START,
        gpt.partition_len(),
        watch,
    )
    .map_err(|error| error.or_too_small(order.size))?;
    gpt.write(&file).map_err(failed)?;
    file.sync_all().map_err(failed)
}

/// A file that is read as a disk.
struct Image {
    file: File,
    len: u64,
}

impl Source for Image {
    fn size(&self) -> u64 {
        self.len
    }

    fn read_at(&self, data: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_exact_at(data, offset)
    }
}

/// What a raw image boots, by the reader that a VMM uses.
fn read_back(image: &Path) -> Result<Found, BuildError> {
    let failed = |e| BuildError::io("cannot read", image, e);
    let file = File::open(image).map_err(failed)?;
    let len = file.metadata().map_err(failed)?.len();
    let source = Rc::new(Image { file, len });
    load(source, Limits::default(), &mut io::sink(), &mut io::sink())
        .map_err(BuildError::DoesNotBoot)
}

/// The folder of one build; it goes with everything in it.
struct Work {
    path: PathBuf,
    rights: Rights,
}

impl Work {
    fn create(output: &Path, rights: Rights) -> Result<Self, BuildError> {
        let name = output.file_name().ok_or(BuildError::NoName)?;
        let name = format!(".{}.{}.part", name.to_string_lossy(), std::process::id());
        let parent = match output.parent() {
            Some(parent) if parent.as_os_str().is_empty() => Path::new("."),
            Some(parent) => parent,
            None => Path::new("."),
        };
        let parent = parent.canonicalize();
        let parent = parent.map_err(|e| BuildError::io("cannot write beside", output, e))?;
        remove_left(&parent, output, rights);
        let path = parent.join(name);
        fs::create_dir(&path).map_err(|e| BuildError::io("cannot create", &path, e))?;
        Ok(Self { path, rights })
    }
}

/// Removes the folders of builds of the same image that were killed.
fn remove_left(parent: &Path, output: &Path, rights: Rights) {
    let name = output.file_name().unwrap_or_default().to_string_lossy();
    let begin = format!(".{name}.");
    for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
        let found = entry.file_name().to_string_lossy().into_owned();
        let pid = found
            .strip_prefix(&begin)
            .and_then(|rest| rest.strip_suffix(".part"));
        let pid = pid.and_then(|pid| pid.parse::<u32>().ok());
        if pid.is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists()) {
            tool::remove(rights, &entry.path());
        }
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        tool::remove(self.rights, &self.path);
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    const UUID: &str = "01234567-89ab-4def-8123-456789abcdef";

    fn order() -> Order {
        let source = sources::parse_list("deb file:/mirror bookworm main\n");
        Order {
            suite: "bookworm".to_owned(),
            sources: source,
            kernel: Some("linux-image-cloud-amd64".to_owned()),
            size: SIZE_MIN,
            hostname: "web".to_owned(),
            cmdline: "console=ttyS0 quiet".to_owned(),
            ..Order::default()
        }
    }

    /// A work folder with a root as Debian's packages leave it, but for the
    /// contents of its files.
    fn root(order: &Order) -> tempfile::TempDir {
        let dir = tempfile::tempdir().expect("dir");
        let root = dir.path().join("root");
        fs::create_dir_all(root.join("boot/grub")).expect("mkdir");
        fs::write(dir.path().join("uuid"), UUID).expect("uuid");
        let cfg = contents::grub_cfg(UUID, &order.hostname, &order.cmdline);
        fs::write(root.join("boot/grub/grub.cfg"), cfg).expect("grub.cfg");
        for (name, what) in [("vmlinuz", "a kernel"), ("initrd.img", "its initrd")] {
            fs::write(root.join(format!("boot/{name}-6.1")), what).expect("written");
            symlink(format!("boot/{name}-6.1"), root.join(name)).expect("link");
        }
        dir
    }

    fn disk(order: &Order, work: &Path) -> Result<PathBuf, BuildError> {
        let stop = AtomicBool::new(false);
        let watch = Watch {
            say: &|_| {},
            stop: &stop,
        };
        let image = work.join("image");
        let rights = Rights::Root;
        make_disk(order, rights, work, &image, watch).map(|()| image)
    }

    #[test]
    fn what_is_written_is_what_the_reader_boots() {
        let order = order();
        let work = root(&order);
        let image = disk(&order, work.path()).expect("a disk");
        assert_eq!(fs::metadata(&image).expect("image").len(), SIZE_MIN);
        let found = read_back(&image).expect("it boots");
        assert_eq!(found.title, "Debian GNU/Linux (web)");
        assert_eq!(
            found.cmdline,
            format!("root=UUID={UUID} ro console=ttyS0 quiet")
        );
        assert_eq!((found.kernel, found.initrd), (8, 10));
    }

    #[test]
    fn a_disk_without_a_kernel_is_no_image() {
        let order = order();
        let work = root(&order);
        fs::remove_file(work.path().join("root/boot/vmlinuz-6.1")).expect("removed");
        let image = disk(&order, work.path()).expect("a disk");
        let refused = read_back(&image).expect_err("nothing to boot");
        assert!(matches!(refused, BuildError::DoesNotBoot(_)), "{refused}");
    }

    #[test]
    fn what_does_not_fit_is_refused_with_the_way_out() {
        let order = order();
        let work = root(&order);
        // It must not be a hole.
        let big = vec![0xa5; SIZE_MIN as usize];
        fs::write(work.path().join("root/big"), big).expect("written");
        let refused = disk(&order, work.path()).expect_err("it is too large");
        let text = refused.to_string();
        assert!(text.contains("64 MiB") && text.contains("--size"), "{text}");
    }

    #[test]
    fn an_order_that_cannot_be_meant_is_refused_before_anything_is_done() {
        type Change = fn(&mut Order);
        let wrong: [(&str, Change); 9] = [
            ("--mirror", |o| o.sources.clear()),
            ("64 MiB", |o| o.size = 1 << 20),
            ("suite", |o| o.suite = "-x".to_owned()),
            ("package", |o| o.packages.push("a,b".to_owned())),
            ("package", |o| o.kernel = Some("--x".to_owned())),
            ("host name", |o| o.hostname = "a b".to_owned()),
            ("GRUB", |o| o.cmdline = "a\nb".to_owned()),
            ("path in an image", |o| {
                o.files.push(FileIn::text("/etc/../x", ""));
            }),
            ("unit", |o| o.units.push("a;b".to_owned())),
        ];
        let dir = tempfile::tempdir().expect("dir");
        let stop = AtomicBool::new(false);
        let watch = Watch {
            say: &|_| {},
            stop: &stop,
        };
        for (word, change) in wrong {
            let mut order = order();
            change(&mut order);
            let refused = build(&order, &dir.path().join("d.img"), false, watch);
            let text = refused.expect_err(word).to_string();
            assert!(text.contains(word), "{word}: {text}");
        }
        let there = dir.path().join("there.img");
        fs::write(&there, "mine").expect("written");
        let refused = build(&order(), &there, false, watch).expect_err("it is there");
        assert!(refused.to_string().contains("--force"), "{refused}");
        assert_eq!(fs::read(&there).expect("read"), b"mine");
        assert_eq!(fs::read_dir(dir.path()).expect("dir").count(), 1);
    }

    #[test]
    fn what_came_meanwhile_or_is_a_vms_disk_is_not_replaced() {
        let dir = tempfile::tempdir().expect("dir");
        let (done, output) = (dir.path().join("done"), dir.path().join("d.img"));
        fs::write(&done, "new").expect("written");
        fs::write(&output, "mine").expect("came while the image was made");
        let put = |replace| put_in_place(&done, &output, replace);
        let refused = put(false).expect_err("it is there");
        assert!(refused.to_string().contains("--force"), "{refused}");
        let disk = File::open(&output).expect("open");
        flock(&disk, FlockOperation::NonBlockingLockShared).expect("as a VM has it");
        let stop = AtomicBool::new(false);
        let watch = Watch {
            say: &|_| {},
            stop: &stop,
        };
        // Said before the image is made, and where one came to have it since.
        let early = build(&order(), &output, true, watch).expect_err("in use");
        for refused in [early, put(true).expect_err("in use")] {
            assert!(matches!(refused, BuildError::InUse(_)), "{refused}");
        }
        assert_eq!(fs::read(&output).expect("read"), b"mine");
        drop(disk);
        put(true).expect("replaced by order");
        assert_eq!(fs::read(&output).expect("read"), b"new");
        fs::write(&done, "newer").expect("written");
        fs::remove_file(&output).expect("removed");
        put(false).expect("a free name");
        let folder = dir.path().join("folder");
        fs::create_dir(&folder).expect("mkdir");
        let refused = may_be_put_at(&folder, true).expect_err("no file");
        assert!(matches!(refused, BuildError::NoFile(_)), "{refused}");
    }

    #[test]
    fn the_folder_of_a_build_goes_with_it_and_that_of_a_killed_one_with_the_next() {
        let dir = tempfile::tempdir().expect("dir");
        let output = dir.path().join("d.img");
        let left = dir.path().join(".d.img.4294967.part");
        let others = dir.path().join(".e.img.4294967.part");
        for folder in [&left, &others] {
            fs::create_dir_all(folder.join("root/etc")).expect("mkdir");
        }
        let work = Work::create(&output, Rights::Root).expect("a folder");
        assert!(!left.exists() && others.exists() && work.path.exists());
        let path = work.path.clone();
        drop(work);
        assert!(!path.exists());
    }
}
