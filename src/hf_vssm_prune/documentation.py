"""Links to the documentation. If an error needs more explanation than its message can give, the message ends with
one."""

# A path in the repository, to be replaced with the URL of the built pages once they have one.
DOCUMENTATION = "hf_vssm_prune/docs"


def see(section: str) -> str:
    """The end of an error message: a reference to a section of the troubleshooting page."""
    return f"See {DOCUMENTATION}/troubleshooting.md#{section}."
