"""What a device says about its images, and the public images that it selects."""
