"""A device's summary of its images, and the selection of public images by it."""
