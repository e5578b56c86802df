"""The read in plain PyTorch, for CPUs and for whatever has no kernel of its own."""
