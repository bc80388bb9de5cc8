//! Clients that ask for too much.

use std::fs;
use std::io::{Read, Write};
use std::thread;
use std::time::{Duration, Instant};

use hebed::limits::{BODY_MAX, BODY_WAIT};
use hebed::server::BUFFER_MAX;

use crate::client;
use crate::world::World;

pub const CASES: &[crate::Case] = &[
    ("wrong_methods_paths_and_bodies_get_their_status", statuses),
    ("a_slow_client_is_given_up", slow),
    (
        "a_thousand_clients_at_once_are_served_in_bounded_memory",
        thousand,
    ),
];

/// Clients at once.
const CLIENTS: usize = 1000;
/// What they may cost, in KiB.
const COST_KIB_MAX: u64 = 64 << 10;

fn statuses() {
    let world = World::new();
    world.define("web", "");
    let daemon = world.daemon();
    let status = |request: String| {
        let reply = client::raw(&world.socket(), request.as_bytes()).expect("an answer");
        (reply.status, reply.header("allow").map(str::to_owned))
    };
    let plain = |method: &str, path: &str| {
        String::from_utf8(client::request(method, path, None)).expect("text")
    };
    for (method, path, allow) in [
        ("DELETE", "/v1/vms", "GET,HEAD"),
        ("POST", "/v1/vms", "GET,HEAD"),
        ("GET", "/v1/vms/web/start", "POST"),
        ("PUT", "/v1/reboot", "POST"),
    ] {
        let (status, allowed) = status(plain(method, path));
        assert_eq!(
            (status, allowed.as_deref()),
            (405, Some(allow)),
            "{method} {path}"
        );
        let error = daemon.ask(method, path, None).json();
        assert!(error["error"].as_str().is_some_and(|e| e.contains("Allow")));
    }
    assert_eq!(status(plain("GET", "/v2/vms")).0, 404);
    assert_eq!(status(plain("GET", "/../etc/passwd")).0, 404);
    let post = "POST /v1/vms/web/start HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n";
    // Announced, and not even sent.
    let announced = format!("{post}Content-Length: {}\r\n\r\n", BODY_MAX + 1);
    assert_eq!(status(announced).0, 413);
    // Sent without a word about its length.
    let chunk = "x".repeat(BODY_MAX + 1);
    let chunked = format!(
        "{post}Transfer-Encoding: chunked\r\n\r\n{:x}\r\n{chunk}\r\n0\r\n\r\n",
        chunk.len()
    );
    assert_eq!(status(chunked).0, 413);
    let kind = format!("{post}Content-Type: text/plain\r\nContent-Length: 2\r\n\r\n{{}}");
    assert_eq!(status(kind).0, 415);
    let long = format!(
        "GET /v1/vms HTTP/1.1\r\nHost: localhost\r\nX: {}\r\n\r\n",
        "x".repeat(2 * BUFFER_MAX)
    );
    assert_eq!(status(long).0, 431);
    let foreign = "GET /v1/vms HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n";
    assert_eq!(status(foreign.to_owned()).0, 421);
    let page = format!("{post}Origin: http://evil.example\r\n\r\n");
    assert_eq!(status(page).0, 403);
    assert_eq!(status("nonsense\r\n\r\n".to_owned()).0, 400);
    assert_eq!(daemon.get("/v1/jobs").json()["jobs"], serde_json::json!([]));
}

fn slow() {
    let world = World::new();
    let daemon = world.daemon();
    let begin = |text: &str| {
        let mut stream = client::connect(&world.socket()).expect("connect");
        stream.write_all(text.as_bytes()).expect("begin");
        stream
    };
    let began = Instant::now();
    let mut head = begin("GET /v1/host HTTP/1.1\r\nHost: loc");
    let mut body = begin(
        "POST /v1/resume-all HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 10\r\n\r\n{",
    );
    let mut idle = begin("GET /v1/host HTTP/1.1\r\nHost: localhost\r\n\r\n");
    assert_eq!(client::read_reply(&mut idle).expect("served").status, 200);
    assert_eq!(client::read_reply(&mut body).expect("told").status, 408);
    assert!(began.elapsed() >= BODY_WAIT);
    for stream in [&mut head, &mut idle] {
        let mut rest = Vec::new();
        // Closed, with a word or without.
        stream.read_to_end(&mut rest).expect("closed");
    }
    assert_eq!(daemon.get("/v1/host").status, 200);
}

fn resident_kib(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("status");
    let line = status.lines().find(|l| l.starts_with("VmRSS:"));
    let word = line.and_then(|l| l.split_whitespace().nth(1));
    word.and_then(|w| w.parse().ok()).expect("VmRSS")
}

fn thousand() {
    let world = World::new();
    world.define("web", "");
    let daemon = world.daemon();
    assert_eq!(daemon.get("/v1/vms").status, 200);
    let before = resident_kib(daemon.child.id());
    let mut streams: Vec<_> = (0..CLIENTS)
        .map(|_| client::connect(&world.socket()).expect("connect"))
        .collect();
    let request = client::request("GET", "/v1/vms", None);
    for stream in &mut streams {
        stream.write_all(&request).expect("ask");
    }
    let mut most = 0;
    for (index, stream) in streams.iter_mut().enumerate() {
        let reply = client::read_reply(stream).expect("an answer");
        assert_eq!(reply.status, 200, "client {index}");
        most = most.max(resident_kib(daemon.child.id()));
    }
    let cost = most.saturating_sub(before);
    assert!(cost < COST_KIB_MAX, "{CLIENTS} clients cost {cost} KiB");
    // As many that never say anything keep nobody out for longer than it takes
    // to give them up.
    drop(streams);
    let silent: Vec<_> = (0..CLIENTS)
        .map(|_| client::connect(&world.socket()).expect("connect"))
        .collect();
    assert_eq!(daemon.get("/v1/host").status, 200);
    drop(silent);
    thread::sleep(Duration::from_millis(100));
    assert!(resident_kib(daemon.child.id()).saturating_sub(before) < COST_KIB_MAX);
}
