//! What host and agent say, one JSON object a line.

use serde::{Deserialize, Serialize};

/// Longest line to the agent, in bytes.
pub const REQUEST_LEN_MAX: usize = 8 << 10;
/// Longest line from the agent, in bytes.
pub const SAID_LEN_MAX: usize = 256 << 10;
/// Longest name of a phase, in bytes.
pub const PHASE_LEN_MAX: usize = 64;
/// Longest time that file systems stay frozen, in seconds.
pub const FREEZE_MAX_S: u32 = 60;
/// Longest time that a program may take, in seconds.
pub const EXEC_MAX_S: u32 = 300;
/// Most words of a program's command line.
pub const EXEC_WORDS_MAX: usize = 64;
/// Most bytes kept of each of a program's outputs.
pub const OUTPUT_MAX: usize = 16 << 10;
/// Seconds between two beats: least and most.
pub const BEAT_S: std::ops::RangeInclusive<u32> = 1..=3600;

/// A line to the agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    /// Chosen by the host; its answer carries it.
    pub id: u64,
    /// What to do.
    #[serde(rename = "do")]
    pub order: Order,
}

/// What the agent can do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Order {
    /// Answer with [`Facts`].
    Ping,
    /// Set the wall clock.
    Time {
        /// Nanoseconds since 1970.
        realtime_ns: u64,
    },
    /// Make file systems consistent on their disks and keep them so.
    Freeze {
        /// They thaw by themselves after so many seconds from now on, 1 to
        /// [`FREEZE_MAX_S`], also where not all are frozen by then.
        for_s: u32,
    },
    /// Let frozen file systems go on.
    Thaw,
    /// Shut the guest down.
    Shutdown {
        /// Boot again.
        reboot: bool,
    },
    /// Run a program; refused unless the agent was started with
    /// `--allow-exec`.
    Exec {
        /// The program, by its path, and its arguments.
        words: Vec<String>,
        /// It is killed after so many seconds, 1 to [`EXEC_MAX_S`].
        for_s: u32,
    },
    /// Say [`Said::Beat`] from now on, and at once when the phase changes.
    Watch {
        /// Every so many seconds, in [`BEAT_S`].
        every_s: u32,
    },
}

/// A line from the agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Said {
    /// The first line of a connection.
    Hello(Facts),
    /// See [`Order::Watch`].
    Beat(Facts),
    /// An order was carried out.
    Done {
        /// The request's.
        id: u64,
        /// What came of it.
        result: Done,
    },
    /// It was not.
    Failed {
        /// The request's, or 0 if it could not be read.
        id: u64,
        /// Why, in one sentence.
        why: String,
    },
}

/// What came of an order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Done {
    /// It was carried out, or is under way.
    Ok,
    /// Of [`Order::Ping`].
    Facts(Facts),
    /// Of [`Order::Time`]: how far the guest's clock was ahead, in
    /// nanoseconds.
    WasAhead {
        /// Negative: it was behind.
        ns: i64,
    },
    /// Of [`Order::Freeze`] and [`Order::Thaw`]: how many file systems.
    FileSystems {
        /// How many.
        count: u32,
    },
    /// Of [`Order::Exec`].
    Ended {
        /// Its exit status; none if a signal or the time limit ended it.
        status: Option<i32>,
        /// The beginning of its standard output, as text.
        stdout: String,
        /// The beginning of its standard error, as text.
        stderr: String,
        /// Not all of its output is here.
        cut: bool,
    },
}

/// How the guest is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Facts {
    /// Version of the protocol.
    pub protocol: u32,
    /// The agent's release.
    pub agent: String,
    /// How far the guest came, in its owner's words: `up` until it says
    /// otherwise.
    pub phase: String,
    /// Changes when the guest boots, and not when it is suspended.
    pub boot_id: String,
    /// Seconds since the guest booted.
    pub uptime_s: u64,
    /// File systems are frozen.
    pub frozen: bool,
}

impl Order {
    /// Whether all its numbers are within their bounds.
    ///
    /// # Errors
    /// Which is not, and what it may be.
    pub fn check(&self) -> Result<(), String> {
        let within = |what: &str, value: u32, most: u32| {
            if (1..=most).contains(&value) {
                return Ok(());
            }
            Err(format!("{what} = {value} is not possible: 1 to {most}"))
        };
        match self {
            Self::Freeze { for_s } => within("for_s", *for_s, FREEZE_MAX_S),
            Self::Watch { every_s } => within("every_s", *every_s, *BEAT_S.end()),
            Self::Exec { words, for_s } => {
                within("for_s", *for_s, EXEC_MAX_S)?;
                if words.is_empty() || words.len() > EXEC_WORDS_MAX {
                    return Err(format!("a program has 1 to {EXEC_WORDS_MAX} words"));
                }
                Ok(())
            }
            Self::Ping | Self::Time { .. } | Self::Thaw | Self::Shutdown { .. } => Ok(()),
        }
    }
}

/// Whether this can name a phase: 1 to [`PHASE_LEN_MAX`] of `a-z`, `0-9`, `-`.
pub fn is_phase(text: &str) -> bool {
    let good = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    (1..=PHASE_LEN_MAX).contains(&text.len()) && text.bytes().all(good)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(order: Order) -> String {
        serde_json::to_string(&Request { id: 7, order }).expect("JSON")
    }

    /// These bytes are the protocol: guests have agents of other releases.
    #[test]
    fn requests_are_written_as_documented() {
        for (order, text) in [
            (Order::Ping, r#""ping""#),
            (
                Order::Time { realtime_ns: 5 },
                r#"{"time":{"realtime_ns":5}}"#,
            ),
            (Order::Freeze { for_s: 10 }, r#"{"freeze":{"for_s":10}}"#),
            (Order::Thaw, r#""thaw""#),
            (
                Order::Shutdown { reboot: true },
                r#"{"shutdown":{"reboot":true}}"#,
            ),
            (Order::Watch { every_s: 5 }, r#"{"watch":{"every_s":5}}"#),
            (
                Order::Exec {
                    words: vec!["/bin/true".into()],
                    for_s: 1,
                },
                r#"{"exec":{"words":["/bin/true"],"for_s":1}}"#,
            ),
        ] {
            assert_eq!(line(order), format!(r#"{{"id":7,"do":{text}}}"#));
        }
    }

    #[test]
    fn answers_are_written_as_documented() {
        let facts = Facts {
            protocol: 1,
            agent: "0.1.0".into(),
            phase: "up".into(),
            boot_id: "b".into(),
            uptime_s: 9,
            frozen: false,
        };
        let facts_text = r#"{"protocol":1,"agent":"0.1.0","phase":"up","boot_id":"b","uptime_s":9,"frozen":false}"#;
        let done = |result| Said::Done { id: 7, result };
        for (said, text) in [
            (
                Said::Hello(facts.clone()),
                format!(r#"{{"hello":{facts_text}}}"#),
            ),
            (done(Done::Ok), r#"{"done":{"id":7,"result":"ok"}}"#.into()),
            (
                done(Done::WasAhead { ns: -3 }),
                r#"{"done":{"id":7,"result":{"was-ahead":{"ns":-3}}}}"#.into(),
            ),
            (
                done(Done::FileSystems { count: 2 }),
                r#"{"done":{"id":7,"result":{"file-systems":{"count":2}}}}"#.into(),
            ),
            (
                Said::Failed {
                    id: 0,
                    why: "no".into(),
                },
                r#"{"failed":{"id":0,"why":"no"}}"#.into(),
            ),
        ] {
            assert_eq!(serde_json::to_string(&said).expect("JSON"), text);
            assert_eq!(serde_json::from_str::<Said>(&text).ok(), Some(said));
        }
    }

    #[test]
    fn numbers_out_of_bounds_are_refused_by_name() {
        for for_s in [0, FREEZE_MAX_S + 1] {
            let refused = Order::Freeze { for_s }.check();
            assert!(refused.is_err_and(|why| why.contains("for_s")));
        }
        assert!(Order::Watch { every_s: 0 }.check().is_err());
        let exec = |count, for_s| {
            let words = vec![String::new(); count];
            Order::Exec { words, for_s }.check()
        };
        assert!(exec(1, 1).is_ok() && exec(EXEC_WORDS_MAX, EXEC_MAX_S).is_ok());
        assert!(exec(0, 1).is_err() && exec(65, 1).is_err() && exec(1, 301).is_err());
    }

    #[test]
    fn phases_are_short_words() {
        assert!(is_phase("ready") && is_phase("step-2"));
        for bad in ["", "Ready", "a b", "a\n", "ü", &"a".repeat(65)] {
            assert!(!is_phase(bad), "{bad:?}");
        }
    }
}
