"""Guides for test-time adaptation."""
