//! demo, test, bench, tidy.

use lab::assets::{Assets, KernelName, Overrides};
use lab::progress::Plain;
use std::time::{Duration, Instant};

fn main() -> anyhow::Result<()> {
    let assets = Assets::open(Overrides::default(), &Plain)?;
    let qemu = assets.qemu(&Plain)?;
    let name = std::env::args().nth(1).unwrap_or("6.1-cloud".into());
    let k = assets.kernel(name.parse::<KernelName>()?, &Plain)?;
    let bins = lab::binaries::Binaries::build(&[], &Plain)?;
    let dir = std::path::PathBuf::from("/tmp/labrun");
    std::fs::create_dir_all(&dir)?;
    std::fs::write(dir.join("initrd"), lab::initramfs::guest(&k, &bins)?)?;
    println!("initrd {}", std::fs::metadata(dir.join("initrd"))?.len());
    lab::disk::make_ext4(&dir.join("disk"), 256, None, &Plain)?;
    let t = Instant::now();
    let mut m = lab::machine::Machine::start(&qemu, &lab::machine::MachineConfig {
        memory_mib: 1024, cpus: 2, kernel: k.image.clone(), initrd: dir.join("initrd"),
        cmdline: "console=ttyS0 quiet lab.role=guest lab.ip=10.0.2.101/24 lab.gw=10.0.2.2 lab.disk_ms=200 lab.slow_work=200".into(), disk: Some(dir.join("disk")), guests: 1, guest_byte: 101, dir: dir.clone() })?;
    let g = m.guests[0];
    let st = lab::probe::wait_for_guest(&g, Duration::from_secs(60), || m.check()).inspect_err(|_| println!("{}", m.serial.text().unwrap()))?;
    println!("{:?} {:?}", t.elapsed(), st);
    let p = lab::probe::Probe::start(&g)?;
    std::thread::sleep(Duration::from_secs(4));
    m.stop()?;
    std::thread::sleep(Duration::from_secs(3));
    m.cont()?;
    std::thread::sleep(Duration::from_secs(4));
    let r = p.finish()?;
    println!("{:?} {:?} of {} answered {}", r.udp.longest_gap(), r.tcp, r.udp.samples.len(), r.udp.answered());
    for path in ["/file?mib=16", "/file?mib=16", "/verify"] {
        println!("{}", String::from_utf8_lossy(&lab::probe::http_get(g.http, path, Duration::from_secs(60))?));
    }
    println!("{}", lab::probe::http_get(g.http, "/web/3", Duration::from_secs(60))?.len());
    println!("{}", lab::probe::http_get(g.slow, "/", Duration::from_secs(60))?.len());
    println!("{:?}", lab::probe::guest_status(&g, Duration::from_secs(3))?);
    println!("{}", m.serial.text()?);
    m.power_button()?;
    std::thread::sleep(Duration::from_secs(3));
    println!("{:?}", m.check());
    println!("{}", m.serial.text()?);
    Ok(())
}
