//! Is this machine ready? Each check with the exact remedy.
