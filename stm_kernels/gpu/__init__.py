"""The Triton kernels. Imported only when one is asked for, so that the package works without triton."""
