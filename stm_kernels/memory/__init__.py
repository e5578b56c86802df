"""Memories that hold state: pages that grow, and shards over processes."""
