"""The page of `stm interact`."""
