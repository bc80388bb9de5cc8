//! Looks at guests from outside, through forwarded ports.
//!
//! Downtime is what a client sees: the longest time without a reply to a UDP
//! probe sent every 10 ms. A TCP session held open all the time shows whether
//! the guest's own TCP state survived. The far end of that session is the
//! guest's kernel; the near end is QEMU's user network, which keeps it open
//! towards this program and retransmits towards the guest.

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use lab_guest::status::GuestStatus;
use serde::Serialize;

use crate::agent::patience;
use crate::machine::GuestPorts;

/// Usual pause between two UDP probes.
pub const UDP_INTERVAL: Duration = Duration::from_millis(10);
/// Pause between two bytes of the TCP session.
pub const TCP_INTERVAL: Duration = Duration::from_secs(1);
/// Pause between two requests to the slow service.
pub const SLOW_INTERVAL: Duration = Duration::from_millis(500);
/// A probe run ends by itself after this many UDP probes (an hour at
/// [`UDP_INTERVAL`]).
const SAMPLES_MAX: usize = 360_000;
/// How long QEMU may take to accept a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(30);
/// How long the last bytes of a session may take: retransmission backs off
/// during an outage.
const LAST_BYTES: Duration = Duration::from_secs(240);

/// One UDP probe.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct UdpSample {
    /// When it was sent, microseconds since the probe began.
    pub sent_us: u64,
    /// When its reply came.
    pub reply_us: Option<u64>,
}

/// What the UDP probe saw.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct UdpRecord {
    /// Every probe, in the order sent.
    pub samples: Vec<UdpSample>,
    /// When the probe was stopped, microseconds since it began.
    pub end_us: u64,
}

/// A time without replies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Gap {
    /// The last reply before it.
    pub from_us: u64,
    /// The first reply after it; the probe's end if none came.
    pub to_us: u64,
    /// A reply came after it.
    pub ended: bool,
}

impl Gap {
    /// Its length in milliseconds.
    pub fn ms(&self) -> f64 {
        (self.to_us - self.from_us) as f64 / 1000.0
    }
}

impl UdpRecord {
    /// The longest time between two replies, or between the last reply and
    /// the end. `None` when no reply ever came.
    pub fn longest_gap(&self) -> Option<Gap> {
        longest_gap(self.samples.iter().filter_map(|s| s.reply_us), self.end_us)
    }

    /// Probes that were answered.
    pub fn answered(&self) -> usize {
        self.samples.iter().filter(|s| s.reply_us.is_some()).count()
    }
}

/// The longest time between two replies, or from the last one to the end.
fn longest_gap(replies: impl Iterator<Item = u64>, end_us: u64) -> Option<Gap> {
    let mut replies: Vec<u64> = replies.collect();
    replies.sort_unstable();
    let last = *replies.last()?;
    let inner = replies.windows(2).map(|w| Gap {
        from_us: w[0],
        to_us: w[1],
        ended: true,
    });
    let open = Gap {
        from_us: last,
        to_us: end_us.max(last),
        ended: false,
    };
    inner
        .chain(std::iter::once(open))
        .max_by_key(|g| g.to_us - g.from_us)
}

/// When the slow-starting service answered.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct SlowRecord {
    /// Each answer, microseconds since the probe began.
    pub replies_us: Vec<u64>,
    /// When the probe was stopped.
    pub end_us: u64,
}

impl SlowRecord {
    /// The longest time without an answer.
    pub fn longest_gap(&self) -> Option<Gap> {
        longest_gap(self.replies_us.iter().copied(), self.end_us)
    }
}

/// What became of the TCP session.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct TcpRecord {
    /// Bytes sent.
    pub sent: u64,
    /// Bytes that came back, each the right one.
    pub echoed: u64,
    /// Why the session ended early, if it did.
    pub broken: Option<String>,
}

impl TcpRecord {
    /// One connection from beginning to end, and every byte came back in order.
    pub fn survived(&self) -> bool {
        self.broken.is_none() && self.sent > 0 && self.echoed == self.sent
    }
}

/// What the probes of one guest saw.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ProbeRecord {
    /// UDP.
    pub udp: UdpRecord,
    /// TCP.
    pub tcp: TcpRecord,
    /// The slow-starting service, where asked for.
    pub slow: Option<SlowRecord>,
}

/// Probes that run until they are stopped.
pub struct Probe {
    stop: Arc<AtomicBool>,
    udp: JoinHandle<UdpRecord>,
    tcp: JoinHandle<TcpRecord>,
    slow: Option<JoinHandle<SlowRecord>>,
    start: Instant,
}

impl Probe {
    /// Starts probing one guest every [`UDP_INTERVAL`], and its slow service
    /// if `slow`.
    pub fn start(ports: &GuestPorts, slow: bool) -> Result<Self> {
        Self::start_every(UDP_INTERVAL, ports, slow)
    }

    /// As [`Probe::start`], with another pause between two UDP probes.
    pub fn start_every(interval: Duration, ports: &GuestPorts, slow: bool) -> Result<Self> {
        let start = Instant::now();
        let stop = Arc::new(AtomicBool::new(false));
        let socket = UdpSocket::bind("127.0.0.1:0").context("no free port")?;
        socket.connect((Ipv4Addr::LOCALHOST, ports.udp_echo))?;
        let udp = {
            let stop = stop.clone();
            thread::spawn(move || udp_run(&socket, interval, start, &stop))
        };
        let address = local(ports.tcp_echo);
        let tcp = {
            let stop = stop.clone();
            thread::spawn(move || tcp_run(address, &stop))
        };
        let slow = slow.then(|| {
            let (port, stop) = (ports.slow, stop.clone());
            thread::spawn(move || slow_run(port, start, &stop))
        });
        Ok(Self {
            stop,
            udp,
            tcp,
            slow,
            start,
        })
    }

    /// The instant that sample times count from.
    pub fn began(&self) -> Instant {
        self.start
    }

    /// Stops and returns what was seen. Waits for the bytes still on the way.
    pub fn finish(self) -> Result<ProbeRecord> {
        self.stop.store(true, Ordering::Release);
        let udp = joined(self.udp)?;
        let tcp = joined(self.tcp)?;
        let slow = self.slow.map(joined).transpose()?;
        Ok(ProbeRecord { udp, tcp, slow })
    }
}

fn joined<T>(thread: JoinHandle<T>) -> Result<T> {
    thread
        .join()
        .map_err(|_| anyhow::anyhow!("a probe panicked"))
}

fn slow_run(port: u16, start: Instant, stop: &AtomicBool) -> SlowRecord {
    let micros = || start.elapsed().as_micros() as u64;
    let mut replies_us = Vec::new();
    while !stop.load(Ordering::Acquire) && replies_us.len() < SAMPLES_MAX {
        if http_get(port, "/", Duration::from_secs(2)).is_ok() {
            replies_us.push(micros());
        }
        thread::sleep(SLOW_INTERVAL);
    }
    SlowRecord {
        replies_us,
        end_us: micros(),
    }
}

fn local(port: u16) -> SocketAddr {
    (Ipv4Addr::LOCALHOST, port).into()
}

fn udp_run(socket: &UdpSocket, interval: Duration, start: Instant, stop: &AtomicBool) -> UdpRecord {
    let micros = |at: Instant| (at - start).as_micros() as u64;
    let mut samples: Vec<UdpSample> = Vec::new();
    let mut next = Instant::now();
    while !stop.load(Ordering::Acquire) && samples.len() < SAMPLES_MAX {
        let now = Instant::now();
        if now >= next {
            let number = samples.len() as u64;
            samples.push(UdpSample {
                sent_us: micros(now),
                reply_us: None,
            });
            // A probe that cannot be sent is a probe without a reply.
            let _ = socket.send(&number.to_le_bytes());
            next += interval;
            // After a stall of this program, do not send a burst.
            next = next.max(now);
        }
        let wait = next
            .saturating_duration_since(Instant::now())
            .max(Duration::from_micros(200));
        take_reply(socket, wait, &mut samples, micros);
    }
    let last_call = Instant::now() + Duration::from_millis(100);
    while Instant::now() < last_call {
        take_reply(socket, Duration::from_millis(10), &mut samples, micros);
    }
    UdpRecord {
        samples,
        end_us: micros(Instant::now()),
    }
}

fn take_reply(
    socket: &UdpSocket,
    wait: Duration,
    samples: &mut [UdpSample],
    micros: impl Fn(Instant) -> u64,
) {
    let _ = socket.set_read_timeout(Some(wait));
    let mut bytes = [0; 64];
    let Ok(8) = socket.recv(&mut bytes) else {
        return;
    };
    let mut number = [0; 8];
    number.copy_from_slice(&bytes[..8]);
    if let Some(sample) = samples.get_mut(u64::from_le_bytes(number) as usize) {
        sample.reply_us.get_or_insert(micros(Instant::now()));
    }
}

fn tcp_run(address: SocketAddr, stop: &AtomicBool) -> TcpRecord {
    let mut record = TcpRecord::default();
    if let Err(e) = tcp_session(address, stop, &mut record) {
        record.broken = Some(format!("{e:#}"));
    }
    record
}

fn tcp_session(address: SocketAddr, stop: &AtomicBool, record: &mut TcpRecord) -> Result<()> {
    let mut stream = TcpStream::connect_timeout(&address, CONNECT_TIMEOUT)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(Duration::from_millis(100)))?;
    let mut next = Instant::now();
    let mut last_call: Option<Instant> = None;
    loop {
        if stop.load(Ordering::Acquire) {
            let end = *last_call.get_or_insert(Instant::now() + LAST_BYTES);
            if record.echoed == record.sent {
                return Ok(());
            }
            if Instant::now() > end {
                bail!("{} bytes did not come back", record.sent - record.echoed);
            }
        } else if Instant::now() >= next {
            stream.write_all(&[byte_at(record.sent)])?;
            record.sent += 1;
            next = Instant::now() + TCP_INTERVAL;
        }
        let mut bytes = [0; 256];
        match stream.read(&mut bytes) {
            Ok(0) => bail!("the connection was closed"),
            Ok(len) => {
                for byte in &bytes[..len] {
                    if *byte != byte_at(record.echoed) || record.echoed >= record.sent {
                        bail!("a wrong byte came back after {}", record.echoed);
                    }
                    record.echoed += 1;
                }
            }
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
            Err(e) => return Err(e.into()),
        }
    }
}

fn byte_at(position: u64) -> u8 {
    (position % 251) as u8
}

/// Fetches a page of a guest by HTTP; only status 200 is a success.
pub fn http_get(port: u16, path: &str, timeout: Duration) -> Result<Vec<u8>> {
    let mut stream = TcpStream::connect_timeout(&local(port), CONNECT_TIMEOUT)?;
    stream.set_read_timeout(Some(timeout))?;
    stream.set_nodelay(true)?;
    write!(
        stream,
        "GET {path} HTTP/1.1\r\nHost: guest\r\nConnection: close\r\n\r\n"
    )?;
    let mut answer = Vec::new();
    stream.take(64 << 20).read_to_end(&mut answer)?;
    let end = answer
        .windows(4)
        .position(|w| w == b"\r\n\r\n")
        .context("the guest's HTTP server did not answer")?;
    let head = String::from_utf8_lossy(&answer[..end]).into_owned();
    if head.split_whitespace().nth(1) != Some("200") {
        bail!("{path}: {}", head.lines().next().unwrap_or(""));
    }
    let length = head.lines().find_map(|l| {
        l.to_ascii_lowercase()
            .strip_prefix("content-length:")?
            .trim()
            .parse()
            .ok()
    });
    let body = answer.split_off(end + 4);
    if length.is_some_and(|l: usize| l != body.len()) {
        bail!("{path}: the answer was cut short");
    }
    Ok(body)
}

/// A guest's status page.
pub fn guest_status(ports: &GuestPorts, timeout: Duration) -> Result<GuestStatus> {
    let body = http_get(ports.http, "/status", timeout)?;
    serde_json::from_slice(&body).context("the guest's status page is no status")
}

/// Waits until a guest's HTTP server answers; `check` may end the waiting.
pub fn wait_for_guest(
    ports: &GuestPorts,
    limit: Duration,
    mut check: impl FnMut() -> Result<()>,
) -> Result<GuestStatus> {
    let begun = Instant::now();
    let end = begun + limit;
    loop {
        match guest_status(ports, patience(begun)) {
            Ok(status) => return Ok(status),
            Err(e) if Instant::now() > end => {
                return Err(e).with_context(|| {
                    format!(
                        "guest 10.0.2.{} did not answer within {} s",
                        ports.host_byte,
                        limit.as_secs()
                    )
                });
            }
            Err(_) => {}
        }
        check()?;
        thread::sleep(Duration::from_millis(200));
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU32;

    use super::*;

    fn record(replies: &[Option<u64>], end_us: u64) -> UdpRecord {
        UdpRecord {
            samples: replies
                .iter()
                .enumerate()
                .map(|(i, r)| UdpSample {
                    sent_us: i as u64 * 10_000,
                    reply_us: *r,
                })
                .collect(),
            end_us,
        }
    }

    #[test]
    fn the_longest_gap_lies_between_two_replies() {
        let record = record(
            &[
                Some(1_000),
                Some(11_000),
                None,
                None,
                Some(41_500),
                Some(51_000),
            ],
            60_000,
        );
        let gap = record.longest_gap().expect("gap");
        assert_eq!((gap.from_us, gap.to_us, gap.ended), (11_000, 41_500, true));
        assert!((gap.ms() - 30.5).abs() < 1e-9);
        assert_eq!(record.answered(), 4);
    }

    #[test]
    fn late_replies_count_when_they_come() {
        // Probes queued during an outage and answered after it do not shorten it.
        let record = record(
            &[Some(1_000), Some(500_000), Some(500_100), Some(500_200)],
            510_000,
        );
        let gap = record.longest_gap().expect("gap");
        assert_eq!((gap.from_us, gap.to_us), (1_000, 500_000));
    }

    #[test]
    fn silence_until_the_end_is_a_gap_without_end() {
        let record = record(&[Some(1_000), Some(2_000), None], 900_000);
        let gap = record.longest_gap().expect("gap");
        assert_eq!((gap.from_us, gap.to_us, gap.ended), (2_000, 900_000, false));
        assert_eq!(self::record(&[None, None], 1).longest_gap(), None);
    }

    #[test]
    fn the_probes_measure_a_server_that_pauses() {
        let echo = UdpSocket::bind("127.0.0.1:0").expect("bind");
        let tcp = std::net::TcpListener::bind("127.0.0.1:0").expect("bind");
        let ports = GuestPorts {
            host_byte: 101,
            udp_echo: echo.local_addr().expect("address").port(),
            tcp_echo: tcp.local_addr().expect("address").port(),
            http: 0,
            slow: 0,
            agent: 0,
        };
        // Answers, is silent for a second, and answers again.
        const BEFORE: u32 = 3;
        let answered = Arc::new(AtomicU32::new(0));
        let count = answered.clone();
        thread::spawn(move || {
            let mut silent_until = Instant::now();
            let mut bytes = [0; 64];
            while let Ok((len, from)) = echo.recv_from(&mut bytes) {
                if Instant::now() < silent_until {
                    continue;
                }
                let _ = echo.send_to(&bytes[..len], from);
                if count.fetch_add(1, Ordering::AcqRel) + 1 == BEFORE {
                    silent_until = Instant::now() + Duration::from_secs(1);
                }
            }
        });
        thread::spawn(move || {
            let (mut stream, _) = tcp.accept().expect("accept");
            let mut bytes = [0; 64];
            while let Ok(len @ 1..) = stream.read(&mut bytes) {
                stream.write_all(&bytes[..len]).expect("echo");
            }
        });
        let probe = Probe::start(&ports, false).expect("start");
        let end = Instant::now() + Duration::from_secs(120);
        while answered.load(Ordering::Acquire) <= 2 * BEFORE && Instant::now() < end {
            thread::sleep(Duration::from_millis(10));
        }
        let record = probe.finish().expect("finish");
        let gap = record.udp.longest_gap().expect("gap");
        assert!(gap.ended && gap.ms() >= 500.0, "{gap:?}");
        assert!(record.tcp.survived(), "{:?}", record.tcp);
    }
}
