"""Example of a model family that an extension adds in two files; see docs/extend.md."""
