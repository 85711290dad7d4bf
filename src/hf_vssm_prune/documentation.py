"""Where the documentation is. An error that its own message cannot settle ends with a place there."""

# In the repository. Once the built pages have an address, it goes here.
DOCUMENTATION = "hf_vssm_prune/docs"


def see(section: str) -> str:
    """The end of an error message: the section of the troubleshooting page that tells more."""
    return f"See {DOCUMENTATION}/troubleshooting.md#{section}."
