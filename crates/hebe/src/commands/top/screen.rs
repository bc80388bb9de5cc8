//! The terminal while `top` has it: other keys and another screen, and
//! everything as before afterwards, also after a panic.

use std::io::{self, IsTerminal, Write};
use std::panic;
use std::sync::{Mutex, Once, PoisonError};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};

/// Another screen, no cursor, no line that goes on in the next.
const ENTER: &str = "\x1b[?1049h\x1b[?25l\x1b[?7l\x1b[2J";
/// The other way round.
const LEAVE: &str = "\x1b[?7h\x1b[?25h\x1b[?1049l";

/// How the terminal was, while it is otherwise.
static BEFORE: Mutex<Option<Termios>> = Mutex::new(None);

/// The terminal; given back when dropped, and before a panic says what it was.
pub struct Screen(());

impl Screen {
    /// Takes the terminal; stdout has to be one.
    pub fn enter() -> io::Result<Self> {
        static HOOK: Once = Once::new();
        HOOK.call_once(|| {
            let before = panic::take_hook();
            panic::set_hook(Box::new(move |info| {
                leave();
                before(info);
            }));
        });
        let before = tcgetattr(io::stdout())?;
        let mut raw = before.clone();
        raw.make_raw();
        *BEFORE.lock().unwrap_or_else(PoisonError::into_inner) = Some(before);
        let screen = Self(());
        tcsetattr(io::stdout(), OptionalActions::Now, &raw)?;
        write(ENTER)?;
        Ok(screen)
    }

    /// Columns and lines.
    pub fn size(&self) -> (usize, usize) {
        match tcgetwinsize(io::stdout()) {
            Ok(size) if size.ws_col > 0 && size.ws_row > 0 => {
                (usize::from(size.ws_col), usize::from(size.ws_row))
            }
            _ => (80, 24),
        }
    }

    /// Shows lines, and nothing of what stood there before.
    pub fn draw(&self, lines: &str) -> io::Result<()> {
        let mut text = String::from("\x1b[H");
        for (i, line) in lines.lines().enumerate() {
            if i > 0 {
                text.push_str("\r\n");
            }
            text.push_str(line);
            text.push_str("\x1b[K");
        }
        text.push_str("\x1b[J");
        write(&text)
    }

    /// Keys that are pressed within a time; `None` where there are none any more.
    pub fn keys(&self, within: Duration) -> Option<Vec<u8>> {
        let stdin = io::stdin();
        if !stdin.is_terminal() {
            std::thread::sleep(within);
            return Some(Vec::new());
        }
        let timeout = Timespec {
            tv_sec: within.as_secs() as i64,
            tv_nsec: i64::from(within.subsec_nanos()),
        };
        let mut fds = [PollFd::new(&stdin, PollFlags::IN)];
        match poll(&mut fds, Some(&timeout)) {
            Ok(0) | Err(rustix::io::Errno::INTR) => return Some(Vec::new()),
            Ok(_) => {}
            Err(_) => return None,
        }
        let mut keys = [0; 64];
        match rustix::io::read(&stdin, &mut keys) {
            Ok(0) => None,
            Ok(count) => Some(keys[..count].to_vec()),
            Err(rustix::io::Errno::INTR) => Some(Vec::new()),
            Err(_) => None,
        }
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        leave();
    }
}

fn leave() {
    let before = BEFORE.lock().unwrap_or_else(PoisonError::into_inner).take();
    if let Some(before) = before {
        let _ = write(LEAVE);
        let _ = tcsetattr(io::stdout(), OptionalActions::Now, &before);
    }
}

fn write(text: &str) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(text.as_bytes())?;
    stdout.flush()
}

#[cfg(test)]
mod tests {
    use std::env;
    use std::fs::File;
    use std::io::Read;
    use std::process::{Command, Stdio};

    use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
    use rustix::termios::LocalModes;

    use super::*;

    /// Said to the process in which this test panics.
    const PANIC: &str = "HEBE_TEST_PANIC";
    const NAME: &str = "commands::top::screen::tests::a_terminal_is_given_back_at_a_panic";

    #[test]
    fn a_terminal_is_given_back_at_a_panic() {
        if env::var_os(PANIC).is_some() {
            let _screen = Screen::enter().expect("a terminal");
            panic!("on purpose");
        }
        let own = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).expect("a terminal");
        grantpt(&own).expect("grant");
        unlockpt(&own).expect("unlock");
        let path = ptsname(&own, Vec::new()).expect("its name");
        let path = path.to_str().expect("text");
        let other = File::options().read(true).write(true).open(path);
        let other = other.expect("open");
        let child = Command::new(env::current_exe().expect("this program"))
            .arg(NAME)
            .envs([(PANIC, "1"), ("RUST_TEST_NOCAPTURE", "1")])
            .stdin(Stdio::null())
            .stdout(other.try_clone().expect("clone"))
            .stderr(Stdio::piped())
            .output()
            .expect("it runs");
        assert!(!child.status.success());
        let said = String::from_utf8_lossy(&child.stderr);
        assert!(said.contains("on purpose"), "{said}");
        let modes = tcgetattr(&other).expect("attributes").local_modes;
        assert!(modes.contains(LocalModes::ICANON | LocalModes::ECHO));
        // The other end is open here, so there is an end to it only once it closes.
        drop(other);
        let mut drawn = Vec::new();
        let _ = File::from(own).read_to_end(&mut drawn);
        let drawn = String::from_utf8_lossy(&drawn).into_owned();
        let (before, after) = (drawn.find("\x1b[?1049h"), drawn.rfind(LEAVE));
        assert!(before.is_some() && before < after, "{drawn:?}");
    }
}
