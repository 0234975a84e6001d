"""Ground for all rooms: files, downloads, errors, seeds, processes, and settings checked against dataclasses."""
