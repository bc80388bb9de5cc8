//! `dashboard`, before something that stands in for the daemon.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::Stdio;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::{Host, PATIENCE, Running};

/// The proxy, let in to.
struct Dashboard {
    port: u16,
    place: String,
    token: String,
    _process: Running,
    /// What the daemon was asked.
    asked: Arc<Mutex<Vec<String>>>,
    _host: Host,
}

impl Dashboard {
    fn new() -> Self {
        let host = Host::new();
        let run = host.root.path().join("run");
        std::fs::create_dir_all(&run).expect("mkdir");
        let listener = UnixListener::bind(run.join("hebed.sock")).expect("bind");
        let asked: Arc<Mutex<Vec<String>>> = Arc::default();
        let heard = Arc::clone(&asked);
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let heard = Arc::clone(&heard);
                thread::spawn(move || daemon(stream, &heard));
            }
        });
        let mut command = host.command(&["--json", "dashboard"]);
        let spawned = command.stdout(Stdio::piped()).spawn();
        let mut process = Running(spawned.expect("hebe runs"));
        let mut stdout = BufReader::new(process.0.stdout.take().expect("stdout"));
        let mut text = String::new();
        while serde_json::from_str::<Value>(&text).is_err() {
            assert_ne!(stdout.read_line(&mut text).expect("read"), 0, "{text}");
        }
        let value: Value = serde_json::from_str(&text).expect("JSON");
        let address = value["address"].as_str().expect("address");
        let rest = address.strip_prefix("http://127.0.0.1:").expect("loopback");
        let (port, path) = rest.split_once('/').expect("a path");
        let (place, token) = path.split_once("/?token=").expect("a token");
        Self {
            port: port.parse().expect("port"),
            place: format!("/{place}"),
            token: token.to_owned(),
            _process: process,
            asked,
            _host: host,
        }
    }

    fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(("127.0.0.1", self.port)).expect("connect");
        stream.set_read_timeout(Some(PATIENCE)).expect("timeout");
        stream
    }

    fn send(&self, request: &str) -> TcpStream {
        let mut stream = self.connect();
        // A refusal may come before all of it is sent.
        let _ = stream.write_all(request.as_bytes());
        stream
    }

    fn request(&self, line: &str, fields: &str) -> String {
        let port = self.port;
        format!("{line} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n{fields}\r\n")
    }

    /// Everything that comes back.
    fn ask(&self, line: &str, fields: &str) -> String {
        answer(self.send(&self.request(line, fields)))
    }

    /// The cookie, as a field.
    fn enter(&self) -> String {
        let line = format!("GET {}/?token={}", self.place, self.token);
        let entered = self.ask(&line, "");
        assert!(entered.starts_with("HTTP/1.1 303 "), "{entered}");
        let cookie = entered.split("Set-Cookie: ").nth(1).expect("a cookie");
        assert!(cookie.contains("HttpOnly") && cookie.contains("SameSite=Strict"));
        format!("Cookie: {}\r\n", cookie.split(';').next().expect("a value"))
    }
}

fn answer(mut stream: TcpStream) -> String {
    let mut text = String::new();
    stream.read_to_string(&mut text).expect("an answer");
    text
}

/// Notes a request; to one for events it says one thing and stays.
fn daemon(mut stream: UnixStream, heard: &Mutex<Vec<String>>) {
    let mut bytes = Vec::new();
    let mut chunk = [0; 1024];
    while !bytes.windows(4).any(|w| w == b"\r\n\r\n") {
        match stream.read(&mut chunk) {
            Ok(count @ 1..) => bytes.extend_from_slice(&chunk[..count]),
            _ => return,
        }
    }
    let text = String::from_utf8_lossy(&bytes).into_owned();
    let events = text.starts_with("GET /v1/events ");
    heard.lock().expect("heard").push(text);
    let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\nfirst\n");
    if events {
        // Until the proxy leaves.
        let _ = stream.read(&mut chunk);
        heard.lock().expect("heard").push("left".into());
    }
}

#[test]
fn nothing_reaches_the_daemon_without_the_cookie() {
    let dashboard = Dashboard::new();
    let place = dashboard.place.clone();
    for path in [
        "/",
        "/v1/vms",
        "/favicon.ico",
        &place,
        &format!("{place}/"),
        &format!("{place}/v1/vms"),
    ] {
        let refused = dashboard.ask(&format!("GET {path}"), "");
        assert!(refused.starts_with("HTTP/1.1 403 "), "{path}: {refused}");
    }
    assert!(dashboard.asked.lock().expect("asked").is_empty());
    let cookie = dashboard.enter();
    let again = dashboard.ask(&format!("GET {place}/?token={}", dashboard.token), "");
    assert!(again.starts_with("HTTP/1.1 403 "), "{again}");
    let page = dashboard.ask(&format!("GET {place}/v1/vms"), &cookie);
    assert!(page.ends_with("first\n"), "{page}");
    let foreign = format!("{cookie}Origin: http://evil.example\r\n");
    let refused = dashboard.ask(&format!("POST {place}/v1/reboot"), &foreign);
    assert!(refused.starts_with("HTTP/1.1 403 "), "{refused}");
    let own = format!(
        "{cookie}Origin: http://127.0.0.1:{}\r\nContent-Length: 2\r\n",
        dashboard.port
    );
    let order = dashboard.request(&format!("POST {place}/v1/reboot"), &own) + "{}";
    assert!(answer(dashboard.send(&order)).starts_with("HTTP/1.1 200 "));
    let asked = dashboard.asked.lock().expect("asked");
    assert_eq!(asked.len(), 2, "{asked:?}");
    assert!(asked[0].starts_with("GET /v1/vms HTTP/1.1\r\nhost: localhost\r\n"));
    assert!(
        asked[1].starts_with("POST /v1/reboot HTTP/1.1\r\n"),
        "{asked:?}"
    );
    // The secrets stay here.
    assert!(
        !asked
            .iter()
            .any(|text| text.to_lowercase().contains("cookie"))
    );
}

#[test]
fn events_come_as_they_happen_and_end_with_the_browser() {
    let dashboard = Dashboard::new();
    let cookie = dashboard.enter();
    let line = format!("GET {}/v1/events", dashboard.place);
    let stream = dashboard.send(&dashboard.request(&line, &cookie));
    let mut lines = BufReader::new(stream).lines();
    assert!(lines.any(|line| line.expect("line") == "first"));
    drop(lines);
    crate::until("the daemon is let go", || {
        dashboard
            .asked
            .lock()
            .expect("asked")
            .iter()
            .any(|text| text == "left")
    });
}

#[test]
fn requests_are_bounded() {
    let dashboard = Dashboard::new();
    let cookie = dashboard.enter();
    let place = &dashboard.place;
    let long = format!("{cookie}X: {}\r\n", "x".repeat(20 << 10));
    let refused = dashboard.ask(&format!("GET {place}/"), &long);
    assert!(refused.starts_with("HTTP/1.1 431 "), "{refused}");
    let origin = format!("Origin: http://127.0.0.1:{}\r\n", dashboard.port);
    for fields in [
        "Content-Length: 65537\r\n",
        "Transfer-Encoding: chunked\r\n",
    ] {
        let fields = format!("{cookie}{origin}{fields}");
        let refused = dashboard.ask(&format!("POST {place}/v1/reboot"), &fields);
        assert!(refused.starts_with("HTTP/1.1 400 "), "{refused}");
    }
    // One that never says all is given up, and holds nobody up meanwhile.
    let began = Instant::now();
    let slow = dashboard.send("GET / HTTP/1.1\r\n");
    assert!(
        dashboard
            .ask(&format!("GET {place}/"), &cookie)
            .ends_with("first\n")
    );
    assert!(answer(slow).starts_with("HTTP/1.1 408 "));
    assert!(began.elapsed() >= Duration::from_secs(9));
    // More at once than are served: those who wait are served in the end.
    let crowd: Vec<TcpStream> = (0..100).map(|_| dashboard.connect()).collect();
    drop(crowd);
    crate::until("there is room again", || {
        let mut stream = dashboard.send(&dashboard.request(&format!("GET {place}/"), &cookie));
        let mut text = String::new();
        let _ = stream.read_to_string(&mut text);
        text.ends_with("first\n")
    });
}

#[test]
fn what_is_missing_is_one_sentence() {
    let host = Host::new();
    let (status, _, error) = host.hebe(&["dashboard"]);
    assert_eq!(status, 1);
    assert!(error.contains("no hebed can be reached"), "{error}");
    assert_eq!(error.lines().count(), 1, "{error}");
    let run = host.root.path().join("run");
    std::fs::create_dir_all(&run).expect("mkdir");
    let _daemon = UnixListener::bind(run.join("hebed.sock")).expect("bind");
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("bind");
    let port = taken.local_addr().expect("address").port().to_string();
    let (status, _, error) = host.hebe(&["dashboard", "--port", &port]);
    assert_eq!(status, 1);
    assert!(error.contains("leave --port out"), "{error}");
}
