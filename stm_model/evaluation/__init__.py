"""How good the masks are: DAVIS' measures."""
