"""What can be exported: the modules of its graphs, what goes into them and what comes out, and its reference."""
