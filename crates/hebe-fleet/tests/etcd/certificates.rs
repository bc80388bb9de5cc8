//! Certificates for tests of TLS, here and in `hebed`.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    date_time_ymd,
};

/// Somebody who signs certificates, into a folder.
pub struct Authority<'a> {
    dir: &'a Path,
    issuer: Issuer<'static, KeyPair>,
    /// Its own certificate.
    pub file: PathBuf,
}

/// A certificate and its key.
pub type Pair = (PathBuf, PathBuf);

/// What a certificate is for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Role {
    Client,
    Server,
    /// etcd's own gateway is a client of etcd with the server's certificate.
    Both,
}

/// Whether a certificate is valid still.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Valid {
    Yes,
    NotAnyMore,
}

/// Writes a file that only its owner may read.
pub fn write(path: PathBuf, text: &str) -> PathBuf {
    fs::write(&path, text).expect("write");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).expect("mode");
    path
}

impl<'a> Authority<'a> {
    pub fn new(dir: &'a Path, called: &str) -> Self {
        let mut params = CertificateParams::new([]).expect("parameters");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, called);
        let key = KeyPair::generate().expect("key");
        let own = params.self_signed(&key).expect("certificate");
        Self {
            file: write(dir.join(format!("{called}.pem")), &own.pem()),
            issuer: Issuer::new(params, key),
            dir,
        }
    }

    pub fn sign(&self, called: &str, role: Role, valid: Valid) -> Pair {
        let mut params = CertificateParams::new(["127.0.0.1".to_owned()]).expect("parameters");
        params.distinguished_name.push(DnType::CommonName, called);
        if role != Role::Client {
            let usage = ExtendedKeyUsagePurpose::ServerAuth;
            params.extended_key_usages.push(usage);
        }
        if role != Role::Server {
            let usage = ExtendedKeyUsagePurpose::ClientAuth;
            params.extended_key_usages.push(usage);
        }
        if valid == Valid::NotAnyMore {
            params.not_before = date_time_ymd(2020, 1, 1);
            params.not_after = date_time_ymd(2021, 1, 1);
        }
        let key = KeyPair::generate().expect("key");
        let signed = params.signed_by(&key, &self.issuer).expect("signed");
        (
            write(self.dir.join(format!("{called}.crt")), &signed.pem()),
            write(self.dir.join(format!("{called}.key")), &key.serialize_pem()),
        )
    }
}
