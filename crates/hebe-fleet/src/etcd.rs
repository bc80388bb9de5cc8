//! What is needed of etcd: keys, leases, transactions, over the JSON gateway
//! of its v3 API (`/v3/…`, since etcd 3.4). Keys and values are base64 there,
//! and 64-bit numbers are strings.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

use crate::config::EtcdConfig;
use crate::http::{Answer, Client, Silent, password, shown};
use crate::slots::FleetError;

/// etcd's code for something that is not there (gRPC's NOT_FOUND).
const CODE_NOT_FOUND: i64 = 5;
/// Its code for what this user may not do (PERMISSION_DENIED).
const CODE_DENIED: i64 = 7;
/// Its code for a token that it does not know (UNAUTHENTICATED).
const CODE_TOKEN: i64 = 16;
/// Words of refusals that have no code of their own: wrong name or password,
/// none where one is wanted, one where none is wanted.
const LOGIN_WORDS: [&str; 4] = [
    "authentication failed",
    "user name is empty",
    "user name not found",
    "authentication is not enabled",
];
/// A token that was given before users or roles were changed.
const OLD_TOKEN: &str = "revision in header is old";

/// A client. It tries one member after the other.
#[derive(Clone, Debug)]
pub struct Etcd {
    client: Client,
    endpoints: Vec<String>,
    login: Option<Login>,
}

/// A user, and the token that etcd gave for it, good for some minutes.
#[derive(Clone)]
struct Login {
    user: String,
    password: String,
    token: Arc<Mutex<Option<String>>>,
}

impl std::fmt::Debug for Login {
    /// Without what is nobody's business.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Login").field("user", &self.user).finish()
    }
}

/// A key as it was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The key.
    pub key: String,
    /// Its value.
    pub value: Vec<u8>,
    /// The store's revision when it was last written.
    pub mod_revision: i64,
    /// Its lease, 0 if it has none.
    pub lease: i64,
}

/// Some keys at one instant.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Range {
    /// The store's revision.
    pub revision: i64,
    /// The keys.
    pub entries: Vec<Entry>,
}

/// On what a change depends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Condition {
    /// No key with this prefix was written after this revision.
    QuietSince(String, i64),
    /// This key was last written at this revision, 0 for a key that is not
    /// there.
    WrittenAt(String, i64),
}

impl Condition {
    fn json(&self) -> Value {
        match self {
            Self::QuietSince(prefix, revision) => json!({
                "key": base64(prefix), "range_end": range_end(prefix), "target": "MOD",
                "result": "LESS", "mod_revision": (revision + 1).to_string(),
            }),
            Self::WrittenAt(key, revision) => json!({
                "key": base64(key), "target": "MOD",
                "result": "EQUAL", "mod_revision": revision.to_string(),
            }),
        }
    }
}

/// A change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// Key, value and lease (0 for none).
    Put(String, Vec<u8>, i64),
    /// Key.
    Delete(String),
}

impl Change {
    fn json(&self) -> Value {
        match self {
            Self::Put(key, value, lease) => json!({"request_put": {
                "key": base64(key), "value": base64(value), "lease": lease.to_string(),
            }}),
            Self::Delete(key) => json!({"request_delete_range": {"key": base64(key)}}),
        }
    }
}

fn base64(bytes: impl AsRef<[u8]>) -> String {
    STANDARD.encode(bytes)
}

/// The end of the range of all keys that begin with `prefix`, which does not
/// end in the byte 255.
fn range_end(prefix: &str) -> String {
    let mut end = prefix.as_bytes().to_vec();
    if let Some(last) = end.last_mut() {
        *last = last.saturating_add(1);
    }
    base64(end)
}

fn number(value: &Value) -> i64 {
    let text = value.as_str().and_then(|text| text.parse().ok());
    text.or_else(|| value.as_i64()).unwrap_or(0)
}

fn bytes(value: &Value) -> Option<Vec<u8>> {
    STANDARD.decode(value.as_str().unwrap_or_default()).ok()
}

fn range_of(body: &Value) -> Option<Range> {
    let empty = Vec::new();
    let entries = body["kvs"].as_array().unwrap_or(&empty).iter().map(|kv| {
        Some(Entry {
            key: String::from_utf8(bytes(&kv["key"])?).ok()?,
            value: bytes(&kv["value"])?,
            mod_revision: number(&kv["mod_revision"]),
            lease: number(&kv["lease"]),
        })
    });
    Some(Range {
        revision: number(&body["header"]["revision"]),
        entries: entries.collect::<Option<_>>()?,
    })
}

/// Why one member did not do as asked.
enum Miss {
    /// It did not answer, or cannot; another one may.
    Next(String),
    /// All would say the same.
    Final(FleetError),
}

impl Etcd {
    /// A client as `config` says, each request of which ends within `timeout`.
    ///
    /// # Errors
    /// When a file that it names cannot be used.
    pub fn new(config: &EtcdConfig, timeout: Duration) -> Result<Self, FleetError> {
        let login = match (&config.user, &config.password_file) {
            (Some(user), Some(file)) => Some(Login {
                user: user.clone(),
                password: password(file)?,
                token: Arc::default(),
            }),
            _ => None,
        };
        let trimmed = config.endpoints.iter().map(|url| url.trim_end_matches('/'));
        Ok(Self {
            client: Client::new(timeout, &config.tls())?,
            endpoints: trimmed.map(str::to_owned).collect(),
            login,
        })
    }

    /// Posts to the first member that answers. A member that does not answer
    /// may have carried the request out.
    fn post(&self, path: &str, body: &Value) -> Result<Value, FleetError> {
        let mut why = Vec::new();
        for endpoint in &self.endpoints {
            match self.post_to(endpoint, path, body) {
                Ok(answer) => return Ok(answer),
                Err(Miss::Final(error)) => return Err(error),
                Err(Miss::Next(reason)) => why.push(format!("{endpoint}: {reason}")),
            }
        }
        Err(FleetError::Silent(why.join("; ")))
    }

    /// Posts to one member; once more with a new token if it does not take the
    /// old one, for then it did nothing.
    fn post_to(&self, endpoint: &str, path: &str, body: &Value) -> Result<Value, Miss> {
        let url = format!("{endpoint}{path}");
        let silent = |silent: Silent| Miss::Next(silent.why);
        let Some(login) = &self.login else {
            return answered(self.client.post(&url, &[], body).map_err(silent)?);
        };
        let known = login
            .token
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        if let Some(token) = known {
            let headers = [("authorization", token.as_str())];
            let answer = self.client.post(&url, &headers, body).map_err(silent)?;
            if !wants_new_token(&answer) {
                return answered(answer);
            }
        }
        let token = self.authenticate(endpoint, login)?;
        let headers = [("authorization", token.as_str())];
        answered(self.client.post(&url, &headers, body).map_err(silent)?)
    }

    fn authenticate(&self, endpoint: &str, login: &Login) -> Result<String, Miss> {
        let url = format!("{endpoint}/v3/auth/authenticate");
        let body = json!({"name": login.user, "password": login.password});
        let answer = self.client.post(&url, &[], &body);
        let answer = answered(answer.map_err(|silent| Miss::Next(silent.why))?)?;
        let Some(token) = answer["token"].as_str() else {
            return Err(Miss::Next("no token in its answer".to_owned()));
        };
        *login.token.lock().unwrap_or_else(PoisonError::into_inner) = Some(token.to_owned());
        Ok(token.to_owned())
    }

    /// All keys with a prefix, as a majority of the members sees them.
    ///
    /// # Errors
    /// When nobody answers.
    pub fn range(&self, prefix: &str) -> Result<Range, FleetError> {
        let body = json!({"key": base64(prefix), "range_end": range_end(prefix)});
        let answer = self.post("/v3/kv/range", &body)?;
        range_of(&answer).ok_or_else(|| FleetError::Odd("keys that are no text".into()))
    }

    /// Makes changes under conditions, all or none; whether they were made. A
    /// change under [`Condition::WrittenAt`] or [`Condition::QuietSince`] that
    /// writes what the condition is about is made once at most, however often
    /// it is sent.
    ///
    /// # Errors
    /// When nobody answers: it may have been made. [`FleetError::NotThere`]
    /// when its lease is over: it was not.
    pub fn change(&self, conditions: &[Condition], changes: &[Change]) -> Result<bool, FleetError> {
        let compare: Vec<Value> = conditions.iter().map(Condition::json).collect();
        let success: Vec<Value> = changes.iter().map(Change::json).collect();
        let body = json!({"compare": compare, "success": success});
        let answer = self.post("/v3/kv/txn", &body)?;
        Ok(answer["succeeded"].as_bool().unwrap_or(false))
    }

    /// Begins a lease.
    ///
    /// # Errors
    /// When nobody answers.
    pub fn lease(&self, seconds: u64) -> Result<i64, FleetError> {
        let answer = self.post("/v3/lease/grant", &json!({"TTL": seconds.to_string()}))?;
        match number(&answer["ID"]) {
            0 => Err(FleetError::Odd("a lease without a number".into())),
            id => Ok(id),
        }
    }

    /// Renews a lease; false if it is over.
    ///
    /// # Errors
    /// When nobody answers.
    pub fn renew(&self, lease: i64) -> Result<bool, FleetError> {
        let body = json!({"ID": lease.to_string()});
        let answer = self.post("/v3/lease/keepalive", &body)?;
        Ok(number(&answer["result"]["TTL"]) > 0)
    }

    /// Ends a lease, and what is bound to it.
    ///
    /// # Errors
    /// When nobody answers.
    pub fn revoke(&self, lease: i64) -> Result<(), FleetError> {
        match self.post("/v3/lease/revoke", &json!({"ID": lease.to_string()})) {
            Ok(_) | Err(FleetError::NotThere) => Ok(()),
            Err(error) => Err(error),
        }
    }
}

/// What a member's answer comes to.
fn answered(answer: Answer) -> Result<Value, Miss> {
    if answer.status == 200 && answer.body.is_object() {
        return Ok(answer.body);
    }
    let code = number(&answer.body["code"]);
    let reason = refusal(&answer);
    if code == CODE_NOT_FOUND {
        return Err(Miss::Final(FleetError::NotThere));
    }
    let login = LOGIN_WORDS.iter().any(|words| reason.contains(words));
    if login || code == CODE_DENIED || code == CODE_TOKEN {
        return Err(Miss::Final(FleetError::NotAllowed(reason)));
    }
    Err(Miss::Next(reason))
}

fn wants_new_token(answer: &Answer) -> bool {
    number(&answer.body["code"]) == CODE_TOKEN || refusal(answer).contains(OLD_TOKEN)
}

/// Why a member did not do as asked.
fn refusal(answer: &Answer) -> String {
    let text = ["error", "message"].map(|key| answer.body[key].as_str());
    let text = text.into_iter().flatten().next();
    match text {
        Some(text) => format!("status {}, {}", answer.status, shown(text)),
        None => format!("status {}, which is not how etcd answers", answer.status),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_read_as_etcd_writes_them() {
        let body = json!({
            "header": {"revision": "12"},
            "kvs": [{"key": "L2E=", "value": "e30=", "mod_revision": "7", "lease": "99"}, {"key": "L2I="}],
        });
        let range = range_of(&body).expect("range");
        assert_eq!(range.revision, 12);
        let (first, second) = (&range.entries[0], &range.entries[1]);
        assert_eq!(
            (first.key.as_str(), first.value.as_slice()),
            ("/a", &b"{}"[..])
        );
        assert_eq!((first.mod_revision, first.lease), (7, 99));
        assert_eq!((second.key.as_str(), second.value.len()), ("/b", 0));
        assert_eq!(range_of(&json!({"kvs": [{"key": "???"}]})), None);
        assert_eq!(range_of(&json!({})), Some(Range::default()));
    }

    #[test]
    fn a_range_ends_behind_its_last_key() {
        assert_eq!(range_end("/g/"), base64("/g0"));
    }
}
