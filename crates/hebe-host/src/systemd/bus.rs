//! One call to PID 1: `StartTransientUnit` of a scope around a process that
//! runs already.
//!
//! `systemd-run --scope` does the same for a program that it starts itself.
//! That would put one more program between `hebe` and each VMM, in the pause of
//! every VM that is resumed; a scope around the running VMM costs it nothing.
//! So here is as much of D-Bus as that one call takes: the authentication of
//! root over a unix socket, one message out, one answer in (D-Bus
//! specification, "Message Protocol" and "Authentication Protocol").

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use super::Scope;
use crate::limits::Limits;

/// How long PID 1 may take for each step, on a host that is busy: it is asked as the
/// host comes up, too.
const WAIT: Duration = Duration::from_secs(20);
/// Longest message that is read; PID 1's are far shorter.
const MESSAGE_MAX: u32 = 1 << 20;
/// Messages that may come before the answer: PID 1 tells everybody on its own
/// socket what happens.
const OTHERS_MAX: usize = 10_000;

const METHOD_CALL: u8 = 1;
const METHOD_RETURN: u8 = 2;
const ERROR: u8 = 3;

/// Starts the scope around its process.
pub(super) fn start_scope(socket: &Path, scope: &Scope) -> io::Result<()> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(WAIT))?;
    stream.set_write_timeout(Some(WAIT))?;
    let uid = rustix::process::geteuid().as_raw().to_string();
    authenticate(&mut stream, &uid)?;
    stream.write_all(&call(scope))?;
    answer(&mut stream)
}

fn authenticate(stream: &mut UnixStream, uid: &str) -> io::Result<()> {
    let hex: String = uid.bytes().map(|b| format!("{b:02x}")).collect();
    stream.write_all(format!("\0AUTH EXTERNAL {hex}\r\n").as_bytes())?;
    let mut line = Vec::new();
    while !line.ends_with(b"\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte)?;
        line.push(byte[0]);
        if line.len() > 1024 {
            return Err(io::Error::other("PID 1 does not end its greeting"));
        }
    }
    if !line.starts_with(b"OK ") {
        return Err(io::Error::other("PID 1 does not take this user"));
    }
    stream.write_all(b"BEGIN\r\n")
}

/// Waits for the answer to the one call.
fn answer(stream: &mut UnixStream) -> io::Result<()> {
    for _ in 0..OTHERS_MAX {
        let mut head = [0; 16];
        stream.read_exact(&mut head)?;
        let word = |at: usize| {
            let bytes = [head[at], head[at + 1], head[at + 2], head[at + 3]];
            if head[0] == b'l' {
                u32::from_le_bytes(bytes)
            } else {
                u32::from_be_bytes(bytes)
            }
        };
        let (body, fields) = (word(4), word(12));
        if body > MESSAGE_MAX || fields > MESSAGE_MAX {
            return Err(io::Error::other("PID 1 sends too long a message"));
        }
        let mut rest = vec![0; (fields.next_multiple_of(8) + body) as usize];
        stream.read_exact(&mut rest)?;
        match head[1] {
            METHOD_RETURN => return Ok(()),
            ERROR => {
                let text = rest.get(fields.next_multiple_of(8) as usize + 4..);
                let text = String::from_utf8_lossy(text.unwrap_or_default());
                return Err(io::Error::other(hebe_api::plain(
                    text.trim_end_matches('\0'),
                )));
            }
            _ => {}
        }
    }
    Err(io::Error::other("PID 1 does not answer"))
}

/// The call: `StartTransientUnit(name, mode, properties, auxiliary)`.
fn call(scope: &Scope) -> Vec<u8> {
    let mut body = Wire::default();
    body.string(scope.name);
    body.string("fail");
    body.array(8, |list| {
        list.property("Description", "s", |v| v.string(scope.title));
        list.property("Slice", "s", |v| v.string(super::SLICE));
        // Nothing stops it with the services: that is the whole point.
        list.property("DefaultDependencies", "b", |v| v.word(0));
        list.property("CollectMode", "s", |v| v.string("inactive-or-failed"));
        limit(list, scope.limits);
        list.property("PIDs", "au", |v| v.array(4, |pids| pids.word(scope.pid)));
    });
    // Units to be made along with it: none.
    body.array(8, |_| {});
    message(&body.0)
}

/// Limits by the names that systemd has for them (systemd.resource-control(5));
/// one that is not said is none, also where others have a default.
fn limit(list: &mut Wire, limits: Option<&Limits>) {
    const NONE: u64 = u64::MAX;
    let mut set = |name: &str, value: u64| list.property(name, "t", |v| v.long(value));
    let Some(limits) = limits else {
        return set("TasksMax", NONE);
    };
    set("TasksMax", limits.tasks);
    let memory = limits.memory;
    set("MemoryHigh", memory.map_or(NONE, |m| m.high.0));
    set("MemoryMax", memory.map_or(NONE, |m| m.max.0));
    set("MemorySwapMax", memory.map_or(NONE, |m| m.max.0));
    let weights = [
        ("CPUWeight", limits.cpu_weight),
        ("IOWeight", limits.io_weight),
    ];
    for (name, weight) in weights {
        if let Some(weight) = weight {
            set(name, weight.into());
        }
    }
    if let Some(limit) = limits.cpu_limit {
        // Microseconds of processor time in each second.
        set("CPUQuotaPerSecUSec", u64::from(limit.percent()) * 10_000);
    }
}

fn message(body: &[u8]) -> Vec<u8> {
    let mut wire = Wire::default();
    // Little-endian, a call, no flags, version 1 of the protocol.
    wire.0.extend([b'l', METHOD_CALL, 0, 1]);
    wire.word(body.len() as u32);
    wire.word(1);
    wire.array(8, |list| {
        list.field(1, "o", |v| v.string("/org/freedesktop/systemd1"));
        list.field(2, "s", |v| v.string("org.freedesktop.systemd1.Manager"));
        list.field(3, "s", |v| v.string("StartTransientUnit"));
        list.field(6, "s", |v| v.string("org.freedesktop.systemd1"));
        list.field(8, "g", |v| v.signature("ssa(sv)a(sa(sv))"));
    });
    wire.align(8);
    wire.0.extend(body);
    wire.0
}

/// Values, one behind the other, each at a multiple of its size.
#[derive(Default)]
struct Wire(Vec<u8>);

impl Wire {
    fn align(&mut self, to: usize) {
        self.0.resize(self.0.len().next_multiple_of(to), 0);
    }

    fn word(&mut self, value: u32) {
        self.align(4);
        self.0.extend(value.to_le_bytes());
    }

    fn long(&mut self, value: u64) {
        self.align(8);
        self.0.extend(value.to_le_bytes());
    }

    /// A string or an object's path.
    fn string(&mut self, text: &str) {
        self.word(text.len() as u32);
        self.0.extend(text.bytes());
        self.0.push(0);
    }

    fn signature(&mut self, text: &str) {
        self.0.push(text.len() as u8);
        self.0.extend(text.bytes());
        self.0.push(0);
    }

    /// Its length is that of the elements, without what aligns the first.
    fn array(&mut self, align: usize, fill: impl FnOnce(&mut Self)) {
        self.word(0);
        let length_at = self.0.len() - 4;
        self.align(align);
        let first = self.0.len();
        fill(self);
        let length = (self.0.len() - first) as u32;
        self.0[length_at..length_at + 4].copy_from_slice(&length.to_le_bytes());
    }

    /// One `(sv)`.
    fn property(&mut self, name: &str, kind: &str, value: impl FnOnce(&mut Self)) {
        self.align(8);
        self.string(name);
        self.signature(kind);
        value(self);
    }

    /// One `(yv)` of a message's head.
    fn field(&mut self, number: u8, kind: &str, value: impl FnOnce(&mut Self)) {
        self.align(8);
        self.0.push(number);
        self.signature(kind);
        value(self);
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;
    use std::thread;

    use hebe_types::ByteSize;

    use super::*;
    use crate::limits::MemoryLimits;

    const PLAIN: Scope = Scope {
        name: "hebe-vm-web-1.scope",
        title: "web",
        pid: 1,
        limits: None,
    };

    /// Whether a message sets this property, a number of 64 bits, to that.
    fn sets(message: &[u8], name: &str, value: u64) -> bool {
        let mut wanted = name.as_bytes().to_vec();
        wanted.extend(b"\0\x01t\0");
        let found = message.windows(wanted.len()).position(|w| w == wanted);
        found.is_some_and(|at| {
            let at = (at + wanted.len()).next_multiple_of(8);
            message[at..at + 8] == value.to_le_bytes()
        })
    }

    #[test]
    fn limits_are_told_by_the_names_that_systemd_has() {
        let limits = Limits {
            memory: Some(MemoryLimits {
                high: ByteSize::mib(600),
                max: ByteSize::mib(1100),
            }),
            tasks: 256,
            cpu_weight: Some(50),
            cpu_limit: "150%".parse().ok(),
            io_weight: Some(300),
        };
        let scope = Scope {
            limits: Some(&limits),
            ..PLAIN
        };
        let told = call(&scope);
        for (name, value) in [
            ("TasksMax", 256),
            ("MemoryHigh", 600 << 20),
            ("MemoryMax", 1100 << 20),
            ("MemorySwapMax", 1100 << 20),
            ("CPUWeight", 50),
            ("IOWeight", 300),
            ("CPUQuotaPerSecUSec", 1_500_000),
        ] {
            assert!(sets(&told, name, value), "{name}");
        }
        let open = Limits {
            memory: None,
            cpu_limit: None,
            cpu_weight: None,
            ..limits
        };
        let scope = Scope {
            limits: Some(&open),
            ..PLAIN
        };
        let told = call(&scope);
        assert!(sets(&told, "MemoryMax", u64::MAX) && sets(&told, "TasksMax", 256));
        let says = |word: &[u8]| told.windows(word.len()).any(|w| w == word);
        assert!(!says(b"CPUQuota") && !says(b"CPUWeight"));
        // What all VMs need has no limit.
        assert!(sets(&call(&PLAIN), "TasksMax", u64::MAX));
    }

    #[test]
    fn values_lie_where_the_protocol_wants_them() {
        let mut wire = Wire::default();
        wire.signature("s");
        wire.string("ab");
        assert_eq!(wire.0, b"\x01s\0\0\x02\0\0\0ab\0");
        let mut wire = Wire::default();
        wire.array(8, |list| list.property("a", "t", |v| v.long(7)));
        // Length, padding to 8, string, signature, padding to 8, value.
        let expected = b"\x18\0\0\0\0\0\0\0\x01\0\0\0a\0\x01t\0\0\0\0\0\0\0\0\x07\0\0\0\0\0\0\0";
        assert_eq!(wire.0, expected);
        let mut empty = Wire::default();
        empty.array(8, |_| {});
        assert_eq!(empty.0, [0; 8]);
        let whole = call(&PLAIN);
        let word = |at: usize| {
            u32::from_le_bytes([whole[at], whole[at + 1], whole[at + 2], whole[at + 3]])
        };
        let fields = word(12).next_multiple_of(8);
        assert_eq!(whole.len() as u32, 16 + fields + word(4));
    }

    /// What PID 1 does: greets, tells of other things, answers.
    fn manager(
        dir: &Path,
        answers: Vec<Vec<u8>>,
    ) -> (std::path::PathBuf, thread::JoinHandle<Vec<u8>>) {
        let path = dir.join("private");
        let listener = UnixListener::bind(&path).expect("bind");
        let served = thread::spawn(move || {
            let (mut client, _) = listener.accept().expect("accept");
            let mut got = vec![0; 4096];
            let mut len = client.read(&mut got).expect("auth");
            assert!(got.starts_with(b"\0AUTH EXTERNAL "));
            client.write_all(b"OK 0123\r\n").expect("ok");
            while !got[..len].windows(7).any(|w| w == b".scope\0") {
                len += client.read(&mut got[len..]).expect("call");
            }
            for answer in answers {
                client.write_all(&answer).expect("answer");
            }
            got.truncate(len);
            got
        });
        (path, served)
    }

    fn message_of(kind: u8, body: &[u8]) -> Vec<u8> {
        let mut wire = Wire::default();
        wire.0.extend([b'l', kind, 0, 1]);
        wire.word(body.len() as u32);
        wire.word(9);
        wire.array(8, |list| list.field(5, "u", |v| v.word(1)));
        wire.align(8);
        wire.0.extend(body);
        wire.0
    }

    #[test]
    fn the_answer_is_found_among_other_news() {
        let dir = tempfile::tempdir().expect("dir");
        let news = message_of(4, b"\x01\0\0\0x\0");
        let (path, served) = manager(dir.path(), vec![news.clone(), news, message_of(2, b"")]);
        start_scope(&path, &PLAIN).expect("started");
        let got = served.join().expect("served");
        assert!(got.windows(18).any(|w| w == b"StartTransientUnit"));
    }

    #[test]
    fn a_refusal_is_one_with_its_words() {
        let dir = tempfile::tempdir().expect("dir");
        let mut words = Wire::default();
        words.string("Unit is there already");
        let (path, served) = manager(dir.path(), vec![message_of(3, &words.0)]);
        let error = start_scope(&path, &PLAIN).expect_err("refused");
        assert!(error.to_string().contains("there already"), "{error}");
        drop(served);
        let absent = start_scope(&dir.path().join("none"), &PLAIN);
        assert!(absent.is_err());
    }

    #[test]
    fn a_message_beyond_all_bounds_is_not_read() {
        let dir = tempfile::tempdir().expect("dir");
        let mut huge = message_of(2, b"");
        huge[4..8].copy_from_slice(&u32::MAX.to_le_bytes());
        let (path, served) = manager(dir.path(), vec![huge]);
        assert!(start_scope(&path, &PLAIN).is_err());
        drop(served);
    }
}
