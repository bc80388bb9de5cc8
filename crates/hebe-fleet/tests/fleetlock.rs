//! The FleetLock client against a small server that counts, as the protocol
//! says.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use hebe_fleet::config::{FleetConfig, FleetLockConfig};
use hebe_fleet::order::{NotRebooted, Order, give_up, in_turn, new_slot, release_after_boot};
use hebe_fleet::slots::{FleetError, Slots, Taken};
use hebe_policy::fleet::holder::{Stop, Times};
use hebe_policy::fleet::slots::{FleetName, Found, Full, Slot};
use hebe_policy::span::Span;
use serde_json::{Value, json};

/// Who holds a slot, and what was asked.
#[derive(Default)]
struct Counts {
    held: BTreeSet<String>,
    asked: Vec<String>,
    /// It gives slots, and its answers are lost.
    unheard: bool,
}

/// A server with one slot. What it is told to say instead comes first.
struct Server {
    url: String,
    counts: Arc<Mutex<Counts>>,
}

impl Server {
    fn start(instead: Option<&'static str>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("port");
        let url = format!("http://{}/base/", listener.local_addr().expect("address"));
        let counts = Arc::new(Mutex::new(Counts::default()));
        let shared = Arc::clone(&counts);
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let _ = serve(stream, &shared, instead);
            }
        });
        Self { url, counts }
    }

    fn held(&self) -> Vec<String> {
        let counts = self.counts.lock().expect("lock");
        counts.held.iter().cloned().collect()
    }
}

fn serve(
    mut stream: TcpStream,
    counts: &Mutex<Counts>,
    instead: Option<&str>,
) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let (mut head, mut length) = (String::new(), 0);
    while reader.read_line(&mut head)? > 2 {}
    for line in head.lines() {
        if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            length = value.trim().parse().unwrap_or(0);
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body)?;
    let body: Value = serde_json::from_slice(&body)?;
    let (status, answer) = match instead {
        Some(instead) => (500, instead.to_owned()),
        None => answer(&head, &body, &mut counts.lock().expect("lock")),
    };
    if head.contains("pre-reboot") && counts.lock().expect("lock").unheard {
        return Ok(());
    }
    write!(
        stream,
        "HTTP/1.1 {status} X\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{answer}",
        answer.len()
    )
}

fn answer(head: &str, body: &Value, counts: &mut Counts) -> (u16, String) {
    let path = head.split_whitespace().nth(1).unwrap_or_default();
    let header = head
        .to_ascii_lowercase()
        .contains("fleet-lock-protocol: true");
    let params = &body["client_params"];
    let id = params["id"].as_str().unwrap_or_default().to_owned();
    let said = |kind: &str, value: &str| json!({"kind": kind, "value": value}).to_string();
    counts.asked.push(format!("{path} {id}"));
    if !header || id.is_empty() || params["group"] != "rack1" {
        return (400, said("bad_request", "header or client_params"));
    }
    match path {
        "/base/v1/pre-reboot" if counts.held.contains(&id) || counts.held.is_empty() => {
            counts.held.insert(id);
            (200, String::new())
        }
        "/base/v1/pre-reboot" => (
            409,
            said("failed_lock_semaphore_full", "semaphore currently full"),
        ),
        "/base/v1/steady-state" => {
            counts.held.remove(&id);
            (200, String::new())
        }
        _ => (404, String::new()),
    }
}

fn name(text: &str) -> FleetName {
    text.parse().expect("name")
}

fn config(url: &str) -> FleetConfig {
    let config = FleetConfig {
        group: name("rack1"),
        host: None,
        at_most: 1,
        give_up_after: Span::minutes(2),
        lease: Span::seconds(15),
        patience: Span::minutes(1),
        request_timeout: Span::seconds(5),
        always: false,
        etcd: None,
        fleetlock: Some(FleetLockConfig {
            url: url.into(),
            ..FleetLockConfig::default()
        }),
    };
    config.check().expect("sound");
    config
}

fn times(config: &FleetConfig) -> Times {
    Times {
        ask_every_ms: 50,
        insist_ms: 500,
        ..config.times(Span::seconds(1))
    }
}

fn slots(config: &FleetConfig, host: &str, dir: &Path) -> Slots {
    Slots::open(config, &name(host), dir.join(host).join("slot.json")).expect("client")
}

fn wants(config: &FleetConfig, host: &str, boot_id: &str) -> Slot {
    new_slot(config, &name(host), host, boot_id).expect("slot")
}

fn quiet(_: &str) {}

#[test]
fn a_slot_goes_from_the_old_kernel_to_the_new_one() {
    let server = Server::start(None);
    let dir = tempfile::tempdir().expect("folder");
    let config = config(&server.url);
    let (a, b) = (
        slots(&config, "a", dir.path()),
        slots(&config, "b", dir.path()),
    );
    let slot = wants(&config, "a", "boot-1");
    let mut order = Order::take(&a, slot, times(&config), &quiet).expect("slot");
    order.while_held(|| ()).expect("held");
    order.pin(["web".to_owned()].into(), 60).expect("pinned");
    drop(order);
    let Err(Stop::NoSlot(why)) = Order::take(&b, wants(&config, "b", "x"), times(&config), &quiet)
    else {
        panic!("there is one slot");
    };
    assert!(why.contains("semaphore currently full"), "{why}");
    assert_eq!(server.held(), ["a"]);
    // The new kernel knows of it from the host's own record.
    let taken = a.take(&wants(&config, "a", "boot-2"), 0).expect("answer");
    assert_eq!(taken, Taken::Not(Full::Unreleased));
    let Some(Found::Slot(own)) = a.own(&name("a")).expect("record") else {
        panic!("it was written down");
    };
    let mut look = |vms: &BTreeSet<String>| {
        assert_eq!(server.held(), ["a"]);
        if vms.contains("web") {
            Ok(())
        } else {
            Err("who?".to_owned())
        }
    };
    release_after_boot(&a, own, times(&config), 5, &mut look, &quiet).expect("released");
    assert!(server.held().is_empty());
    assert_eq!(a.own(&name("a")).expect("record"), None);
    let all = a.all();
    assert!(matches!(all, Err(FleetError::NotTold)), "{all:?}");
    let asked = &server.counts.lock().expect("lock").asked;
    assert_eq!(
        asked.first().map(String::as_str),
        Some("/base/v1/pre-reboot a")
    );
    assert_eq!(
        asked.last().map(String::as_str),
        Some("/base/v1/steady-state a")
    );
}

#[test]
fn a_dead_host_is_unlocked_by_hand_and_a_refusal_gives_the_slot_back() {
    let server = Server::start(None);
    let dir = tempfile::tempdir().expect("folder");
    let config = config(&server.url);
    let (a, b) = (
        slots(&config, "a", dir.path()),
        slots(&config, "b", dir.path()),
    );
    let take = |slots, host| {
        let slot = wants(&config, host, "boot-1");
        Order::take(slots, slot, times(&config), &quiet)
    };
    drop(take(&a, "a").expect("slot"));
    assert!(
        take(&b, "b").is_err(),
        "a died, and the server does not know"
    );
    assert_eq!(b.unlock(&name("a")).expect("answer"), None);
    let order = take(&b, "b").expect("free again");
    assert_eq!(order.undo("x"), Stop::NotReady("x".into()));
    assert!(server.held().is_empty());
    // Nothing was taken: giving back is no error.
    give_up(&b, wants(&config, "b", "boot-1"), times(&config), &quiet).expect("released");
}

#[test]
fn a_grant_that_nobody_heard_is_given_back_and_a_kept_slot_is_not() {
    let server = Server::start(None);
    let dir = tempfile::tempdir().expect("folder");
    let config = config(&server.url);
    let a = slots(&config, "a", dir.path());
    let take = || Order::take(&a, wants(&config, "a", "boot-1"), times(&config), &quiet);
    let deaf = |unheard| server.counts.lock().expect("lock").unheard = unheard;
    deaf(true);
    let stop = take().err();
    assert!(matches!(stop, Some(Stop::NoSlot(_))), "{stop:?}");
    assert!(server.held().is_empty(), "{:?}", server.held());
    // What `hebe fleet lock` took is not this order's to give back.
    deaf(false);
    let mut order = take().expect("slot");
    order.pin(BTreeSet::new(), 60).expect("pinned");
    drop(order);
    deaf(true);
    assert!(take().is_err());
    assert_eq!(server.held(), ["a"]);
    assert!(a.own(&name("a")).expect("record").is_some());
}

#[test]
fn the_record_on_a_copied_disk_is_another_machines() {
    let server = Server::start(None);
    let dir = tempfile::tempdir().expect("folder");
    let config = config(&server.url);
    let a = slots(&config, "a", dir.path());
    a.pin(&wants(&config, "a", "boot-1")).expect("written");
    let copy = new_slot(&config, &name("a"), "another", "boot-1").expect("slot");
    let taken = a.take(&copy, 0).expect("answer");
    assert!(matches!(taken, Taken::Not(Full::SameName(_))), "{taken:?}");
}

#[test]
fn a_reboot_that_strands_vms_keeps_the_slot_until_it_is_released() {
    let server = Server::start(None);
    let dir = tempfile::tempdir().expect("folder");
    let config = config(&server.url);
    let a = slots(&config, "a", dir.path());
    let turn = |all_run| {
        let wanted = wants(&config, "a", "boot-1");
        let reboot = || NotRebooted {
            why: "kexec failed".into(),
            all_run,
        };
        let check = || Ok(["web".to_owned()].into());
        in_turn(&a, wanted, times(&config), 60, &quiet, check, reboot)
    };
    assert_eq!(turn(true), Stop::NotReady("kexec failed".into()));
    assert!(server.held().is_empty());
    assert_eq!(turn(false), Stop::Stranded("kexec failed".into()));
    assert_eq!(server.held(), ["a"]);
    // `hebe fleet release` in the same boot.
    let Some(Found::Slot(own)) = a.own(&name("a")).expect("record") else {
        panic!("it was written down");
    };
    give_up(&a, own, times(&config), &quiet).expect("released");
    assert!(server.held().is_empty());
}

#[test]
fn a_server_that_is_none_or_does_not_answer_gives_no_slot() {
    let dir = tempfile::tempdir().expect("folder");
    // It accepts, and never answers.
    let mute = TcpListener::bind("127.0.0.1:0").expect("port");
    let mute_url = format!("http://{}", mute.local_addr().expect("address"));
    // Nobody listens there; a port that was free may be somebody's a moment later.
    let closed_url = "http://127.0.0.1:1".to_owned();
    let odd = Server::start(Some("<html>it works</html>"));
    for url in [&mute_url, &closed_url, &odd.url] {
        let config = config(url);
        let a = slots(&config, "a", dir.path());
        let slot = wants(&config, "a", "boot-1");
        let begun = std::time::Instant::now();
        // Nobody knows what the server heard.
        let Err(Stop::Unreleased(why)) = Order::take(&a, slot.clone(), times(&config), &quiet)
        else {
            panic!("{url} gives no slots");
        };
        assert!(why.contains("nobody keeps the slots"), "{why}");
        let kept = give_up(&a, slot, times(&config), &quiet).expect_err("nobody heard it");
        assert!(kept.to_string().contains("hebe fleet release"), "{kept}");
        assert!(begun.elapsed() < Duration::from_secs(120));
    }
    let angry = Server::start(Some("{\"kind\": \"on\\nfire\", \"value\": \"help\"}"));
    let config = config(&angry.url);
    let a = slots(&config, "a", dir.path());
    let taken = a.take(&wants(&config, "a", "boot-1"), 0).expect("answer");
    assert_eq!(taken, Taken::Denied("help (on fire)".into()));
}

#[test]
fn a_damaged_record_is_not_taken_for_none() {
    let server = Server::start(None);
    let dir = tempfile::tempdir().expect("folder");
    let config = config(&server.url);
    let a = slots(&config, "a", dir.path());
    std::fs::create_dir(dir.path().join("a")).expect("folder");
    for text in ["", "{}", "{\"version\": 2}"] {
        std::fs::write(dir.path().join("a/slot.json"), text).expect("write");
        let error = a.own(&name("a")).expect_err("damaged").to_string();
        assert!(error.contains("slot.json"), "{error}");
        assert!(a.take(&wants(&config, "a", "boot-1"), 0).is_err());
        let stop = Order::take(&a, wants(&config, "a", "boot-1"), times(&config), &quiet).err();
        assert!(matches!(stop, Some(Stop::NoSlot(_))), "{stop:?}");
    }
    assert!(server.held().is_empty(), "nobody was asked");
    // The way out of it.
    a.unlock(&name("a")).expect("answer");
    assert_eq!(a.own(&name("a")).expect("record"), None);
}
