"""Test-time adaptation: one method a file, one harness for all of them."""
