//! What is needed of etcd: keys, leases, transactions, over the JSON gateway
//! of its v3 API (`/v3/…`, since etcd 3.4). Keys and values are base64 there,
//! and 64-bit numbers are strings.

use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

use crate::http::{Answer, Client, shown};
use crate::slots::FleetError;

/// etcd's code for something that is not there (gRPC's NOT_FOUND).
const CODE_NOT_FOUND: i64 = 5;

/// A client. It tries one member after the other.
#[derive(Clone, Debug)]
pub struct Etcd {
    client: Client,
    endpoints: Vec<String>,
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
    /// This key was last written at this revision.
    WrittenAt(String, i64),
}

/// A change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// Key, value and lease (0 for none).
    Put(String, Vec<u8>, i64),
    /// Key.
    Delete(String),
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

impl Etcd {
    /// A client of these members, each request of which ends within `timeout`.
    pub fn new(endpoints: &[String], timeout: Duration) -> Self {
        let trimmed = endpoints.iter().map(|url| url.trim_end_matches('/'));
        Self {
            client: Client::new(timeout),
            endpoints: trimmed.map(str::to_owned).collect(),
        }
    }

    /// Posts to the first member that answers. A member that does not answer
    /// may have carried the request out.
    fn post(&self, path: &str, body: &Value) -> Result<Value, FleetError> {
        let mut why = Vec::new();
        for endpoint in &self.endpoints {
            match self.client.post(&format!("{endpoint}{path}"), &[], body) {
                Ok(answer) if answer.status == 200 && answer.body.is_object() => {
                    return Ok(answer.body);
                }
                Ok(answer) if number(&answer.body["code"]) == CODE_NOT_FOUND => {
                    return Err(FleetError::NotThere);
                }
                Ok(answer) => why.push(format!("{endpoint}: {}", refusal(&answer))),
                Err(silent) => why.push(format!("{endpoint}: {}", silent.why)),
            }
        }
        Err(FleetError::Silent(why.join("; ")))
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

    /// Makes a change under a condition; whether it was made. A change under
    /// [`Condition::WrittenAt`] or [`Condition::QuietSince`] that writes what
    /// the condition is about is made once at most, however often it is sent.
    ///
    /// # Errors
    /// When nobody answers: it may have been made. [`FleetError::NotThere`]
    /// when its lease is over: it was not.
    pub fn change(&self, condition: &Condition, change: &Change) -> Result<bool, FleetError> {
        let compare = match condition {
            Condition::QuietSince(prefix, revision) => json!({
                "key": base64(prefix), "range_end": range_end(prefix), "target": "MOD",
                "result": "LESS", "mod_revision": (revision + 1).to_string(),
            }),
            Condition::WrittenAt(key, revision) => json!({
                "key": base64(key), "target": "MOD",
                "result": "EQUAL", "mod_revision": revision.to_string(),
            }),
        };
        let act = match change {
            Change::Put(key, value, lease) => json!({"request_put": {
                "key": base64(key), "value": base64(value), "lease": lease.to_string(),
            }}),
            Change::Delete(key) => json!({"request_delete_range": {"key": base64(key)}}),
        };
        let body = json!({"compare": [compare], "success": [act]});
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
