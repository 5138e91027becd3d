"""Pools in processes: cores that are divided among engine processes, and what clients and engines say to each other."""
