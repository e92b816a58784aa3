"""What a graph holds and what it costs, without running it."""
