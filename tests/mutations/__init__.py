"""Planted bugs, and whether the tests notice."""
