"""What a run came to, on one page that opens offline, and in pictures."""
