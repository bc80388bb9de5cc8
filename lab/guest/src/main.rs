//! PID 1 of the lab's hosts and guests.
//!
//! PID 1 mounts, then forks: the child plays the role that the kernel command
//! line names (`lab.role=guest`, else host), PID 1 itself only reaps orphans.
//! So the role's own children are waited for by those who started them. With
//! `lab.role=system` PID 1 becomes the init program of a root file system.

mod agent;
mod cpr;
mod dax;
mod guest;
mod host;
mod leak;
mod modules;
mod services;
mod sys;
mod system;
mod timed;

use std::process::exit;

use anyhow::Result;

fn main() {
    let userspace_tsc = sys::tsc();
    if std::process::id() != 1 {
        exit(tool(&std::env::args().collect::<Vec<_>>(), userspace_tsc));
    }
    if let Err(e) = base_mounts() {
        eprintln!("LAB: PANIC {e:#}");
    }
    let role = sys::cmdline_value("lab.role");
    if role.as_deref() == Some("system")
        && let Err(e) = system::enter()
    {
        println!("LAB: PANIC {e:#}");
    }
    let guest = role.as_deref() == Some("guest");
    // SAFETY: the process has one thread, so the child may go on freely.
    match unsafe { libc::fork() } {
        0 => {
            let result = if guest {
                guest::run(userspace_tsc)
            } else {
                host::run(userspace_tsc)
            };
            if let Err(e) = result {
                println!("LAB: PANIC {e:#}");
            }
            exit(1);
        }
        child => reap(child),
    }
}

/// Test aids, when the program is not init.
fn tool(arguments: &[String], userspace_tsc: u64) -> i32 {
    let words: Vec<&str> = arguments.iter().skip(1).map(String::as_str).collect();
    let result = match words[..] {
        ["dax-fill", device] => dax::pattern(device, true),
        ["dax-check", device] => dax::pattern(device, false),
        ["dax-flip", device, offset] => dax::flip(device, offset),
        ["leak", kib_per_s] => leak::run(kib_per_s),
        ["timed", console, words, ref program @ ..] => {
            return said(timed::run(console.as_ref(), words, program));
        }
        ["kexec-unload"] => sys::kexec_unload().map(|()| 0),
        ["system-agent"] => system::agent(userspace_tsc).map(|()| 0),
        ["peer", ref more @ ..] => return said(cpr::tool(more)),
        _ => {
            eprintln!(
                "lab-init is the init program of the lab's machines; it does nothing elsewhere"
            );
            return 2;
        }
    };
    match result {
        Ok(bad) => {
            println!("{bad} bad pages");
            i32::from(bad != 0)
        }
        Err(e) => {
            eprintln!("{e:#}");
            2
        }
    }
}

/// The exit status of what says all there is to say itself.
fn said(result: Result<()>) -> i32 {
    match result {
        Ok(()) => 0,
        Err(e) => {
            eprintln!("{e:#}");
            1
        }
    }
}

fn base_mounts() -> Result<()> {
    sys::mount_pseudo("devtmpfs", "/dev", "")?;
    sys::mount_pseudo("proc", "/proc", "")?;
    sys::mount_pseudo("sysfs", "/sys", "")?;
    // The kernel may have started init before /dev/console existed.
    sys::take_console()
}

fn reap(role: i32) -> ! {
    loop {
        let mut status = 0;
        // SAFETY: `status` is a valid place for the result.
        let pid = unsafe { libc::waitpid(-1, &mut status, 0) };
        if pid == role || pid < 0 {
            println!("LAB: PANIC the role's process ended with status {status:#x}");
            sys::reboot(sys::Reboot::PowerOff);
            loop {
                std::thread::park();
            }
        }
    }
}
