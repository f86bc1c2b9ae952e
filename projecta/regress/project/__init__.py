"""The project that is measured: configuration, git, machine."""
