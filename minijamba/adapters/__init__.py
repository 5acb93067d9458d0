"""Implementations of Jamba as `conformance` sees them: one file each, which alone imports the package it is about."""
