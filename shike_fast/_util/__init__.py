"""What data and engine both stand on: files, text, progress, processes, the command line."""
