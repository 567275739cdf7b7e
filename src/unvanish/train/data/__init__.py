"""The user's own data: files in, sequences out; every error names file, row and column."""
