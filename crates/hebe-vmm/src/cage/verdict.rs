//! The last word of a VMM that made a system call which it never makes.
//!
//! The call is not carried out. The kernel sends SIGSYS instead, whose
//! handler writes one line to the log and ends the process: the VM is then
//! listed as crashed, with that line as the reason. A process that has taken
//! the handler away gains nothing by it: the call is refused all the same,
//! and SIGSYS without a handler ends the process.

use std::io;

/// Its exit status: 128 and the number of SIGSYS, as a shell has it.
pub const EXIT_STATUS: i32 = 128 + libc::SIGSYS;

/// The code of a SIGSYS that seccomp sends (<asm-generic/siginfo.h>).
const SYS_SECCOMP: i32 = 1;

/// Lets SIGSYS end this process with a word.
pub(super) fn install() -> io::Result<()> {
    // SAFETY: an all-zero sigaction is valid; the handler makes only
    // async-signal-safe calls and does not return.
    let result = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) = end;
        action.sa_sigaction = handler as libc::sighandler_t;
        action.sa_flags = libc::SA_SIGINFO;
        libc::sigaction(libc::SIGSYS, &action, std::ptr::null_mut())
    };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

extern "C" fn end(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel passes a siginfo_t of 128 bytes. For a SIGSYS of
    // seccomp, which the code at byte 8 tells, it holds the number of the call
    // at byte 24, behind the address of the call (struct siginfo, _sigsys,
    // <asm-generic/siginfo.h>).
    let (code, call) = unsafe {
        let info = info.cast::<i32>();
        (info.add(2).read(), info.add(6).read())
    };
    let mut line = [0; 160];
    let len = word((code == SYS_SECCOMP).then_some(call), &mut line);
    // SAFETY: the buffer is live, and both calls are async-signal-safe.
    unsafe {
        libc::write(libc::STDERR_FILENO, line.as_ptr().cast(), len);
        libc::_exit(EXIT_STATUS)
    }
}

/// A line of the log, made without taking memory; returns its length. Without
/// a call, somebody sent the signal.
fn word(call: Option<i32>, line: &mut [u8; 160]) -> usize {
    let Some(call) = call else {
        let sent = br#"{"level":"error","text":"ended by a SIGSYS that somebody sent"}"#;
        line[..sent.len()].copy_from_slice(sent);
        line[sent.len()] = b'\n';
        return sent.len() + 1;
    };
    let mut digits = [0; 10];
    let mut rest = call.unsigned_abs();
    let mut at = digits.len();
    loop {
        at -= 1;
        digits[at] = b'0' + (rest % 10) as u8;
        rest /= 10;
        if rest == 0 {
            break;
        }
    }
    let pieces: [&[u8]; 3] = [
        br#"{"level":"error","text":"killed by its cage: it made system call "#,
        &digits[at..],
        b", which hebe-vmm never makes\"}\n",
    ];
    let mut len = 0;
    for piece in pieces {
        line[len..len + piece.len()].copy_from_slice(piece);
        len += piece.len();
    }
    len
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_word_is_a_line_of_the_log_that_names_the_call() {
        for call in [0, 59, i32::MAX] {
            let mut line = [0; 160];
            let len = word(Some(call), &mut line);
            let text = std::str::from_utf8(&line[..len]).expect("text");
            assert!(text.ends_with('\n'));
            let value: serde_json::Value = serde_json::from_str(text).expect("JSON");
            let said = value["text"].as_str().expect("text");
            assert!(said.starts_with("killed by its cage"), "{said}");
            assert!(said.contains(&format!("system call {call},")), "{said}");
        }
    }
}
