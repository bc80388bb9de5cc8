//! A browser, driven through its debugging pipe: JSON texts with a NUL behind
//! each, in at descriptor 3 and out at 4.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{CWD, FileType, Mode, mknodat};
use serde_json::{Value, json};

/// How long anything may take: a browser on a busy machine is slow.
const PATIENCE: Duration = Duration::from_secs(300);

/// A browser; killed when dropped.
pub struct Browser {
    child: Child,
    to: File,
    from: Receiver<Value>,
    next: u64,
    /// Events that came meanwhile.
    events: VecDeque<Value>,
    dir: tempfile::TempDir,
}

/// A tab, by the session in which it is spoken to.
#[derive(Clone)]
pub struct Tab(String);

impl Browser {
    pub fn start(program: &Path) -> Self {
        let dir = tempfile::tempdir().expect("dir");
        let fifo = |name: &str| {
            let path = dir.path().join(name);
            let mode = Mode::RUSR | Mode::WUSR;
            mknodat(CWD, &path, FileType::Fifo, mode, 0).expect("fifo");
            path
        };
        let (inward, outward) = (fifo("in"), fifo("out"));
        let log = File::create(dir.path().join("log")).expect("log");
        let child = Command::new("/bin/sh")
            .args([
                "-c",
                "in=$1 out=$2; shift 2; exec \"$@\" 3<\"$in\" 4>\"$out\"",
                "sh",
            ])
            .args([&inward, &outward])
            .arg(program)
            .args([
                "--remote-debugging-pipe",
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-dev-shm-usage",
                "--no-first-run",
                "--disable-background-networking",
                "--disable-component-update",
                "--disable-sync",
            ])
            .arg(format!(
                "--user-data-dir={}",
                dir.path().join("profile").display()
            ))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .expect("the browser starts");
        // In the order in which the shell opens them: each waits for the other end.
        let to = File::options().write(true).open(&inward).expect("in");
        let from = File::open(&outward).expect("out");
        let (tell, texts) = mpsc::channel();
        thread::spawn(move || {
            for text in BufReader::new(from).split(0).map_while(Result::ok) {
                let Ok(value) = serde_json::from_slice(&text) else {
                    continue;
                };
                if tell.send(value).is_err() {
                    return;
                }
            }
        });
        Self {
            child,
            to,
            from: texts,
            next: 1,
            events: VecDeque::new(),
            dir,
        }
    }

    fn next_text(&mut self) -> Value {
        self.from.recv_timeout(PATIENCE).unwrap_or_else(|e| {
            let log = std::fs::read_to_string(self.dir.path().join("log"));
            panic!(
                "the browser says nothing more ({e}): {}",
                log.unwrap_or_default()
            )
        })
    }

    fn call(&mut self, tab: Option<&Tab>, method: &str, params: Value) -> Value {
        let id = self.next;
        self.next += 1;
        let mut order = json!({ "id": id, "method": method, "params": params });
        if let Some(Tab(session)) = tab {
            order["sessionId"] = json!(session);
        }
        self.to
            .write_all(format!("{order}\0").as_bytes())
            .expect("ask the browser");
        loop {
            let mut text = self.next_text();
            if text["id"] == id {
                assert!(text["error"].is_null(), "{method}: {text}");
                return text["result"].take();
            }
            self.events.push_back(text);
        }
    }

    /// A tab of a profile of its own, which shares no cookie with another.
    pub fn profile(&mut self) -> Tab {
        let context = self.call(None, "Target.createBrowserContext", json!({}));
        let of = &context["browserContextId"];
        let page = json!({ "url": "about:blank", "browserContextId": of });
        let target = self.call(None, "Target.createTarget", page);
        let attach = json!({ "targetId": target["targetId"], "flatten": true });
        let session = self.call(None, "Target.attachToTarget", attach);
        let tab = Tab(session["sessionId"].as_str().expect("a session").to_owned());
        for domain in ["Page.enable", "Runtime.enable", "Log.enable"] {
            self.call(Some(&tab), domain, json!({}));
        }
        let size =
            json!({ "width": 1100, "height": 1000, "deviceScaleFactor": 1, "mobile": false });
        self.call(Some(&tab), "Emulation.setDeviceMetricsOverride", size);
        tab
    }

    pub fn open(&mut self, tab: &Tab, address: &str) {
        self.call(Some(tab), "Page.navigate", json!({ "url": address }));
    }

    /// What an expression comes to in a page.
    pub fn evaluate(&mut self, tab: &Tab, expression: &str) -> Value {
        let params =
            json!({ "expression": expression, "returnByValue": true, "awaitPromise": true });
        let mut answer = self.call(Some(tab), "Runtime.evaluate", params);
        assert!(
            answer["exceptionDetails"].is_null(),
            "{expression}: {answer}"
        );
        answer["result"]["value"].take()
    }

    /// Waits until an expression is true; a page that is being loaded has
    /// nothing that could be looked at.
    pub fn until(&mut self, tab: &Tab, expression: &str) {
        let began = Instant::now();
        let safe = format!(
            "(() => {{ try {{ return Boolean({expression}) }} catch {{ return false }} }})()"
        );
        while self.evaluate(tab, &safe) != true {
            if began.elapsed() > PATIENCE {
                let page = self.evaluate(tab, "location.href + document.body.innerText");
                panic!("{expression} does not come true: {page}");
            }
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// What a tab complained of so far: exceptions, errors on its console, and
    /// what it was kept from loading.
    pub fn complaints(&mut self, Tab(session): &Tab) -> Vec<Value> {
        let complaint = |event: &&Value| {
            let params = &event["params"];
            event["sessionId"] == session.as_str()
                && match event["method"].as_str() {
                    Some("Runtime.exceptionThrown") => true,
                    Some("Runtime.consoleAPICalled") => params["type"] == "error",
                    Some("Log.entryAdded") => params["entry"]["level"] == "error",
                    _ => false,
                }
        };
        self.events.iter().filter(complaint).cloned().collect()
    }

    /// A picture, as PNG.
    pub fn picture(&mut self, tab: &Tab) -> Vec<u8> {
        use base64::Engine;
        let whole = json!({ "format": "png", "captureBeyondViewport": true });
        let answer = self.call(Some(tab), "Page.captureScreenshot", whole);
        let text = answer["data"].as_str().expect("a picture");
        let engine = base64::engine::general_purpose::STANDARD;
        engine.decode(text).expect("base64")
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
