//! Kernel loading, memory layout and ACPI tables.
