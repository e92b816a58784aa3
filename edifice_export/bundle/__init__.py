"""A bundle on disk: its manifest, its files and their hashes, and how it is written whole or not at all."""
