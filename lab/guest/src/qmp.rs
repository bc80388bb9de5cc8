//! QEMU's control socket (QMP): only what the lab asks of it.
//!
//! The test machine drives the emulated machine through it, and the init
//! program of a lab host those VMs that are QEMU's there.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

/// Events kept until somebody waits for them; older ones are dropped.
const EVENTS_MAX: usize = 256;
/// How long QEMU may say nothing, on a computer that is busy.
const SILENCE: Duration = Duration::from_secs(120);

/// A connection to one QEMU.
pub struct Qmp {
    stream: UnixStream,
    reader: BufReader<UnixStream>,
    events: VecDeque<Value>,
}

impl Qmp {
    /// Connects; QEMU needs a moment to open its socket.
    pub fn connect(path: &Path, limit: Duration) -> Result<Self> {
        let end = Instant::now() + limit;
        let stream = loop {
            match UnixStream::connect(path) {
                Ok(stream) => break stream,
                Err(e) if Instant::now() > end => {
                    return Err(e).context("QEMU did not open its control socket");
                }
                Err(_) => std::thread::sleep(Duration::from_millis(5)),
            }
        };
        stream.set_read_timeout(Some(SILENCE))?;
        let reader = BufReader::new(stream.try_clone()?);
        let mut qmp = Self {
            stream,
            reader,
            events: VecDeque::new(),
        };
        qmp.read()?;
        qmp.execute("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// Runs one command and returns its result; events in between are kept.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let text = json!({"execute": command, "arguments": arguments}).to_string();
        self.stream
            .write_all(text.as_bytes())
            .context("QEMU is gone")?;
        loop {
            let mut answer = self.read()?;
            if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            }
            if let Some(error) = answer.get("error") {
                bail!("QEMU refuses {command}: {}", error["desc"]);
            }
            self.keep(answer);
        }
    }

    /// Waits for the first event that `wanted` says yes to; those before it
    /// are given to `wanted`, too, and gone then. Fails when QEMU says nothing
    /// at all for two minutes.
    pub fn wait_for(&mut self, mut wanted: impl FnMut(&Value) -> bool) -> Result<Value> {
        loop {
            let event = match self.events.pop_front() {
                Some(event) => event,
                None => self.read()?,
            };
            if wanted(&event) {
                return Ok(event);
            }
        }
    }

    /// Waits until QEMU closes the connection, which its end does.
    pub fn wait_for_end(mut self) -> Result<()> {
        loop {
            let mut line = String::new();
            if self
                .reader
                .read_line(&mut line)
                .context("QEMU does not end")?
                == 0
            {
                return Ok(());
            }
        }
    }

    fn keep(&mut self, answer: Value) {
        if answer.get("event").is_some() {
            if self.events.len() == EVENTS_MAX {
                self.events.pop_front();
            }
            self.events.push_back(answer);
        }
    }

    fn read(&mut self) -> Result<Value> {
        let mut line = String::new();
        if self
            .reader
            .read_line(&mut line)
            .context("QEMU does not answer")?
            == 0
        {
            bail!("QEMU is gone");
        }
        serde_json::from_str(&line).context("QEMU answered nonsense")
    }
}
