"""The `stm` commands, one file each, with their settings."""
