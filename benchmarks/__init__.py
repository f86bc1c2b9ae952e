"""The asv suites, one module per room of the package; `common` holds what they share."""
