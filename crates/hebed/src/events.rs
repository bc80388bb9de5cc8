//! What happens, told to whoever listens.
//!
//! An event is encoded once and shared by all who hear it. Who is too slow
//! loses the oldest ones and is told so; nobody waits for it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use hebe_host::listing::VmState;
use hebe_types::VmName;
use serde::Serialize;
use tokio::sync::broadcast;

use crate::agents::AgentState;
use crate::jobs::Job;

/// Events that are kept for a slow listener.
const BACKLOG: usize = 256;

/// Something that happened.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case", untagged)]
pub enum Event {
    /// A job began, got on or ended.
    Job(Job),
    /// A VM is in another state than before.
    Vm {
        /// Which VM.
        name: VmName,
        /// Before; `None` for one that is new.
        before: Option<VmState>,
        /// Now; `None` for one that is gone.
        state: Option<VmState>,
        /// More about it.
        detail: Option<String>,
    },
    /// The supervisor has something to say.
    Supervisor {
        /// Of which VM.
        name: VmName,
        /// A sentence.
        text: String,
        /// Somebody should look.
        trouble: bool,
    },
    /// An agent was heard for the first time, fell silent, or is back.
    Agent {
        /// Of which VM.
        name: VmName,
        /// How it is now.
        state: AgentState,
        /// When it was last heard, in seconds since 1970.
        heard_at: Option<f64>,
    },
    /// How the host is ageing.
    Ageing {
        /// A sentence with its reason.
        text: String,
        /// Somebody should look.
        trouble: bool,
    },
}

impl Event {
    /// Its name on the wire.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Job(_) => "job",
            Self::Vm { .. } => "vm",
            Self::Supervisor { .. } => "supervisor",
            Self::Agent { .. } => "agent",
            Self::Ageing { .. } => "ageing",
        }
    }
}

/// An event as it is sent.
#[derive(Clone, Debug)]
pub struct Sent {
    /// Counts from 1 in each daemon.
    pub number: u64,
    /// [`Event::kind`].
    pub kind: &'static str,
    /// JSON.
    pub data: Arc<str>,
}

/// Where events go.
#[derive(Debug)]
pub struct Bus {
    sender: broadcast::Sender<Sent>,
    last: AtomicU64,
}

impl Default for Bus {
    fn default() -> Self {
        Self {
            sender: broadcast::Sender::new(BACKLOG),
            last: AtomicU64::new(0),
        }
    }
}

impl Bus {
    /// Tells everybody who listens.
    pub fn tell(&self, event: &Event) {
        if self.sender.receiver_count() == 0 {
            return;
        }
        let Ok(data) = serde_json::to_string(event) else {
            return;
        };
        let _ = self.sender.send(Sent {
            number: self.last.fetch_add(1, Ordering::Relaxed) + 1,
            kind: event.kind(),
            data: data.into(),
        });
    }

    /// Hears everything from now on.
    pub fn listen(&self) -> broadcast::Receiver<Sent> {
        self.sender.subscribe()
    }
}
