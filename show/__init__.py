"""Shows a generation, in the terminal and on a page."""
