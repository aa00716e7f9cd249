"""The server's side of one federation."""
