//! demo, test, bench, tidy.

use lab::assets::{Assets, KernelName, Overrides};
use lab::progress::Plain;

fn main() -> anyhow::Result<()> {
    let assets = Assets::open(Overrides::default(), &Plain)?;
    let qemu = assets.qemu(&Plain)?;
    let name = std::env::args().nth(1).unwrap_or("6.1-cloud".into());
    let k = assets.kernel(name.parse::<KernelName>()?, &Plain)?;
    let bins = lab::binaries::Binaries::build(&[], &Plain)?;
    let dir = std::path::PathBuf::from("/tmp/labrun");
    std::fs::create_dir_all(&dir)?;
    let t = std::time::Instant::now();
    std::fs::write(dir.join("initrd"), lab::initramfs::host(&k, &bins, None)?)?;
    println!(
        "initrd {:?} {}",
        t.elapsed(),
        std::fs::metadata(dir.join("initrd"))?.len()
    );
    let t = std::time::Instant::now();
    let mut m = lab::machine::Machine::start(
        &qemu,
        &lab::machine::MachineConfig {
            memory_mib: 4096,
            cpus: 2,
            kernel: k.image.clone(),
            initrd: dir.join("initrd"),
            cmdline: lab::machine::host_cmdline(1024, ""),
            disk: None,
            guests: 3,
            guest_byte: 101,
            dir: dir.clone(),
        },
    )?;
    let st = m.wait_for_boot(None, std::time::Duration::from_secs(90))?;
    println!("{:?} {:?}", t.elapsed(), st);
    println!(
        "{}",
        String::from_utf8_lossy(&m.agent.get("/proc/modules")?)
    );
    println!(
        "{}",
        String::from_utf8_lossy(
            &m.agent
                .get("/sys/devices/system/clocksource/clocksource0/current_clocksource")?
        )
    );
    println!("{:?}", m.agent.get("/dev/kvm").map(|_| ()));
    println!("{:?}", m.agent.make_devdax());
    println!("{}", m.exec_ok(&["/init"]).unwrap_err());
    println!("{}", m.serial.text()?);
    m.power_off()?;
    println!("{:?}", t.elapsed());
    Ok(())
}
