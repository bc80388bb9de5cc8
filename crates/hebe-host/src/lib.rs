//! The host's life: launch, pre-flight, suspend all, reload, resume all.
