"""History: what happened in past rounds."""
