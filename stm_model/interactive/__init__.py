"""Scribbles in, masks of a whole video out: what a user draws, and who draws in a user's place."""
