//! The agent: runs what the test machine asks for.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use lab_guest::proto::{
    AGENT_PORT, HostStatus, PAYLOAD_LEN_MAX, Reply, Request, read_message, write_message,
};

use crate::{dax, sys};

/// How long the output of a program that ended is waited for, where somebody else
/// holds it open: on a busy machine it takes a moment until all of it is read.
const LEFT_OPEN: Duration = Duration::from_secs(5);

/// The running agent, as the host role sees it.
pub struct Agent {
    /// Set when init has done everything.
    pub settled: AtomicBool,
    userspace_tsc: u64,
}

/// Starts listening.
pub fn start(userspace_tsc: u64) -> Result<Arc<Agent>> {
    let listener = TcpListener::bind(("0.0.0.0", AGENT_PORT)).context("the agent cannot listen")?;
    let agent = Arc::new(Agent {
        settled: AtomicBool::new(false),
        userspace_tsc,
    });
    let shared = agent.clone();
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let agent = shared.clone();
            thread::spawn(move || {
                match serve(&agent, stream) {
                    Ok(()) => {}
                    // A client that gave up waiting is no news.
                    Err(e) if gone(&e) => {}
                    Err(e) => println!("LAB: agent: {e}"),
                }
            });
        }
    });
    Ok(agent)
}

fn gone(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof, WouldBlock};
    matches!(
        error.kind(),
        BrokenPipe | ConnectionReset | UnexpectedEof | WouldBlock
    )
}

fn serve(agent: &Agent, mut stream: TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(Duration::from_secs(30)))?;
    let (request, payload) = read_message::<Request>(&mut stream)?;
    let kexec = matches!(request, Request::Kexec { jump: true, .. });
    let power_off = matches!(request, Request::PowerOff);
    let (reply, payload) = match handle(agent, request, payload) {
        Ok(done) => done,
        Err(e) => (
            Reply::Failed {
                message: format!("{e:#}"),
            },
            Vec::new(),
        ),
    };
    let failed = matches!(reply, Reply::Failed { .. });
    write_message(&mut stream, &reply, &[&payload])?;
    if failed || !(kexec || power_off) {
        return Ok(());
    }
    // The reply must leave before the machine does.
    stream.shutdown(std::net::Shutdown::Write)?;
    let _ = stream.read(&mut [0]);
    rustix::fs::sync();
    let how = if kexec {
        sys::Reboot::Kexec
    } else {
        sys::Reboot::PowerOff
    };
    println!("LAB: jump {}", sys::tsc());
    Err(sys::reboot(how))
}

fn handle(agent: &Agent, request: Request, payload: Vec<u8>) -> Result<(Reply, Vec<u8>)> {
    let plain = |reply| Ok((reply, Vec::new()));
    match request {
        Request::Status => plain(Reply::Status(status(agent))),
        Request::Exec { argv, timeout_ms } => {
            exec(&argv, payload, Duration::from_millis(timeout_ms))
        }
        Request::Spawn { argv, log } => {
            let log = File::options().create(true).append(true).open(&log)?;
            let child = command(&argv)?
                .stdin(Stdio::null())
                .stdout(log.try_clone()?)
                .stderr(log)
                .process_group(0)
                .spawn()
                .with_context(|| format!("cannot run {}", argv[0]))?;
            let pid = child.id();
            thread::spawn(move || wait(child));
            plain(Reply::Spawned { pid })
        }
        Request::Kill { pid, signal } => {
            // SAFETY: kill(2) takes no pointer.
            match unsafe { libc::kill(pid, signal) } {
                0 => plain(Reply::Done),
                _ => Err(io::Error::last_os_error()).context("cannot send the signal"),
            }
        }
        Request::Put { path, mode } => {
            if let Some(parent) = Path::new(&path).parent() {
                fs::create_dir_all(parent)?;
            }
            fs::write(&path, payload).with_context(|| format!("cannot write {path}"))?;
            fs::set_permissions(&path, fs::Permissions::from_mode(mode))?;
            plain(Reply::Done)
        }
        Request::Get { path } => {
            let file = File::open(&path).with_context(|| format!("cannot open {path}"))?;
            let mut data = Vec::new();
            file.take(PAYLOAD_LEN_MAX).read_to_end(&mut data)?;
            Ok((Reply::Done, data))
        }
        Request::MakeDevdax => dax::make_devdax().map(|()| (Reply::Done, Vec::new())),
        Request::Kexec {
            kernel,
            initrd,
            cmdline,
            ..
        } => {
            sys::kexec_load(&kernel, &initrd, &cmdline)?;
            plain(Reply::Done)
        }
        Request::PowerOff => plain(Reply::Done),
    }
}

fn status(agent: &Agent) -> HostStatus {
    let uptime = sys::read_line("/proc/uptime");
    let seconds = uptime
        .split(' ')
        .next()
        .and_then(|s| s.parse::<f64>().ok())
        .unwrap_or(0.0);
    HostStatus {
        boot_id: sys::read_line("/proc/sys/kernel/random/boot_id"),
        kernel: sys::read_line("/proc/sys/kernel/osrelease"),
        uptime_ms: (seconds * 1000.0) as u64,
        realtime_ns: sys::realtime_ns(),
        userspace_tsc: agent.userspace_tsc,
        settled: agent.settled.load(Ordering::Acquire),
    }
}

fn command(argv: &[String]) -> Result<Command> {
    let Some((program, arguments)) = argv.split_first() else {
        bail!("nothing to run");
    };
    let mut command = Command::new(program);
    command.args(arguments).current_dir("/");
    Ok(command)
}

fn wait(mut child: Child) {
    if let Err(e) = child.wait() {
        println!("LAB: agent: {e}");
    }
}

fn exec(argv: &[String], stdin: Vec<u8>, timeout: Duration) -> Result<(Reply, Vec<u8>)> {
    let mut child = command(argv)?
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn()
        .with_context(|| format!("cannot run {}", argv[0]))?;
    let mut input = child.stdin.take().context("no pipe")?;
    thread::spawn(move || {
        // A program that does not read its input is no error.
        let _ = input.write_all(&stdin);
    });
    let stdout = collect(child.stdout.take().context("no pipe")?);
    let stderr = collect(child.stderr.take().context("no pipe")?);
    let end = Instant::now() + timeout;
    let mut timed_out = false;
    let mut pause = Duration::from_millis(1);
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if !timed_out && Instant::now() > end {
            timed_out = true;
            // SAFETY: kill(2) takes no pointer; the child leads its own group.
            unsafe { libc::kill(-(child.id() as i32), libc::SIGKILL) };
        }
        thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(50));
    };
    // A daemon left behind may hold the pipes open: take what came so far.
    let mut payload = finish(&stdout);
    let stdout_len = payload.len() as u64;
    payload.extend(finish(&stderr));
    let reply = Reply::Exited {
        code: status.code(),
        signal: status.signal(),
        timed_out,
        stdout_len,
    };
    Ok((reply, payload))
}

/// Output gathered by a thread of its own.
struct Collected {
    data: std::sync::Mutex<Vec<u8>>,
    closed: AtomicBool,
}

fn collect(mut from: impl Read + Send + 'static) -> Arc<Collected> {
    let collected = Arc::new(Collected {
        data: std::sync::Mutex::default(),
        closed: AtomicBool::new(false),
    });
    let shared = collected.clone();
    thread::spawn(move || {
        let mut buffer = [0; 65536];
        while let Ok(n) = from.read(&mut buffer) {
            let Ok(mut data) = shared.data.lock() else {
                break;
            };
            if n == 0 || data.len() as u64 > PAYLOAD_LEN_MAX / 4 {
                break;
            }
            data.extend_from_slice(&buffer[..n]);
        }
        shared.closed.store(true, Ordering::Release);
    });
    collected
}

fn finish(collected: &Collected) -> Vec<u8> {
    let end = Instant::now() + LEFT_OPEN;
    while !collected.closed.load(Ordering::Acquire) && Instant::now() < end {
        thread::sleep(Duration::from_millis(5));
    }
    collected
        .data
        .lock()
        .map(|mut d| std::mem::take(&mut *d))
        .unwrap_or_default()
}
