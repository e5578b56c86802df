"""Semi-supervised tracking: the loop, its memory, and a video tracked into a folder."""
