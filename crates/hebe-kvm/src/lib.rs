//! VM and vCPU over KVM: ordered save and restore.
