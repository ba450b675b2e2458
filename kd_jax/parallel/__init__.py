"""Devices and processes: meshes, what processes agree on, how they find each other."""
