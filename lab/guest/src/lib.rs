//! What the test machine and the init program of the lab's hosts and guests
//! have in common: the agent's protocol and the guests' status page.

pub mod proto;
pub mod status;
