//! DAX set-up on a made-up sysfs, with the kernel's reactions behind its files.

use std::cell::RefCell;
use std::os::unix::fs::symlink;

use super::*;

const UUID: &str = "01234567-89ab-4cde-8f01-23456789abcd";

struct Fake {
    dir: tempfile::TempDir,
    roots: Roots,
    /// Every write: file, relative to sysfs, and text.
    written: RefCell<Vec<(String, String)>>,
}

fn fake() -> Fake {
    let dir = tempfile::tempdir().expect("dir");
    let roots = Roots {
        sys: dir.path().join("sys"),
        dev: dir.path().join("dev"),
    };
    fs::create_dir_all(&roots.dev).expect("dev");
    let bus = roots.sys.join("bus/nd/devices/ndbus0");
    fs::create_dir_all(&bus).expect("bus");
    fs::write(bus.join("wait_probe"), "1\n").expect("probe");
    for driver in ["nd_pmem", "dax_pmem"] {
        fs::create_dir_all(roots.sys.join("bus/nd/drivers").join(driver)).expect("driver");
    }
    Fake {
        dir,
        roots,
        written: RefCell::default(),
    }
}

impl Fake {
    fn nd(&self, rest: &str) -> PathBuf {
        self.roots.sys.join("bus/nd").join(rest)
    }

    /// A legacy namespace, bound to nd_pmem, with `head` at its beginning.
    fn add_namespace(&self, region: u32, head: &[u8]) {
        let namespace = self.nd(&format!("devices/namespace{region}.0"));
        let block = format!("pmem{region}");
        fs::create_dir_all(namespace.join("block").join(&block)).expect("namespace");
        fs::write(namespace.join("size"), "268435456\n").expect("size");
        symlink(self.nd("drivers/nd_pmem"), namespace.join("driver")).expect("driver");
        let seed = self.nd(&format!("devices/dax{region}.0"));
        fs::create_dir_all(&seed).expect("seed");
        let region_dir = self.nd(&format!("devices/region{region}"));
        fs::create_dir_all(&region_dir).expect("region");
        fs::write(region_dir.join("dax_seed"), format!("dax{region}.0\n")).expect("seed");
        let mut bytes = vec![0x5a; 16384];
        bytes[4096..4096 + head.len()].copy_from_slice(head);
        fs::write(self.roots.dev.join(block), bytes).expect("block");
    }

    fn add_dax(&self, name: &str, align: &str) {
        let dir = self.roots.sys.join("bus/dax/devices").join(name);
        fs::create_dir_all(&dir).expect("dax");
        fs::write(dir.join("size"), "264241152\n").expect("size");
        fs::write(dir.join("align"), align).expect("align");
        fs::write(dir.join("resource"), "0x100400000\n").expect("resource");
        let driver = self.roots.sys.join("bus/dax/drivers/device_dax");
        fs::create_dir_all(&driver).expect("driver");
        symlink(driver, dir.join("driver")).expect("driver");
    }

    /// What the kernel does when a file is written.
    fn react(&self, path: &Path, text: &str, works: bool) -> io::Result<()> {
        let file = path.strip_prefix(&self.roots.sys).expect("in sysfs");
        let file = file.to_string_lossy().into_owned();
        self.written.borrow_mut().push((file.clone(), text.into()));
        match file.as_str() {
            "bus/nd/drivers/nd_pmem/unbind" => {
                fs::remove_file(self.nd(&format!("devices/{text}/driver")))
            }
            "bus/nd/drivers/dax_pmem/bind" if works => {
                self.add_dax(text, "2097152\n");
                Ok(())
            }
            "bus/nd/drivers/dax_pmem/bind" => Err(io::ErrorKind::NotFound.into()),
            _ => fs::write(path, text),
        }
    }

    fn create(&self, options: &CreateOptions, works: bool) -> Result<Created, DaxError> {
        Pmem {
            roots: &self.roots,
            write: &mut |path: &Path, text: &str| self.react(path, text, works),
        }
        .create(options, UUID)
    }

    fn wrote(&self, file: &str) -> Vec<String> {
        let written = self.written.borrow();
        let to_file = written.iter().filter(|(f, _)| f == file);
        to_file.map(|(_, text)| text.clone()).collect()
    }
}

#[test]
fn a_reserved_range_becomes_a_device_once() {
    let fake = fake();
    fake.add_namespace(0, b"");
    let made = fake.create(&CreateOptions::default(), true).expect("made");
    let Created::New(device) = made else {
        panic!("{made:?}");
    };
    assert_eq!(
        device,
        DaxDevice {
            path: fake.roots.dev.join("dax0.0"),
            size: 264_241_152,
            align: GRANULE,
            resource: Some(0x1_0040_0000),
            driver: Some("device_dax".into()),
        }
    );
    for (attribute, value) in [
        ("mode", "pmem"),
        ("align", "2097152"),
        ("uuid", UUID),
        ("namespace", "namespace0.0"),
    ] {
        let file = format!("bus/nd/devices/dax0.0/{attribute}");
        assert_eq!(fake.wrote(&file), [value], "{attribute}");
    }
    let order: Vec<String> = fake.written.borrow().iter().map(|w| w.0.clone()).collect();
    assert_eq!(
        order.first().expect("first"),
        "bus/nd/drivers/nd_pmem/unbind"
    );
    assert_eq!(order.last().expect("last"), "bus/nd/drivers/dax_pmem/bind");

    fake.written.borrow_mut().clear();
    let again = fake.create(&CreateOptions::default(), true).expect("again");
    assert_eq!(again, Created::Existing(device));
    assert_eq!(*fake.written.borrow(), []);
}

#[test]
fn an_info_block_is_never_overwritten_unasked() {
    for head in INFO_BLOCKS {
        let fake = fake();
        fake.add_namespace(0, head);
        let refused = fake.create(&CreateOptions::default(), true);
        assert!(
            matches!(refused, Err(DaxError::InfoBlock { .. })),
            "{refused:?}"
        );
        assert_eq!(*fake.written.borrow(), []);
        let force = CreateOptions {
            force: true,
            ..CreateOptions::default()
        };
        assert!(matches!(fake.create(&force, true), Ok(Created::New(_))));
    }
}

#[test]
fn a_failure_gives_the_namespace_back() {
    let fake = fake();
    fake.add_namespace(0, b"");
    let failed = fake.create(&CreateOptions::default(), false);
    assert!(matches!(failed, Err(DaxError::Sysfs { .. })), "{failed:?}");
    assert_eq!(fake.wrote("bus/nd/drivers/nd_pmem/bind"), ["namespace0.0"]);
}

#[test]
fn an_unbound_namespace_is_looked_at_by_the_kernel_first() {
    let fake = fake();
    fake.add_namespace(0, b"");
    fs::remove_file(fake.nd("devices/namespace0.0/driver")).expect("unbound");
    fake.create(&CreateOptions::default(), true).expect("made");
    let first = fake.written.borrow()[0].clone();
    assert_eq!(
        first,
        ("bus/nd/drivers/nd_pmem/bind".into(), "namespace0.0".into())
    );
    assert_eq!(fake.wrote("bus/nd/drivers/nd_pmem/unbind"), [""; 0]);
}

#[test]
fn which_range_is_meant_must_be_clear() {
    let fake = fake();
    let none = fake.create(&CreateOptions::default(), true);
    assert!(matches!(none, Err(DaxError::NoNamespace)));
    fake.add_namespace(0, b"");
    fake.add_namespace(1, b"");
    let both = fake.create(&CreateOptions::default(), true);
    let said = both.expect_err("which?").to_string();
    assert!(said.contains("namespace0.0, namespace1.0"), "{said}");
    let named = |name: &str| CreateOptions {
        namespace: Some(name.into()),
        force: false,
    };
    let unknown = fake.create(&named("namespace7.0"), true);
    assert!(matches!(unknown, Err(DaxError::UnknownNamespace(_))));
    let Ok(Created::New(device)) = fake.create(&named("namespace1.0"), true) else {
        panic!("namespace1.0");
    };
    assert_eq!(device.path, fake.roots.dev.join("dax1.0"));
    let Ok(Created::New(_)) = fake.create(&named("namespace0.0"), true) else {
        panic!("another region's device is not this one's");
    };
}

#[test]
fn devices_are_listed_and_found_by_number() {
    let fake = fake();
    assert_eq!(list(&fake.roots.sys, &fake.roots.dev).expect("none"), []);
    fake.add_dax("dax0.0", "2097152\n");
    fake.add_dax("dax1.0", "4096\n");
    let all = list(&fake.roots.sys, &fake.roots.dev).expect("list");
    assert_eq!(all.len(), 2);
    assert_eq!((all[0].align, all[1].align), (GRANULE, 4096));

    let numbers = fake.roots.sys.join("dev/char");
    fs::create_dir_all(&numbers).expect("dev/char");
    let device = fake.roots.sys.join("bus/dax/devices/dax0.0");
    symlink(fake.roots.sys.join("bus/dax"), device.join("subsystem")).expect("subsystem");
    symlink(&device, numbers.join("252:0")).expect("number");
    let found = device_of(&fake.roots.sys, 252, 0).expect("look");
    assert_eq!(found.expect("found").path, Path::new("/dev/dax0.0"));
    assert_eq!(device_of(&fake.roots.sys, 1, 3).expect("look"), None);
    fs::write(device.join("size"), "many").expect("size");
    let said = device_of(&fake.roots.sys, 252, 0).expect_err("nonsense");
    assert!(said.to_string().contains("'many'"), "{said}");
    assert!(fake.dir.path().exists());
}

#[test]
fn reservations_are_read_as_the_kernel_reads_them() {
    let found = |cmdline: &str| -> Vec<(u64, u64)> {
        let all = parse_memmap_reservations(cmdline);
        all.into_iter().map(|r| (r.start, r.len)).collect()
    };
    assert_eq!(found("quiet memmap=256M!4G ro"), [(4 << 30, 256 << 20)]);
    assert_eq!(
        found("memmap=1G!8G,0x10000000!0x100000000"),
        [(4 << 30, 256 << 20), (8 << 30, 1 << 30)]
    );
    assert_eq!(found("a=\"b memmap=1M!2M\" memmap=1k!0100"), [(64, 1024)]);
    assert_eq!(
        found("memmap=1G@4G memmap=1G$4G memmap=1G#4G memmap=exactmap"),
        []
    );
    assert_eq!(found("xmemmap=1G!4G memmap=!4G memmap=1G! memmap=0!4G"), []);
    assert_eq!(found("memmap=99999999999T!4G memmap=1X!4G"), []);
    assert_eq!(found("ro -- memmap=1G!4G"), []);
    assert_eq!(found("memmap=0x1e!4G"), [(4 << 30, 0x1e)]);
    assert_eq!(found(""), []);
}
