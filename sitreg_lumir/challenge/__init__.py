"""LUMIR's jobs: fields for the pairs of a data set, what they were made from, their scores, and the submission."""
