"""The demo: its data made from the MNI152 template, the example scans, and the whole method on them."""
