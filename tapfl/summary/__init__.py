"""A device's summary of its images, and the public images selected by it."""
