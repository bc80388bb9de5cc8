//! The control socket.
//!
//! One thread accepts, one thread serves each connection, and the VM is
//! behind one lock: requests are served one at a time, in the order in which
//! they get it. A client that says nothing, or nonsense, holds no lock.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use hebe_api::{Deadline, Order, Request, Response, VmmState, read_frame, write_frame};
use hebe_store::Segment;

use crate::log;
use crate::vm::{Event, Vm, VmError};

/// Most connections at once; one more is closed at once.
const CONNECTIONS_MAX: usize = 32;

/// How often it is looked whether a guest that resets is there again.
const LOOK_EVERY: Duration = Duration::from_millis(1);

/// The VM, shared between control connections and the main thread. It is
/// `None` while it is rebuilt after a reset and once it has ended.
pub(crate) type Shared = Arc<Mutex<Option<Vm>>>;

/// Listens on `path`, replacing a socket that a dead process left. The
/// caller holds the VM's lock, so no live VMM listens there.
pub(crate) fn listen(path: &Path) -> Result<UnixListener, VmError> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => UnixListener::bind(path),
    }
    .map_err(|source| VmError::Io {
        what: "a socket cannot be made: check the rights and the space of the run directory",
        source,
    })
}

/// Serves connections for ever, in a thread of its own.
pub(crate) fn serve(listener: UnixListener, vm: Shared, events: Sender<Event>) -> io::Result<()> {
    let connections = Arc::new(AtomicUsize::new(0));
    let accept = move || {
        for stream in listener.incoming().flatten() {
            if connections.fetch_add(1, Ordering::SeqCst) >= CONNECTIONS_MAX {
                connections.fetch_sub(1, Ordering::SeqCst);
                continue;
            }
            let (vm, events, connections) = (vm.clone(), events.clone(), connections.clone());
            let spawned = hebe_sys::thread::named("control").spawn(move || {
                // A broken connection is its client's business.
                let _ = converse(stream, &vm, &events);
                connections.fetch_sub(1, Ordering::SeqCst);
            });
            if let Err(error) = spawned {
                log::log_error(&format!("no thread for a control connection: {error}"));
            }
        }
    };
    hebe_sys::thread::named("accept").spawn(accept).map(drop)
}

fn converse(mut stream: UnixStream, vm_place: &Shared, events: &Sender<Event>) -> io::Result<()> {
    while let Some(order) = read_frame::<Order>(&mut stream)? {
        // Before the lock: a client that does not send it holds none.
        let file = match &order.request {
            Request::Save { .. } => hebe_sys::fdpass::receive(&stream, 1)?.pop().map(File::from),
            _ => None,
        };
        let mut guard = vm_place.lock().unwrap_or_else(PoisonError::into_inner);
        // Asked with the lock held, for which it may have waited long.
        if order.is_expired() {
            drop(guard);
            write_frame(&mut stream, &failed(&VmError::Expired))?;
            continue;
        }
        let Some(vm) = guard.as_mut() else {
            let message = "the VM is being rebuilt or has ended: try again".to_owned();
            write_frame(&mut stream, &Response::Failed { message })?;
            continue;
        };
        if let Some(expected) = end(&order.request, vm) {
            let response = match vm.prepare_quit(expected) {
                Ok(()) => Response::Done,
                Err(error) => failed(&error),
            };
            drop(guard);
            let done = response == Response::Done;
            // The order stands even if nobody waits for the answer.
            let written = write_frame(&mut stream, &response);
            if done {
                let _ = events.send(Event::Quit);
            }
            written?;
            continue;
        }
        match &order.request {
            Request::Console => {
                let hub = vm.console.clone();
                drop(guard);
                write_frame(&mut stream, &Response::Done)?;
                return hub.attach(stream);
            }
            Request::SegmentFiles => {
                let segment = vm.segment.clone();
                drop(guard);
                hand_out(&mut stream, &segment)?;
            }
            _ => {
                let mut result = answer(vm, &order, file.as_ref());
                if is_suspend(&order.request) && matches!(result, Err(VmError::Ending)) {
                    guard = after_the_end(vm_place, guard, order.until);
                    let Some(vm) = guard.as_mut() else {
                        // Its end is answer enough, and no refusal.
                        return Err(io::ErrorKind::ConnectionAborted.into());
                    };
                    result = answer(vm, &order, file.as_ref());
                    if vm.stands_by && vm.state() == VmmState::Paused {
                        vm.release();
                    }
                }
                drop(guard);
                let response = result.unwrap_or_else(|error| failed(&error));
                write_frame(&mut stream, &response)?;
            }
        }
    }
    Ok(())
}

fn is_suspend(request: &Request) -> bool {
    matches!(request, Request::Freeze | Request::Save { .. })
}

/// Waits until the end that the guest asked for has come, or the client waits no
/// more. A VM that boots again stands by then: a guest that resets without end
/// could never be suspended otherwise, and would hold up all others that are to be.
fn after_the_end<'a>(
    place: &'a Shared,
    mut guard: MutexGuard<'a, Option<Vm>>,
    until: Option<Deadline>,
) -> MutexGuard<'a, Option<Vm>> {
    loop {
        let Some(vm) = guard.as_mut().filter(|vm| vm.board.is_ending()) else {
            return guard;
        };
        vm.stands_by = !until.is_some_and(|until| until.has_passed());
        if !vm.stands_by {
            return guard;
        }
        drop(guard);
        // The main thread wants the lock.
        thread::sleep(LOOK_EVERY);
        guard = place.lock().unwrap_or_else(PoisonError::into_inner);
    }
}

/// Whether a request ends the VMM, and in which state the VM must be for it.
fn end(request: &Request, vm: &Vm) -> Option<Option<VmmState>> {
    match request {
        Request::Quit { expected } => Some(*expected),
        // No guest is left that could see it.
        Request::PowerButton if vm.failed.is_some() => Some(None),
        _ => None,
    }
}

/// Gives the client what the VM's RAM lies in; the VM keeps it, too.
fn hand_out(stream: &mut UnixStream, segment: &Segment) -> io::Result<()> {
    let fds: Vec<_> = segment.files().iter().map(AsFd::as_fd).collect();
    if fds.is_empty() {
        return write_frame(stream, &failed(&VmError::NoFiles));
    }
    let spec = serde_json::to_string(segment.spec())?;
    let count = fds.len();
    write_frame(stream, &Response::SegmentFiles { count, spec })?;
    hebe_sys::fdpass::send(stream, &fds)
}

fn answer(vm: &mut Vm, order: &Order, file: Option<&File>) -> Result<Response, VmError> {
    Ok(match (&order.request, file) {
        (Request::Status, _) => Response::Status(vm.status()),
        (Request::Pause, _) => {
            vm.pause()?;
            Response::Done
        }
        (Request::Unpause, _) => {
            vm.unpause()?;
            Response::Done
        }
        (Request::Freeze, _) => Response::Frozen(vm.freeze_until(order.until)?),
        (Request::Thaw, _) => {
            vm.thaw()?;
            Response::Done
        }
        (Request::Save { name }, Some(file)) => {
            Response::Saved(vm.save_until(file, name, order.until)?)
        }
        (Request::PowerButton, _) => {
            if vm.status().state != VmmState::Running {
                return Err(VmError::NotNow {
                    state: vm.status().state,
                    wanted: "shut down",
                });
            }
            vm.press_power_button()?;
            Response::Done
        }
        (Request::Balloon { target }, _) => Response::Balloon(vm.balloon(*target)?),
        // Served elsewhere, or refused before this.
        (
            Request::Console | Request::SegmentFiles | Request::Quit { .. } | Request::Save { .. },
            _,
        ) => Response::Done,
    })
}

fn failed(error: &VmError) -> Response {
    Response::Failed {
        message: chain(error),
    }
}

/// An error and its causes as one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.ends_with(&more) {
            text = format!("{text}: {more}");
        }
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("{text}")]
    struct Link {
        text: &'static str,
        #[source]
        cause: Option<Box<Link>>,
    }

    fn link(text: &'static str, cause: Option<Link>) -> Link {
        let cause = cause.map(Box::new);
        Link { text, cause }
    }

    #[test]
    fn a_request_that_waited_longer_than_its_client_is_not_begun() {
        let shared: Shared = Arc::new(Mutex::new(None));
        let (events, _inbox) = std::sync::mpsc::channel();
        let (mut client, server) = UnixStream::pair().expect("pair");
        let mut ask = |wait: Option<Duration>| {
            let order = Order {
                request: Request::Freeze,
                until: wait.map(Deadline::after),
            };
            write_frame(&mut client, &order).expect("write");
            client.try_clone().expect("clone")
        };
        let answer = |mut client: UnixStream| match read_frame(&mut client).expect("read") {
            Some(Response::Failed { message }) => message,
            other => panic!("{other:?}"),
        };
        let busy = shared.lock().expect("lock");
        let vm = shared.clone();
        let server = std::thread::spawn(move || converse(server, &vm, &events));
        let late = ask(Some(Duration::from_millis(10)));
        std::thread::sleep(Duration::from_millis(100));
        drop(busy);
        assert_eq!(answer(late), VmError::Expired.to_string());
        for wait in [Some(Duration::from_secs(600)), None] {
            let begun = answer(ask(wait));
            assert!(begun.contains("being rebuilt"), "{begun}");
        }
        drop(client);
        server.join().expect("join").expect("a good end");
    }

    #[test]
    fn causes_are_told_once_and_in_order() {
        let root = link("no such file", None);
        assert_eq!(chain(&root), "no such file");
        let disk = link("disk web.img cannot be opened", Some(root));
        let whole = link("the VM cannot be built", Some(disk));
        assert_eq!(
            chain(&whole),
            "the VM cannot be built: disk web.img cannot be opened: no such file"
        );
    }

    #[test]
    fn a_cause_that_the_error_ends_in_is_not_repeated() {
        let root = link("no such file", None);
        let error = link("cannot open: no such file", Some(root));
        assert_eq!(chain(&error), "cannot open: no such file");
    }
}
