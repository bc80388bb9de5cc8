//! What an operator has: Debian with systemd as the host, and in a VM a Debian
//! that `hebe image build` makes, with an address by DHCP and a web server.
//! Then `systemctl kexec` puts another kernel under it.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use hebe_image::build::{FileIn, Order};
use lab::assets::KernelName;
use lab::probe;
use lab::scenario::{Lab, LabOptions, guest_disk_path};
use lab::system::{self, System};

use crate::test::Scene;

const OLD: KernelName = KernelName::V6_1Cloud;
const NEW: KernelName = KernelName::V7_3Cloud;
const SUITE: &str = "bookworm";
const NAME: &str = "web";

/// How long a whole Debian may take to serve, in a VM of an emulated machine.
const GUEST: Duration = Duration::from_secs(600);
/// How long it may take to serve again once its host is up.
const AGAIN: Duration = Duration::from_secs(120);
/// How long one answer may take.
const ANSWER: Duration = Duration::from_secs(20);
/// Longest answer, in bytes.
const ANSWER_MAX: u64 = 64 << 10;

/// Tells the boot by its id, before nginx serves anything.
const BOOT_ID: &str = "[Unit]\nDescription=Tell which boot this is\nBefore=nginx.service\n\n[Service]\nType=oneshot\nExecStart=/bin/cp /proc/sys/kernel/random/boot_id /var/www/html/boot_id\n\n[Install]\nWantedBy=multi-user.target\n";
/// A connection outlasts whatever is done to the VM meanwhile.
const NGINX: &str = "keepalive_timeout 1d;\nsend_timeout 1d;\n";

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
        ],
        links: timers.into_iter().map(mask).collect(),
        units: vec!["boot-id.service".to_owned()],
        ..Order::default()
    })
}

pub fn run(scene: &Scene) -> Result<()> {
    let image = system::cached_image(scene.assets, "nginx", &image(scene)?, scene.progress)?;
    let options = LabOptions {
        host: OLD,
        system: Some(System::debian12().with_units()),
        others: vec![NEW],
        guest_kernels: Vec::new(),
        guest_images: vec![(NAME.to_owned(), image)],
        guests: 1,
        ..LabOptions::default()
    };
    let mut lab = Lab::boot(scene.assets, options, scene.progress)?;
    scene.progress.step("booting Debian in a VM");
    let disk = guest_disk_path(NAME);
    let order = [
        "hebe",
        "run",
        "--name",
        NAME,
        "--memory",
        "384MiB",
        "--disk",
        &disk,
        "--net",
        "tap101@br0",
    ];
    lab.machine.exec_ok(&order)?;
    let port = lab
        .machine
        .guests
        .first()
        .context("the lab has no ports")?
        .http;
    let before = boot_id(&mut lab, port, GUEST).with_context(|| last_words(&lab))?;
    in_sight_of_the_host(&lab)?;
    running(&lab).context("before the reboot")?;
    let mut session = Session::open(port)?;
    ensure!(session.get()? == before, "two answers of one guest differ");

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
    running(&lab)
        .context("after the reboot")
        .with_context(|| last_words(&lab))?;
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
    lab.machine.check()?;
    lab.machine.power_off()
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

/// The host reaches the server at the address that DHCP gave.
fn in_sight_of_the_host(lab: &Lab) -> Result<()> {
    let script = "exec 3<>/dev/tcp/10.0.2.101/80; printf 'GET / HTTP/1.0\\r\\n\\r\\n' >&3; cat <&3";
    let page = lab.machine.exec_ok(&["bash", "-c", script])?;
    ensure!(page.contains("nginx"), "the host got: {page}");
    Ok(())
}

fn running(lab: &Lab) -> Result<()> {
    let (state, told) = super::state(lab, NAME)?;
    ensure!(state == "running", "{NAME} is {state}: {told}");
    Ok(())
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
        "the guest's console:\n{}\nits VMM:\n{}\nthe host:\n{}{}",
        read(&format!("/run/hebe/vms/{NAME}/console.log")),
        read(&format!("/run/hebe/vms/{NAME}/log")),
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
