//! Runs a program for the host, with bounds.

use std::io::{self, Read};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::thread::{self, Builder};
use std::time::{Duration, Instant};

use crate::protocol::{Done, OUTPUT_MAX};

/// How often a program is looked at.
const LOOK: Duration = Duration::from_millis(10);
/// How long the rest of its output is waited for once it has ended: something
/// that it started may keep the pipe open.
const REST: Duration = Duration::from_millis(500);

/// Runs `words`, and kills it after `limit`.
///
/// # Errors
/// If it cannot be run; then nothing of it is left.
pub(crate) fn run(words: &[String], limit: Duration) -> io::Result<Done> {
    run_with(words, limit, Builder::new)
}

/// Its output is read by threads of `reader`.
fn run_with(words: &[String], limit: Duration, reader: fn() -> Builder) -> io::Result<Done> {
    let (program, arguments) = words
        .split_first()
        .ok_or_else(|| io::Error::other("there is no program"))?;
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        // Whatever it starts is killed with it.
        .process_group(0)
        .spawn()?;
    let (out, err) = (child.stdout.take(), child.stderr.take());
    let collected = collect(out, reader()).and_then(|out| Ok((out, collect(err, reader())?)));
    let (stdout, stderr) = match collected {
        Ok(both) => both,
        Err(error) => {
            kill(&mut child)?;
            return Err(error);
        }
    };
    let status = wait(&mut child, limit)?;
    let until = Instant::now() + REST;
    let (stdout, cut_out) = text(&stdout, until);
    let (stderr, cut_err) = text(&stderr, until);
    Ok(Done::Ended {
        status,
        stdout,
        stderr,
        cut: cut_out || cut_err,
    })
}

fn wait(child: &mut Child, limit: Duration) -> io::Result<Option<i32>> {
    let until = Instant::now() + limit;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status.code());
        }
        if Instant::now() >= until {
            kill(child)?;
            return Ok(None);
        }
        thread::sleep(LOOK);
    }
}

/// Kills a child that was not waited for yet, with what it started.
fn kill(child: &mut Child) -> io::Result<()> {
    let group = child.id().cast_signed();
    // SAFETY: a signal to the child's own process group: it was not waited for
    // yet, so that its id is no other's.
    unsafe { libc::kill(-group, libc::SIGKILL) };
    child.wait().map(|_| ())
}

/// Pieces of an output; the end of the channel is its end.
fn collect(
    pipe: Option<impl Read + Send + 'static>,
    reader: Builder,
) -> io::Result<Receiver<Vec<u8>>> {
    // Holds no more than is kept.
    let (sender, pieces) = mpsc::channel();
    reader.spawn(move || {
        let Some(mut pipe) = pipe else { return };
        let mut kept = 0;
        let mut chunk = [0; 4096];
        while let Ok(count @ 1..) = pipe.read(&mut chunk) {
            // What is not kept is read all the same: the program goes on.
            let keep = count.min((OUTPUT_MAX + 1).saturating_sub(kept));
            kept += keep;
            if keep > 0 && sender.send(chunk[..keep].to_vec()).is_err() {
                return;
            }
        }
    })?;
    Ok(pieces)
}

/// The beginning of an output as text, and whether that is not all.
fn text(pieces: &Receiver<Vec<u8>>, until: Instant) -> (String, bool) {
    let mut bytes = Vec::new();
    let cut = loop {
        let left = until.saturating_duration_since(Instant::now());
        match pieces.recv_timeout(left) {
            Ok(piece) => bytes.extend(piece),
            Err(mpsc::RecvTimeoutError::Disconnected) => break bytes.len() > OUTPUT_MAX,
            Err(mpsc::RecvTimeoutError::Timeout) => break true,
        }
    };
    bytes.truncate(OUTPUT_MAX);
    (String::from_utf8_lossy(&bytes).into_owned(), cut)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str, limit: Duration) -> (Option<i32>, String, String, bool) {
        let words = ["/bin/sh", "-c", script].map(str::to_owned);
        match run(&words, limit).expect("run") {
            Done::Ended {
                status,
                stdout,
                stderr,
                cut,
            } => (status, stdout, stderr, cut),
            other => panic!("{other:?}"),
        }
    }

    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn status_and_both_outputs_are_told() {
        let said = shell("echo out; echo err >&2; exit 3", LONG);
        assert_eq!(said, (Some(3), "out\n".into(), "err\n".into(), false));
        assert!(run(&["/no/such".to_owned()], LONG).is_err());
    }

    #[test]
    fn output_is_bounded_and_does_not_block_the_program() {
        let (status, stdout, _, cut) = shell("head -c 1000000 /dev/zero; exit 5", LONG);
        assert_eq!((status, stdout.len(), cut), (Some(5), OUTPUT_MAX, true));
    }

    #[test]
    fn a_program_that_takes_too_long_is_killed_with_what_it_started() {
        // On a busy computer a shell may not come to say anything in a short time.
        for time in [LOOK * 20, LOOK * 500, LONG / 2] {
            let begin = Instant::now();
            let (status, stdout, _, _) = shell("echo on; sleep 1000 & sleep 1000", time);
            assert_eq!(status, None);
            assert!(begin.elapsed() < time + LONG, "it was waited for");
            if stdout == "on\n" {
                return;
            }
            assert_eq!(stdout, "");
        }
        panic!("it never said anything");
    }

    #[test]
    fn without_a_thread_for_its_output_a_program_is_refused_and_nothing_is_left() {
        let dir = tempfile::tempdir().expect("dir");
        let late = dir.path().join("late");
        let script = format!("sleep 1; touch {}", late.display());
        let words = ["/bin/sh", "-c", &script].map(str::to_owned);
        // No address space has room for such a stack.
        let refused = run_with(&words, LONG, || Builder::new().stack_size(1 << 60));
        assert!(refused.is_err(), "{refused:?}");
        thread::sleep(Duration::from_millis(1500));
        assert!(!late.exists(), "the program went on");
    }
}
