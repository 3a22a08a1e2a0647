"""The commands about jobs, which work on files alone: none needs the launcher. `commands.py` has what users type."""
