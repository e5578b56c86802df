"""The choice of the k best memory positions of each query."""
