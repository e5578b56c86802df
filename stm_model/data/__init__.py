"""Clips to train on and to test with: procedural ones, and folders in the layouts of the benchmarks."""
