"""The tracker inside annotation tools, each a thin layer over `Tracker.start`; not imported by anything else."""
