"""The mini-world: a small closed world, its English, three tasks about it, and a base model that has read of it."""
