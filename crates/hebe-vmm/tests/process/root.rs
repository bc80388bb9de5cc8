//! A VMM that was started in an initramfs: once the host's root file system
//! took over, the root directory that it knows is empty, and what it knew by
//! name is elsewhere. What is open stays.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsFd;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use hebe_api::{Client, Request, Response, VmStatus, VmmState};
use hebe_snapshot::SavedFile;

use crate::ending::RESET_WHEN_TOLD;
use crate::guest;

/// In a mount namespace of its own: makes a root directory in memory that
/// holds what the VMM needs, starts it there, and empties that root when told
/// to. `$1` is the program, `$2` what is the run directory and has the disk.
const EARLY_ROOT: &str = r#"
set -e
mount --make-rprivate /
mount -t tmpfs none "$2/root"
cd "$2/root"
mkdir dev proc usr early
mount --rbind /dev dev
mount --bind /usr usr
mount --rbind /proc proc
for dir in lib lib64; do
    if [ -L /$dir ]; then cp -P /$dir .; elif [ -d /$dir ]; then mkdir $dir; mount --bind /$dir $dir; fi
done
mount --bind "$2" early
cp "$1" vmm
chroot . /vmm --name web --vm-id 11111111111111111111111111111111 --run-dir /early \
    --memfd --config /early/config.toml 2>"$2/log" &
vmm=$!
read word
for dir in dev proc usr lib lib64 early; do
    if [ ! -L $dir ] && [ -d $dir ]; then umount -l $dir; fi
done
rm -rf -- *
ls -A
echo empty
wait $vmm
"#;

struct Early {
    shell: Child,
    dir: tempfile::TempDir,
}

impl Early {
    /// `None` where nobody may mount anything, which is said.
    fn start() -> Option<Self> {
        let mut may = Command::new("unshare");
        may.args(["-m", "mount", "--make-rprivate", "/"]);
        if !may.output().is_ok_and(|o| o.status.success()) {
            let line = "skipped here: a test in another root directory needs root (runs in CI)";
            let _ = writeln!(std::io::stderr(), "{line}");
            return None;
        }
        let dir = tempfile::tempdir().expect("dir");
        fs::create_dir(dir.path().join("root")).expect("root");
        fs::write(dir.path().join("disk.img"), vec![0; 1 << 20]).expect("disk");
        let kernel = guest::image(RESET_WHEN_TOLD);
        fs::write(dir.path().join("kernel"), kernel).expect("kernel");
        let config = "name = 'web'\nmemory = '8MiB'\nkernel = '/early/kernel'\n[[disk]]\npath = '/early/disk.img'\n";
        fs::write(dir.path().join("config.toml"), config).expect("definition");
        let mut shell = Command::new("unshare");
        shell.args(["-m", "sh", "-c", EARLY_ROOT, "sh"]);
        shell.arg(env!("CARGO_BIN_EXE_hebe-vmm")).arg(dir.path());
        shell.stdin(Stdio::piped()).stdout(Stdio::piped());
        let shell = shell.spawn().expect("spawn");
        Some(Self { shell, dir })
    }

    fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }

    fn connect(&self) -> Client {
        let until = Instant::now() + Duration::from_secs(120);
        loop {
            match Client::connect(&self.dir.path().join("vmm.sock")) {
                Ok(client) => return client,
                Err(e) => assert!(Instant::now() < until, "{e}: {}", self.log()),
            }
            thread::sleep(Duration::from_millis(2));
        }
    }

    fn ask(&self, request: &Request) -> Response {
        let answer = self.connect().call(request);
        answer.unwrap_or_else(|e| panic!("{request:?}: {e}: {}", self.log()))
    }

    fn status(&self) -> VmStatus {
        match self.ask(&Request::Status) {
            Response::Status(status) => status,
            other => panic!("{other:?}"),
        }
    }

    fn empty_the_root(&mut self) {
        let mut stdin = self.shell.stdin.take().expect("stdin");
        stdin.write_all(b"go\n").expect("tell");
        let stdout = self.shell.stdout.take().expect("stdout");
        let mut line = String::new();
        BufReader::new(stdout).read_line(&mut line).expect("answer");
        assert_eq!(line, "empty\n", "{}", self.log());
    }

    /// Types something, which the guest takes for an order to reset itself.
    fn reset(&self) {
        let mut client = self.connect();
        let attached = client.call(&Request::Console).expect("attach");
        assert_eq!(attached, Response::Done);
        client.into_stream().write_all(b"!").expect("type");
        let until = Instant::now() + Duration::from_secs(120);
        while !self.log().contains("reset by the guest") {
            assert!(Instant::now() < until, "no reset: {}", self.log());
            thread::sleep(Duration::from_millis(2));
        }
    }
}

impl Drop for Early {
    fn drop(&mut self) {
        if let Ok(mut client) = Client::connect(&self.dir.path().join("vmm.sock")) {
            let _ = client.call(&Request::Quit { expected: None });
        } else {
            let _ = self.shell.kill();
        }
        let _ = self.shell.wait();
    }
}

#[test]
fn a_vmm_whose_root_directory_was_emptied_is_frozen_saved_reset_and_ends_on_record() {
    if guest::cannot_run() {
        return;
    }
    let Some(mut early) = Early::start() else {
        return;
    };
    assert_eq!(early.status().state, VmmState::Running);
    early.empty_the_root();
    // Its disk has no path any more, and is where it was.
    let frozen = early.ask(&Request::Freeze);
    assert!(matches!(frozen, Response::Frozen(_)), "{frozen:?}");
    assert_eq!(early.ask(&Request::Thaw), Response::Done);
    // The file that it is saved in is one of the host's root.
    let path = early.dir.path().join("web.part");
    let file = File::create_new(&path).expect("a new file");
    let request = Request::Save { name: path.clone() };
    let saved = early.connect().call_with(&request, &[file.as_fd()]);
    assert!(matches!(saved, Ok(Response::Saved(_))), "{saved:?}");
    let saved = SavedFile::open(&path).expect("a saved VM");
    saved.verify().expect("whole");
    assert_eq!(early.ask(&Request::Unpause), Response::Done);
    // A reset needs KVM, the console's log, the kernel and the disk again.
    early.reset();
    assert_eq!(early.status().state, VmmState::Running);
    let ended = early.ask(&Request::Quit { expected: None });
    assert_eq!(ended, Response::Done);
    early.shell.wait().expect("wait");
    let record = fs::read(early.dir.path().join("exit.json")).expect("record");
    let record: serde_json::Value = serde_json::from_slice(&record).expect("JSON");
    assert_eq!(record["reason"], "quit");
}

#[test]
fn a_disk_that_is_gone_from_its_place_refuses_the_freeze_there_too() {
    if guest::cannot_run() {
        return;
    }
    let Some(mut early) = Early::start() else {
        return;
    };
    assert_eq!(early.status().state, VmmState::Running);
    early.empty_the_root();
    let disk = early.dir.path().join("disk.img");
    let moved = early.dir.path().join("moved.img");
    fs::rename(&disk, &moved).expect("rename");
    let freeze = || early.connect().call(&Request::Freeze);
    let refused = freeze().expect_err("removed").to_string();
    assert!(refused.contains("removed or renamed"), "{refused}");
    fs::write(&disk, vec![0; 1 << 20]).expect("another");
    let refused = freeze().expect_err("replaced").to_string();
    assert!(refused.contains("replaced"), "{refused}");
    fs::rename(&moved, &disk).expect("put back");
    freeze().expect("as it was");
}
