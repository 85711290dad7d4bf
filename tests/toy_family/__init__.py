"""A family of models as an extension adds one, in two files: see docs/extend.md."""
