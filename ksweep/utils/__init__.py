"""What every room may use: errors, files, hashing, the terminal, clocks."""
