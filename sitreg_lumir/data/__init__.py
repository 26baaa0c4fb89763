"""From the files of a LUMIR dataset to batches and views."""
