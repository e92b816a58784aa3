"""The command `edifice-export`: parses and prints, decides nothing."""
