//! Host and agent over a socket pair, well-behaved and not.

use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use hebe_agent::guest::Guest;
use hebe_agent::{Client, ClientError, Done, Facts, Limits, LineError, Order, Said, converse};

const LONG: Duration = Duration::from_secs(90);
const SHORT: Duration = Duration::from_millis(100);

#[derive(Default)]
struct Fake {
    done: Mutex<Vec<String>>,
    frozen: Mutex<bool>,
    phase: Mutex<String>,
}

impl Fake {
    fn note(&self, what: String) {
        self.done.lock().expect("lock").push(what);
    }
}

impl Guest for Fake {
    fn facts(&self) -> Facts {
        Facts {
            phase: self.phase.lock().expect("lock").clone(),
            boot_id: "boot".into(),
            uptime_s: 5,
            frozen: *self.frozen.lock().expect("lock"),
            ..Facts::default()
        }
    }

    fn set_time(&self, realtime_ns: u64) -> io::Result<i64> {
        self.note(format!("time {realtime_ns}"));
        Ok(-7)
    }

    fn freeze(&self, time: Duration) -> Result<u32, String> {
        self.note(format!("freeze {}", time.as_secs()));
        *self.frozen.lock().expect("lock") = true;
        Ok(2)
    }

    fn thaw(&self) -> Result<u32, String> {
        self.note("thaw".into());
        *self.frozen.lock().expect("lock") = false;
        Ok(2)
    }

    fn shut_down(&self, reboot: bool) -> io::Result<()> {
        self.note(format!("shut down {reboot}"));
        Err(io::Error::other("not today"))
    }
}

fn limits() -> Limits {
    Limits {
        silence: LONG,
        write: LONG,
        look: Duration::from_millis(10),
        exec: false,
    }
}

/// Runs `host` against an agent; returns how the agent's side ended.
fn with_agent(
    limits: Limits,
    guest: &Fake,
    host: impl FnOnce(UnixStream),
) -> Result<(), LineError> {
    let (near, far) = UnixStream::pair().expect("pair");
    thread::scope(|scope| {
        let agent = scope.spawn(|| converse(far, guest, limits));
        host(near);
        agent.join().expect("no panic")
    })
}

#[test]
fn every_order_is_carried_out_and_answered() {
    let guest = Fake::default();
    let ended = with_agent(limits(), &guest, |stream| {
        let mut client = Client::new(stream, LONG).expect("hello");
        assert_eq!(client.hello().boot_id, "boot");
        let mut order = |order| client.order(order);
        let Done::Facts(facts) = order(Order::Ping).expect("ping") else {
            panic!("other facts")
        };
        assert_eq!((facts.uptime_s, facts.frozen), (5, false));
        let time = order(Order::Time { realtime_ns: 9 }).expect("time");
        assert_eq!(time, Done::WasAhead { ns: -7 });
        let frozen = order(Order::Freeze { for_s: 3 }).expect("freeze");
        assert_eq!(frozen, Done::FileSystems { count: 2 });
        // Frozen file systems would hold the guest up on its way down.
        let refused = order(Order::Shutdown { reboot: true }).expect_err("no");
        assert!(refused.to_string().contains("not today"), "{refused}");
    });
    assert!(ended.is_ok(), "{ended:?}");
    let done = guest.done.lock().expect("lock");
    assert_eq!(*done, ["time 9", "freeze 3", "thaw", "shut down true"]);
}

#[test]
fn programs_are_run_only_where_the_guest_says_so() {
    let exec = || Order::Exec {
        words: ["/bin/echo", "hi"].map(str::to_owned).to_vec(),
        for_s: 20,
    };
    let guest = Fake::default();
    let ended = with_agent(limits(), &guest, |stream| {
        let mut client = Client::new(stream, LONG).expect("hello");
        let refused = client.order(exec()).expect_err("off").to_string();
        assert!(refused.contains("--allow-exec"), "{refused}");
    });
    assert!(ended.is_ok());
    let on = Limits {
        exec: true,
        ..limits()
    };
    let ended = with_agent(on, &guest, |stream| {
        let mut client = Client::new(stream, LONG).expect("hello");
        match client.order(exec()) {
            Ok(Done::Ended { status, stdout, .. }) => {
                assert_eq!((status, &*stdout), (Some(0), "hi\n"));
            }
            other => panic!("{other:?}"),
        }
        client.order(Order::Freeze { for_s: 1 }).expect("freeze");
        let refused = client.order(exec()).expect_err("frozen").to_string();
        assert!(refused.contains("frozen"), "{refused}");
    });
    assert!(ended.is_ok());
}

#[test]
fn who_watches_hears_beats_and_phases_and_can_still_order() {
    let guest = Fake::default();
    let ended = with_agent(limits(), &guest, |stream| {
        let mut client = Client::new(stream, LONG).expect("hello");
        client.order(Order::Watch { every_s: 1 }).expect("watch");
        *guest.phase.lock().expect("lock") = "ready".into();
        match client.hear() {
            Ok(Said::Beat(facts)) => assert_eq!(facts.phase, "ready"),
            other => panic!("{other:?}"),
        }
        assert!(matches!(client.hear(), Ok(Said::Beat(_))), "one a second");
        client.order(Order::Ping).expect("ping");
    });
    assert!(ended.is_ok(), "{ended:?}");
}

#[test]
fn garbage_is_answered_and_does_nothing() {
    let guest = Fake::default();
    let ended = with_agent(limits(), &guest, |mut stream| {
        let mut said = io::BufReader::new(stream.try_clone().expect("clone"));
        let mut next = || {
            let mut line = String::new();
            io::BufRead::read_line(&mut said, &mut line).expect("line");
            serde_json::from_str::<Said>(&line).expect("said")
        };
        assert!(matches!(next(), Said::Hello(_)));
        let deep = "[".repeat(5000);
        for garbage in [
            "",
            "hello",
            "{}",
            "null",
            r#"{"id":-1,"do":"ping"}"#,
            r#"{"id":1,"do":"explode"}"#,
            r#"{"id":1,"do":"ping","more":1}"#,
            r#"{"id":1,"do":{"freeze":{"for_s":3,"more":1}}}"#,
            r#"{"id":1,"do":{"time":{"realtime_ns":1e99}}}"#,
            &deep,
        ] {
            stream
                .write_all(format!("{garbage}\n").as_bytes())
                .expect("write");
            let answer = next();
            assert!(
                matches!(answer, Said::Failed { id: 0, .. }),
                "{garbage}: {answer:?}"
            );
        }
        // Understood, and out of bounds.
        for order in [
            r#"{"freeze":{"for_s":0}}"#,
            r#"{"freeze":{"for_s":61}}"#,
            r#"{"watch":{"every_s":0}}"#,
            r#"{"exec":{"words":[],"for_s":1}}"#,
        ] {
            let line = format!("{{\"id\":4,\"do\":{order}}}\n");
            stream.write_all(line.as_bytes()).expect("write");
            assert!(matches!(next(), Said::Failed { id: 4, .. }), "{order}");
        }
        stream
            .write_all(b"{\"id\":9,\"do\":\"ping\"}\n")
            .expect("write");
        assert!(matches!(next(), Said::Done { id: 9, .. }), "still there");
    });
    assert!(ended.is_ok(), "{ended:?}");
    assert!(guest.done.lock().expect("lock").is_empty());
}

#[test]
fn a_host_that_says_nothing_or_has_no_end_is_hung_up_on() {
    let guest = Fake::default();
    let short = Limits {
        silence: SHORT,
        ..limits()
    };
    let begin = Instant::now();
    let ended = with_agent(short, &guest, |mut stream| {
        // Drop by drop is silence too: a line has to come.
        let _ = stream.write_all(b"{");
        let mut rest = Vec::new();
        stream.read_to_end(&mut rest).expect("the end");
    });
    assert!(matches!(ended, Err(LineError::Late)), "{ended:?}");
    assert!(begin.elapsed() < LONG);
    let ended = with_agent(limits(), &guest, |mut stream| {
        let _ = stream.write_all(&[b'x'; 64 << 10]);
        let _ = stream.read_to_end(&mut Vec::new());
    });
    assert!(matches!(ended, Err(LineError::TooLong(_))), "{ended:?}");
    let ended = with_agent(limits(), &guest, |mut stream| {
        let _ = stream.write_all(b"\xff\xff\n");
        let _ = stream.read_to_end(&mut Vec::new());
    });
    assert!(matches!(ended, Err(LineError::NoText)), "{ended:?}");
    let hurried = Limits {
        write: SHORT,
        ..limits()
    };
    let ended = with_agent(hurried, &guest, |mut stream| {
        // Asks, and never reads: a second direction fills up.
        stream.set_write_timeout(Some(LONG)).expect("limit");
        while stream.write_all(b"{\"id\":1,\"do\":\"ping\"}\n").is_ok() {}
    });
    assert!(ended.is_err(), "{ended:?}");
}

/// What a guest says to `Client::new`, and the error that comes of it.
fn refused(says: &[u8]) -> ClientError {
    let (near, mut far) = UnixStream::pair().expect("pair");
    far.write_all(says).expect("write");
    far.shutdown(std::net::Shutdown::Write).expect("shut");
    let client = Client::new(near, LONG);
    client
        .and_then(|mut c| c.order(Order::Ping))
        .expect_err("refused")
}

#[test]
fn a_hostile_guest_is_refused_in_time_and_in_bounds() {
    let facts =
        r#"{"protocol":1,"agent":"a","phase":"p","boot_id":"b","uptime_s":1,"frozen":false}"#;
    let hello = format!("{{\"hello\":{facts}}}\n");
    let senseless = |says: &str| {
        let error = refused(says.as_bytes());
        assert!(
            matches!(error, ClientError::Senseless(_)),
            "{says}: {error:?}"
        );
    };
    senseless("hi\n");
    senseless("{\"hello\":{}}\n");
    senseless(&hello.replace("\"protocol\":1", "\"protocol\":2"));
    senseless(&format!("{{\"beat\":{facts}}}\n"));
    // Answers that were not asked for, and beats without end.
    senseless(&format!(
        "{hello}{{\"done\":{{\"id\":99,\"result\":\"ok\"}}}}\n"
    ));
    let beats = format!("{{\"beat\":{facts}}}\n").repeat(100);
    senseless(&format!("{hello}{beats}"));
    assert!(matches!(refused(b""), ClientError::NoAgent));
    assert!(matches!(refused(hello.as_bytes()), ClientError::NoAgent));

    let (near, mut far) = UnixStream::pair().expect("pair");
    let flood = thread::spawn(move || while far.write_all(&[b'x'; 4096]).is_ok() {});
    let error = Client::new(near, LONG).expect_err("no end");
    assert!(
        matches!(error, ClientError::Line(LineError::TooLong(_))),
        "{error:?}"
    );
    flood.join().expect("it is hung up on");

    let (near, _silent) = UnixStream::pair().expect("pair");
    let error = Client::new(near, SHORT).expect_err("silent");
    assert!(
        matches!(error, ClientError::Line(LineError::Late)),
        "{error:?}"
    );
}

#[test]
fn the_agent_is_reached_through_the_vms_socket() {
    let dir = tempfile::tempdir().expect("dir");
    let path = dir.path().join("vsock.sock");
    let error = Client::connect(&path, SHORT).expect_err("no socket");
    assert!(error.to_string().contains("[vsock]"), "{error}");
    let listener = UnixListener::bind(&path).expect("listen");
    // Hung up on: nobody listens in the guest.
    thread::scope(|scope| {
        scope.spawn(|| listener.accept().map(drop));
        let error = Client::connect(&path, LONG).expect_err("no agent");
        assert!(matches!(error, ClientError::NoAgent), "{error:?}");
    });
    thread::scope(|scope| {
        let vmm = scope.spawn(|| {
            let (mut stream, _) = listener.accept().expect("accept");
            let mut line = [0; 14];
            stream.read_exact(&mut line).expect("line");
            assert_eq!(&line, b"CONNECT 18501\n");
            stream.write_all(b"OK 1073741824\n").expect("granted");
            converse(stream, &Fake::default(), limits())
        });
        let mut client = Client::connect(&path, LONG).expect("connected");
        client.order(Order::Ping).expect("ping");
        drop(client);
        assert!(vmm.join().expect("no panic").is_ok());
    });
}

#[test]
fn a_socket_at_which_nobody_is_let_in_holds_nobody_up() {
    let dir = tempfile::tempdir().expect("dir");
    let path = dir.path().join("vsock.sock");
    let address = rustix::net::SocketAddrUnix::new(&path).expect("address");
    let listener = rustix::net::socket(
        rustix::net::AddressFamily::UNIX,
        rustix::net::SocketType::STREAM,
        None,
    );
    let listener = listener.expect("socket");
    rustix::net::bind(&listener, &address).expect("bind");
    rustix::net::listen(&listener, 0).expect("listen");
    let _first = UnixStream::connect(&path).expect("room for one");
    let begin = Instant::now();
    let error = Client::connect(&path, SHORT).expect_err("no room");
    assert!(matches!(error, ClientError::NoSocket(_)), "{error:?}");
    assert!(begin.elapsed() < LONG);
}

#[test]
fn whatever_starts_an_agent_thaws_when_it_ended() {
    let mut help = std::process::Command::new(env!("CARGO_BIN_EXE_hebe-agent"));
    let help = help.arg("--help").output().expect("run").stdout;
    assert!(String::from_utf8_lossy(&help).contains("\n  hebe-agent thaw "));
    let systemd = include_str!("../../../packaging/hebe-agent.service");
    assert!(systemd.contains("\nExecStopPost=-/usr/sbin/hebe-agent thaw\n"));
    let init = include_str!("../../../packaging/hebe-agent.init");
    assert!(init.contains("\"$program\" thaw;"));
}
