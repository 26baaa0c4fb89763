"""Files: NIfTI volumes and fields, ITK transforms, tables of points, checksums, and writing whole or not at all."""
