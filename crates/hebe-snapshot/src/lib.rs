//! RAM and execution state in a file.
