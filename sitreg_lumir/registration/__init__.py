"""The main job: two scans in, transforms both ways, warped images, numbers and a report out."""
