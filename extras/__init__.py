"""Scripts that not every user needs. Each can be run from the repository's root and imported from it."""
