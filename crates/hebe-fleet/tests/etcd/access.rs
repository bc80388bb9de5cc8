//! TLS to etcd, with certificates of both sides, and users with passwords.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use hebe_fleet::config::{EtcdConfig, FleetConfig};
use hebe_fleet::http::{Client, TlsFiles};
use hebe_fleet::order::Order;
use hebe_fleet::slots::{FleetError, Slots};
use hebe_policy::fleet::holder::Stop;
use serde_json::json;

use crate::certificates::{Authority, Role, Valid, write};
use crate::server::Server;
use crate::{config, name, pinned, quiet, slot, there, times};

fn open(access: &EtcdConfig) -> Result<Slots, FleetError> {
    let config = FleetConfig {
        etcd: Some(access.clone()),
        ..config(&[], 1)
    };
    config.check().expect("sound");
    Slots::open(&config, &name("a"), "/nonexistent/note".into())
}

/// What is said when a slot is asked for with `access`, by an order that would
/// wait for a long time.
fn refused(access: &EtcdConfig) -> String {
    let slots = open(access).expect("client");
    slots.own(&name("a")).expect_err("refused").to_string()
}

#[test]
fn both_sides_show_who_they_are_over_tls() {
    let dir = tempfile::tempdir().expect("folder");
    let ours = Authority::new(dir.path(), "ours");
    let other = Authority::new(dir.path(), "other");
    let (server_file, server_key) = ours.sign("server", Role::Both, Valid::Yes);
    let (certificate, key) = ours.sign("client", Role::Both, Valid::Yes);
    let access = EtcdConfig {
        ca: Some(ours.file.clone()),
        certificate: Some(certificate),
        key: Some(key.clone()),
        ..EtcdConfig::default()
    };
    let flags = [
        ("cert-file", server_file),
        ("key-file", server_key),
        ("trusted-ca-file", ours.file.clone()),
    ];
    let mut flags: Vec<(&str, String)> = flags
        .into_iter()
        .map(|(flag, file)| (flag, file.display().to_string()))
        .collect();
    flags.push(("client-cert-auth", "true".to_owned()));
    let Some(server) = Server::start_with(1, access, &flags) else {
        return;
    };
    let good = server.config();
    let slots = open(&good).expect("client");
    pinned(&slots, &config(&[], 1), "a", 120);
    assert!(there(&slots, "a").is_some());
    // A server that somebody else vouches for, a client that nobody does, or
    // that others do.
    let wrong_ca = EtcdConfig {
        ca: Some(other.file.clone()),
        ..good.clone()
    };
    let why = refused(&wrong_ca);
    assert!(why.contains("UnknownIssuer"), "{why}");
    let nobody = EtcdConfig {
        certificate: None,
        key: None,
        ..good.clone()
    };
    assert!(refused(&nobody).contains("nobody keeps the slots"));
    let (certificate, foreign_key) = other.sign("stranger", Role::Both, Valid::Yes);
    let stranger = EtcdConfig {
        certificate: Some(certificate),
        key: Some(foreign_key),
        ..good.clone()
    };
    assert!(refused(&stranger).contains("nobody keeps the slots"));
    // Files that cannot be used are told of by name, before anybody is asked.
    let unusable = |access: &EtcdConfig, word: &str| {
        let Err(error) = open(access) else {
            panic!("{word}: it was taken");
        };
        assert!(error.to_string().contains(word), "{word}: {error}");
    };
    let with_ca = |file: PathBuf| EtcdConfig {
        ca: Some(file),
        ..good.clone()
    };
    unusable(
        &with_ca("/nonexistent/ca.pem".into()),
        "/nonexistent/ca.pem",
    );
    unusable(&with_ca(key.clone()), "holds no certificate");
    fs::set_permissions(&key, fs::Permissions::from_mode(0o644)).expect("mode");
    unusable(&good, "every user of this host may read it");
}

#[test]
fn a_user_of_etcd_has_a_password_and_others_are_told_at_once() {
    let dir = tempfile::tempdir().expect("folder");
    let password = write(dir.path().join("password"), "secret\n");
    let Some(mut server) = Server::start(1) else {
        return;
    };
    let client = Client::new(Duration::from_secs(20), &TlsFiles::default()).expect("client");
    for (path, body) in [
        ("user/add", json!({"name": "root", "password": "secret"})),
        ("role/add", json!({"name": "root"})),
        ("user/grant", json!({"user": "root", "role": "root"})),
        ("enable", json!({})),
    ] {
        let url = format!("{}/v3/auth/{path}", server.endpoints[0]);
        let answer = client.post(&url, &[], &body).expect("answer");
        assert_eq!(answer.status, 200, "{path}: {answer:?}");
    }
    let nobody = server.config();
    server.access.user = Some("root".to_owned());
    server.access.password_file = Some(password);
    let slots = open(&server.config()).expect("client");
    pinned(&slots, &config(&[], 1), "a", 120);
    // A token is no longer taken after users were changed, or its own was.
    for (path, body) in [
        ("user/add", json!({"name": "other", "password": "other"})),
        (
            "user/changepw",
            json!({"name": "root", "password": "secret"}),
        ),
    ] {
        let url = |path: &str| format!("{}/v3/auth/{path}", server.endpoints[0]);
        let login = json!({"name": "root", "password": "secret"});
        let answer = client.post(&url("authenticate"), &[], &login);
        let answer = answer.expect("answer").body;
        let token = answer["token"].as_str().expect("token");
        let answer = client.post(&url(path), &[("authorization", token)], &body);
        assert_eq!(answer.expect("answer").status, 200, "{path}");
        assert!(there(&slots, "a").is_some(), "{path}: with a new token");
    }
    let mut wrong = server.config();
    wrong.password_file = Some(write(dir.path().join("wrong"), "guess\n"));
    for access in [nobody, wrong] {
        let why = refused(&access);
        assert!(why.contains("does not let this host in"), "{why}");
        // Whoever would wait for a slot is told, too, and does not wait.
        let begun = Instant::now();
        let slots = open(&access).expect("client");
        let config = config(&[], 1);
        let wanted = slot(&config, "b", "boot-1");
        let Err(Stop::NoSlot(why)) = Order::take(&slots, wanted, times(&config, 600), &quiet)
        else {
            panic!("no slot was to be had");
        };
        assert!(why.contains("does not let this host in"), "{why}");
        assert!(begun.elapsed() < Duration::from_secs(300));
    }
}
