//! A VMM without a guest.
//!
//! What it does wrong is told by words in `ROOT/fake/NAME`; what it does is
//! noted, one line each, in `ROOT/fake/events`.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{self, ExitCode};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use hebe_api::{
    FreezeReport, RamMeter, Request, Response, ResumeReport, SaveReport, VmStatus, VmmState,
    read_frame, write_frame,
};
use hebe_snapshot::SavedFile;
use hebe_store::Segment;
use hebe_sys::clock::stamp_now;
use hebe_types::{VmId, VmName};

struct Fake {
    name: VmName,
    id: VmId,
    dir: PathBuf,
    root: PathBuf,
    segment: Option<Segment>,
    state: VmmState,
    resume: Option<ResumeReport>,
    /// KVM gives it up at this instant.
    fails_at: Option<Instant>,
}

/// Runs one; returns its exit status.
pub fn run(arguments: &[String]) -> ExitCode {
    let mut options: BTreeMap<&str, &str> = BTreeMap::new();
    let mut it = arguments.iter().peekable();
    while let Some(flag) = it.next() {
        let value = it.next_if(|v| !v.starts_with("--"));
        options.insert(flag, value.map_or("", String::as_str));
    }
    let named = arguments
        .windows(2)
        .filter(|pair| pair[0] == "--segment-fd");
    let fds = named.map(|pair| take_fd(&pair[1])).collect();
    let dir = PathBuf::from(options["--run-dir"]);
    match start(&options, fds, dir.clone()) {
        Ok(fake) => fake.serve(),
        Err(message) => {
            end(&dir, "error", &message);
            ExitCode::FAILURE
        }
    }
}

fn end(dir: &Path, reason: &str, message: &str) {
    let ran = reason != "error";
    let record = serde_json::json!({"reason": reason, "message": message, "ran": ran});
    fs::write(dir.join("exit.json"), record.to_string()).expect("exit.json");
}

fn take_fd(text: &str) -> OwnedFd {
    let number = text.parse().expect("a descriptor");
    // SAFETY: the host passed this descriptor for this process alone, and it
    // is taken once.
    unsafe { OwnedFd::from_raw_fd(number) }
}

fn start(
    options: &BTreeMap<&str, &str>,
    mut fds: Vec<OwnedFd>,
    dir: PathBuf,
) -> Result<Fake, String> {
    // Kept to the end of the process.
    std::mem::forget(take_fd(options["--lock-fd"]));
    let root = dir
        .ancestors()
        .nth(3)
        .expect("root/run/vms/NAME")
        .to_owned();
    let spec = options.get("--segment");
    let spec = spec.map(|json| serde_json::from_str(json).expect("a SegmentSpec"));
    let mapped = match (&spec, fds.len()) {
        (Some(spec), 1) => Some(Segment::map(fds.remove(0), spec)),
        (Some(spec), _) => Some(Segment::map_files(fds, spec)),
        (None, _) => {
            assert!(options.contains_key("--memfd"));
            None
        }
    };
    let segment = mapped.transpose().map_err(|e| e.to_string())?;
    let id = hebe_sys::proc::parse_uuid(options["--vm-id"]).expect("an id");
    let mut fake = Fake {
        name: options["--name"].parse().expect("a name"),
        id: VmId(id),
        dir,
        root,
        segment,
        state: VmmState::Running,
        resume: None,
        fails_at: None,
    };
    let process_started = stamp_now();
    if fake.told("say-bridge") && hebe_sys::link::index(hebe_types::NAT_BRIDGE).is_some() {
        fake.event("bridge");
    }
    if fake.told("say-later") && options.contains_key("--limits-later") {
        fake.event("later");
    }
    if fake.told("fail-start") {
        return Err("the tap is taken".into());
    }
    if let Some(known) = options.get("--expect") {
        let text = fs::read_to_string(known).expect("what it was booted with");
        let booted = format!("name = \"{}\"", fake.name);
        assert!(text.contains(&booted), "{text}");
        if fake.told("say-expects") {
            fake.event("expects");
        }
    }
    let continues = ["--resume", "--restore"]
        .iter()
        .any(|f| options.contains_key(f));
    if continues && fake.told("changed-disk") && !options.contains_key("--accept-changed-disk") {
        return Err("a disk changed".into());
    }
    if fake.told("hang-start") {
        thread::sleep(Duration::from_secs(600));
    }
    if options.contains_key("--resume") {
        let segment = fake.segment.as_ref().expect("a segment");
        let state = segment.exec().load().map_err(|e| e.to_string())?;
        assert_eq!(state, fake.name.as_str().as_bytes());
    }
    if let Some(file) = options.get("--restore") {
        // A real file where a test made one, else what `save` here writes.
        let state = match SavedFile::open(Path::new(file)) {
            Ok(saved) => saved.state().to_vec(),
            Err(_) => fs::read(file).map_err(|e| e.to_string())?,
        };
        assert_eq!(state, fake.name.as_str().as_bytes());
    }
    if !options.contains_key("--config") {
        let now = stamp_now();
        fake.resume = Some(ResumeReport {
            process_started,
            state_read: now,
            constructed: now,
            running: now,
            ram_touched: RamMeter::default(),
            steps: None,
        });
    }
    if fake.told("fail-late") {
        return Err("the disk went away".into());
    }
    if let Some(gate) = options.get("--gate-fd") {
        let mut gate = File::from(take_fd(gate));
        gate.write_all(&[1]).expect("write");
        gate.read_exact(&mut [0]).map_err(|_| "nobody looked")?;
    }
    fake.run_guest();
    Ok(fake)
}

impl Fake {
    fn told(&self, word: &str) -> bool {
        let path = self.root.join("fake").join(self.name.as_str());
        fs::read_to_string(path).is_ok_and(|text| text.split_whitespace().any(|w| w == word))
    }

    fn event(&self, what: &str) {
        let path = self.root.join("fake/events");
        let mut file = OpenOptions::new()
            .create(true)
            .append(true)
            .open(path)
            .expect("events");
        // One write, so that lines of several VMMs do not mix.
        file.write_all(format!("{} {what}\n", self.name).as_bytes())
            .expect("write");
    }

    fn run_guest(&mut self) {
        if let Some(segment) = &self.segment {
            let boot = hebe_sys::proc::boot_id().expect("boot id");
            let marked = segment.exec().mark_running(boot, process::id());
            marked.expect("mark");
        }
        self.event("runs");
        self.state = VmmState::Running;
    }

    fn serve(self) -> ExitCode {
        let listener = UnixListener::bind(self.dir.join("vmm.sock")).expect("bind");
        let fake = Arc::new(Mutex::new(self));
        for stream in listener.incoming().flatten() {
            let fake = Arc::clone(&fake);
            thread::spawn(move || converse(stream, &fake));
        }
        ExitCode::SUCCESS
    }

    fn answer(&mut self, request: &Request) -> Response {
        let failed = |message: &str| Response::Failed {
            message: message.into(),
        };
        match request {
            Request::Status => Response::Status(self.status()),
            Request::Freeze | Request::Thaw | Request::Unpause | Request::Pause
                if self.has_failed() =>
            {
                failed("the VM failed and cannot run again (KVM gave it up)")
            }
            Request::Pause if self.told("triple-fault") => self.triple_fault(),
            Request::Freeze => self.freeze(),
            Request::Thaw if self.state == VmmState::Frozen => {
                if self.told("refuse-thaw") {
                    return failed("a device does not start");
                }
                self.run_guest();
                Response::Done
            }
            Request::Pause => {
                self.state = VmmState::Paused;
                Response::Done
            }
            Request::Unpause => {
                self.run_guest();
                Response::Done
            }
            // No guest is left that could see it.
            Request::PowerButton if self.has_failed() => self.leave("quit"),
            Request::PowerButton if self.told("ignore-button") => Response::Done,
            Request::PowerButton if self.told("power-off-late") => {
                let (dir, marked) = (self.dir.clone(), self.segment.take());
                thread::spawn(move || {
                    thread::sleep(Duration::from_secs(6));
                    if let Some(segment) = marked {
                        segment.exec().mark_empty().expect("mark");
                    }
                    end(&dir, "power-off", "");
                    process::exit(0)
                });
                Response::Done
            }
            Request::PowerButton => self.leave("power-off"),
            Request::Quit { .. } if self.told("ignore-quit") => failed("not now"),
            Request::Quit { expected } if expected.is_some_and(|e| e != self.state) => {
                Response::Failed {
                    message: "in another state".into(),
                }
            }
            Request::Quit { expected: Some(_) } if self.is_last_holder() => {
                failed("frozen in memory that ends with its VMM")
            }
            Request::Quit { .. } => match self.state {
                VmmState::Frozen => self.leave("frozen"),
                VmmState::Saved => self.leave("saved"),
                _ => self.leave("quit"),
            },
            _ => failed("not now"),
        }
    }

    /// As the real one has it: in files, not in a store.
    fn is_last_holder(&self) -> bool {
        let in_files = |segment: &Segment| !segment.files().is_empty();
        self.state == VmmState::Frozen && self.segment.as_ref().is_some_and(in_files)
    }

    fn leave(&self, reason: &str) -> ! {
        if reason != "frozen"
            && let Some(segment) = &self.segment
        {
            segment.exec().mark_empty().expect("mark");
        }
        end(&self.dir, reason, "");
        self.event(reason);
        process::exit(0)
    }

    fn has_failed(&self) -> bool {
        let failing = self.fails_at.is_some_and(|at| at <= Instant::now());
        failing || self.told("failed")
    }

    /// The segment goes on saying that it ran.
    fn triple_fault(&self) -> ! {
        end(&self.dir, "triple-fault", "");
        process::exit(11)
    }

    fn status(&self) -> VmStatus {
        VmStatus {
            name: if self.told("another-name") {
                "innocent".parse().expect("name")
            } else {
                self.name.clone()
            },
            id: if self.told("another-id") {
                VmId([0xee; 16])
            } else {
                self.id
            },
            state: if self.has_failed() {
                VmmState::Paused
            } else {
                self.state
            },
            // One that its own VMM must not be able to have killed.
            pid: if self.told("another-process") {
                std::os::unix::process::parent_id()
            } else {
                process::id()
            },
            version: "fake".into(),
            resumes: u32::from(self.resume.is_some()),
            failed: self.has_failed().then(|| "KVM gave it up".into()),
            guest_panicked: false,
            stopped_devices: Vec::new(),
            ram_meter: RamMeter::default(),
            disk_request_ns: None,
            disk_rings: Vec::new(),
            first_tx: self.resume.as_ref().map(|r| r.running),
            resume: self.resume.clone(),
            cage: None,
            balloon: self.told("gives-back").then(|| {
                let reported = hebe_types::ByteSize::mib(1);
                Box::new(hebe_api::BalloonStatus {
                    reported,
                    ..hebe_api::BalloonStatus::default()
                })
            }),
        }
    }

    fn freeze(&mut self) -> Response {
        if self.told("refuse-freeze") {
            return Response::Failed {
                message: "a disk request hangs".into(),
            };
        }
        if self.told("fail-at-freeze") {
            // Its vCPU is let run once more before that is found out.
            self.fails_at = Some(Instant::now() + Duration::from_millis(20));
            return Response::Failed {
                message: "vCPU 0 cannot be stopped cleanly".into(),
            };
        }
        if self.told("triple-fault") {
            self.triple_fault();
        }
        if self.told("die-before-commit") {
            process::abort();
        }
        let asked = stamp_now();
        let segment = self.segment.as_ref().expect("only VMs in a store freeze");
        let state = self.name.as_str().as_bytes();
        segment.exec().commit_frozen(state).expect("commit");
        self.event("frozen");
        self.state = VmmState::Frozen;
        if self.told("frozen-by-another") {
            return Response::Failed {
                message: "it is frozen already".into(),
            };
        }
        if self.told("die-after-commit") {
            process::abort();
        }
        Response::Frozen(FreezeReport {
            asked,
            vcpus_stopped: asked,
            devices_drained: asked,
            saved: asked,
            committed: stamp_now(),
            state_bytes: state.len() as u64,
            ram_touched: RamMeter::default(),
        })
    }

    fn save(&mut self, mut file: File) -> Response {
        if self.has_failed() {
            return Response::Failed {
                message: "the VM failed and cannot run again (KVM gave it up)".into(),
            };
        }
        if self.told("refuse-save") {
            // Late enough for what befalls other VMs meanwhile.
            std::thread::sleep(std::time::Duration::from_millis(300));
            return Response::Failed {
                message: "the disk is full".into(),
            };
        }
        let len = file.metadata().expect("metadata").len();
        assert_eq!(len, 0, "a saved file is new");
        let asked = stamp_now();
        file.write_all(self.name.as_str().as_bytes())
            .expect("write");
        self.event("saved-to-file");
        self.state = VmmState::Saved;
        if self.told("die-after-save") {
            // The answer still goes out.
            std::thread::spawn(|| {
                std::thread::sleep(std::time::Duration::from_millis(50));
                process::abort();
            });
        }
        Response::Saved(SaveReport {
            asked,
            vcpus_stopped: asked,
            durable: stamp_now(),
            bytes_written: 3,
        })
    }
}

fn hand_out(stream: &mut UnixStream, fake: &Fake) {
    let segment = fake.segment.as_ref().expect("a segment");
    let spec = serde_json::to_string(segment.spec()).expect("spec");
    let fds: Vec<_> = segment.files().iter().map(AsFd::as_fd).collect();
    let count = fds.len();
    write_frame(stream, &Response::SegmentFiles { count, spec }).expect("write");
    hebe_sys::fdpass::send(stream, &fds).expect("send");
}

fn converse(mut stream: UnixStream, fake: &Mutex<Fake>) {
    while let Ok(Some(request)) = read_frame::<Request>(&mut stream) {
        if request == Request::SegmentFiles {
            hand_out(&mut stream, &fake.lock().expect("lock"));
            continue;
        }
        let response = if let Request::Save { .. } = request {
            let mut files = hebe_sys::fdpass::receive(&stream, 1).expect("a file");
            let file = files.pop().expect("one").into();
            fake.lock().expect("lock").save(file)
        } else {
            fake.lock().expect("lock").answer(&request)
        };
        if write_frame(&mut stream, &response).is_err() {
            return;
        }
    }
}
