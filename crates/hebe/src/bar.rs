//! Shows on a terminal that something long goes on, and how far it is.
//!
//! Where stderr is no terminal, or JSON was asked for, nothing is shown: a log
//! of a bar is of use to nobody. What is short is not shown either.

use std::io::{self, IsTerminal};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::output::Output;

/// What takes less is not shown.
const LONG: Duration = Duration::from_millis(700);
/// How often it is drawn.
const DRAW_EVERY: Duration = Duration::from_millis(150);

/// How much of how much is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Far {
    /// In bytes.
    Bytes(u64, u64),
    /// In VMs.
    Vms(u64, u64),
}

/// `None` while that is not known.
pub type Done = Option<Far>;

/// Something that goes on until this is dropped.
pub struct Bar(Option<Shown>);

struct Shown {
    bar: ProgressBar,
    stop: Option<Sender<()>>,
    drawer: Option<JoinHandle<()>>,
}

impl Bar {
    /// Something of which it is not known how long it takes.
    pub fn busy(out: &Output, text: &str) -> Self {
        Self::counting(out, text, || None)
    }

    /// Something of which `look` says how far it is.
    pub fn counting(out: &Output, text: &str, look: impl Fn() -> Done + Send + 'static) -> Self {
        if out.is_json() || !io::stderr().is_terminal() {
            return Self(None);
        }
        Self::on(ProgressDrawTarget::stderr, text, look)
    }

    fn on(
        target: impl FnOnce() -> ProgressDrawTarget + Send + 'static,
        text: &str,
        look: impl Fn() -> Done + Send + 'static,
    ) -> Self {
        // Nothing draws it before it is worth while, lines aside neither.
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::hidden());
        bar.set_message(text.to_owned());
        let (stop, stopped) = mpsc::channel();
        let drawn = bar.clone();
        let drawer = thread::Builder::new().spawn(move || {
            let mut target = Some(target);
            let mut pause = LONG;
            while stopped.recv_timeout(pause) == Err(RecvTimeoutError::Timeout) {
                pause = DRAW_EVERY;
                if let Some(target) = target.take() {
                    drawn.set_draw_target(target());
                }
                draw(&drawn, look());
            }
            if target.is_none() {
                drawn.finish_and_clear();
            }
        });
        Self(Some(Shown {
            bar,
            stop: Some(stop),
            drawer: drawer.ok(),
        }))
    }

    /// An order for all VMs, and what to call with their number as each is dealt
    /// with.
    pub fn vms(out: &Output, text: &str) -> (Self, impl Fn(usize) + Sync + use<>) {
        let far = Arc::new((AtomicUsize::new(0), AtomicUsize::new(0)));
        let seen = Arc::clone(&far);
        let number = |of: &AtomicUsize| of.load(Ordering::Relaxed) as u64;
        let bar = Self::counting(out, text, move || {
            let (done, whole) = (number(&seen.0), number(&seen.1));
            (whole > 0).then_some(Far::Vms(done, whole))
        });
        let tell = move |whole| {
            far.1.store(whole, Ordering::Relaxed);
            far.0.fetch_add(1, Ordering::Relaxed);
        };
        (bar, tell)
    }

    /// Writes lines without the bar in between.
    pub fn aside<T>(&self, write: impl FnOnce() -> T) -> T {
        match &self.0 {
            Some(shown) => shown.bar.suspend(write),
            None => write(),
        }
    }
}

impl Drop for Shown {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(drawer) = self.drawer.take() {
            let _ = drawer.join();
        }
    }
}

fn reach(bar: &ProgressBar, done: u64, whole: u64) {
    bar.set_length(whole);
    bar.set_position(done.min(whole));
}

fn draw(bar: &ProgressBar, done: Done) {
    let template = match done {
        Some(Far::Bytes(done, whole)) => {
            reach(bar, done, whole);
            "hebe: {msg}  [{bar:30}] {bytes} of {total_bytes}  {elapsed}"
        }
        Some(Far::Vms(done, whole)) => {
            reach(bar, done, whole);
            "hebe: {msg}  [{bar:30}] {pos} of {len}  {elapsed}"
        }
        None => "hebe: {spinner} {msg}  {elapsed}",
    };
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style.progress_chars("=> "));
    }
    bar.tick();
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use indicatif::TermLike;

    use super::*;

    /// Keeps what is written to it.
    #[derive(Clone, Debug, Default)]
    struct Paper(Arc<Mutex<String>>);

    impl Paper {
        /// What was written since this was asked last.
        fn taken(&self) -> String {
            std::mem::take(&mut self.0.lock().expect("paper"))
        }
    }

    impl TermLike for Paper {
        fn width(&self) -> u16 {
            100
        }
        fn move_cursor_up(&self, _: usize) -> io::Result<()> {
            Ok(())
        }
        fn move_cursor_down(&self, _: usize) -> io::Result<()> {
            Ok(())
        }
        fn move_cursor_right(&self, _: usize) -> io::Result<()> {
            Ok(())
        }
        fn move_cursor_left(&self, _: usize) -> io::Result<()> {
            Ok(())
        }
        fn write_line(&self, text: &str) -> io::Result<()> {
            self.write_str(text)
        }
        fn write_str(&self, text: &str) -> io::Result<()> {
            self.0.lock().expect("paper").push_str(text);
            Ok(())
        }
        fn clear_line(&self) -> io::Result<()> {
            Ok(())
        }
        fn flush(&self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_bar_says_what_goes_on_and_how_far_it_is() {
        let paper = Paper::default();
        let target = ProgressDrawTarget::term_like(Box::new(paper.clone()));
        let bar = ProgressBar::with_draw_target(None, target);
        bar.set_message("saving 2 VMs");
        let shown = |done| {
            draw(&bar, done);
            bar.force_draw();
            paper.taken()
        };
        assert!(shown(None).contains("saving 2 VMs"));
        let text = shown(Some(Far::Bytes(3 << 20, 4 << 20)));
        assert!(text.contains("3.00 MiB of 4.00 MiB"), "{text}");
        // More than was thought.
        let text = shown(Some(Far::Bytes(9, 4)));
        assert!(text.contains("4 B of 4 B"), "{text}");
        let text = shown(Some(Far::Vms(3, 7)));
        assert!(text.contains("3 of 7"), "{text}");
    }

    #[test]
    fn what_is_short_leaves_no_trace() {
        let paper = Paper::default();
        let drawn = Box::new(paper.clone());
        let target = || ProgressDrawTarget::term_like(drawn);
        let bar = Bar::on(target, "starting", || None);
        assert_eq!(bar.aside(|| 7), 7);
        drop(bar);
        assert_eq!(paper.taken(), "");
    }

    #[test]
    fn where_json_is_asked_for_nothing_is_shown() {
        let bar = Bar::busy(&Output::new(true), "saving");
        assert!(bar.0.is_none());
        assert_eq!(bar.aside(|| 7), 7);
    }
}
