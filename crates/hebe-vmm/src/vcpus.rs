//! The vCPU threads.
//!
//! Each thread owns its vCPU and obeys commands, one at a time:
//!
//! ```text
//!   stopped ── Run ──► in the guest ── Pause (and a kick) ──► stopped
//!      │                     └── shutdown, failure ─────────────┘ reported as an event
//!      ├── Save ──► stopped
//!      └── Exit ──► gone
//! ```

use std::panic::{self, AssertUnwindSafe};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::JoinHandle;

use hebe_kvm::{Kick, Stop, Vcpu, VcpuError};
use hebe_state::v1::machine::VcpuV1;

use crate::board::Board;
use crate::cage;
use crate::vm::Event;

enum Command {
    Run,
    Pause(Sender<Result<(), Stop>>),
    Save(Sender<Result<VcpuV1, VcpuError>>),
    Exit,
}

/// Why the vCPUs could not be stopped or read.
#[derive(Debug, thiserror::Error)]
pub enum VcpusError {
    /// A vCPU's last instruction could not be completed.
    #[error("vCPU {index} cannot be stopped cleanly: {reason}")]
    Pause {
        /// Which one.
        index: usize,
        /// What KVM reported.
        reason: String,
    },
    /// Registers could not be read.
    #[error(transparent)]
    Save(#[from] VcpuError),
    /// A vCPU thread is gone.
    #[error("vCPU thread {0} has ended")]
    Gone(usize),
    /// The kernel gives no thread.
    #[error("a vCPU thread cannot be started")]
    Spawn(#[source] std::io::Error),
}

/// All vCPUs of a VM, each in its thread, stopped at first.
#[derive(Debug)]
pub(crate) struct Vcpus {
    threads: Vec<VcpuThread>,
}

#[derive(Debug)]
struct VcpuThread {
    commands: Sender<Command>,
    kick: Kick,
    handle: Option<JoinHandle<()>>,
}

impl Vcpus {
    /// Starts them; their threads are confined further where this process
    /// is in its cage.
    pub(crate) fn start(
        vcpus: Vec<Vcpu>,
        board: &Arc<Board>,
        events: &Sender<Event>,
    ) -> Result<Self, VcpusError> {
        let caged = cage::has_filters();
        let mut threads = Vec::with_capacity(vcpus.len());
        for vcpu in vcpus {
            let (commands, inbox) = mpsc::channel();
            let kick = vcpu.kick_handle();
            let (board, events) = (board.clone(), events.clone());
            let handle = hebe_sys::thread::named(format!("vcpu{}", vcpu.index()))
                .spawn(move || {
                    if caged {
                        cage::narrow_vcpu();
                    }
                    let events_of_panic = events.clone();
                    let obey = AssertUnwindSafe(|| obey(vcpu, &inbox, &board, &events));
                    if panic::catch_unwind(obey).is_err() {
                        // A VM short of a vCPU must not seem to run.
                        let stop = Stop::Failed("its thread panicked".into());
                        let _ = events_of_panic.send(Event::VcpuStopped(stop));
                    }
                })
                .map_err(VcpusError::Spawn)?;
            threads.push(VcpuThread {
                commands,
                kick,
                handle: Some(handle),
            });
        }
        Ok(Self { threads })
    }

    /// Lets all vCPUs run.
    pub(crate) fn run(&self) {
        for thread in &self.threads {
            // A thread that is gone has reported why.
            let _ = thread.commands.send(Command::Run);
        }
    }

    /// Stops all vCPUs, each with its last instruction completed. All are
    /// asked before any is waited for: they stop side by side.
    pub(crate) fn pause(&self) -> Result<(), VcpusError> {
        let mut answers = Vec::with_capacity(self.threads.len());
        for thread in &self.threads {
            let (answer, receiver) = mpsc::channel();
            let _ = thread.commands.send(Command::Pause(answer));
            thread.kick.kick();
            answers.push(receiver);
        }
        let mut result = Ok(());
        for (index, answer) in answers.iter().enumerate() {
            let stopped = match answer.recv() {
                Ok(Ok(())) => Ok(()),
                Ok(Err(stop)) => Err(VcpusError::Pause {
                    index,
                    reason: format!("{stop:?}"),
                }),
                Err(_) => Err(VcpusError::Gone(index)),
            };
            result = result.and(stopped);
        }
        result
    }

    /// Reads all stopped vCPUs, in order.
    pub(crate) fn save(&self) -> Result<Vec<VcpuV1>, VcpusError> {
        let mut answers = Vec::with_capacity(self.threads.len());
        for thread in &self.threads {
            let (answer, receiver) = mpsc::channel();
            let _ = thread.commands.send(Command::Save(answer));
            answers.push(receiver);
        }
        let read = |(index, answer): (usize, &Receiver<Result<VcpuV1, VcpuError>>)| {
            answer
                .recv()
                .map_err(|_| VcpusError::Gone(index))?
                .map_err(VcpusError::Save)
        };
        answers.iter().enumerate().map(read).collect()
    }
}

impl Drop for Vcpus {
    fn drop(&mut self) {
        for thread in &self.threads {
            let _ = thread.commands.send(Command::Exit);
            thread.kick.kick();
        }
        for thread in &mut self.threads {
            if let Some(handle) = thread.handle.take() {
                // A panic in there was reported by the panic handler.
                let _ = handle.join();
            }
        }
    }
}

fn obey(mut vcpu: Vcpu, inbox: &Receiver<Command>, board: &Board, events: &Sender<Event>) {
    vcpu.bind_to_thread();
    let mut running = false;
    // A vCPU that stopped by itself has no state worth saving or running: a
    // shutdown may have reset it.
    let mut stopped_itself = None;
    loop {
        // While it runs, the inbox is looked at after each kick only.
        let command = if running {
            match vcpu.run(board) {
                Stop::Interrupted => vcpu.clear_kick(),
                stop => {
                    running = false;
                    stopped_itself = Some(stop.clone());
                    let _ = events.send(Event::VcpuStopped(stop));
                }
            }
            inbox.try_recv().ok()
        } else {
            match inbox.recv() {
                Ok(command) => Some(command),
                Err(_) => return,
            }
        };
        match command {
            None => {}
            Some(Command::Run) => running = stopped_itself.is_none(),
            Some(Command::Pause(answer)) => {
                let result = match &stopped_itself {
                    Some(stop) => Err(stop.clone()),
                    None if running => vcpu.finish_pending_io(board),
                    None => Ok(()),
                };
                running = false;
                let _ = answer.send(result);
            }
            Some(Command::Save(answer)) => {
                let _ = answer.send(vcpu.save());
            }
            Some(Command::Exit) => return,
        }
    }
}
