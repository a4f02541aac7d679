"""Where workers run: each backend submits and cancels workers, nothing more."""
