"""The user's own data: files in, sequences out; every refusal names file, row and column."""
