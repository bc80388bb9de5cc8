//! One answer from each thread, also from one that panics: whoever waits for an
//! answer per VM must not wait for ever, least of all while the host goes down.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

/// Why there is no better answer.
pub(crate) const DIED: &str = "the thread that did this ended early: please report this";

/// Sends one answer: the one that it is given, or on its drop one of failure.
struct Answering<T, F: FnOnce(&str) -> T> {
    sender: Sender<T>,
    failure: Option<F>,
}

impl<T, F: FnOnce(&str) -> T> Answering<T, F> {
    fn give(mut self, answer: T) {
        self.failure = None;
        // Who waits for every answer is there to take it.
        let _ = self.sender.send(answer);
    }
}

impl<T, F: FnOnce(&str) -> T> Drop for Answering<T, F> {
    fn drop(&mut self) {
        if let Some(failure) = self.failure.take() {
            let _ = self.sender.send(failure(DIED));
        }
    }
}

/// Runs `work` in a thread of its own and sends `sender` its answer; `failure`
/// makes one where the thread panics. Where no thread can be started it is done
/// right here: later than wanted, and not left undone.
pub(crate) fn in_thread<T: Send + 'static>(
    sender: &Sender<T>,
    failure: impl FnOnce(&str) -> T + Send + 'static,
    work: impl FnOnce() -> T + Send + 'static,
) {
    let answering = Answering {
        sender: sender.clone(),
        failure: Some(failure),
    };
    let work = move || answering.give(work());
    let work = Arc::new(Mutex::new(Some(work)));
    let theirs = Arc::clone(&work);
    let take = |work: &Mutex<Option<_>>| work.lock().unwrap_or_else(PoisonError::into_inner).take();
    let started = thread::Builder::new().spawn(move || take(&theirs).map(|work| work()));
    if started.is_err() {
        let _ = catch_unwind(AssertUnwindSafe(|| take(&work).map(|work| work())));
    }
}

/// What `work` gives, or [`DIED`] where it panics. Only for work of which nothing
/// is used afterwards that it may have left half done.
pub(crate) fn or_died<T>(work: impl FnOnce() -> Result<T, String>) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|_| Err(DIED.to_owned()))
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;
    use std::time::Duration;

    use super::*;

    #[test]
    fn each_thread_answers_once_whatever_becomes_of_it() {
        let (sender, receiver) = channel();
        let failure = |why: &str| format!("failed: {why}");
        in_thread(&sender, failure, || "done".to_owned());
        let patience = Duration::from_secs(30);
        assert_eq!(receiver.recv_timeout(patience).expect("answers"), "done");
        in_thread(&sender, failure, || panic!("told to"));
        let answer = receiver.recv_timeout(patience).expect("answers");
        assert_eq!(answer, format!("failed: {DIED}"));
        drop(sender);
        assert!(receiver.recv_timeout(patience).is_err(), "and once only");
        assert_eq!(or_died(|| -> Result<(), _> { panic!() }), Err(DIED.into()));
        assert_eq!(or_died(|| Ok(1)), Ok(1));
    }
}
