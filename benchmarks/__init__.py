"""The asv suites, one module for each part of the package; `common` is shared."""
