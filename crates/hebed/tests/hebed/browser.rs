//! The page in a real browser, through `hebe dashboard`.
//!
//! `HEBE_CHROMIUM` and `HEBE_PROGRAM` name the browser and `hebe`, as
//! `cargo xtask test --only dashboard` sets them; without them this is skipped.

use std::env;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use hebe_host::listing::VmState;
use serde_json::Value;

use crate::chromium::Browser;
use crate::world::{Daemon, World};

pub const CASES: &[crate::Case] = &[("the_page_is_live_in_a_browser_that_was_let_in", page)];

/// `hebe dashboard`; killed when dropped.
struct Dashboard {
    child: Child,
    address: String,
}

impl Dashboard {
    fn start(world: &World, hebe: &PathBuf) -> Self {
        let child = Command::new(hebe)
            .args(["--json", "dashboard"])
            .env("HEBE_RUN_DIR", &world.host.layout.run)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .expect("hebe runs");
        // Killed, whatever it says.
        let mut dashboard = Self {
            child,
            address: String::new(),
        };
        let stdout = dashboard.child.stdout.take().expect("stdout");
        let mut text = String::new();
        for line in BufReader::new(stdout).lines() {
            text += &line.expect("text");
            if let Ok(value) = serde_json::from_str::<Value>(&text) {
                let address = value["address"].as_str().expect("an address");
                dashboard.address = address.to_owned();
                return dashboard;
            }
        }
        panic!("hebe dashboard ended: {text}");
    }
}

impl Drop for Dashboard {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A warm reboot of two VMs that took 2.4 s.
fn report(world: &World) {
    use EventKind as Kind;
    use hebe_host::report::{ReportPlace, keep_report};
    use hebe_host::timeline::{EventKind, KernelInfo, Side, Timeline};
    let kernel = |release: &str| KernelInfo {
        release: release.into(),
        boot_id: "1".into(),
    };
    let mut timeline = Timeline::new(hebe_types::RebootMethod::Warm, kernel("6.1.0"));
    timeline.after = Some(kernel("7.3.0"));
    let mut now = hebe_sys::clock::stamp_now();
    let vms = ["database", "web"].map(crate::world::name);
    let host =
        |kinds: &[(Side, Kind, bool)], now: &mut hebe_types::Stamp, timeline: &mut Timeline| {
            for (side, kind, of_vms) in kinds {
                let whose = vms.iter().map(Some).filter(|_| *of_vms);
                for vm in whose.chain((!of_vms).then_some(None)) {
                    now.realtime_ns += 150_000_000;
                    timeline.note(*now, *side, vm, *kind);
                }
            }
        };
    let (before, after) = (Side::Before, Side::After);
    let kinds = [
        (before, Kind::Asked, false),
        (before, Kind::Checked, false),
        (before, Kind::ImageLoaded, false),
        (before, Kind::Prepared, false),
        (before, Kind::VcpusStopped, true),
        (before, Kind::Committed, true),
        (before, Kind::AllSuspended, false),
        (before, Kind::Jump, false),
        (after, Kind::KernelEntry, false),
        (after, Kind::UserSpace, false),
        (after, Kind::VmmStarted, true),
        (after, Kind::Running, true),
        (after, Kind::FirstReply, true),
        (after, Kind::AllResumed, false),
    ];
    host(&kinds, &mut now, &mut timeline);
    keep_report(&world.host, &timeline, ReportPlace::Disk).expect("kept");
}

fn page() {
    let program = |key| env::var_os(key).map(PathBuf::from);
    let (Some(chromium), Some(hebe)) = (program("HEBE_CHROMIUM"), program("HEBE_PROGRAM")) else {
        assert!(env::var_os("HEBE_REQUIRE_BROWSER").is_none(), "no browser");
        println!("skipped: HEBE_CHROMIUM and HEBE_PROGRAM name no browser and no hebe");
        return;
    };
    let world = World::new();
    world.define("web", "");
    world.define("database", "autostart = true");
    crate::api::sample(&world);
    report(&world);
    let daemon = world.daemon();
    world.until("database", VmState::Running);
    daemon.settled();
    let dashboard = Dashboard::start(&world, &hebe);
    let mut browser = Browser::start(&chromium);
    let tab = browser.profile();
    browser.open(&tab, &dashboard.address);
    browser.until(
        &tab,
        "document.getElementById('state').textContent === 'live'",
    );
    browser.until(&tab, "document.querySelectorAll('#vms tr').length === 2");
    let names = "[...document.querySelectorAll('#vms tr')].map(r => r.cells[0].textContent + ' ' + r.cells[1].textContent).join()";
    assert_eq!(
        browser.evaluate(&tab, names),
        "database running,web stopped"
    );
    // The address is not left where somebody may read it.
    assert_eq!(browser.evaluate(&tab, "location.search"), "");
    assert_eq!(browser.evaluate(&tab, "document.cookie"), "");
    // The chart of the last reboot is a picture that was loaded.
    browser.until(&tab, "document.getElementById('report').naturalWidth > 0");
    browser.until(
        &tab,
        "document.querySelectorAll('#downtime tr').length === 2",
    );
    browser.until(&tab, "document.querySelectorAll('#age tr').length > 3");
    browser.until(
        &tab,
        "document.getElementById('store').textContent.includes(' free')",
    );
    // Everything that can be pressed says what it does.
    let unnamed = "[...document.querySelectorAll('button, a, img')].filter(e => !(e.alt || e.getAttribute('aria-label'))).length";
    assert_eq!(browser.evaluate(&tab, unnamed), 0);
    orders(&world, &daemon, &mut browser, &tab);
    strangers(&dashboard, &mut browser);
    let complaints = browser.complaints(&tab);
    assert!(complaints.is_empty(), "{complaints:#?}");
    if let Some(path) = env::var_os("HEBE_PICTURE") {
        fs::write(path, browser.picture(&tab)).expect("write");
    }
}

/// An order through the page, and one by somebody else, are seen in it.
fn orders(world: &World, daemon: &Daemon, browser: &mut Browser, tab: &crate::chromium::Tab) {
    let state = |name: &str, state: &str| {
        format!("document.querySelector('#vms tr[data-name={name}]').dataset.state === '{state}'")
    };
    let press = "document.querySelector('#vms tr[data-name=web] button[data-what=start]').click()";
    browser.evaluate(tab, press);
    browser.until(tab, &state("web", "running"));
    world.until("web", VmState::Running);
    daemon.settled();
    let name = crate::world::name("web");
    hebe_host::ops::suspend(&world.host, &name).expect("suspended");
    browser.until(tab, &state("web", "frozen"));
    let log = "document.getElementById('log').textContent.includes('running → frozen')";
    browser.until(tab, log);
    // What a guest wrote is read as text.
    let text = "fetch('v1/vms/web/console').then(r => r.headers.get('content-type'))";
    assert_eq!(browser.evaluate(tab, text), "text/plain; charset=utf-8");
}

/// Another profile has no cookie, and the address lets nobody in again.
fn strangers(dashboard: &Dashboard, browser: &mut Browser) {
    let stranger = browser.profile();
    let place = dashboard.address.split("?token").next().expect("a place");
    for address in [place, &dashboard.address] {
        browser.open(&stranger, address);
        browser.until(
            &stranger,
            "document.body.innerText.includes('hebe dashboard')",
        );
        assert_eq!(
            browser.evaluate(&stranger, "document.querySelectorAll('table').length"),
            0
        );
        let asked = browser.evaluate(&stranger, "fetch('v1/vms').then(r => r.status, () => 0)");
        assert!(asked == 403 || asked == 0, "{asked}");
    }
}
