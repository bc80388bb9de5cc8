//! A load balancer before the VMs of several lab hosts: Debian's haproxy, on
//! this computer's loopback, and clients that ask through it without a pause.

use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::Serialize;

use crate::assets::Haproxy;
use crate::probe::http_get;

/// How long a client waits for an answer; the balancer answers before that.
const ANSWER_LIMIT: Duration = Duration::from_secs(60);
/// A client that was refused waits a little, as a person would.
const AFTER_REFUSAL: Duration = Duration::from_millis(200);
/// A run of clients ends by itself after this many answers.
const ANSWERS_MAX: usize = 1_000_000;

/// What stands behind the balancer.
#[derive(Clone, Debug)]
pub struct Server {
    /// Its name.
    pub name: String,
    /// Its HTTP port on the loopback.
    pub port: u16,
    /// How many requests it is given at once: what it can do in a second is
    /// that, divided by how long each takes.
    pub at_once: u32,
}

/// A running balancer. Dropping it ends haproxy.
pub struct Balancer {
    /// Where clients ask.
    pub port: u16,
    child: Child,
}

impl Balancer {
    /// Starts it; files go into `dir`.
    pub fn start(haproxy: &Haproxy, dir: &Path, servers: &[Server]) -> Result<Self> {
        let port = TcpListener::bind("127.0.0.1:0")
            .and_then(|listener| listener.local_addr())
            .context("no free port")?
            .port();
        let file = dir.join("haproxy.cfg");
        fs::write(&file, config(port, servers)).context("no room for haproxy's file")?;
        let log = fs::File::create(dir.join("haproxy.log"))?;
        let mut child = haproxy
            .command()
            .arg("-db")
            .arg("-f")
            .arg(&file)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("cannot start haproxy")?;
        let end = Instant::now() + Duration::from_secs(120);
        while std::net::TcpStream::connect(("127.0.0.1", port)).is_err() {
            let ended = child.try_wait()?.is_some();
            if ended || Instant::now() > end {
                let _ = child.kill();
                let _ = child.wait();
                let said = fs::read_to_string(dir.join("haproxy.log")).unwrap_or_default();
                bail!("haproxy does not listen: {}", said.trim());
            }
            thread::sleep(Duration::from_millis(50));
        }
        Ok(Self { port, child })
    }
}

impl Drop for Balancer {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A host that is away accepts connections all the same, because QEMU's user
/// network does: only an answer shows that it is there.
fn config(port: u16, servers: &[Server]) -> String {
    let mut text = format!(
        "global
  maxconn 500
defaults
  mode http
  timeout connect 2s
  timeout client 60s
  timeout server 8s
  timeout queue 50s
  timeout check 2s
  option http-server-close
  option redispatch 1
  retries 3
  retry-on conn-failure empty-response response-timeout
frontend clients
  bind 127.0.0.1:{port}
  default_backend hosts
backend hosts
  balance leastconn
  option httpchk GET /paced/0
  default-server inter 1s fastinter 500ms downinter 500ms fall 2 rise 1
"
    );
    for server in servers {
        text.push_str(&format!(
            "  server {} 127.0.0.1:{} check maxconn {}\n",
            server.name, server.port, server.at_once
        ));
    }
    text
}

/// One answer, or none.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Answer {
    /// When it came, in seconds since the clients began.
    pub at_s: f64,
    /// How long it took, in seconds.
    pub took_s: f64,
    /// It was a good one.
    pub ok: bool,
}

/// Clients that ask for a page, and as soon as it came, again.
pub struct Clients {
    began: Instant,
    stop: Arc<AtomicBool>,
    answers: Arc<Mutex<Vec<Answer>>>,
    threads: Vec<JoinHandle<()>>,
}

impl Clients {
    /// `count` of them, who ask for `page` at `port`.
    pub fn start(count: u32, port: u16, page: &str) -> Self {
        let (stop, answers) = (
            Arc::<AtomicBool>::default(),
            Arc::<Mutex<Vec<Answer>>>::default(),
        );
        let began = Instant::now();
        let client = |_| {
            let (stop, answers, page) = (stop.clone(), answers.clone(), page.to_owned());
            thread::spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    let asked = Instant::now();
                    let ok = http_get(port, &page, ANSWER_LIMIT).is_ok();
                    let answer = Answer {
                        at_s: began.elapsed().as_secs_f64(),
                        took_s: asked.elapsed().as_secs_f64(),
                        ok,
                    };
                    let mut answers = answers.lock().unwrap_or_else(PoisonError::into_inner);
                    if answers.len() >= ANSWERS_MAX {
                        return;
                    }
                    answers.push(answer);
                    drop(answers);
                    if !ok {
                        thread::sleep(AFTER_REFUSAL);
                    }
                }
            })
        };
        let threads = (0..count).map(client).collect();
        Self {
            began,
            stop,
            answers,
            threads,
        }
    }

    /// Seconds since they began.
    pub fn now_s(&self) -> f64 {
        self.began.elapsed().as_secs_f64()
    }

    /// Good answers between two instants.
    pub fn answered(&self, from_s: f64, to_s: f64) -> usize {
        let answers = self.answers.lock().unwrap_or_else(PoisonError::into_inner);
        let within = |a: &&Answer| a.ok && (from_s..to_s).contains(&a.at_s);
        answers.iter().filter(within).count()
    }

    /// Ends them; every answer, in order.
    pub fn finish(mut self) -> Vec<Answer> {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            // A client that panicked has no more answers.
            let _ = thread.join();
        }
        let mut answers = self.answers.lock().unwrap_or_else(PoisonError::into_inner);
        let mut all = std::mem::take(&mut *answers);
        all.sort_by(|a, b| a.at_s.total_cmp(&b.at_s));
        all
    }
}

impl Drop for Clients {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

impl Haproxy {
    /// Runs it with its libraries.
    pub fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        if let Some(libraries) = &self.libraries {
            command.env("LD_LIBRARY_PATH", libraries);
        }
        command
    }
}

/// Where haproxy lies among unpacked packages.
pub(crate) fn unpacked(dir: &Path) -> Haproxy {
    let folders: [PathBuf; 2] =
        ["usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu"].map(|folder| dir.join(folder));
    Haproxy {
        program: dir.join("usr/sbin/haproxy"),
        libraries: std::env::join_paths(folders).ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_server_is_in_the_file_with_what_it_can_do() {
        let server = |i: u16| Server {
            name: format!("host{i}"),
            port: 8000 + i,
            at_once: 2,
        };
        let text = config(80, &[server(1), server(2)]);
        assert!(text.contains("bind 127.0.0.1:80\n"));
        assert!(text.contains("server host2 127.0.0.1:8002 check maxconn 2\n"));
    }

    #[test]
    fn clients_count_good_answers_and_go_on_after_bad_ones() {
        use std::io::{Read, Write};
        let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
        let port = listener.local_addr().expect("address").port();
        thread::spawn(move || {
            for (i, stream) in listener.incoming().enumerate() {
                let mut stream = stream.expect("accept");
                let _ = stream.read(&mut [0; 512]);
                let code = if i % 3 == 2 { "503 No" } else { "200 OK" };
                let head = format!("HTTP/1.1 {code}\r\nContent-Length: 1\r\n\r\nx");
                let _ = stream.write_all(head.as_bytes());
            }
        });
        let clients = Clients::start(2, port, "/");
        let end = Instant::now() + Duration::from_secs(120);
        while clients.answered(0.0, f64::INFINITY) < 10 && Instant::now() < end {
            thread::sleep(Duration::from_millis(10));
        }
        let all = clients.finish();
        let good = all.iter().filter(|a| a.ok).count();
        assert!(good >= 10 && good < all.len(), "{good} of {}", all.len());
        assert!(all.windows(2).all(|w| w[0].at_s <= w[1].at_s));
    }
}
