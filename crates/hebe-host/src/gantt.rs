//! The report as a Gantt chart in SVG: one bar row per VM, one for the host.
