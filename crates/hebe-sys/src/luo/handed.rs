//! Sessions that another process retrieved and handed over, and the device for
//! those that it did not.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::{Incoming, LuoError, Orchestrator, Outgoing, SessionName};

/// A session by its name.
pub type Adopted = (SessionName, Box<dyn Incoming>);

/// Opens the device when it is needed.
type Open = Box<dyn Fn() -> Result<Box<dyn Orchestrator>, LuoError> + Send + Sync>;

/// Gives out each session once: those that were handed over, whoever got them
/// from the kernel, before those that the kernel still has.
pub struct Handed {
    open: Open,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    here: BTreeMap<SessionName, Box<dyn Incoming>>,
    given: BTreeSet<SessionName>,
    device: Option<Box<dyn Orchestrator>>,
}

impl fmt::Debug for Handed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let here = &self.lock().here;
        f.debug_list().entries(here.keys()).finish()
    }
}

impl Handed {
    /// With the sessions that were handed over. `open` opens the device; that is
    /// done for the first session that was not. A session that is there twice is
    /// taken once: both are one for the kernel.
    pub fn new(sessions: impl IntoIterator<Item = Adopted>, open: Open) -> Self {
        let state = State {
            here: sessions.into_iter().collect(),
            ..State::default()
        };
        Self {
            open,
            state: Mutex::new(state),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn device<T>(
        &self,
        state: &mut State,
        call: impl FnOnce(&dyn Orchestrator) -> Result<T, LuoError>,
    ) -> Result<T, LuoError> {
        let device = match state.device.take() {
            Some(device) => device,
            None => (self.open)()?,
        };
        call(&**state.device.insert(device))
    }
}

impl Orchestrator for Handed {
    fn create_session(&self, name: &SessionName) -> Result<Box<dyn Outgoing>, LuoError> {
        self.device(&mut self.lock(), |device| device.create_session(name))
    }

    fn retrieve_session(&self, name: &SessionName) -> Result<Box<dyn Incoming>, LuoError> {
        let mut state = self.lock();
        if let Some(session) = state.here.remove(name) {
            state.given.insert(name.clone());
            return Ok(session);
        }
        if state.given.contains(name) {
            return Err(LuoError::SessionTaken(name.clone()));
        }
        self.device(&mut state, |device| device.retrieve_session(name))
    }
}
