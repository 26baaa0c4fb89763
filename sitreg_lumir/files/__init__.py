"""Volumes and fields on disk, what they were made from, and their scores."""
