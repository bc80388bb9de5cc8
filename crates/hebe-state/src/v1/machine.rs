//! The machine: VM, vCPUs, interrupt controllers, clock, ACPI registers.
