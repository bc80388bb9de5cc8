//! The guest's HTTP server: status page, cached file, web objects.
//!
//! `/status` and `/verify` answer JSON; `/file` reads the file `cache` of the
//! disk (made on demand, `?mib=N`) and tells how long it took; `/web/N` are
//! objects of 512 KiB; `/paced/MS` answers after so many milliseconds, a service
//! whose rate does not depend on how fast its machine is; `/generation` tells
//! what the kernel made of the VM generation ID; `/panic` has the kernel panic.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use lab_guest::status::{FileRead, HTTP_PORT, WEB_OBJECT_LEN};

use super::{DISK, Findings, block_reads, disk, generation, monotonic_ns, status};

/// Longest request head.
const HEAD_LEN_MAX: usize = 4096;
/// Most web objects.
const OBJECTS_MAX: u64 = 2048;
/// Longest time that a paced answer takes, in milliseconds.
const PACED_MS_MAX: u64 = 10_000;
/// Largest cached file, in MiB.
const FILE_MIB_MAX: u64 = 512;

/// Starts the server.
pub fn start(findings: Arc<Findings>) -> Result<()> {
    let listener = TcpListener::bind(("0.0.0.0", HTTP_PORT)).context("HTTP cannot listen")?;
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let findings = findings.clone();
            thread::spawn(move || {
                // A client that goes away is no concern of the server.
                let _ = serve(stream, &findings);
            });
        }
    });
    Ok(())
}

fn serve(mut stream: TcpStream, findings: &Findings) -> io::Result<()> {
    stream.set_read_timeout(Some(Duration::from_secs(30)))?;
    stream.set_nodelay(true)?;
    let mut head = Vec::new();
    let mut buffer = [0; 1024];
    while !head.windows(4).any(|w| w == b"\r\n\r\n") {
        let len = stream.read(&mut buffer)?;
        if len == 0 || head.len() > HEAD_LEN_MAX {
            return Ok(());
        }
        head.extend_from_slice(&buffer[..len]);
    }
    let head = String::from_utf8_lossy(&head);
    let target = head.split_whitespace().nth(1).unwrap_or("/");
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let answer = answer(path, query, findings);
    let (code, body) = match answer {
        Ok(Some(body)) => ("200 OK", body),
        Ok(None) => ("404 Not Found", Vec::new()),
        Err(e) => ("500 Internal Server Error", format!("{e:#}").into_bytes()),
    };
    let head = format!(
        "HTTP/1.1 {code}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes())?;
    stream.write_all(&body)
}

fn answer(path: &str, query: &str, findings: &Findings) -> Result<Option<Vec<u8>>> {
    let parameter = |name: &str| {
        query
            .split('&')
            .find_map(|p| p.strip_prefix(name)?.strip_prefix('=')?.parse::<u64>().ok())
    };
    match path {
        "/status" => Ok(Some(serde_json::to_vec(&status(findings))?)),
        "/verify" => {
            let missing = disk::verify(findings)?;
            Ok(Some(format!("{{\"missing\":{missing}}}").into_bytes()))
        }
        "/generation" => Ok(Some(serde_json::to_vec(&generation::look()?)?)),
        "/panic" => {
            fs::write("/proc/sysrq-trigger", "c")?;
            Ok(None)
        }
        "/file" => {
            let mib = parameter("mib").unwrap_or(64).min(FILE_MIB_MAX);
            Ok(Some(serde_json::to_vec(&read_file(mib)?)?))
        }
        _ => match path.rsplit_once('/') {
            Some(("/web", n)) => match n.parse() {
                Ok(n) if n < OBJECTS_MAX => web_object(n).map(Some),
                _ => Ok(None),
            },
            Some(("/paced", ms)) => match ms.parse() {
                Ok(ms) if ms <= PACED_MS_MAX => {
                    thread::sleep(Duration::from_millis(ms));
                    Ok(Some(b"done\n".to_vec()))
                }
                _ => Ok(None),
            },
            _ => Ok(None),
        },
    }
}

fn content_folder() -> &'static str {
    match Path::new(DISK).exists() {
        true => DISK,
        false => "/run",
    }
}

fn ensure(path: &str, len: u64, seed: u64) -> Result<()> {
    if fs::metadata(path).is_ok_and(|m| m.len() == len) {
        return Ok(());
    }
    let mut file = File::create(path).with_context(|| format!("cannot create {path}"))?;
    let mut block = vec![0u8; 1 << 20];
    let mut state = seed;
    for start in (0..len).step_by(block.len()) {
        for chunk in block.chunks_exact_mut(8) {
            state = state.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29) ^ start;
            chunk.copy_from_slice(&state.to_le_bytes());
        }
        let now = (len - start).min(block.len() as u64) as usize;
        file.write_all(&block[..now])?;
    }
    file.sync_all()?;
    Ok(())
}

fn read_file(mib: u64) -> Result<FileRead> {
    let path = format!("{}/cache-{mib}", content_folder());
    ensure(&path, mib << 20, 5)?;
    let reads = block_reads();
    let start = monotonic_ns();
    let mut file = File::open(&path)?;
    let mut buffer = vec![0; 1 << 17];
    let mut bytes = 0;
    loop {
        match file.read(&mut buffer)? {
            0 => break,
            len => bytes += len as u64,
        }
    }
    Ok(FileRead {
        bytes,
        elapsed_ns: monotonic_ns() - start,
        block_reads: block_reads() - reads,
    })
}

fn web_object(number: u64) -> Result<Vec<u8>> {
    let folder = format!("{}/web", content_folder());
    fs::create_dir_all(&folder)?;
    let path = format!("{folder}/{number}");
    ensure(&path, WEB_OBJECT_LEN as u64, number + 1)?;
    fs::read(&path).with_context(|| format!("cannot read {path}"))
}
