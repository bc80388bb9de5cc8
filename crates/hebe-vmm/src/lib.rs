//! One VM put together, and its control socket.
