//! The test machine's end of the agent in a lab host.

use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use lab_guest::proto::{HostStatus, Reply, Request, read_message, write_message};

/// How long the agent may take for anything but running a program.
const REPLY_TIMEOUT: Duration = Duration::from_secs(120);
/// How long QEMU may take to accept a connection: all that it waits for is the
/// computer that it runs on.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(30);

/// How long one answer is waited for where it is asked for again and again, since
/// `begun`: a connection may be lost, and a busy machine may be slow.
pub(crate) fn patience(begun: Instant) -> Duration {
    (Duration::from_secs(2) + begun.elapsed() / 20).min(Duration::from_secs(15))
}

/// How a program in the lab host ended.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ExecOutput {
    /// Exit status, if it exited.
    pub code: Option<i32>,
    /// Signal, if one killed it.
    pub signal: Option<i32>,
    /// It ran out of time and was killed.
    pub timed_out: bool,
    /// Standard output.
    pub stdout: Vec<u8>,
    /// Standard error.
    pub stderr: Vec<u8>,
}

impl ExecOutput {
    /// Exit status 0.
    pub fn ok(&self) -> bool {
        self.code == Some(0)
    }

    /// Standard output as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// Both outputs, for error messages.
    pub fn all_text(&self) -> String {
        format!("{}{}", self.text(), String::from_utf8_lossy(&self.stderr))
    }
}

/// Talks to the agent; every call is a connection of its own, so a new
/// kernel's agent is reached just like the old one's.
#[derive(Clone, Copy, Debug)]
pub struct Agent {
    address: SocketAddr,
}

impl Agent {
    /// The agent behind a forwarded port of this machine.
    pub fn new(port: u16) -> Self {
        Self {
            address: (Ipv4Addr::LOCALHOST, port).into(),
        }
    }

    /// The forwarded port.
    pub fn port(&self) -> u16 {
        self.address.port()
    }

    fn connect(&self, timeout: Duration) -> Result<TcpStream> {
        let stream = TcpStream::connect_timeout(&self.address, CONNECT_TIMEOUT)
            .context("cannot reach the lab host")?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(timeout))?;
        Ok(stream)
    }

    fn call(
        &self,
        request: &Request,
        payload: &[u8],
        timeout: Duration,
    ) -> Result<(Reply, Vec<u8>)> {
        let mut stream = self.connect(timeout)?;
        write_message(&mut stream, request, &[payload]).context("the lab host's agent is gone")?;
        let (reply, payload) =
            read_message(&mut stream).context("the lab host's agent did not answer")?;
        match reply {
            Reply::Failed { message } => bail!("in the lab host: {message}"),
            reply => Ok((reply, payload)),
        }
    }

    fn simple(&self, request: &Request, payload: &[u8]) -> Result<Vec<u8>> {
        self.call(request, payload, REPLY_TIMEOUT)
            .map(|(_, payload)| payload)
    }

    /// The host's state; fails within `timeout` when no agent answers.
    pub fn status(&self, timeout: Duration) -> Result<HostStatus> {
        match self.call(&Request::Status, b"", timeout)? {
            (Reply::Status(status), _) => Ok(status),
            (other, _) => bail!("unexpected reply {other:?}"),
        }
    }

    /// Runs a program to its end.
    pub fn exec(&self, argv: &[&str], stdin: &[u8], timeout: Duration) -> Result<ExecOutput> {
        let request = Request::Exec {
            argv: argv.iter().map(|a| (*a).to_owned()).collect(),
            timeout_ms: timeout.as_millis() as u64,
        };
        match self.call(&request, stdin, timeout + REPLY_TIMEOUT)? {
            (
                Reply::Exited {
                    code,
                    signal,
                    timed_out,
                    stdout_len,
                },
                mut stdout,
            ) => {
                let stderr = stdout.split_off((stdout_len as usize).min(stdout.len()));
                Ok(ExecOutput {
                    code,
                    signal,
                    timed_out,
                    stdout,
                    stderr,
                })
            }
            (other, _) => bail!("unexpected reply {other:?}"),
        }
    }

    /// Starts a program and leaves it running.
    pub fn spawn(&self, argv: &[&str], log: &str) -> Result<u32> {
        let request = Request::Spawn {
            argv: argv.iter().map(|a| (*a).to_owned()).collect(),
            log: log.to_owned(),
        };
        match self.call(&request, b"", REPLY_TIMEOUT)? {
            (Reply::Spawned { pid }, _) => Ok(pid),
            (other, _) => bail!("unexpected reply {other:?}"),
        }
    }

    /// Sends a signal to a process of the host.
    pub fn kill(&self, pid: i32, signal: i32) -> Result<()> {
        self.simple(&Request::Kill { pid, signal }, b"").map(drop)
    }

    /// Whether a process of the host is there.
    pub fn alive(&self, pid: u32) -> Result<bool> {
        let mut stream = self.connect(Duration::from_secs(15))?;
        let request = Request::Kill {
            pid: pid as i32,
            signal: 0,
        };
        write_message(&mut stream, &request, &[]).context("the lab host's agent is gone")?;
        let (reply, _) = read_message::<Reply>(&mut stream).context("the agent did not answer")?;
        Ok(reply == Reply::Done)
    }

    /// Writes a file.
    pub fn put(&self, path: &str, mode: u32, data: &[u8]) -> Result<()> {
        let request = Request::Put {
            path: path.to_owned(),
            mode,
        };
        self.simple(&request, data).map(drop)
    }

    /// Reads a file.
    pub fn get(&self, path: &str) -> Result<Vec<u8>> {
        self.simple(
            &Request::Get {
                path: path.to_owned(),
            },
            b"",
        )
    }

    /// Makes the reserved range a devdax device.
    pub fn make_devdax(&self) -> Result<()> {
        self.simple(&Request::MakeDevdax, b"").map(drop)
    }

    /// Loads another kernel and, when `jump`, goes there at once.
    pub fn kexec(&self, kernel: &str, initrd: &str, cmdline: &str, jump: bool) -> Result<()> {
        let request = Request::Kexec {
            kernel: kernel.to_owned(),
            initrd: initrd.to_owned(),
            cmdline: cmdline.to_owned(),
            jump,
        };
        self.simple(&request, b"").map(drop)
    }

    /// Powers the host off.
    pub fn power_off(&self) -> Result<()> {
        self.simple(&Request::PowerOff, b"").map(drop)
    }

    /// Waits until a kernel other than the one called `before` answers;
    /// `settled` waits for the end of its start-up, too. `check` is asked
    /// between tries and ends the waiting with its error.
    pub fn wait_for_boot(
        &self,
        before: Option<&str>,
        settled: bool,
        limit: Duration,
        mut check: impl FnMut() -> Result<()>,
    ) -> Result<HostStatus> {
        let begun = Instant::now();
        let end = begun + limit;
        loop {
            if let Ok(status) = self.status(patience(begun))
                && before != Some(status.boot_id.as_str())
                && (status.settled || !settled)
            {
                return Ok(status);
            }
            check()?;
            if Instant::now() > end {
                bail!("the lab host did not answer within {} s", limit.as_secs());
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }
}
