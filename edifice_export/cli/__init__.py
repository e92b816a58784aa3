"""The command `edifice-export`, a file for each of its commands: parses and prints, decides nothing."""
