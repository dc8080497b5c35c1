"""Images as they are stored and decoded: arrays, files, JPEG."""
