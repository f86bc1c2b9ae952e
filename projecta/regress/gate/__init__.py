"""Judges whether a change costs time or memory."""
