//! TCP: with certificates of both sides, or not at all.

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};

use crate::certificates::{Authority, Pair, Role, Valid};
use crate::client;
use crate::world::World;

pub const CASES: &[crate::Case] = &[
    (
        "only_clients_with_the_right_certificate_are_served",
        clients,
    ),
    ("strangers_hold_nobody_up", strangers),
    ("files_that_cannot_be_used_are_told_of", files),
];

fn arguments(pair: &Pair, ca: &Path) -> Vec<String> {
    let text = |path: &Path| path.display().to_string();
    let words = ["--listen", "127.0.0.1:0", "--tls-cert", &text(&pair.0)];
    let more = ["--tls-key", &text(&pair.1), "--client-ca", &text(ca)];
    words.iter().chain(&more).map(|w| (*w).to_owned()).collect()
}

/// Where the daemon listens: it says so soon after it answers on its socket.
fn address(world: &World) -> SocketAddr {
    let began = Instant::now();
    loop {
        let log = world.log();
        let mut lines = log.lines();
        let line = lines.find(|line| line.contains("for certificates of"));
        let rest = line.and_then(|line| line.split("listens on ").nth(1));
        if let Some(address) = rest.and_then(|rest| rest.split(',').next()) {
            return address.parse().expect("an address");
        }
        assert!(began.elapsed() < crate::world::PATIENCE, "{log}");
        thread::sleep(Duration::from_millis(5));
    }
}

fn connect(address: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(address).expect("connect");
    let patience = Some(crate::world::PATIENCE);
    stream.set_read_timeout(patience).expect("timeout");
    stream
}

/// What a client gets that believes in `ca` and shows `pair`.
fn ask(
    address: SocketAddr,
    ca: &Path,
    pair: Option<&Pair>,
    request: &str,
) -> Result<String, String> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut roots = RootCertStore::empty();
    let own = CertificateDer::from_pem_file(ca).expect("a certificate");
    roots.add(own).expect("an authority");
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_root_certificates(roots);
    let config = match pair {
        None => config.with_no_client_auth(),
        Some((certificate, key)) => {
            let chain = vec![CertificateDer::from_pem_file(certificate).expect("a certificate")];
            let key = PrivateKeyDer::from_pem_file(key).expect("a key");
            config.with_client_auth_cert(chain, key).expect("a pair")
        }
    };
    let name = ServerName::try_from("127.0.0.1").expect("a name");
    let session = ClientConnection::new(Arc::new(config), name).expect("a session");
    let mut stream = StreamOwned::new(session, connect(address));
    let mut text = String::new();
    let asked = stream
        .write_all(request.as_bytes())
        .and_then(|()| stream.read_to_string(&mut text));
    match asked {
        Ok(_) => Ok(text),
        // How a server ends a session is of no matter when all is said.
        Err(_) if text.contains("\r\n\r\n") => Ok(text),
        Err(error) => Err(error.to_string()),
    }
}

const VMS: &str = "GET /v1/vms HTTP/1.1\r\nHost: host.example\r\nConnection: close\r\n\r\n";

fn clients() {
    let world = World::new();
    world.define("web", "");
    let (ours, other) = (
        Authority::new(world.root.path(), "ours"),
        Authority::new(world.root.path(), "other"),
    );
    let server = ours.sign("server", Role::Server, Valid::Yes);
    let _daemon = world.daemon_with(&arguments(&server, &ours.file));
    let address = address(&world);
    let good = ours.sign("operator", Role::Client, Valid::Yes);
    let answer = ask(address, &ours.file, Some(&good), VMS).expect("served");
    assert!(
        answer.starts_with("HTTP/1.1 200 ") && answer.contains("\"web\""),
        "{answer}"
    );
    // Whoever is not root on this host does not say what it boots.
    let body = "{\"kernel\": \"/tmp/k\"}";
    let order = format!(
        "POST /v1/reboot HTTP/1.1\r\nHost: h\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    let answer = ask(address, &ours.file, Some(&good), &order).expect("served");
    assert!(answer.starts_with("HTTP/1.1 403 "), "{answer}");
    let refused = |pair: Option<&Pair>| ask(address, &ours.file, pair, VMS).expect_err("refused");
    let why = refused(None);
    assert!(why.contains("CertificateRequired"), "{why}");
    let why = refused(Some(&other.sign("stranger", Role::Client, Valid::Yes)));
    assert!(
        why.contains("UnknownCA") || why.contains("DecryptError"),
        "{why}"
    );
    let why = refused(Some(&ours.sign("former", Role::Client, Valid::NotAnyMore)));
    assert!(why.contains("CertificateExpired"), "{why}");
    // A certificate for servers is none for clients.
    let why = refused(Some(&server));
    assert!(why.contains("ertificate"), "{why}");
    // A client that believes in somebody else does not speak with this daemon.
    let why = ask(address, &other.file, Some(&good), VMS).expect_err("not believed");
    assert!(why.contains("UnknownIssuer"), "{why}");
    // Without TLS nothing is answered that is HTTP.
    let mut plain = connect(address);
    plain.write_all(VMS.as_bytes()).expect("send");
    let mut bytes = Vec::new();
    let _ = plain.read_to_end(&mut bytes);
    assert!(
        !String::from_utf8_lossy(&bytes).contains("HTTP"),
        "{bytes:?}"
    );
}

fn strangers() {
    let world = World::new();
    let ours = Authority::new(world.root.path(), "ours");
    let server = ours.sign("server", Role::Server, Valid::Yes);
    let daemon = world.daemon_with(&arguments(&server, &ours.file));
    let address = address(&world);
    let good = ours.sign("operator", Role::Client, Valid::Yes);
    let began = Instant::now();
    let crowd: Vec<TcpStream> = (0..hebed::tls::HANDSHAKES_MAX)
        .map(|_| connect(address))
        .collect();
    // Those on the socket notice nothing.
    assert_eq!(daemon.get("/v1/vms").status, 200);
    assert!(client::connect(&world.socket()).is_ok());
    // Those over the network wait until the strangers have had their time.
    let answer = ask(address, &ours.file, Some(&good), VMS).expect("served");
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    assert!(began.elapsed() >= hebed::server::HEAD_WAIT / 2);
    for mut stranger in crowd {
        let mut rest = Vec::new();
        // Ended, and told nothing.
        let _ = stranger.read_to_end(&mut rest);
        assert!(rest.is_empty(), "{rest:?}");
    }
}

fn files() {
    let world = World::new();
    let dir = world.root.path();
    let ours = Authority::new(dir, "ours");
    let (certificate, key) = ours.sign("server", Role::Server, Valid::Yes);
    let says = |pair: &Pair, ca: &Path| {
        let mut command = world.command();
        let output = command
            .args(arguments(pair, ca))
            .output()
            .expect("hebed runs");
        assert_eq!(output.status.code(), Some(1));
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    let none = dir.join("none");
    for (pair, ca, words) in [
        (
            (none.clone(), key.clone()),
            ours.file.clone(),
            ["--tls-cert", "none"],
        ),
        (
            (certificate.clone(), none.clone()),
            ours.file.clone(),
            ["--tls-key", "none"],
        ),
        (
            (certificate.clone(), key.clone()),
            none,
            ["--client-ca", "none"],
        ),
        (
            (key.clone(), key.clone()),
            ours.file.clone(),
            ["--tls-cert", "no certificate"],
        ),
        (
            (certificate.clone(), certificate.clone()),
            ours.file.clone(),
            ["--tls-key", "no private key"],
        ),
        (
            (certificate.clone(), key.clone()),
            key.clone(),
            ["--client-ca", "no certificate"],
        ),
        (
            (ours.file.clone(), key.clone()),
            ours.file.clone(),
            ["--tls-cert", "cannot be used"],
        ),
    ] {
        let said = says(&pair, &ca);
        assert!(
            words.iter().all(|word| said.contains(word)),
            "{words:?}: {said}"
        );
    }
    let mode = |path: &Path, mode| {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("mode");
    };
    mode(&key, 0o644);
    let said = says(&(certificate.clone(), key.clone()), &ours.file);
    assert!(
        said.contains("private key") && said.contains("chmod"),
        "{said}"
    );
    mode(&key, 0o640);
    mode(&ours.file, 0o666);
    let said = says(&(certificate, key), &ours.file);
    assert!(
        said.contains("every user") && said.contains("chmod"),
        "{said}"
    );
}
