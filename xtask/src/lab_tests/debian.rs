//! What an operator has: Debian with systemd as the host and the package
//! installed, and in a VM a Debian that `hebe image build` makes, with an
//! address that Hebe's network gives it, a web server and a real-time clock; and
//! a second NIC in a network of its own, which passt carries. Then `systemctl
//! kexec` puts another kernel under it.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use hebe_image::build::{FileIn, Order};
use lab::assets::KernelName;
use lab::probe;
use lab::scenario::{Lab, LabOptions, guest_disk_path};
use lab::system;
use serde_json::Value;

use super::{package, systemd};
use crate::test::Scene;

const OLD: KernelName = KernelName::V6_1Cloud;
const NEW: KernelName = KernelName::V7_3Cloud;
const SUITE: &str = "bookworm";
const NAME: &str = "web";

/// How long a whole Debian may take to serve, in a VM of an emulated machine.
const GUEST: Duration = Duration::from_secs(1800);
/// How long it may take to serve again once its host is up.
const AGAIN: Duration = Duration::from_secs(600);
/// How long one answer may take.
const ANSWER: Duration = Duration::from_secs(60);
/// How long passt may outlive its VMM.
const PASST_GONE: Duration = Duration::from_secs(240);
/// The port of the host that passt takes.
const OWN_PORT: u16 = 8090;
/// The guest's NIC in the network of its own, and its address there.
const OWN_MAC: &str = "52:54:00:00:00:77";
const OWN_ADDRESS: &str = "10.0.2.15";
/// Longest answer, in bytes.
const ANSWER_MAX: u64 = 64 << 10;

/// Tells the boot by its id, before nginx serves anything.
const BOOT_ID: &str = "[Unit]\nDescription=Tell which boot this is\nBefore=nginx.service\n\n[Service]\nType=oneshot\nExecStart=/bin/cp /proc/sys/kernel/random/boot_id /var/www/html/boot_id\n\n[Install]\nWantedBy=multi-user.target\n";
/// A connection outlasts whatever is done to the VM meanwhile.
const NGINX: &str = "keepalive_timeout 1d;\nsend_timeout 1d;\n";
/// The lab's own network has the same addresses: what comes from that NIC's goes
/// back there, and nothing else.
fn own_network() -> String {
    format!(
        "[Match]\nMACAddress={OWN_MAC}\n\n[Network]\nDHCP=ipv4\nLinkLocalAddressing=no\nIPv6AcceptRA=no\n\n[DHCPv4]\nRouteTable=77\nUseDNS=no\n\n[RoutingPolicyRule]\nFrom={OWN_ADDRESS}\nTable=77\n"
    )
}
/// Whoever connects is told what the system sees at that moment.
const SIGHT: &str =
    "[Socket]\nListenStream=8080\nAccept=yes\n\n[Install]\nWantedBy=sockets.target\n";
const SIGHT_OF_ONE: &str = "[Service]\nExecStart=/usr/local/sbin/sight\nStandardInput=socket\n";
const SIGHT_SCRIPT: &str = r"#!/bin/sh
while read -r line && [ ${#line} -gt 1 ]; do :; done
printf 'HTTP/1.0 200 OK\r\n\r\n'
test -c /dev/rtc0 && echo rtc_name $(cat /sys/class/rtc/rtc0/name)
echo rtc_s $(cat /sys/class/rtc/rtc0/since_epoch)
ip -4 -oneline address show scope global
";

/// As its owner writes it down. Ports of the host lead to the guest.
fn definition() -> String {
    let disk = guest_disk_path(NAME);
    format!(
        r#"name = "{NAME}"
memory = "384MiB"
rtc = true

[[disk]]
path = "{disk}"

[[net]]
network = "nat"
forward = ["80:80", "8080:8080"]

[[net]]
network = "user"
mac = "{OWN_MAC}"
forward = ["127.0.0.1:{OWN_PORT}:8080"]
"#
    )
}

/// The image, as `hebe image build web.img --include nginx-light …` makes it.
fn image(scene: &Scene) -> Result<Order> {
    let mask = |unit: &str| {
        (
            format!("/etc/systemd/system/{unit}"),
            "/dev/null".to_owned(),
        )
    };
    // What is of no use in a minute's life.
    let timers = [
        "apt-daily.timer",
        "apt-daily-upgrade.timer",
        "dpkg-db-backup.timer",
        "e2scrub_all.timer",
        "e2scrub_reap.service",
        "fstrim.timer",
    ];
    Ok(Order {
        suite: SUITE.to_owned(),
        sources: system::apt_sources(scene.assets, SUITE)?,
        kernel: Some("linux-image-cloud-amd64".to_owned()),
        packages: vec!["nginx-light".to_owned()],
        size: 1 << 30,
        hostname: NAME.to_owned(),
        cmdline: "console=ttyS0 loglevel=4 systemd.show_status=error".to_owned(),
        dhcp: true,
        files: vec![
            FileIn::text("/etc/systemd/system/boot-id.service", BOOT_ID),
            FileIn::text("/etc/nginx/conf.d/lab.conf", NGINX),
            FileIn::text("/etc/systemd/network/20-own.network", &own_network()),
            FileIn::text("/etc/systemd/system/sight.socket", SIGHT),
            FileIn::text("/etc/systemd/system/sight@.service", SIGHT_OF_ONE),
            FileIn {
                mode: 0o755,
                ..FileIn::text("/usr/local/sbin/sight", SIGHT_SCRIPT)
            },
        ],
        links: timers.into_iter().map(mask).collect(),
        units: vec!["boot-id.service".to_owned(), "sight.socket".to_owned()],
        ..Order::default()
    })
}

pub fn run(scene: &Scene) -> Result<()> {
    let image = system::cached_image(scene.assets, "nginx", &image(scene)?, scene.progress)?;
    let options = LabOptions {
        host: OLD,
        system: Some(package::system()),
        others: vec![NEW],
        guest_kernels: Vec::new(),
        guest_images: vec![(NAME.to_owned(), image)],
        guests: 1,
        ports_of_host: true,
        product: package::PROGRAMS.to_vec(),
        store_init: false,
        ..LabOptions::default()
    };
    let mut lab = Lab::boot(scene.assets, options, scene.progress)?;
    scene.progress.step("installing the package");
    package::install(&lab)?;
    package::set_up(&lab)?;
    scene.progress.step("booting Debian in a VM");
    let path = format!("/etc/hebe/vms/{NAME}.toml");
    let text = definition();
    lab.machine.agent.put(&path, 0o644, text.as_bytes())?;
    // The unit ends, and takes neither the VMM nor its passt along.
    let unit = ["systemd-run", "--wait", "--collect", "--quiet"];
    let start = [&unit[..], &["/usr/bin/hebe", "start", NAME]].concat();
    lab.machine.exec_ok(&start)?;
    let ports = *lab.machine.guests.first().context("the lab has no ports")?;
    let port = ports.http;
    let before = boot_id(&mut lab, port, GUEST).with_context(|| last_words(&lab))?;
    let address = in_sight_of_the_host(&lab)?;
    let first = Sight::of(&lab, ports.slow).with_context(|| last_words(&lab))?;
    first.check(&address)?;
    in_its_own_network(&lab).with_context(|| last_words(&lab))?;
    let listed = listed(&lab).context("before the reboot")?;
    let mut session = Session::open(port)?;
    ensure!(session.get()? == before, "two answers of one guest differ");

    by_its_unit(&lab)?;
    kexec(&mut lab, scene)?;
    systemd::tell_start(&lab)?;
    tell_pause(&lab)?;
    let listed_after = self::listed(&lab)
        .context("after the reboot")
        .with_context(|| last_words(&lab))?;
    ensure!(
        listed == listed_after,
        "`hebe list` said {listed}, and then {listed_after}"
    );
    let after = boot_id(&mut lab, port, AGAIN).with_context(|| last_words(&lab))?;
    ensure!(
        before == after,
        "the guest booted again: {before}, then {after}"
    );
    let answer = session
        .get()
        .context("the connection of before the reboot")?;
    ensure!(
        answer == before,
        "another guest answers on the old connection: {answer}"
    );
    ensure!(
        in_sight_of_the_host(&lab)? == address,
        "another address than {address}"
    );
    let second = Sight::of(&lab, ports.slow)?;
    second.check(&address).context("after the reboot")?;
    in_its_own_network(&lab)
        .context("after the reboot")
        .with_context(|| last_words(&lab))?;
    ensure!(
        first.rtc_s < second.rtc_s,
        "its clock shows {}, and showed {}",
        second.rtc_s,
        first.rtc_s
    );
    package::is_not_removed(&lab)?;
    self::listed(&lab).context("after a removal that was refused")?;
    lab.machine.check()?;
    // Last, for its kernel says so in words that a check takes for trouble.
    out_of_memory(&lab)?;
    lab.machine.power_off()
}

/// A VM that its unit resumes does not wait until it is in its scope. What the kernel
/// leaves of it in the unit (a thread of KVM's, as of Linux 6.1) keeps nobody waiting:
/// the unit ends, and the VM runs on in its scope.
fn by_its_unit(lab: &Lab) -> Result<()> {
    let unit = "hebe-resume.service";
    lab.machine.exec_ok(&["hebe", "suspend", NAME])?;
    lab.machine.exec_ok(&["systemctl", "restart", unit])?;
    listed(lab).context("resumed by its unit")?;
    lab.machine
        .exec_ok(&["timeout", "60", "systemctl", "stop", unit])
        .context("the unit does not end")?;
    listed(lab).context("after its unit")?;
    systemd::in_its_scope(lab, NAME)?;
    lab.machine.exec_ok(&["systemctl", "start", unit]).map(drop)
}

fn kexec(lab: &mut Lab, scene: &Scene) -> Result<()> {
    scene.progress.step("systemctl kexec");
    let mut load = vec!["hebe".to_owned(), "reboot".to_owned(), "--load".to_owned()];
    load.extend(lab.reboot_arguments(NEW));
    let words: Vec<&str> = load.iter().map(String::as_str).collect();
    lab.machine.exec_ok(&words)?;
    let old = lab.boot.clone();
    lab.machine
        .agent
        .spawn(&["systemctl", "kexec"], "/data/kexec.log")?;
    let new = lab.wait_for_next_boot()?;
    ensure!(
        old.kernel != new.kernel && new.kernel.starts_with("7."),
        "{} came after {}",
        new.kernel,
        old.kernel
    );
    Ok(())
}

/// What the VM stood still for, by the report of the reboot, for docs/benchmarks.md
/// ("The pause of a host with systemd").
fn tell_pause(lab: &Lab) -> Result<()> {
    let report = super::json(lab, &["hebe", "reboot", "--report", "--json"])?;
    let rows = report["rows"].as_array().map_or(&[][..], Vec::as_slice);
    let at = |kind: &str| {
        let row = rows.iter().find(|row| row["kind"] == kind);
        let ms = row.and_then(|row| row["at_ms"].as_f64());
        ms.with_context(|| format!("no {kind} in {report}"))
    };
    let entry = at("kernel-entry")?;
    let since = |kind: &str| -> Result<f64> { Ok((at(kind)? - entry) / 1e3) };
    println!(
        "    stood still {:.1} s before it; then the store found at {:.1} s, its VMM at {:.1} s, its vCPUs at {:.1} s, the network ready at {:.1} s (emulated)",
        -since("vcpus-stopped")?,
        since("store-found")?,
        since("vmm-started")?,
        since("running")?,
        since("network-ready")?,
    );
    Ok(())
}

/// What the guest's own Linux sees.
struct Sight {
    /// By its real-time clock, in seconds since 1970.
    rtc_s: u64,
    /// Its host's clock just before and just after it looked, in seconds.
    host_s: [u64; 2],
    /// The clock's name, if it has one.
    rtc_name: String,
    /// Its addresses, as `ip` tells them.
    addresses: String,
}

impl Sight {
    fn of(lab: &Lab, port: u16) -> Result<Self> {
        let host = || -> Result<u64> { Ok(lab.machine.exec_ok(&["date", "+%s"])?.trim().parse()?) };
        let from = host()?;
        let body = probe::http_get(port, "/", ANSWER * 3).context("the guest tells nothing")?;
        let to = host()?;
        let text = String::from_utf8_lossy(&body).into_owned();
        let word = |name: &str| text.lines().find_map(|line| line.strip_prefix(name));
        Ok(Self {
            rtc_s: word("rtc_s ")
                .and_then(|s| s.trim().parse().ok())
                .with_context(|| format!("no clock in: {text}"))?,
            host_s: [from, to],
            rtc_name: word("rtc_name ").unwrap_or_default().trim().to_owned(),
            addresses: text.clone(),
        })
    }

    /// The driver is the one for PCs, the time that of the host, and the address
    /// is what the guest was given by DHCP.
    fn check(&self, address: &str) -> Result<()> {
        let name = &self.rtc_name;
        ensure!(name.starts_with("rtc_cmos"), "its clock is '{name}'");
        let [from, to] = self.host_s;
        ensure!(
            (from.saturating_sub(1)..=to + 1).contains(&self.rtc_s),
            "its clock showed {}, its host's {from} to {to}",
            self.rtc_s
        );
        let inet = format!("inet {address}/");
        let line = self.addresses.lines().find(|line| line.contains(&inet));
        let line = line.with_context(|| format!("no {address} in: {}", self.addresses))?;
        ensure!(line.contains(" dynamic "), "not by DHCP: {line}");
        Ok(())
    }
}

/// The guest's boot, by its web server, from outside the machine.
fn boot_id(lab: &mut Lab, port: u16, limit: Duration) -> Result<String> {
    let end = Instant::now() + limit;
    loop {
        match probe::http_get(port, "/boot_id", ANSWER) {
            Ok(body) => return Ok(String::from_utf8_lossy(&body).trim().to_owned()),
            Err(error) if Instant::now() > end => {
                return Err(error).context("the guest's web server does not answer");
            }
            Err(_) => std::thread::sleep(Duration::from_millis(500)),
        }
        lab.machine.check()?;
    }
}

/// The host reaches the server at the address that its network gave the guest,
/// which is that address.
fn in_sight_of_the_host(lab: &Lab) -> Result<String> {
    let shown = super::json(lab, &["hebe", "show", NAME, "--json"])?;
    let address = shown["nics"][0]["address"].as_str();
    let address = address.with_context(|| format!("no address in {shown}"))?;
    let script =
        format!("exec 3<>/dev/tcp/{address}/80; printf 'GET / HTTP/1.0\\r\\n\\r\\n' >&3; cat <&3");
    let page = lab.machine.exec_ok(&["bash", "-c", &script])?;
    ensure!(page.contains("nginx"), "the host got: {page}");
    Ok(address.to_owned())
}

/// A new connection through passt reaches the guest, which has its address there by
/// DHCP; and passt is nobody, and where nothing takes it from its VM.
fn in_its_own_network(lab: &Lab) -> Result<()> {
    let ask = format!(
        "exec 3<>/dev/tcp/127.0.0.1/{OWN_PORT}; printf 'GET / HTTP/1.0\\r\\n\\r\\n' >&3; cat <&3"
    );
    let words = ["timeout", "60", "bash", "-c", ask.as_str()];
    let told = lab.machine.exec_ok(&words);
    let told = told.context("no answer through passt")?;
    let inet = format!("inet {OWN_ADDRESS}/24 ");
    // Nothing but DHCP gives it to that NIC; passt's leases have no end.
    ensure!(told.contains(&inet), "no {OWN_ADDRESS} in: {told}");
    let passts = passts(lab)?;
    let [pid] = passts.as_slice() else {
        bail!("passt runs as {passts:?}");
    };
    let read = |file: &str| {
        lab.machine
            .exec_ok(&["cat", &format!("/proc/{pid}/{file}")])
    };
    let scope = format!("/hebe.slice/hebe-passt-{NAME}-{pid}.scope");
    // Nobody waits until PID 1 has moved it.
    let end = Instant::now() + AGAIN;
    loop {
        let group = read("cgroup")?;
        if group.contains(&scope) {
            break;
        }
        ensure!(Instant::now() < end, "passt is in {group}");
        std::thread::sleep(Duration::from_millis(500));
    }
    let status = read("status")?;
    let uid = status.lines().find(|line| line.starts_with("Uid:"));
    let uid = uid.and_then(|line| line.split_whitespace().nth(1));
    ensure!(uid.is_some_and(|uid| uid != "0"), "passt's user: {uid:?}");
    Ok(())
}

/// The processes of passt, which may run as `passt.avx2`.
fn passts(lab: &Lab) -> Result<Vec<String>> {
    let script = "grep -l '^passt' /proc/[0-9]*/comm 2>/dev/null; true";
    let told = lab.machine.exec_ok(&["sh", "-c", script])?;
    let pid = |line: &str| Some(line.split('/').nth(2)?.to_owned());
    Ok(told.lines().filter_map(pid).collect())
}

/// A VMM that meets its limit of memory is ended by the kernel, its passt ends with
/// it, and the reason is told.
fn out_of_memory(lab: &Lab) -> Result<()> {
    let file = format!("/sys/fs/cgroup/hebe.slice/hebe-vm-{NAME}-*.scope/memory.max");
    let script = format!("for file in {file}; do echo 0 > $file; done");
    lab.machine.exec_ok(&["sh", "-ec", &script])?;
    let end = Instant::now() + PASST_GONE;
    let row = loop {
        let row = only_row(lab)?;
        if row["state"] == "crashed" {
            break row;
        }
        ensure!(Instant::now() < end, "it has no memory, and runs: {row}");
        std::thread::sleep(Duration::from_millis(200));
    };
    let detail = row["detail"].as_str().unwrap_or_default();
    ensure!(
        detail.contains("its control group allows"),
        "no reason: {row}"
    );
    let end = Instant::now() + PASST_GONE;
    while !passts(lab)?.is_empty() {
        ensure!(Instant::now() < end, "passt outlives its VMM");
        std::thread::sleep(Duration::from_millis(200));
    }
    Ok(())
}

fn only_row(lab: &Lab) -> Result<Value> {
    let mut list = super::json(lab, &["hebe", "list", "--json"])?;
    let rows = match list.get_mut("vms") {
        Some(rows) => rows.take(),
        None => list,
    };
    match rows.as_array().map_or(&[][..], Vec::as_slice) {
        [row] => Ok(row.clone()),
        _ => bail!("not one VM is listed: {rows}"),
    }
}

/// The one VM, which runs, as `hebe list` tells it; less what is of one boot.
fn listed(lab: &Lab) -> Result<Value> {
    let row = only_row(lab)?;
    if row["name"] != NAME || row["state"] != "running" {
        return Err(lab.machine.not_running(&row.to_string()));
    }
    let keys = ["name", "id", "state", "detail", "memory", "store"];
    Ok(keys
        .iter()
        .map(|key| ((*key).to_owned(), row[*key].clone()))
        .collect())
}

fn last_words(lab: &Lab) -> String {
    let read = |path: &str| {
        let bytes = lab.machine.agent.get(path).unwrap_or_default();
        let text = String::from_utf8_lossy(&bytes).into_owned();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(40)..].join("\n")
    };
    let journal = lab.machine.exec(&[
        "journalctl",
        "-b",
        "-u",
        "hebe-resume.service",
        "-n",
        "30",
        "--no-pager",
    ]);
    format!(
        "the guest's console:\n{}\nits VMM:\n{}\nits passt:\n{}\nthe host:\n{}{}",
        read(&format!("/run/hebe/vms/{NAME}/console.log")),
        read(&format!("/run/hebe/vms/{NAME}/log")),
        read(&format!("/run/hebe/vms/{NAME}/passt1.log")),
        read("/data/kexec.log"),
        journal.map(|o| o.all_text()).unwrap_or_default()
    )
}

/// One connection with the web server, used again and again.
struct Session(BufReader<TcpStream>);

impl Session {
    fn open(port: u16) -> Result<Self> {
        let stream = TcpStream::connect(("127.0.0.1", port)).context("no connection")?;
        stream.set_read_timeout(Some(ANSWER * 3))?;
        Ok(Self(BufReader::new(stream)))
    }

    fn get(&mut self) -> Result<String> {
        self.0
            .get_mut()
            .write_all(b"GET /boot_id HTTP/1.1\r\nHost: guest\r\n\r\n")?;
        let mut length = 0;
        let mut reader = (&mut self.0).take(ANSWER_MAX);
        loop {
            let mut line = String::new();
            if reader.read_line(&mut line)? == 0 {
                bail!("the server hung up");
            }
            let line = line.trim().to_ascii_lowercase();
            if let Some(text) = line.strip_prefix("content-length:") {
                length = text.trim().parse()?;
            }
            if line.is_empty() {
                break;
            }
        }
        let mut body = vec![0; length];
        reader.read_exact(&mut body)?;
        Ok(String::from_utf8_lossy(&body).trim().to_owned())
    }
}
