"""The tests: a package, so that no folder that a command leaves behind can take the place of one of their modules."""
