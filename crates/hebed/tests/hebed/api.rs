//! The API and its description.

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::process::Command;
use std::time::Duration;

use hebe_host::listing::VmState;
use serde_json::{Value, json};

use crate::client::{self, Reply};
use crate::world::World;

pub const CASES: &[crate::Case] = &[
    ("every_route_is_described_and_nothing_else", described),
    ("answers_are_as_they_are_described", answers),
    ("a_vm_is_started_suspended_resumed_and_stopped", life),
    ("what_cannot_be_done_is_said_at_once", refused),
    ("events_tell_what_happens", events),
    ("systemd_hands_a_socket_over_and_hears_how_it_goes", systemd),
    ("one_daemon_at_a_time", alone),
    ("figures_for_prometheus", figures),
    ("the_page_runs_its_own_script_alone", page),
    ("vms_are_left_alone_in_the_midst_of_an_order_for_all", quiet),
];

fn description() -> Value {
    serde_json::from_str(hebed::routes::OPENAPI).expect("JSON")
}

fn described() {
    let described = description();
    let mut written = BTreeSet::new();
    for (path, operations) in described["paths"].as_object().expect("paths") {
        for method in operations.as_object().expect("operations").keys() {
            written.insert((method.clone(), path.clone()));
        }
    }
    let there: BTreeSet<_> = hebed::routes::routes()
        .into_iter()
        .flat_map(|(methods, path, _)| methods.iter().map(|m| ((*m).to_owned(), path.to_owned())))
        .collect();
    assert_eq!(there, written);
    // Every reference leads somewhere, and every schema is one.
    let text = described.to_string();
    for part in text.split("#/components/schemas/").skip(1) {
        let name = part.split('"').next().expect("a name");
        assert!(
            described["components"]["schemas"][name].is_object(),
            "{name}"
        );
    }
    for name in described["components"]["schemas"]
        .as_object()
        .expect("schemas")
        .keys()
    {
        validator(&described, &format!("#/components/schemas/{name}"));
    }
}

fn validator(described: &Value, place: &str) -> jsonschema::Validator {
    let schema = json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$ref": place,
        "components": described["components"],
    });
    jsonschema::validator_for(&schema).unwrap_or_else(|e| panic!("{place}: {e}"))
}

/// Compares what is told with its schema.
pub fn is_valid(schema: &str, value: &Value) {
    let validator = validator(&description(), &format!("#/components/schemas/{schema}"));
    assert!(validator.is_valid(value), "{schema}: {value}");
}

/// Compares an answer with what is said of it.
pub fn check(method: &str, path: &str, reply: &Reply) {
    let described = description();
    let operation = &described["paths"][path][method];
    let status = reply.status.to_string();
    let content = &operation["responses"][&status]["content"];
    let kind = reply.header("content-type").expect("a type");
    assert!(
        content[kind].is_object(),
        "{method} {path}: {status} {kind}"
    );
    if kind != "application/json" {
        return;
    }
    let schema = &content[kind]["schema"];
    let Some(place) = schema["$ref"].as_str() else {
        assert!(reply.json().is_object());
        return;
    };
    let validator = validator(&described, place);
    let wrong: Vec<String> = validator
        .iter_errors(&reply.json())
        .map(|e| format!("{}: {e}", e.instance_path()))
        .collect();
    assert!(
        wrong.is_empty(),
        "{method} {path}: {wrong:?} in {}",
        reply.body
    );
}

fn answers() {
    let world = World::new();
    world.define(
        "web",
        "autostart = true\nrestart = \"always\"\nrestart_limit = 3",
    );
    world.define("db", "after = [\"web\"]");
    world.define("broken", "colour = 1");
    world.define("idle", "");
    let daemon = world.daemon();
    world.until("web", VmState::Running);
    assert_eq!(daemon.order("/v1/vms/db/start", "")["state"], "done");
    assert_eq!(daemon.order("/v1/vms/db/suspend", "{}")["state"], "done");
    for (path, status) in [("/v1/host/age", 404), ("/v1/report", 404)] {
        let reply = daemon.get(path);
        assert_eq!(reply.status, status, "{path}: {reply:?}");
        check("get", path, &reply);
    }
    sample(&world);
    report(&world);
    for (path, concrete, status) in [
        ("/", "/", 200),
        ("/metrics", "/metrics", 200),
        ("/v1/openapi.json", "/v1/openapi.json", 200),
        ("/v1/host", "/v1/host", 200),
        ("/v1/host/check", "/v1/host/check", 200),
        ("/v1/host/age", "/v1/host/age?period=none", 200),
        ("/v1/host/age", "/v1/host/age?period=never", 400),
        ("/v1/vms", "/v1/vms", 200),
        ("/v1/vms/{name}", "/v1/vms/web", 200),
        ("/v1/vms/{name}", "/v1/vms/db", 200),
        ("/v1/vms/{name}", "/v1/vms/broken", 200),
        ("/v1/vms/{name}", "/v1/vms/idle", 200),
        ("/v1/vms/{name}", "/v1/vms/nobody", 404),
        ("/v1/vms/{name}", "/v1/vms/No%20Name", 400),
        ("/v1/vms/{name}/console", "/v1/vms/web/console?lines=5", 200),
        (
            "/v1/vms/{name}/console",
            "/v1/vms/web/console?lines=5000",
            400,
        ),
        ("/v1/vms/{name}/log", "/v1/vms/web/log", 200),
        ("/v1/store", "/v1/store", 200),
        ("/v1/report", "/v1/report", 200),
        ("/v1/report.svg", "/v1/report.svg", 200),
        ("/v1/jobs", "/v1/jobs", 200),
        ("/v1/jobs/{id}", "/v1/jobs/1", 200),
        ("/v1/jobs/{id}", "/v1/jobs/99999", 404),
        ("/v1/jobs/{id}", "/v1/jobs/x", 400),
    ] {
        let reply = daemon.get(concrete);
        assert_eq!(reply.status, status, "{concrete}: {reply:?}");
        assert_eq!(reply.header("x-content-type-options"), Some("nosniff"));
        check("get", path, &reply);
    }
    let preflight = daemon.post("/v1/reboot/preflight", "{\"method\": \"saved\"}");
    assert_eq!(preflight.status, 200, "{preflight:?}");
    check("post", "/v1/reboot/preflight", &preflight);
    let stop = daemon.post("/v1/vms/web/stop", "{\"timeout_s\": 5}");
    assert_eq!(stop.status, 202);
    check("post", "/v1/vms/{name}/stop", &stop);
    let broken = daemon.get("/v1/vms/broken").json();
    let why = broken["definition_error"].as_str().expect("why");
    assert!(why.contains("colour") && why.contains("line 4"), "{why}");
}

/// A sample of the host, for its age.
pub fn sample(world: &World) {
    use hebe_host::ageing::{SLOTS, SampleStore, path_below, sample};
    let path = path_below(&world.host.layout.state);
    let mut store = SampleStore::open(&path, SLOTS).expect("a store of samples");
    store
        .append(&sample(&world.host).expect("a sample"))
        .expect("kept");
}

/// A report of a reboot.
fn report(world: &World) {
    use hebe_host::report::{ReportPlace, keep_report};
    use hebe_host::timeline::{EventKind, KernelInfo, Side, Timeline};
    let kernel = KernelInfo {
        release: "6.1".into(),
        boot_id: "1".into(),
    };
    let mut timeline = Timeline::new(hebe_types::RebootMethod::Warm, kernel);
    let now = hebe_sys::clock::stamp_now();
    timeline.note(now, Side::Before, None, EventKind::Asked);
    keep_report(&world.host, &timeline, ReportPlace::Disk).expect("kept");
}

fn page() {
    let world = World::new();
    let daemon = world.daemon();
    let nonce = || {
        let reply = daemon.get("/");
        let policy = reply.header("content-security-policy").expect("a policy");
        assert!(!policy.contains("unsafe"), "{policy}");
        for part in [
            "default-src 'none'",
            "frame-ancestors 'none'",
            "connect-src 'self'",
        ] {
            assert!(policy.contains(part), "{policy}");
        }
        let rest = policy.split("script-src 'nonce-").nth(1).expect("a nonce");
        let nonce = rest.split('\'').next().expect("its end").to_owned();
        let marked = format!("<script nonce=\"{nonce}\">");
        assert_eq!(reply.body.matches("<script").count(), 1);
        assert!(reply.body.contains(&marked) && !reply.body.contains("NONCE"));
        // Nothing from elsewhere.
        assert!(!reply.body.contains("://") && !reply.body.contains("src=\"/"));
        nonce
    };
    let first = nonce();
    assert_eq!(first.len(), 32);
    assert_ne!(first, nonce());
    let other = daemon.get("/v1/vms");
    let policy = other.header("content-security-policy").expect("a policy");
    assert!(policy.starts_with("default-src 'none'"), "{policy}");
}

fn life() {
    let world = World::new();
    world.define("web", "");
    let daemon = world.daemon();
    let started = daemon.order("/v1/vms/web/start", "");
    assert_eq!(started["state"], "done", "{started}");
    let vm = daemon.get("/v1/vms/web").json();
    assert_eq!(
        (&vm["state"], &vm["store"]),
        (&json!("running"), &json!("devdax"))
    );
    // As a VM's identity is written everywhere.
    assert_eq!(vm["status"]["id"], vm["id"], "{vm}");
    assert_eq!(daemon.order("/v1/vms/web/suspend", "")["state"], "done");
    assert_eq!(daemon.get("/v1/vms/web").json()["state"], "frozen");
    let resume = "{\"from\": \"memory\"}";
    assert_eq!(daemon.order("/v1/vms/web/resume", resume)["state"], "done");
    assert_eq!(world.state("web"), Some(VmState::Running));
    assert_eq!(daemon.order("/v1/vms/web/stop", "")["state"], "done");
    assert_eq!(daemon.get("/v1/vms/web").json()["state"], "stopped");
    // Its VMMs are gone for good: nothing is left of them but the daemon's word.
    let zombies = || {
        let children = format!("/proc/{0}/task/{0}/children", daemon.child.id());
        fs::read_to_string(children).unwrap_or_default()
    };
    let began = std::time::Instant::now();
    while !zombies().trim().is_empty() {
        assert!(began.elapsed() < crate::world::PATIENCE, "{}", zombies());
        std::thread::sleep(Duration::from_millis(20));
    }
    let all = daemon.order("/v1/resume-all", "{}");
    assert_eq!(all["state"], "done", "{all}");
    assert_eq!(
        daemon.get("/v1/jobs").json()["jobs"]
            .as_array()
            .map(Vec::len),
        Some(5)
    );
}

fn refused() {
    let world = World::new();
    world.define("web", "");
    let daemon = world.daemon();
    for (path, body, status, word) in [
        ("/v1/vms/web/stop", "", 409, "not up"),
        ("/v1/vms/web/suspend", "", 409, "not up"),
        ("/v1/vms/nobody/start", "", 404, "nobody"),
        ("/v1/vms/web/stop", "{\"timeout_s\": 0}", 400, "force"),
        ("/v1/vms/web/stop", "{\"timeout_s\": 4000}", 400, "3600"),
        ("/v1/vms/web/start", "{\"colour\": 1}", 422, "colour"),
        ("/v1/vms/web/start", "{", 400, ""),
        (
            "/v1/vms/web/resume",
            "{\"from\": \"memory\", \"again\": true}",
            400,
            "leave one out",
        ),
        (
            "/v1/reboot",
            "{\"method\": \"warm\", \"hard\": true}",
            400,
            "hard",
        ),
        ("/v1/reboot", "{\"timeout_s\": 5}", 400, "cold"),
    ] {
        let reply = daemon.post(path, body);
        assert_eq!(reply.status, status, "{path} {body}: {reply:?}");
        let error = reply.json()["error"]
            .as_str()
            .expect("a sentence")
            .to_owned();
        assert!(error.contains(word), "{path} {body}: {error}");
    }
    assert_eq!(daemon.get("/v1/jobs").json()["jobs"], json!([]));
    // A reboot that its checks refuse is a job that failed, and touched nothing.
    let text = "{\"method\": \"warm\", \"kernel\": \"/no/such/kernel\"}";
    let job = daemon.order("/v1/reboot", text);
    assert_eq!(job["state"], "failed", "{job}");
    let error = job["error"].as_str().expect("why");
    assert!(error.contains("refused"), "{error}");
    assert!(
        !daemon.get("/v1/host").json()["quiet"]
            .as_bool()
            .expect("quiet")
    );
}

fn events() {
    let world = World::new();
    world.define("web", "");
    let daemon = world.daemon();
    let mut stream = client::connect(&world.socket()).expect("connect");
    let request = "GET /v1/events HTTP/1.1\r\nHost: localhost\r\n\r\n";
    stream.write_all(request.as_bytes()).expect("ask");
    let mut lines = BufReader::new(stream).lines();
    let began = std::time::Instant::now();
    let mut next = || -> (String, Value) {
        let mut kind = String::new();
        loop {
            // A stream that says that it is alive keeps a reader for ever.
            assert!(began.elapsed() < crate::world::PATIENCE, "no more news");
            let line = lines.next().expect("more").expect("read");
            if let Some(name) = line.strip_prefix("event: ") {
                kind = name.to_owned();
            }
            if let Some(data) = line.strip_prefix("data: ") {
                return (kind, serde_json::from_str(data).expect("JSON"));
            }
        }
    };
    let (kind, hello) = next();
    assert_eq!(kind, "hello");
    is_valid("HelloEvent", &hello);
    assert_eq!(hello["daemon"], daemon.get("/v1/host").json()["daemon"]);
    assert_eq!(daemon.post("/v1/vms/web/start", "").status, 202);
    let (mut jobs, mut runs) = (Vec::new(), false);
    // The VM may be seen to run before its job is.
    while !runs || jobs.len() < 2 {
        match next() {
            (kind, job) if kind == "job" => {
                is_valid("Job", &job);
                assert_eq!((&job["kind"], &job["vm"]), (&json!("start"), &json!("web")));
                jobs.push(job["state"].clone());
            }
            (kind, vm) if kind == "vm" => {
                is_valid("VmEvent", &vm);
                runs |= vm["state"] == "running";
            }
            _ => {}
        }
    }
    assert_eq!(jobs[1], "done");
    // So many listen, and no more.
    let listeners: Vec<_> = (0..100)
        .map(|_| {
            let mut stream = client::connect(&world.socket()).expect("connect");
            stream.write_all(request.as_bytes()).expect("ask");
            let mut head = String::new();
            BufReader::new(stream.try_clone().expect("clone"))
                .read_line(&mut head)
                .expect("head");
            (stream, head)
        })
        .collect();
    let taken = listeners
        .iter()
        .filter(|(_, head)| head.contains("200"))
        .count();
    assert_eq!(taken, hebed::app::LISTENERS_MAX - 1);
    drop(listeners);
}

fn systemd() {
    let world = World::new();
    let notify = world.root.path().join("notify");
    let heard = UnixDatagram::bind(&notify).expect("bind");
    heard
        .set_read_timeout(Some(Duration::from_secs(60)))
        .expect("timeout");
    let socket = world.root.path().join("handed.sock");
    let listener = UnixListener::bind(&socket).expect("bind");
    let hebed = world.command();
    // A shell puts the socket where systemd does, and knows the process's number.
    let script = format!(
        "exec 3<&{}; LISTEN_PID=$$ LISTEN_FDS=1 exec \"$@\"",
        listener.as_raw_fd()
    );
    rustix::io::fcntl_setfd(&listener, rustix::io::FdFlags::empty()).expect("inherited");
    let mut command = Command::new("/bin/sh");
    command.args(["-c", &script, "sh"]).arg(hebed.get_program());
    command.args(hebed.get_args());
    command.envs(hebed.get_envs().filter_map(|(k, v)| Some((k, v?))));
    command.env("NOTIFY_SOCKET", &notify);
    command.env("WATCHDOG_USEC", "400000");
    let mut child = command.spawn().expect("starts");
    let words: Vec<String> = (0..4)
        .map(|_| {
            let mut words = [0; 64];
            let length = heard.recv(&mut words).expect("said");
            String::from_utf8_lossy(&words[..length]).into_owned()
        })
        .collect();
    assert_eq!(words, ["READY=1", "WATCHDOG=1", "WATCHDOG=1", "WATCHDOG=1"]);
    let reply = client::raw(&socket, &client::request("GET", "/v1/host", None));
    assert_eq!(reply.expect("answers").status, 200);
    assert!(
        !world.socket().exists(),
        "the one that was handed over is enough"
    );
    // Asked to end, it says so and ends well.
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).expect("ask");
    assert!(child.wait().expect("ends").success());
}

fn alone() {
    let world = World::new();
    let first = world.daemon();
    let second = world.command().output().expect("runs");
    assert_eq!(second.status.code(), Some(1));
    let said = String::from_utf8_lossy(&second.stderr).into_owned();
    assert!(said.starts_with("<3>another hebed"), "{said}");
    assert_eq!(first.get("/v1/host").status, 200);
}

fn figures() {
    let world = World::new();
    world.define("web", "");
    world.define("db", "");
    let daemon = world.daemon();
    daemon.order("/v1/vms/web/start", "");
    let text = daemon.get("/metrics").body;
    for line in [
        "hebe_vms{state=\"running\"} 1.0",
        "hebe_vms{state=\"stopped\"} 1.0",
        "hebe_vms{state=\"frozen\"} 0.0",
        "hebe_vm_up{vm=\"web\"} 1.0",
        "hebe_vm_up{vm=\"db\"} 0.0",
        "hebe_vm_memory_bytes{vm=\"web\"} 4194304.0",
    ] {
        assert!(text.lines().any(|l| l == line), "{line}: {text}");
    }
    for start in [
        "hebe_store_bytes{part=\"free\"} ",
        "hebe_host_indicator{indicator=\"open files\"} ",
        "hebe_host_indicator_limit{indicator=\"kernel memory\"} ",
    ] {
        assert!(
            text.lines().any(|l| l.starts_with(start)),
            "{start}: {text}"
        );
    }
    assert!(text.ends_with("# EOF\n"), "{text}");
}

/// Somebody else is in the midst of an order for all VMs.
fn quiet() {
    let world = World::new();
    world.define("web", "autostart = true");
    let all = world.host.lock_all().expect("nobody has it");
    let daemon = world.daemon();
    for (path, status) in [
        ("/v1/vms", 503),
        ("/v1/vms/web", 503),
        ("/v1/store", 503),
        ("/v1/report", 503),
        ("/v1/host/check", 503),
        ("/v1/host", 200),
        ("/v1/jobs", 200),
        ("/metrics", 200),
    ] {
        let reply = daemon.get(path);
        assert_eq!(reply.status, status, "{path}: {reply:?}");
        assert_eq!(reply.header("retry-after").is_some(), status == 503);
        check("get", &path.replace("web", "{name}"), &reply);
    }
    assert_eq!(daemon.get("/v1/host").json()["quiet"], json!(true));
    assert_eq!(world.state("web"), Some(VmState::Stopped));
    drop(all);
    world.until("web", VmState::Running);
}
