"""The road from a program to a verified bundle: trace, rewrite, link, verify, write."""
