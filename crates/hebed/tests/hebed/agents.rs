//! Agents in guests, behind sockets that lie where a VMM would have them.

use std::io::{self, BufRead, BufReader, Lines, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use hebe_agent::guest::Guest;
use hebe_agent::{Facts, Limits, converse};
use serde_json::{Value, json};

use crate::api::{check, is_valid};
use crate::client;
use crate::world::{World, name};

pub const CASES: &[crate::Case] = &[
    (
        "agents_are_heard_and_their_silence_is_told",
        heard_and_silent,
    ),
    ("agents_do_what_they_are_told_over_http", told),
    ("programs_that_take_long_keep_nobody_up", long_programs),
];

/// Notes what it is told to do.
#[derive(Clone, Default)]
struct Noting(Arc<Mutex<Vec<String>>>);

impl Noting {
    fn note(&self, text: String) {
        self.0.lock().expect("notes").push(text);
    }
}

impl Guest for Noting {
    fn facts(&self) -> Facts {
        Facts {
            phase: "ready".into(),
            boot_id: "b\u{1b}[2J".into(),
            uptime_s: 9,
            ..Facts::default()
        }
    }
    fn set_time(&self, realtime_ns: u64) -> io::Result<i64> {
        self.note(format!("time {}", realtime_ns > 0));
        Ok(-5)
    }
    fn freeze(&self, time: Duration) -> Result<u32, String> {
        self.note(format!("freeze {}", time.as_secs() <= 20));
        Ok(2)
    }
    fn thaw(&self) -> Result<u32, String> {
        Err("no file system is frozen".into())
    }
    fn shut_down(&self, reboot: bool) -> io::Result<()> {
        self.note(format!("shutdown {reboot}"));
        Ok(())
    }
}

/// The agent in a VM.
struct Agent {
    guest: Noting,
    /// It hangs up on whoever comes.
    away: Arc<AtomicBool>,
}

impl Agent {
    /// The VM has to be up: its directory is made by its start.
    fn of(world: &World, vm: &str, exec: bool) -> Self {
        let socket = world.host.layout.vm_dir(&name(vm)).join("vsock.sock");
        let listener = UnixListener::bind(socket).expect("socket");
        let (guest, away) = (Noting::default(), Arc::new(AtomicBool::new(false)));
        let (own, gone) = (guest.clone(), Arc::clone(&away));
        let limits = Limits {
            exec,
            ..Limits::default()
        };
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                if gone.load(Ordering::Relaxed) {
                    continue;
                }
                let guest = own.clone();
                thread::spawn(move || serve(stream, &guest, limits));
            }
        });
        Self { guest, away }
    }

    fn go_away(&self, away: bool) {
        self.away.store(away, Ordering::Relaxed);
    }
}

fn serve(stream: UnixStream, guest: &Noting, limits: Limits) {
    let mut asked = BufReader::new(stream);
    let mut line = String::new();
    let _ = asked.read_line(&mut line);
    assert_eq!(line, "CONNECT 18501\n");
    let mut stream = asked.into_inner();
    if stream.write_all(b"OK 1024\n").is_ok() {
        let _ = converse(stream, guest, limits);
    }
}

/// What the daemon tells.
struct Events(Lines<BufReader<UnixStream>>);

impl Events {
    fn of(world: &World) -> Self {
        let mut stream = client::connect(&world.socket()).expect("connect");
        let request = "GET /v1/events HTTP/1.1\r\nHost: localhost\r\n\r\n";
        stream.write_all(request.as_bytes()).expect("ask");
        let mut events = Self(BufReader::new(stream).lines());
        events.next("hello");
        events
    }

    fn next(&mut self, wanted: &str) -> Value {
        let mut kind = String::new();
        loop {
            let line = self.0.next().expect("more").expect("read");
            if let Some(name) = line.strip_prefix("event: ") {
                kind = name.to_owned();
            }
            if let Some(data) = line.strip_prefix("data: ")
                && kind == wanted
            {
                return serde_json::from_str(data).expect("JSON");
            }
        }
    }
}

fn heard_and_silent() {
    let world = World::new();
    for vm in ["web", "mute", "bare"] {
        world.define(vm, "");
    }
    let daemon = world.daemon_with(&["--agent-every".into(), "1".into()]);
    for vm in ["web", "mute", "bare"] {
        daemon.order(&format!("/v1/vms/{vm}/start"), "");
    }
    let mut events = Events::of(&world);
    // Takes connections, and says nothing.
    let socket = world.host.layout.vm_dir(&name("mute")).join("vsock.sock");
    let _mute = UnixListener::bind(socket).expect("socket");
    let agent = Agent::of(&world, "web", false);
    let is = |vm: &str, state: &str| {
        let state = json!(state);
        daemon.until(&format!("/v1/vms/{vm}"), |vm| vm["agent"]["state"] == state)
    };
    let web = is("web", "answers");
    is("mute", "never");
    check("get", "/v1/vms", &daemon.get("/v1/vms"));
    let facts = &web["agent"]["facts"];
    assert_eq!(
        (&facts["phase"], &facts["boot_id"], &facts["uptime_s"]),
        (&json!("ready"), &json!("b\u{fffd}[2J"), &json!(9))
    );
    assert!(web["agent"]["heard_at"].as_f64() > Some(1e9), "{web}");
    assert_eq!(daemon.get("/v1/vms/bare").json()["agent"], Value::Null);
    let text = daemon.get("/metrics").body;
    for line in [
        "hebe_vm_agent_up{vm=\"web\"} 1.0",
        "hebe_vm_agent_up{vm=\"mute\"} 0.0",
    ] {
        assert!(text.lines().any(|l| l == line), "{line}: {text}");
    }
    let since = "hebe_vm_agent_heard_timestamp_seconds{vm=\"web\"} ";
    assert!(text.contains(since) && !text.contains("agent_up{vm=\"bare\"}"));
    agent.go_away(true);
    for state in ["answers", "silent"] {
        let event = events.next("agent");
        is_valid("AgentEvent", &event);
        assert_eq!(
            (&event["name"], &event["state"]),
            (&json!("web"), &json!(state))
        );
    }
    is("web", "silent");
    agent.go_away(false);
    assert_eq!(events.next("agent")["state"], "answers");
    // Nobody is asked while it stands still.
    assert_eq!(daemon.order("/v1/vms/web/suspend", "")["state"], "done");
    let frozen = daemon.get("/v1/vms/web").json();
    assert_eq!(frozen["agent"]["state"], "unasked", "{frozen}");
    assert!(frozen["agent"]["heard_at"].is_f64());
    assert!(
        agent.guest.0.lock().expect("notes").is_empty(),
        "only heard"
    );
}

/// What the agent in `web` is told, and what comes of it.
fn told() {
    let world = World::new();
    for vm in ["web", "bare", "shy", "mute", "idle"] {
        world.define(vm, "");
    }
    let daemon = world.daemon_with(&["--agent-every".into(), "0".into()]);
    for vm in ["web", "bare", "shy", "mute"] {
        daemon.order(&format!("/v1/vms/{vm}/start"), "");
    }
    let agent = Agent::of(&world, "web", true);
    let _shy = Agent::of(&world, "shy", false);
    let away = Agent::of(&world, "mute", true);
    away.go_away(true);
    let pinged = daemon.get("/v1/vms/web/agent");
    check("get", "/v1/vms/{name}/agent", &pinged);
    assert_eq!(pinged.json()["facts"]["phase"], "ready", "{pinged:?}");
    for (order, body, status, wanted) in [
        ("time", "", 200, json!({"was-ahead": {"ns": -5}})),
        (
            "freeze",
            "{\"for_s\": 20}",
            200,
            json!({"file-systems": {"count": 2}}),
        ),
        ("freeze", "{\"for_s\": 61}", 400, json!("1 to 60")),
        ("thaw", "{}", 409, json!("no file system is frozen")),
        ("shutdown", "{\"reboot\": true}", 200, json!({"ok": null})),
        ("exec", "", 400, json!("1 to 64 words")),
        (
            "exec",
            "{\"words\": [\"true\"], \"for_s\": 301}",
            400,
            json!("1 to 300"),
        ),
        (
            "exec",
            "{\"words\": [\"true\"], \"shell\": 1}",
            422,
            json!("shell"),
        ),
        (
            "exec",
            "{\"words\": [\"sh\", \"-c\", \"printf 'a\\\\033b'; echo e >&2; exit 7\"]}",
            200,
            json!({"ended": {"status": 7, "stdout": "a\u{1b}b", "stderr": "e\n", "cut": false}}),
        ),
    ] {
        let reply = daemon.post(&format!("/v1/vms/web/agent/{order}"), body);
        assert_eq!(reply.status, status, "{order} {body}: {reply:?}");
        check("post", &format!("/v1/vms/{{name}}/agent/{order}"), &reply);
        let mut answer = reply.json();
        match wanted.as_str() {
            Some(word) => {
                let error = answer["error"].as_str().expect("a sentence");
                assert!(error.contains(word), "{order} {body}: {error}");
            }
            None => {
                let name = answer.as_object_mut().and_then(|a| a.remove("name"));
                assert_eq!((name, answer), (Some(json!("web")), wanted));
            }
        }
    }
    let notes = agent.guest.0.lock().expect("notes").clone();
    assert_eq!(notes, ["time true", "freeze true", "shutdown true"]);
    let exec = "{\"words\": [\"true\"]}";
    for (vm, order, body, status, word) in [
        ("shy", "exec", exec, 409, "--allow-exec"),
        ("bare", "thaw", "", 409, "[vsock]"),
        ("mute", "thaw", "", 502, "no agent answers"),
        ("idle", "thaw", "", 409, "stopped"),
        ("nobody", "thaw", "", 404, "nobody"),
    ] {
        let reply = daemon.post(&format!("/v1/vms/{vm}/agent/{order}"), body);
        assert_eq!(reply.status, status, "{vm}: {reply:?}");
        let error = reply.json()["error"].as_str().expect("why").to_owned();
        assert!(error.contains(word), "{vm}: {error}");
        check("post", &format!("/v1/vms/{{name}}/agent/{order}"), &reply);
    }
    // None of that was a job of the daemon's, nor an agent asked by itself.
    let jobs = daemon.get("/v1/jobs").json();
    assert_eq!(jobs["jobs"].as_array().map(Vec::len), Some(4));
    assert_eq!(daemon.get("/v1/vms/web").json()["agent"], Value::Null);
}

/// Programs that take long keep nobody from anything but more of the same.
fn long_programs() {
    let world = World::new();
    world.define("web", "");
    let daemon = world.daemon();
    daemon.order("/v1/vms/web/start", "");
    let _agent = Agent::of(&world, "web", true);
    let gate = world.root.path().join("gate");
    let script = format!("until test -e {}; do sleep 0.1; done", gate.display());
    let body = json!({"words": ["sh", "-c", script], "for_s": 300}).to_string();
    let path = "/v1/vms/web/agent/exec";
    thread::scope(|scope| {
        // The agent serves eight connections at a time, as many as wait here.
        let asked: Vec<_> = (0..12)
            .map(|_| scope.spawn(|| daemon.post(path, &body).status))
            .collect();
        // Some are refused at once, and the others wait for their program.
        let began = std::time::Instant::now();
        while asked.iter().filter(|one| one.is_finished()).count() < 4 {
            assert!(began.elapsed() < crate::world::PATIENCE, "{}", world.log());
            thread::sleep(Duration::from_millis(5));
        }
        assert_eq!(daemon.get("/v1/vms").status, 200);
        assert_eq!(daemon.order("/v1/vms/web/suspend", "")["state"], "done");
        std::fs::write(&gate, "").expect("gate");
        let all: Vec<u16> = asked.into_iter().map(|a| a.join().expect("ends")).collect();
        let refused = all.iter().filter(|status| **status == 429).count();
        assert_eq!(refused, 4, "{all:?}");
        let served = all
            .iter()
            .filter(|status| matches!(**status, 200 | 502))
            .count();
        assert_eq!(served, 8, "{all:?}");
    });
}
