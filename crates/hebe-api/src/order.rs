//! A request as it travels, with the instant from which on it is void.

use std::time::Duration;

use hebe_sys::proc::since_boot_ns;
use serde::{Deserialize, Serialize};

use crate::Request;

/// An instant on the clock that client and VMM share: `CLOCK_BOOTTIME` of the
/// kernel that both run under, which nobody sets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Deadline {
    boottime_ns: u64,
}

impl Deadline {
    /// So long from now.
    pub fn after(wait: Duration) -> Self {
        let wait = u64::try_from(wait.as_nanos()).unwrap_or(u64::MAX);
        Self {
            boottime_ns: since_boot_ns().saturating_add(wait),
        }
    }

    /// Whether it is now, or was.
    pub fn has_passed(self) -> bool {
        since_boot_ns() >= self.boottime_ns
    }
}

/// What a frame to a VMM holds. A client of an earlier release sends the bare
/// [`Request`], which reads as one without a deadline, and a VMM of an earlier
/// release reads past the deadline.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Order {
    /// What is asked.
    #[serde(flatten)]
    pub request: Request,
    /// Until when the client waits. A VMM does not begin later with what
    /// changes its VM's state: the client has given up, and may have undone
    /// what the request was a part of. `None` is always in time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub until: Option<Deadline>,
}

impl Order {
    /// The client that asked waits no more.
    pub fn is_expired(&self) -> bool {
        self.until.is_some_and(Deadline::has_passed)
    }
}

impl Request {
    /// Whether the VM is not the same afterwards.
    pub fn changes_state(&self) -> bool {
        match self {
            Self::Status | Self::Console | Self::SegmentFiles | Self::Balloon { target: None } => {
                false
            }
            Self::Pause
            | Self::Unpause
            | Self::Freeze
            | Self::Thaw
            | Self::Save { .. }
            | Self::PowerButton
            | Self::Quit { .. }
            | Self::Balloon { target: Some(_) } => true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::VmmState;

    fn requests() -> Vec<Request> {
        let expected = Some(VmmState::Frozen);
        let name = "/saved/web.part".into();
        vec![
            Request::Status,
            Request::Pause,
            Request::Unpause,
            Request::Freeze,
            Request::Thaw,
            Request::Save { name },
            Request::PowerButton,
            Request::Quit { expected },
            Request::Quit { expected: None },
            Request::Console,
            Request::SegmentFiles,
            Request::Balloon { target: None },
            Request::Balloon {
                target: Some(hebe_types::ByteSize::mib(64)),
            },
        ]
    }

    #[test]
    fn orders_and_the_bare_requests_of_another_release_read_each_other() {
        for request in requests() {
            let bare = serde_json::to_string(&request).expect("encode");
            let read: Order = serde_json::from_str(&bare).expect(&bare);
            assert_eq!((&read.request, read.until), (&request, None));
            let until = Some(Deadline::after(Duration::from_secs(60)));
            let order = Order { request, until };
            let sent = serde_json::to_string(&order).expect("encode");
            assert_eq!(serde_json::from_str::<Order>(&sent).expect(&sent), order);
            let old: Request = serde_json::from_str(&sent).expect(&sent);
            assert_eq!(old, order.request);
        }
    }

    #[test]
    fn a_deadline_passes() {
        let order = |wait| Order {
            request: Request::Freeze,
            until: Some(Deadline::after(wait)),
        };
        assert!(order(Duration::ZERO).is_expired());
        assert!(!order(Duration::from_secs(3600)).is_expired());
        assert!(!order(Duration::MAX).is_expired());
        let always = Order {
            request: Request::Freeze,
            until: None,
        };
        assert!(!always.is_expired());
    }
}
