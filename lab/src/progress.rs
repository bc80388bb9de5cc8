//! How long-running steps tell a person what they do.

/// Receives one short line per step; the latest one is what happens now.
pub trait Progress: Send + Sync {
    /// A step begins.
    fn step(&self, text: &str);
    /// Something worth keeping on the screen.
    fn note(&self, text: &str);
}

/// Says nothing.
pub struct Silent;

impl Progress for Silent {
    fn step(&self, _text: &str) {}
    fn note(&self, _text: &str) {}
}

/// Writes lines to standard error.
pub struct Plain;

impl Progress for Plain {
    fn step(&self, text: &str) {
        eprintln!("  {text}");
    }
    fn note(&self, text: &str) {
        eprintln!("{text}");
    }
}
